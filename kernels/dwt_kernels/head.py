"""One model's linear head and what goes into it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """logits (N, V) = hidden (N, H) @ weight (V, H).T + bias (V,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def of_rows(self, index: Tensor) -> Head:
        return self._replace(hidden=self.hidden[index])

    def of_columns(self, columns: int) -> Head:
        """Without the padding from ``columns`` on."""
        bias = None if self.bias is None else self.bias[:columns]
        return self._replace(weight=self.weight[:columns], bias=bias)
