"""One micro-batch on the meta device: the real modules, forward and backward; every byte and operation is counted."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dwt_ds.data.teacher_rows import CommonWords
from dwt_ds.distill.hidden import hidden_loss_of
from dwt_ds.models.build import DTYPES
from dwt_ds.models.flops import teacher_width
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.meta_device import RepeatedOperations
from dwt_ds.plan.shapes import Shapes
from dwt_ds.plan.sharded_teacher import head_elements
from dwt_ds.plan.stand_ins import Loss, chunk_rows, imitate_device
from dwt_ds.run.resolve import Resolved

# Operations that return no view and yet start nothing on a device.
_ON_THE_HOST = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "is_pinned", "set_"}
_ON_THE_HOST |= {"_record_function_enter_new", "_record_function_exit"}


def launches_kernel(operation: OpOverload) -> bool:
    """Whether an operation starts work on a device: it makes no view, and does more than allocate."""
    return not operation.is_view and operation._schema.name.split("::")[1] not in _ON_THE_HOST


class LiveBytes(TorchDispatchMode):
    """Counts, within the context, the bytes of storages (`now`, and the most so far, `peak`) and the operations that
    start work on a device (`launches`).

    The storage of every tensor that an operation returns counts until it is freed, on the meta device as in a real run.
    On a GPU the caching allocator's peak is `peak`, except that it rounds sizes up.

    Args:
        existing: tensors allocated before, which count from the start.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.launches = 0
        self._alive: set[int] = set()
        for tensor in existing:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def reset_peak(self) -> None:
        """Set the peak to what is allocated now."""
        self.peak = self.now

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.launches += launches_kernel(func)
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self.add(each)
        return result


@dataclass(frozen=True)
class MicroBatchCost:
    """Bytes that one micro-batch adds to the weights, and its operations."""

    activations: int
    """Kept by the student's forward pass, up to the head, for the backward pass."""
    head_gradients: int
    """Gradients of the loss that its forward pass makes and keeps."""
    loss_peak: int
    """Most allocated while the loss is computed: the two above, logits in chunks, fp32 sums."""
    backward_peak: int
    """Most allocated in the backward pass, without the parameters' complete gradients."""
    teacher_peak: int
    """Most allocated in the teacher's forward pass."""
    launches: int
    """Operations of the student, forward and backward, without the loss."""
    teacher_launches: int
    """Operations of the teacher's forward pass."""


class _Inputs(NamedTuple):
    """A micro-batch: token ids, and the labelled positions among all tokens."""

    ids: Tensor
    positions: Tensor
    their_ids: Tensor
    """The same rows in the teacher's vocabulary."""
    their_positions: Tensor
    words: CommonWords | None = None
    """Of two vocabularies."""


class _Taught(NamedTuple):
    """What a teacher's forward pass gives and costs."""

    view: tuple[Tensor, Tensor] | None = None
    """Hidden states at the labelled positions, and the head."""
    everywhere: Tensor | None = None
    """Hidden states at all tokens, for the hidden loss."""
    peak: int = 0
    """Most bytes allocated."""
    launches: int = 0


