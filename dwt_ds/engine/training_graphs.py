"""The student's forward and backward pass as two CUDA graphs: two launches in place of some hundreds.

DeepSpeed's engine stays around them. It calls the module and back-propagates the loss as always, and the gradients are
reduced and the weights updated outside of the graphs. This needs gradients that are added to one buffer
(`gradients.py`), since a graph writes to the same addresses each time.

Source: torch's notes on CUDA semantics, "CUDA Graphs"; dropout draws from the generator that torch registers with a
graph, so that a replay draws the numbers that the pass itself would draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dwt_ds.data.batches import Batch
from dwt_ds.distill.objective import Losses, LossScalars, TeacherView
from dwt_ds.engine.cuda_graphs import EAGER_CALLS, MOST_SHAPES, CudaRecorder, Recording
from dwt_ds.engine.gradients import FlatGradients
from dwt_ds.engine.ranks import rank

# How far the gradient of the first replay may be from the pass's own, as a share of its norm. Rounding in 16 bits moves
# it by some 0.01; a graph that holds something else, or draws another dropout, by about 1.
_TOLERANCE = 0.1


class GraphedTraining:
    """Runs an objective's training passes; a shape that comes `EAGER_CALLS` times in a row is recorded, then replayed.

    If its first gradient is not finite, the shape is tried again after the same number of calls.

    Evaluation, and batches for a teacher with another vocabulary, whose number of aligned positions varies, run as they
    are.

    Args:
        objective: its `forward` is replaced.
        loss_scale: the current one of fp16, 1 in other precisions.
    """

    def __init__(
        self, objective: nn.Module, gradients: FlatGradients, recorder: CudaRecorder, loss_scale: Callable[[], float]
    ) -> None:
        self._objective, self._gradients, self._recorder = objective, gradients, recorder
        self._loss_scale = loss_scale
        self._forward: Callable[[Batch, TeacherView | None, LossScalars], Losses] = objective.forward
        self._passes: dict[Any, _Pass | None] = {}
        self._last: Any = None
        self._in_a_row = 0
        # What makes the replayed losses part of an autograd graph.
        self._anchor = torch.zeros((), device=gradients.views[0].device, requires_grad=True)
        objective.forward = self  # type: ignore[assignment]

    def __call__(self, batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> Losses:
        """As `DistillObjective.forward`; the losses are the caller's own.

        Raises:
            NotRecordedError: the pass cannot be recorded.
        """
        if not (self._objective.training and torch.is_grad_enabled()) or batch.teacher is not None:
            return self._forward(batch, teacher, scalars)
        tensors = _tensors(batch, teacher, scalars)
        key = tuple(None if each is None else each.shape for each in tensors)
        self._in_a_row = self._in_a_row + 1 if key == self._last else 1
        self._last = key
        if key not in self._passes and self._in_a_row > EAGER_CALLS and self._recorded < MOST_SHAPES:
            self._record(key, batch, teacher, scalars)
        recorded = self._passes.get(key)
        if recorded is None:
            return self._forward(batch, teacher, scalars)
        recorded.copy(tensors)
        return Losses(*_Replay.apply(self._anchor, recorded))

    def release(self) -> None:
        """Drop the recorded passes, which hold the teacher's head; emptying torch's cache then frees their memory."""
        self._passes.clear()

    @property
    def _recorded(self) -> int:
        """How many shapes are replayed."""
        return sum(each is not None for each in self._passes.values())

    def _record(self, key: Any, batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> None:
        """Keep the pass of this shape, or None if its first replay gives another gradient than the pass itself.

        Each rank decides for itself: ranks exchange nothing within a pass, and may have batches of different shapes.
        """
        state = get_accelerator().get_rng_state()
        made = _Pass(batch, teacher, scalars)
        made.upstream.fill_(self._loss_scale())
        # Run on the buffers themselves, so that torch compiles for their addresses now and not while it records.
        exact = self._gradient_of(self._forward(made.batch, made.teacher, made.scalars).loss, made.upstream)
        norm = float(_norm([own for own in exact if own is not None]))
        off = self._distance_of_a_replay(made, exact, state) / norm if 0 < norm < math.inf else math.nan
        get_accelerator().set_rng_state(state)
        if not math.isfinite(off):
            # As in fp16's first steps, whose loss scale is too large. It does not tell whether a replay is right.
            self._in_a_row = 0
            return
        fits = off <= _TOLERANCE
        self._passes[key] = made if fits else None
        shape = " x ".join(str(size) for size in batch.input_ids.shape)
        if rank() == 0:
            does = "is replayed as CUDA graphs" if fits else "is not replayed: it would be too far off"
            print(f"the student's pass of {shape} tokens {does} (gradient off by {off:.1e} of its norm)", flush=True)

    def _distance_of_a_replay(self, made: _Pass, exact: tuple[Tensor | None, ...], state: Tensor) -> float:
        """Record the pass and replay it, with the random numbers of `state`: how far its gradient is from `exact`."""
        made.forward = self._recorder.record(lambda: self._forward(made.batch, made.teacher, made.scalars))
        made.backward = self._recorder.record(lambda: self._add_gradient(made))
        get_accelerator().set_rng_state(state)
        # The buffers are zero here: each micro-batch's gradients are reduced, and each step sets them to zero.
        made.forward.replay()
        made.backward.replay()
        pairs = [(view, own) for view, own in zip(self._gradients.views, exact) if own is not None]
        torch._foreach_sub_([view for view, _ in pairs], [own for _, own in pairs])
        distance = float(_norm([view for view, _ in pairs]))
        torch._foreach_zero_(self._gradients.buffers)
        return distance

    def _gradient_of(self, loss: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of each parameter; None where it has no part in the loss."""
        parameters = self._gradients.parameters
        return torch.autograd.grad(loss, parameters, upstream, allow_unused=True)

    def _add_gradient(self, made: _Pass) -> Tensor:
        gradients = self._gradient_of(made.forward.output.loss, made.upstream)
        pairs = [(view, each) for view, each in zip(self._gradients.views, gradients) if each is not None]
        with torch.no_grad():
            torch._foreach_add_([view for view, _ in pairs], [each for _, each in pairs])
        return made.upstream


