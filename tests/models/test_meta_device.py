"""Operations of the meta device that are worked out once: what counts them sees the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM

from dwt_ds.models.flops import forward_flops, meta_model
from dwt_ds.models.meta_device import RepeatedOperations
from dwt_ds.plan.simulation import LiveBytes

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
TINY |= {"vocab_size": 99, "pad_token_id": 0}


def step(family: str) -> tuple[int, int, int, int]:
    """Bytes that a step keeps and its most, its operations on a device, and the FLOPs of its forward pass."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **TINY)).train()
        tokens = torch.zeros(3, 20, dtype=torch.int64)
        with FlopCounterMode(display=False) as flops:
            model(input_ids=tokens)
        with LiveBytes(model.parameters()) as live:
            model(input_ids=tokens).logits.float().logsumexp(-1).mean().backward()
    return live.now, live.peak, live.launches, flops.get_total_flops()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_step_costs_the_same(family: str) -> None:
    plain = step(family)
    for _ in range(2):
        with RepeatedOperations():
            assert step(family) == plain


X = torch.empty(4, 6, device="meta")
CALLS: dict[str, Callable[[], Tensor]] = {
    "a number's type counts": lambda: X.to(torch.int64) * 2,
    "a number's type counts, again": lambda: X.to(torch.int64) * 2.0,
    "the strides count": lambda: torch.empty_like(X),
    "the strides count, again": lambda: torch.empty_like(X.t()),
    "a number on the CPU": lambda: X.bfloat16() * torch.tensor(2.0),
    "two results": lambda: torch.max(X, 1).indices,
    "a generator": lambda: X.bernoulli(0.5, generator=torch.Generator("cpu")),
}


def test_shapes_strides_and_dtypes_are_those_of_the_operation() -> None:
    def looks() -> dict[str, Any]:
        made = {name: call() for name, call in CALLS.items()}
        return {name: (each.shape, each.stride(), each.dtype, each.device) for name, each in made.items()}

    plain = looks()
    with RepeatedOperations():
        assert looks() == plain
        assert looks() == plain


@pytest.mark.parametrize("view", [lambda x: x.view(-1), lambda x: torch.ops.aten._unsafe_view(x, [24])])
def test_a_view_shares_its_storage_and_a_change_is_in_place(view: Callable[[Tensor], Tensor]) -> None:
    with RepeatedOperations():
        for _ in range(2):
            assert view(X).untyped_storage()._cdata == X.untyped_storage()._cdata
            assert X.add_(1) is X


def test_the_second_time_is_not_worked_out() -> None:
    worked_out = []

    class Counting(RepeatedOperations):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            worked_out.append(func)
            return func(*args, **(kwargs or {}))

    with Counting(), RepeatedOperations():
        for _ in range(3):
            torch.empty(3, 71, device="meta").sin()
    assert worked_out.count(torch.ops.aten.sin.default) == 1


def test_a_family_that_asks_whether_its_mask_is_whole_is_counted() -> None:
    """Its answer for full rows is yes."""
    config = AutoConfig.for_model("roformer", **TINY, embedding_size=32)
    assert forward_flops(meta_model(config), 20, 3, 99) > 0
