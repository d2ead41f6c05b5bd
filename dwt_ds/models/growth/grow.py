"""Growing a student from a smaller teacher: its layers are copies of the teacher's, widened if the student is wider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dwt_ds.models.growth.layout import COUNTS, Layout, in_layer, layer_of, layout_of
from dwt_ds.models.growth.plan import GrowthPlan, check_growth

NET2NET_NOISE = 0.01
"""Standard deviation of Net2Net's symmetry-breaking noise, as a share of the weight's own."""


@torch.no_grad()
def grow(
    teacher: PreTrainedModel, student: PreTrainedModel, method: str, *, seed: int, entries: Tensor | None = None
) -> None:
    """Fill the student, in place, with the teacher's weights. Tied weights stay tied.

    Embeddings and head are copied too. Rows of the vocabulary, position and type tables that the teacher does not have
    keep the student's initial values. Added channels, by width method:

    * fna: zeros around the teacher's weights; biases and LayerNorms keep the student's initial values (Fang et al.
      2020).
    * net2net: random copies with a little noise. One map for the residual stream, a new one for the heads and the
      feed-forward of each layer (Chen et al. 2016).
    * fpi: round-robin copies, which keep the function (bert2BERT's function-preserving initialisation, Chen et al.
      2022).
    * aki: as fpi, but the added outputs of a layer come from the layer above it; the last layer as fpi (bert2BERT's
      advanced knowledge initialisation).

    With a tied decoder the copies would count several times in every logit, so the last LayerNorm before the decoder is
    divided by the number of copies.

    Args:
        method: a `student.init`; see `dwt_ds.models.growth.plan`.
        seed: of the random maps and the noise.
        entries: (V,) int64, for each entry of the student's vocabulary the teacher's, -1 for none, where the
            vocabularies differ; entries without one keep the student's initial values.

    Raises ValueError as `check_growth` does.
    """
    plan = check_growth(teacher.config, student.config, method)
    maps = _Maps(plan, torch.Generator().manual_seed(seed), entries)
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    for name, target in student.named_parameters(remove_duplicate=False):
        layout = layout_of(name)
        assert layout is not None, name  # check_growth looked at every name
        if layout.kind == "decoder" and tied:
            continue  # filled under its other name, as a table
        layer = layer_of(name)
        source_layer = None if layer is None else plan.layer_sources[layer]
        source_name = name if source_layer is None else in_layer(name, source_layer)
        if source_name not in theirs:
            continue  # absent by design (`is_absent_by_design`): the student's own stays
        source = theirs[source_name].to(target.dtype)
        shapes = zip(layout.axes, source.shape, target.shape, strict=True)
        axes = tuple(maps.axis(axis, old, new, layer) for axis, old, new in shapes)
        above = None
        if plan.width == "aki" and source_layer is not None:
            above = theirs.get(in_layer(name, source_layer + 1))
        target.copy_(_grown(source, above, target, layout, axes, maps, tied))


class _Maps:
    """The map of every axis, drawn once; all layers share the residual stream's."""

    def __init__(self, plan: GrowthPlan, generator: torch.Generator, entries: Tensor | None) -> None:
        self.plan, self.generator, self.entries = plan, generator, entries
        teacher, student = plan.teacher, plan.student
        self.hidden = self._draw(teacher.hidden_size, student.hidden_size)
        one_stream = teacher.embedding_size == teacher.hidden_size and student.embedding_size == student.hidden_size
        self.embedding = self.hidden if one_stream else self._draw(teacher.embedding_size, student.embedding_size)
        self.heads = [self._draw(teacher.num_heads, student.num_heads) for _ in range(student.layers)]
        self.ffn = [self._draw(teacher.intermediate_size, student.intermediate_size) for _ in range(student.layers)]

    def axis(self, axis: str, old: int, new: int, layer: int | None) -> AxisMap:
        """The map of an axis from `old` to `new` channels in a student layer (None: outside the layers, or shared)."""
        blocks, _, name = axis.rpartition(" ")
        if name == "vocab" and self.entries is not None:
            return AxisMap.from_source(self.entries, old)
        if name in COUNTS:  # the student may have more or fewer: a padded vocabulary, other positions
            return leading(old, new, self.plan.position_shift if name == "positions" else 0)
        if name == "heads":
            mapping = self.heads[layer or 0].widened(self.plan.teacher.head_size)
        elif name == "ffn":
            mapping = self.ffn[layer or 0]
        else:
            mapping = self.hidden if name == "hidden" else self.embedding
        return mapping.stacked(int(blocks), old // int(blocks)) if blocks else mapping

    def _draw(self, old: int, new: int) -> AxisMap:
        if self.plan.width == "fna":
            return leading(old, new)
        if self.plan.width == "net2net":
            return random_copies(old, new, self.generator)
        return round_robin(old, new)


def _grown(
    source: Tensor,
    above: Tensor | None,
    target: Tensor,
    layout: Layout,
    axes: tuple[AxisMap, ...],
    maps: _Maps,
    tied: bool,
) -> Tensor:
    divided = None
    if layout.kind in ("linear", "decoder"):
        divided = 1
    elif layout.kind == "head norm" and tied:
        divided = 0
    wide = widen(source, axes, divided)
    if above is not None and layout.kind in ("linear", "bias"):
        from_above = widen(above.to(source.dtype), axes, divided)
        wide = torch.where(_along_rows(axes[0].added, wide), from_above, wide)
    if maps.plan.width == "net2net" and layout.kind == "linear":
        noise = torch.randn(wide.shape, generator=maps.generator, dtype=torch.float32)
        noise = noise.to(wide) * (NET2NET_NOISE * source.std())
        wide = torch.where(_along_rows(axes[0].added, wide), wide + noise, wide)
    own = _along_rows(axes[0].source < 0, wide) if layout.axes[0] in COUNTS or wide.ndim == 1 else None
    return wide if own is None else torch.where(own, target, wide)


def _along_rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class AxisMap:
    """Where each channel of an axis comes from, from n old channels to m new ones."""

    source: Tensor
    """(m,) int64, the old channel that each new one copies; -1 where it copies none."""
    copies: Tensor
    """(m,) int64, the number of new channels that copy the same old one."""
    added: Tensor
    """(m,) bool, true past the first n channels."""

    @classmethod
    def from_source(cls, source: Tensor, old: int) -> AxisMap:
        """From the (m,) source channels and the number n of old channels."""
        known = source.clamp(min=0)
        counts = torch.bincount(source[source >= 0], minlength=old)
        return cls(source, counts[known].clamp(min=1), torch.arange(len(source)) >= old)

    def widened(self, size: int) -> AxisMap:
        """Each channel becomes `size` consecutive channels: heads become their channels."""
        inner = torch.arange(size)
        source = torch.where(self.source[:, None] < 0, -1, self.source[:, None] * size + inner).flatten()
        return AxisMap(source, self.copies.repeat_interleave(size), self.added.repeat_interleave(size))

    def stacked(self, blocks: int, old: int) -> AxisMap:
        """The axis `blocks` times in one matrix, as in fused query-key-value and gated feed-forward weights."""
        offsets = torch.arange(blocks)[:, None] * old
        source = torch.where(self.source < 0, -1, self.source + offsets).flatten()
        return AxisMap(source, self.copies.repeat(blocks), self.added.repeat(blocks))


def leading(old: int, new: int, shift: int = 0) -> AxisMap:
    """Channel j copies channel j + `shift`, or none where there is no such (FNA, Fang et al. 2020, section 3.1)."""
    places = torch.arange(new) + shift
    return AxisMap.from_source(torch.where((places >= 0) & (places < old), places, -1), old)


def round_robin(old: int, new: int) -> AxisMap:
    """Channel j copies j mod n: equally many copies of each where n divides m (bert2BERT, Chen et al. 2022)."""
    return AxisMap.from_source(torch.arange(new) % old, old)


def random_copies(old: int, new: int, generator: torch.Generator) -> AxisMap:
    """The old channels in their places, then uniform draws from them (Net2WiderNet, Chen et al. 2016, equation 2)."""
    drawn = torch.randint(0, old, (new - old,), generator=generator)
    return AxisMap.from_source(torch.cat([torch.arange(old), drawn]), old)


def widen(source: Tensor, axes: tuple[AxisMap, ...], divided: int | None) -> Tensor:
    """The source weight, of one or two axes, read through the maps of its axes; channels without source are zero.

    Values along the axis `divided` are divided by the number of copies, so that sums over it stay the same.
    """
    wide = source
    for axis, mapping in enumerate(axes):
        wide = wide.index_select(axis, mapping.source.clamp(min=0))
        shape = [-1 if each == axis else 1 for each in range(source.ndim)]
        if divided == axis:
            wide = wide / mapping.copies.to(wide.dtype).view(shape)
        wide = wide.masked_fill((mapping.source < 0).view(shape), 0)
    return wide