class _Pass:
    """One shape's buffers and recordings."""

    forward: Recording[Losses]
    backward: Recording[Tensor]

    def __init__(self, batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> None:
        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

        self.batch = batch._replace(
            input_ids=own(batch.input_ids),
            attention_mask=None if batch.attention_mask is None else own(batch.attention_mask),
            positions=own(batch.positions),
            labels=own(batch.labels),
        )
        self.teacher = None if teacher is None else teacher._replace(hidden=own(teacher.hidden))
        self.scalars = LossScalars(*(own(each) for each in scalars))
        self.upstream = torch.ones_like(self.scalars.soft_weight)
        """0-d, the gradient of the loss that the backward pass starts from."""
        self._buffers = _tensors(self.batch, self.teacher, self.scalars)

    def copy(self, tensors: list[Tensor | None]) -> None:
        """A micro-batch into the buffers."""
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for buffer, each in zip(self._buffers, tensors):
            if buffer is not None and each is not None:
                by_dtype.setdefault(buffer.dtype, []).append((buffer, each))
        for pairs in by_dtype.values():
            torch._foreach_copy_([buffer for buffer, _ in pairs], [each for _, each in pairs])


class _Replay(torch.autograd.Function):
    """The recorded passes as one step of autograd: the gradients go into the buffers, none is returned."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorded: _Pass) -> tuple[Tensor | None, ...]:
        ctx.recorded = recorded
        recorded.forward.replay()
        losses = [None if each is None else each.detach().clone() for each in recorded.forward.output]
        ctx.mark_non_differentiable(*(each for each in losses[1:] if each is not None))
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *others: Tensor | None) -> tuple[None, None]:
        ctx.recorded.upstream.copy_(upstream)
        ctx.recorded.backward.replay()
        return None, None


def _norm(tensors: list[Tensor]) -> Tensor:
    """0-d fp32, of all numbers together."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).norm()


def _tensors(batch: Batch, teacher: TeacherView | None, scalars: LossScalars) -> list[Tensor | None]:
    """What differs from one micro-batch to the next."""
    hidden = None if teacher is None else teacher.hidden
    return [batch.input_ids, batch.attention_mask, batch.positions, batch.labels, hidden, *scalars]
