"""One micro-batch on the meta device: the real modules, forward and backward, with every byte counted."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.plan.settings import Settings
from dwt_ds.plan.shapes import Shapes
from dwt_ds.plan.stand_ins import Loss, chunk_rows, imitate_device
from dwt_ds.plan.tracking import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MicroBatchBytes:
    """Bytes that one micro-batch adds to the weights."""

    activations: int
    """Kept by the student's forward pass, up to the head, for the backward pass."""
    head_gradients: int
    """Gradients of the loss that its forward pass makes and keeps."""
    loss_peak: int
    """Most alive while the loss is computed: the two above, logits in chunks, fp32 sums."""
    backward_peak: int
    """Most alive in the backward pass, gradients of the parameters left out once they are complete."""
    teacher_peak: int
    """Most alive in the teacher's forward pass."""


class Simulator:
    """Runs micro-batches of any size on shapes alone.

    Args:
        settings: recipe, JSON and data.
        shapes: the models; they are copied.
        on_cpu: whether attention, dropout and chunks are those of a CPU.
    """

    def __init__(self, settings: Settings, shapes: Shapes, *, on_cpu: bool) -> None:
        self._settings, self._on_cpu = settings, on_cpu
        self._dtype = DTYPES[settings.ds.precision]
        wanted = settings.config.teacher.dtype
        self._teacher_dtype = self._dtype if wanted == "auto" else DTYPES[wanted]
        self._student = copy.deepcopy(shapes.student).to(self._dtype).train()
        imitate_device(self._student.model, settings.config.student.attention, on_cpu=on_cpu)
        if settings.config.train.activation_checkpointing:
            self._student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._teacher = None
        if shapes.teacher is not None:
            self._teacher = copy.deepcopy(shapes.teacher).to(self._teacher_dtype).eval()
            if not on_cpu:  # a CPU's dropout does nothing in evaluation
                imitate_device(self._teacher.model, "auto", on_cpu=False)

    @property
    def teacher(self) -> GatheredMaskedLM | None:
        """The teacher in the dtype that it computes in."""
        return self._teacher

    def teacher_bytes(self) -> int:
        """The teacher's weights and tables, whole."""
        return 0 if self._teacher is None else _bytes_of(self._teacher)

    def micro_batch(self, rows: int) -> MicroBatchBytes:
        """Bytes of a micro-batch of `rows` full rows."""
        with torch.device("meta"):
            input_ids = torch.zeros(rows, self._settings.corpus.seq_len, dtype=torch.int64)
            positions = torch.zeros(rows * self._settings.labels_per_row, dtype=torch.int64)
        view, teacher_peak = self._teach(input_ids, positions)
        existing = [*self._student.parameters(), *self._student.buffers(), *(view or ())]
        student_bytes = LiveBytes(existing).now
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in self._student.parameters()]
        try:
            with torch.device("meta"), LiveBytes(existing) as live:
                hidden = self._student(input_ids, None, positions)
                activations = live.now - student_bytes
                loss = self._loss(hidden, view)
                del hidden
                kept, loss_peak = live.now - student_bytes, live.peak - student_bytes
                live.reset_peak()
                loss.backward()
                backward_peak = live.peak - student_bytes
        finally:
            for hook in hooks:
                hook.remove()
        return MicroBatchBytes(activations, kept - activations, loss_peak, backward_peak, teacher_peak)

    def logit_rows(self, rows: int) -> int | None:
        """Rows of logits in memory at once for a micro-batch of `rows`; None: logit-free."""
        return self._rows_at_once(rows * self._settings.labels_per_row)

    def _teach(self, input_ids: Tensor, positions: Tensor) -> tuple[tuple[Tensor, Tensor] | None, int]:
        if self._teacher is None:
            return None, 0
        existing = [*self._teacher.parameters(), *self._teacher.buffers()]
        with torch.no_grad(), torch.device("meta"), LiveBytes(existing) as live:
            before = live.now
            hidden = self._teacher(input_ids, None, positions)
        return (hidden, self._teacher.decoder_weight), live.peak - before

    def _loss(self, hidden: Tensor, view: tuple[Tensor, Tensor] | None) -> Tensor:
        size = self._settings.corpus.vocab_size
        weight, bias = self._student.decoder_weight[:size], self._student.decoder_bias
        teacher = None if view is None else (view[0], view[1][:size])
        rows_at_once = self._rows_at_once(hidden.shape[0])
        bias = None if bias is None else bias[:size]
        loss: Tensor = Loss.apply(hidden, weight, bias, teacher, rows_at_once, self._on_cpu)  # type: ignore[no-untyped-call]
        return loss

    def _rows_at_once(self, rows: int) -> int | None:
        element_bytes = self._dtype.itemsize + (0 if self._teacher is None else self._teacher_dtype.itemsize)
        row_bytes = self._settings.corpus.vocab_size * element_bytes
        return chunk_rows(rows, row_bytes, memory=self._settings.config.distill.memory, on_cpu=self._on_cpu)


def forward_flops(gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int, vocab_size: int) -> int:
    """Operations (a multiplication and an addition are two) of one row's forward pass, logits included.

    Counted are the matrix products that the model needs, attention's among them.
    """
    model = copy.deepcopy(gathered).eval()
    model.model.set_attn_implementation("eager")
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden = model(torch.zeros(1, seq_len, dtype=torch.int64), None, torch.zeros(labels_per_row, dtype=torch.int64))
    return counter.get_total_flops() + 2 * labels_per_row * vocab_size * int(hidden.shape[-1])


def recomputed_flops(gathered: GatheredMaskedLM, seq_len: int, labels_per_row: int) -> int:
    """Operations of one row's forward pass that activation checkpointing does again in the backward pass."""
    counts = []
    for checkpointing in (False, True):
        model = copy.deepcopy(gathered).train()
        model.model.set_attn_implementation("eager")
        if checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            positions = torch.zeros(labels_per_row, dtype=torch.int64)
            model(torch.zeros(1, seq_len, dtype=torch.int64), None, positions).sum().backward()
        counts.append(counter.get_total_flops())
    without, with_checkpointing = counts
    return int(with_checkpointing - without)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes_of(module: nn.Module) -> int:
    return LiveBytes([*module.parameters(), *module.buffers()]).now
