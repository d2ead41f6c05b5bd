"""A run in progress: the numbers of each step, and what is done around a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.distill.objective import Losses, LossScalars
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState
from dwt_ds.engine.checkpoint.save_and_load import Retention, save_checkpoint
from dwt_ds.engine.student import (
    StudentEngine,
    before_waiting_for_norm,
    gradient_divisor,
    release_recorded_passes,
    step_was_skipped,
)
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.quantization import switch_fake_quantizers
from dwt_ds.run.evaluation import Evaluation
from dwt_ds.run.exports import Exporter, NotExportedError
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.guard import Guard, TooManySkipsError
from dwt_ds.run.log import RunLog
from dwt_ds.run.meter import Meter, losses_with_teacher
from dwt_ds.run.micro_batches import MicroBatches
from dwt_ds.run.progress import evaluation_words
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.soft_weight import SoftWeight
from dwt_ds.run.step_numbers import StepNumbers
from dwt_ds.run.stop import StopRequest
from dwt_ds.run.stop_agreement import StopAgreement
from dwt_ds.run.stuck import StuckWatch

# During an evaluation, each check for a request to stop costs a collective.
_BATCHES_BETWEEN_STOP_CHECKS = 8
_STEPS_BETWEEN_COLLECTIONS = 100


class Session:
    """The loop in pretrain.py drives it, one step after another.

    `assemble` makes its parts. `state` is where the run stands: at its beginning, or as a checkpoint has it. `teacher`
    is None if the student trains alone from here on.
    """

    def __init__(
        self,
        *,
        resolved: Resolved,
        student: StudentEngine,
        teacher: TeacherEngine | None,
        batches: StepBatches,
        evaluation: Evaluation,
        exporter: Exporter,
        folder: RunFolder,
        facts: RunFacts,
        state: RunState,
        log: RunLog,
        stop: StopRequest,
        stuck: StuckWatch,
    ) -> None:
        self.config, self.total_steps, self.first_step = resolved.config, resolved.total_steps, state.step
        self.student, self.teacher, self.device = student, teacher, ranks.device()
        self.log, self._evaluation, self._exporter = log, evaluation, exporter
        self._folder, self._facts, self._state, self._stuck = folder, facts, state, stuck
        self._divisor, self._quantization = gradient_divisor(student), resolved.quantization
        self._shared_vocabulary = teacher is not None and self.config.teacher.vocabulary == "shared"
        further = [] if teacher is None else losses_with_teacher(self.config)
        self._meter = Meter(state.tokens, state.elapsed_seconds, self._divisor, further)
        self.micro_batches = MicroBatches(batches, teacher, state.step, self.total_steps, self.config.data, self._meter)
        before_waiting_for_norm(student, self.micro_batches.prefetch)
        self._guard = Guard(self.config.train, state.guard, self._divisor)
        self._soft_weight = SoftWeight(resolved, state, student.lr_scheduler)
        self._done = self._saved = state.step
        stuck.beat(state.step)
        self._stop = StopAgreement(stop, folder.path)
        self._stop.agree()

    def steps(self) -> Iterator[int]:
        """Optimizer steps to take, counted from 0, until the last one or until the ranks agree to stop."""
        self._make_what_is_missing()
        # Python would collect garbage at a different step on each rank, and each time all others would wait.
        gc.disable()
        try:
            for step in range(self.first_step, self.total_steps):
                if self._stop.agreed:
                    return
                if step % _STEPS_BETWEEN_COLLECTIONS == 0:
                    gc.collect(1)
                yield step
        finally:
            gc.enable()

    def begin_step(self, step: int, micro_batches: Sequence[Batch]) -> StepNumbers:
        """The numbers of an optimizer step that all ranks share; `micro_batches` are this rank's.

        The loss is a mean over the global batch. So its counts are summed over the ranks, which may have different
        numbers of labels, and divided by the number by which DeepSpeed divides the loss again.
        """
        self._switch_quantization(step)
        labelled = sum(len(batch.labels) for batch in micro_batches)
        positions = sum(batch.soft_rows for batch in micro_batches)
        tokens = sum(batch.token_count for batch in micro_batches)
        hidden = sum(batch.hidden_rows for batch in micro_batches)
        soft_weight = self._soft_weight.scheduled(step)
        temperature = value_at(self.config.distill.temperature, step, self.total_steps)
        # One copy, for which the host does not wait. fp64 holds every count exactly.
        sums = [labelled, positions, hidden, tokens, self._stop.is_asked()]
        on_gpu = self.device.type == "cuda"
        local = torch.tensor([*sums, soft_weight, temperature], dtype=torch.float64, pin_memory=on_gpu)
        shared = local.to(self.device, non_blocking=True)
        counts = ranks.reduce_sum(shared[: len(sums)])
        self._meter.begin_step(counts[3])
        hard_rows, soft_rows, hidden_rows = counts[:3].clamp(min=1).float() / self._divisor
        weight, tau = shared[len(sums) :].float()
        adaptive = self._soft_weight.adaptive()
        return StepNumbers(
            step,
            LossScalars(weight if adaptive is None else adaptive, tau, hard_rows, soft_rows, hidden_rows),
            soft_weight=soft_weight if adaptive is None else adaptive,
            temperature=temperature,
            learning_rate=float(self.student.get_lr()[0]),
            ranks_to_stop=counts[4],
            aligned_share=counts[1] / counts[0].clamp(min=1) if self._shared_vocabulary else None,
        )

    def record(self, loss: Losses) -> Tensor:
        """Add a micro-batch's losses to the step's. Returns the 0-d loss to back-propagate, NaN if the step is bad."""
        self._meter.add(loss)
        return self._guard.poison(loss.loss, loss.hard, last=self.student.is_gradient_accumulation_boundary())

    def end_step(self, numbers: StepNumbers) -> None:
        """Log, save, evaluate, export: whatever is due after this optimizer step."""
        done, train = numbers.step + 1, self.config.train
        self._done = done
        self._stuck.beat(done)
        self.log.progress.advance()
        self._note_skip(done)
        self._stop.agree_late(numbers.ranks_to_stop)
        if self.teacher is not None and not step_was_skipped(self.student):
            self._soft_weight.observe(self._meter, numbers)
        last = done == self.total_steps
        release = self._soft_weight.release_is_due(done)
        if last or done == 1 or done % train.log_every == 0 or release:
            self.log.step(numbers, self._meter, teacher_active=self.teacher is not None)
        if release:
            self._release_teacher(done)
        self._end_if_too_many_skips(done)
        began = time.perf_counter()
        # First, since what follows could fail; `finish` saves a run that is stopped.
        if last or (not self._stop.agreed and train.checkpoint_every and done % train.checkpoint_every == 0):
            self._save(done)
        if self._evaluation.is_due(done):
            self._evaluate(done)
        if self._export_is_due(done) and not self._stop.agreed:  # else the next start exports it
            self._export_on_the_way(done)
        self._meter.add_pause(time.perf_counter() - began)
        self._stuck.beat(done)

    def finish(self) -> None:
        """Export the student and mark the run as complete; a run that was asked to stop is saved instead."""
        if self._stop.agreed and self._done < self.total_steps:
            self._save_and_stop()
            self._stuck.end()
            return
        tokens, problem = self._meter.tokens, ""
        try:
            self._exporter.export(self._folder.export, self._state_at(self.total_steps))
            if ranks.rank() == 0:
                self._folder.finish(self.total_steps)
        except (NotExportedError, OSError) as error:
            problem = str(error)
        problem = ranks.broadcast_from_rank_0(problem)
        if problem:
            raise NotExportedError(problem)
        self._stuck.end()
        self.log.progress.close()
        self.log.progress.say(f"done: {self.total_steps} steps, {tokens:,} tokens; exported to {self._folder.export}")

    def _switch_quantization(self, step: int) -> None:
        """Fake quantization is on from its first step, also after a resume beyond it."""
        if self._quantization is not None:
            switch_fake_quantizers(self.student, step >= self._quantization.start_step)

    def _release_teacher(self, done: int) -> None:
        """Free the teacher and what is kept for it; the student trains on alone."""
        assert self.teacher is not None
        self.log.teacher_released(done, self.teacher.parameters, self._meter)
        release_recorded_passes(self.student)  # first: the teacher's release empties the allocator's cache
        self._evaluation.release_teacher()
        self.micro_batches.release_teacher(done)
        self.teacher, self._soft_weight.released = None, done

    def _state_at(self, done: int) -> RunState:
        """Where the run stands after `done` optimizer steps."""
        return replace(
            self._state,
            step=done,
            rows=self.micro_batches.batches.rows_consumed(done),
            tokens=self._meter.tokens,
            elapsed_seconds=self._meter.elapsed_seconds,
            adaptive=self._soft_weight.state_dict(),
            guard=self._guard.state_dict(),
            teacher_released=self._soft_weight.released,
        )

    def _export_is_due(self, done: int) -> bool:
        every = self.config.train.export_every
        return 0 < done < self.total_steps and every > 0 and done % every == 0

    def _export_on_the_way(self, done: int) -> None:
        try:
            self._exporter.export(self._folder.export_of(done), self._state_at(done))
        except NotExportedError as error:
            self.log.say(done, f"NOT EXPORTED: {error}")

    def _make_what_is_missing(self) -> None:
        """The evaluation and the export of the step that a resume begins at, if the last start did not come to them."""
        done, folder, began = self.first_step, self._folder, time.perf_counter()
        evaluates = self._evaluation.is_due(done) and not ranks.broadcast_from_rank_0(folder.has_held_out_loss(done))
        exports = self._export_is_due(done) and not ranks.broadcast_from_rank_0(folder.export_of(done).is_dir())
        if evaluates:
            self._switch_quantization(done - 1)
            self._evaluate(done)
        if exports:
            self._export_on_the_way(done)
        if evaluates or exports:
            self._meter.add_pause(time.perf_counter() - began)

    def _evaluate(self, done: int) -> None:
        losses = self._evaluation.student_losses(self.student, self.teacher, self._until_stopped, done)
        if self._stop.agreed and done < self.total_steps:
            return  # only a part of the rows was seen
        if not losses:
            data = self.config.data.dir
            self.log.say(done, f"held-out: {data} holds out no token to predict; prepare it with --validation above 0")
            return
        self.log.say(done, evaluation_words(losses))
        self.log.add({"step": done, **losses})

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Validation micro-batches, of which every rank has the same number, until the ranks agree to stop."""
        for number, batch in enumerate(batches):
            self._stuck.beat(self._done)
            if number % _BATCHES_BETWEEN_STOP_CHECKS == 0 and self._done < self.total_steps:
                self._stop.agree()
                if self._stop.agreed:
                    return
            yield batch

    def _save_and_stop(self) -> None:
        reasons = self._stop.reasons()
        if self._saved < self._done or self._done == 0:
            self._save(self._done)
        if ranks.rank() == 0:
            self._folder.clear_stop_request()
        self.log.progress.close()
        self.log.progress.say(
            f"stopped at step {self._done}/{self.total_steps} ({reasons}); the same command resumes at step "
            f"{self._saved}"
        )

    def _note_skip(self, done: int) -> None:
        """Write down which rows the step had if the optimizer skipped it."""
        if step_was_skipped(self.student) and ranks.rank() == 0:
            batches = self.micro_batches.batches
            first = batches.rows_consumed(done - 1)
            rows = {"first_row": first, "rows": batches.rows_consumed(done) - first}
            self._folder.add_skip({"step": done, **rows, "epoch": int(batches.epoch(done - 1))})
            self.log.say(done, "SKIPPED: loss or gradient not finite, or a loss spike")

    def _end_if_too_many_skips(self, done: int) -> None:
        """Once the step's row is written: a resume goes on after this step."""
        try:
            self._guard.end_step(step_was_skipped(self.student))
        except TooManySkipsError:
            self._save(done)
            raise

    def _save(self, done: int) -> None:
        state, retention = self._state_at(done), Retention(self.config.train.keep_last, self.config.train.keep_every)
        self._folder.require_lock()
        gc.collect()  # all of it, where training waits anyway: `steps` leaves out what has lived long
        try:
            seconds = save_checkpoint(self.student, self._folder.checkpoints, state, self._facts, retention)
        except OSError as error:
            # Training continues: there may be room again for the next checkpoint.
            self.log.say(done, f"CHECKPOINT NOT SAVED: {error}")
        else:
            self._saved = done
            self.log.say(done, f"checkpoint saved, training waited {seconds:.1f} s")
