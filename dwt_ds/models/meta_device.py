"""Operations of the meta device, which computes shapes only, each worked out once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Operation and the shapes of its arguments -> shape, strides and dtype of each tensor that it returns.
_known: dict[Hashable, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}


class RepeatedOperations(TorchDispatchMode):
    """Within the context, an operation on shapes that were seen before is not worked out again, and any value that is
    read is True.

    Torch computes most shapes of the meta device in Python, which takes as long as computing a small model, and the
    layers of a model repeat one another. Enter it before modes that count operations: they still see every one.
    """

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # some families ask in their forward pass whether a mask is all ones
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        try:
            key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
            known = _known.get(key)
        except (_NotOnMetaError, TypeError):  # a value that cannot be compared
            return func(*args, **kwargs)
        if known is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
            return made[0] if len(func._schema.returns) == 1 else tuple(made)
        result = func(*args, **kwargs)
        if _is_all_new(func, result, (args, kwargs)):
            _known[key] = [(each.size(), each.stride(), each.dtype) for each in tree_iter(result)]
        return result


class _NotOnMetaError(Exception):
    pass


def _shapes(values: Any) -> Hashable:
    """The arguments with tensors' shapes for the tensors; 1, 1.0 and True differ."""
    if isinstance(values, (list, tuple)):
        return tuple(_shapes(each) for each in values)
    if isinstance(values, Tensor):
        if not values.is_meta:
            raise _NotOnMetaError
        return values.size(), values.stride(), values.dtype
    return type(values), values


def _is_all_new(func: OpOverload, result: Any, arguments: Any) -> bool:
    """Whether all returned tensors have memory of their own. Those of `_unsafe_view` have not, but its schema does not
    say so."""
    made = list(tree_iter(result))
    if len(made) != len(func._schema.returns) or not all(isinstance(each, Tensor) and each.is_meta for each in made):
        return False
    again = [torch.empty_strided(each.size(), each.stride(), dtype=each.dtype, device="meta") for each in made]
    whole = all(each.untyped_storage().nbytes() == new.untyped_storage().nbytes() for each, new in zip(made, again))
    storages = {each.untyped_storage()._cdata for each in made}
    given = {each.untyped_storage()._cdata for each in tree_iter(arguments) if isinstance(each, Tensor)}
    return whole and len(storages) == len(made) and storages.isdisjoint(given)