class Simulator:
    """Runs micro-batches of any size on the meta device.

    Args:
        shapes: the models; they are copied.
        on_cpu: whether attention, dropout and chunks are those of a CPU.
    """

    def __init__(self, settings: Resolved, shapes: Shapes, *, on_cpu: bool) -> None:
        self._settings, self._on_cpu, self._overlap = settings, on_cpu, shapes.overlap
        self._dtype = DTYPES[settings.ds.precision]
        wanted = settings.config.teacher.dtype
        self._teacher_dtype = self._dtype if wanted == "auto" else DTYPES[wanted]
        self._student = copy.deepcopy(shapes.student).to(self._dtype).train()
        imitate_device(self._student.model, settings.config.student.attention, on_cpu=on_cpu)
        if settings.config.train.activation_checkpointing:
            self._student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.teacher: GatheredMaskedLM | None = None
        """In the dtype that it computes in."""
        if shapes.teacher is not None:
            self.teacher = copy.deepcopy(shapes.teacher).to(self._teacher_dtype).eval()
            if not on_cpu:  # a CPU's dropout does nothing in evaluation
                imitate_device(self.teacher.model, "auto", on_cpu=False)
        self._hidden_loss = None
        if self.teacher is not None and settings.config.distill.hidden_weight:
            teacher_size = self.teacher.model.config.hidden_size
            with torch.device("meta"):
                self._hidden_loss = hidden_loss_of(self._student.model, teacher_size, settings.config)
            self._hidden_loss.to(self._dtype)

    def teacher_bytes(self) -> int:
        """Bytes of the whole teacher: weights and buffers, and its head's rows of shared entries."""
        if self.teacher is None:
            return 0
        rows = 0 if self._overlap is None else head_elements(self.teacher, self._overlap.entries)
        whole = LiveBytes([*self.teacher.parameters(), *self.teacher.buffers()]).now
        return whole + rows * self._teacher_dtype.itemsize

    def micro_batch(self, rows: int) -> MicroBatchCost:
        """Bytes and operations of a micro-batch of `rows` full rows."""
        inputs = self._inputs(rows)
        taught = self._teach(inputs.their_ids, inputs.their_positions)
        existing = [*self._student.parameters(), *self._student.buffers(), *(taught.view or ())]
        if self._hidden_loss is not None and taught.everywhere is not None:
            existing += [*self._hidden_loss.parameters(), taught.everywhere]
        student_bytes = LiveBytes(existing).now
        trained = [p for p in self._student.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
        try:
            with torch.device("meta"), RepeatedOperations(), LiveBytes(existing) as live:
                if self._hidden_loss is not None:
                    self._hidden_loss.listen()
                hidden = self._student(inputs.ids, None, inputs.positions)
                activations = live.now - student_bytes
                loss = self._loss(hidden, taught.view)
                if self._hidden_loss is not None and taught.everywhere is not None:
                    loss = loss + self._hidden_loss(taught.everywhere, None, inputs.words)
                del hidden
                kept, loss_peak = live.now - student_bytes, live.peak - student_bytes
                live.reset_peak()
                loss.backward()
                backward_peak = live.peak - student_bytes
        finally:
            for hook in hooks:
                hook.remove()
        return MicroBatchCost(
            activations, kept - activations, loss_peak, backward_peak, taught.peak, live.launches, taught.launches
        )

    def _inputs(self, rows: int) -> _Inputs:
        with torch.device("meta"):
            ids = torch.zeros(rows, self._settings.corpus.seq_len, dtype=torch.int64)
            positions = torch.zeros(rows * self._settings.positions_per_row, dtype=torch.int64)
            if self._overlap is None or self.teacher is None:
                return _Inputs(ids, positions, ids, positions)
            width = teacher_width(self.teacher, self._overlap, ids.shape[1])
            their_ids = torch.zeros(rows, width, dtype=torch.int64)
            their_positions = positions[: round(self._overlap.aligned_share * len(positions))]
            words = CommonWords(ids, their_ids, ids.numel())  # at most
        return _Inputs(ids, positions, their_ids, their_positions, words)

    def logit_rows(self, rows: int) -> int | None:
        """Rows of logits in memory at once for a micro-batch of `rows`; None: logit-free."""
        with_teacher = self.teacher is not None and self._overlap is None
        a_call = max(self._settings.labels_per_row, self._settings.further_per_row)
        return self._rows_at_once(rows * a_call, self._settings.corpus.vocab_size, with_teacher=with_teacher)

    def _teach(self, input_ids: Tensor, positions: Tensor) -> _Taught:
        if self.teacher is None:
            return _Taught()
        existing = [*self.teacher.parameters(), *self.teacher.buffers()]
        with torch.no_grad(), torch.device("meta"), RepeatedOperations(), LiveBytes(existing) as live:
            before = live.now
            if self._hidden_loss is None:
                hidden, everywhere = self.teacher(input_ids, None, positions), None
            else:
                hidden, everywhere = self.teacher(input_ids, None, positions, everywhere=True)
        weight = self.teacher.decoder_weight
        shared = weight if self._overlap is None else weight[: self._overlap.entries]
        return _Taught((hidden, shared), everywhere, live.peak - before, live.launches)

    def _loss(self, hidden: Tensor, view: tuple[Tensor, Tensor] | None) -> Tensor:
        size = self._settings.corpus.vocab_size
        weight, bias = self._student.decoder_weight[:size], self._student.decoder_bias
        bias = None if bias is None else bias[:size]
        if view is not None and self._overlap is not None:
            whole = self._one_loss(hidden, weight, bias, None)
            with torch.device("meta"):
                ids = torch.zeros(self._overlap.entries, dtype=torch.int64)
                aligned = torch.zeros(len(view[0]), dtype=torch.int64)
            some = None if bias is None else bias.index_select(0, ids)
            return whole + self._one_loss(hidden.index_select(0, aligned), weight.index_select(0, ids), some, view)
        if view is None or not self._settings.further_per_row:
            return self._one_loss(hidden, weight, bias, None if view is None else (view[0], view[1][:size]))
        labelled = len(hidden) * self._settings.labels_per_row // self._settings.positions_per_row
        sizes = [labelled, len(hidden) - labelled]
        ours, further = hidden.split(sizes)
        theirs, of_further = view[0].split(sizes)
        loss = self._one_loss(ours, weight, bias, (theirs, view[1][:size]))
        return loss + self._one_loss(further, weight, bias, (of_further, view[1][:size]))

    def _one_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        rows_at_once = self._rows_at_once(hidden.shape[0], weight.shape[0], with_teacher=teacher is not None)
        return Loss.apply(hidden, weight, bias, teacher, rows_at_once)  # type: ignore[no-untyped-call]

    def _rows_at_once(self, rows: int, columns: int, *, with_teacher: bool) -> int | None:
        row_bytes = columns * (self._dtype.itemsize + (self._teacher_dtype.itemsize if with_teacher else 0))
        return chunk_rows(rows, row_bytes, memory=self._settings.config.distill.memory, on_cpu=self._on_cpu)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
