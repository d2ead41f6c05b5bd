"""Growing a student from a smaller teacher: its layers are copies of the teacher's, widened where it is wider."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dwt_ds.models.growth.layout import COUNTS, Layout, in_layer, layer_of, layout_of
from dwt_ds.models.growth.maps import AxisMap, leading, random_copies, round_robin, widen
from dwt_ds.models.growth.plan import GrowthPlan, check_growth

NET2NET_NOISE = 0.01
"""Standard deviation of Net2Net's symmetry-breaking noise, as a share of the weight's own."""


@torch.no_grad()
def grow(teacher: PreTrainedModel, student: PreTrainedModel, method: str, *, seed: int) -> None:
    """Fills the student, in place, with the teacher's weights. What is tied stays tied.

    Embeddings and head are copied too. Rows of the vocabulary, position and type tables that the teacher does not have
    keep the student's own initial values. By method of width (the depth map alone where there is none):

    * fna: the teacher's weights in the leading corner, zeros around them; biases and LayerNorms keep the student's own
      values past the teacher's channels (Fang et al. 2020).
    * net2net: random copies, one map for all that touches the residual stream and fresh ones for each layer's heads and
      feed-forward; a little noise on the copies (Chen et al. 2016).
    * fpi: round-robin copies; the function is kept (bert2BERT's function-preserving initialisation, Chen et al. 2022).
    * aki: as fpi, but the added outputs of a layer come from the layer above it (bert2BERT's advanced knowledge
      initialisation); the last layer as fpi.

    With a tied decoder the copies would count several times in every logit, so the last LayerNorm before the decoder is
    divided by the number of copies.

    Args:
        teacher: the smaller model; it is not changed.
        student: the larger model, of the same family, with its random initial weights.
        method: a `student.init`; see `dwt_ds.models.growth.plan`.
        seed: of the random maps and the noise.

    Raises:
        ValueError: what `check_growth` raises.
    """
    plan = check_growth(teacher.config, student.config, method)
    maps = _Maps(plan, torch.Generator().manual_seed(seed))
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
            continue  # ModernBERT's absent norm: the student's own stays
        source = theirs[source_name].to(target.dtype)
        shapes = zip(layout.axes, source.shape, target.shape, strict=True)
        axes = tuple(maps.axis(axis, old, new, layer) for axis, old, new in shapes)
        above = None
        if plan.width == "aki" and source_layer is not None:
            above = theirs.get(in_layer(name, source_layer + 1))
        target.copy_(_grown(source, above, target, layout, axes, maps, tied))


class _Maps:
    """The map of every axis, drawn once: the residual stream's is shared by all layers."""

    def __init__(self, plan: GrowthPlan, generator: torch.Generator) -> None:
        self.plan, self.generator = plan, generator
        teacher, student = plan.teacher, plan.student
        self.hidden = self._draw(teacher.hidden_size, student.hidden_size)
        one_stream = teacher.embedding_size == teacher.hidden_size and student.embedding_size == student.hidden_size
        self.embedding = self.hidden if one_stream else self._draw(teacher.embedding_size, student.embedding_size)
        self.heads = [self._draw(teacher.num_heads, student.num_heads) for _ in range(student.layers)]
        self.ffn = [self._draw(teacher.intermediate_size, student.intermediate_size) for _ in range(student.layers)]

    def axis(self, axis: str, old: int, new: int, layer: int | None) -> AxisMap:
        """The map of an axis from `old` to `new` channels in a student layer (None: outside, or shared by all)."""
        blocks, _, name = axis.rpartition(" ")
        if name in COUNTS:  # may differ either way: a padded vocabulary, more or fewer positions
            return leading(old, new)
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
