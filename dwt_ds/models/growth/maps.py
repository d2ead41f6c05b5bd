"""Where each channel of a wider layer comes from, and how a weight is widened along its axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AxisMap:
    """One axis of a weight, from n old channels to m new ones.

    source: (m,) int64, the old channel that each new one copies, -1 where it copies none.
    copies: (m,) int64, how many new channels copy that same old one.
    added: (m,) bool, the channels past the first n.
    """

    source: Tensor
    copies: Tensor
    added: Tensor

    @classmethod
    def from_source(cls, source: Tensor, old: int) -> AxisMap:
        """From the (m,) source channels and the number n of old ones."""
        known = source.clamp(min=0)
        counts = torch.bincount(source[source >= 0], minlength=old)
        return cls(source, counts[known].clamp(min=1), torch.arange(len(source)) >= old)

    def widened(self, size: int) -> AxisMap:
        """Each channel becomes a run of `size` channels: heads become their channels."""
        inner = torch.arange(size)
        source = torch.where(self.source[:, None] < 0, -1, self.source[:, None] * size + inner).flatten()
        return AxisMap(source, self.copies.repeat_interleave(size), self.added.repeat_interleave(size))

    def stacked(self, blocks: int, old: int) -> AxisMap:
        """The axis `blocks` times in one matrix, as in fused query-key-value and gated feed-forward weights."""
        offsets = torch.arange(blocks)[:, None] * old
        source = torch.where(self.source < 0, -1, self.source + offsets).flatten()
        return AxisMap(source, self.copies.repeat(blocks), self.added.repeat(blocks))


def leading(old: int, new: int) -> AxisMap:
    """The first min(old, new) channels in their places, the rest from nowhere (FNA, Fang et al. 2020, section 3.1)."""
    places = torch.arange(new)
    return AxisMap.from_source(torch.where(places < old, places, -1), old)


def round_robin(old: int, new: int) -> AxisMap:
    """Channel j copies j mod n: equally many copies of each where n divides m (bert2BERT, Chen et al. 2022)."""
    return AxisMap.from_source(torch.arange(new) % old, old)


def random_copies(old: int, new: int, generator: torch.Generator) -> AxisMap:
    """The old channels in their places, then uniform draws from them (Net2WiderNet, Chen et al. 2016, equation 2)."""
    drawn = torch.randint(0, old, (new - old,), generator=generator)
    return AxisMap.from_source(torch.cat([torch.arange(old), drawn]), old)


def widen(source: Tensor, axes: tuple[AxisMap, ...], divided: int | None) -> Tensor:
    """The source weight read through the maps of its axes; channels from nowhere hold zeros.

    Args:
        source: the old weight, one or two axes.
        axes: one map an axis.
        divided: the axis whose values are divided by the number of copies, so that sums over it stay what they were;
            None for none.
    """
    wide = source
    for axis, mapping in enumerate(axes):
        wide = wide.index_select(axis, mapping.source.clamp(min=0))
        shape = [-1 if each == axis else 1 for each in range(source.ndim)]
        if divided == axis:
            wide = wide / mapping.copies.to(wide.dtype).view(shape)
        wide = wide.masked_fill((mapping.source < 0).view(shape), 0)
    return wide
