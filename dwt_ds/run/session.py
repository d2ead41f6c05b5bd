"""A run in progress: the micro-batches and numbers of each step, and what is done around a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dwt_ds.data.batches import Batch, StepBatches, step_loader
from dwt_ds.distill.adaptive import AdaptiveWeight
from dwt_ds.distill.objective import Losses, LossScale
from dwt_ds.distill.release import TeacherRelease
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState
from dwt_ds.engine.checkpoint.save import Retention, save_checkpoint
from dwt_ds.engine.student import (
    StudentEngine,
    gradient_divisor,
    gradient_norm,
    loss_scale,
    peak_memory_bytes,
    step_was_skipped,
    write_monitors,
)
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.export.writer import NotFiniteError
from dwt_ds.models.quantization import enable
from dwt_ds.run.evaluation import Evaluation
from dwt_ds.run.exports import Exporter
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.guard import Guard, TooManySkipsError
from dwt_ds.run.meter import Fourth, Meter
from dwt_ds.run.mfu import Utilization
from dwt_ds.run.progress import Progress, evaluation_words
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.stop import LateNumber, StopRequest
from dwt_ds.run.stuck import StuckWatch

# During an evaluation, each check for a request to stop costs a collective.
_BATCHES_BETWEEN_STOP_CHECKS = 8
_STEPS_BETWEEN_COLLECTIONS = 100


@dataclass(frozen=True)
class StepNumbers:
    """What all ranks share in one optimizer step."""

    step: int
    """Counted from 0."""
    scale: LossScale
    """Weight, temperature and global counts as the loss takes them."""
    soft_weight: float | Tensor
    """The same weight for the metrics: a number, or 0-d on the device if it is adaptive."""
    temperature: float
    learning_rate: float
    ranks_to_stop: Tensor
    """0-d on the device: how many ranks were asked to stop. Reading it waits for the device."""
    aligned_share: Tensor | None = None
    """0-d on the device: share of the labelled tokens that the soft loss sees, where the teacher's vocabulary is
    another; None for the same."""


class NotExportedError(RuntimeError):
    """The last export could not be written: a full disk, a limit on file sizes, weights that are not finite."""


class Session:
    """The loop in pretrain.py drives it, one step after another.

    Args:
        resolved: the run's settings.
        student: DeepSpeed's engine around the DistillObjective.
        teacher: None for a student that trains alone, be it from here on.
        adaptive: the soft weight, if it follows the losses.
        batches: this rank's micro-batches by step.
        evaluation: on the held-out text.
        exporter: of the student.
        folder: of the run.
        facts: of the run, for its checkpoints.
        state: where the run stands: at its beginning, or as a checkpoint has it.
        progress: prints for rank 0.
        stop: whether this rank was asked to stop.
        stuck: watches over the ranks' progress.
        utilization: of the devices, by the rate of tokens; rank 0's, None on the others.
    """

    def __init__(
        self,
        *,
        resolved: Resolved,
        student: StudentEngine,
        teacher: TeacherEngine | None,
        adaptive: AdaptiveWeight | None,
        batches: StepBatches,
        evaluation: Evaluation,
        exporter: Exporter,
        folder: RunFolder,
        facts: RunFacts,
        state: RunState,
        progress: Progress,
        stop: StopRequest,
        stuck: StuckWatch,
        utilization: Utilization | None,
    ) -> None:
        self.config, self.total_steps, self.first_step = resolved.config, resolved.total_steps, state.step
        self.student, self.teacher, self.device = student, teacher, ranks.device()
        self._quantization, self._adaptive = resolved.quantization, adaptive
        self._release = TeacherRelease(resolved.config, resolved.total_steps)
        self._teacher_loss, self._teacher_mass = state.teacher_loss, state.teacher_mass
        self._teacher_released = state.teacher_released
        self._shared_vocabulary = teacher is not None and resolved.config.teacher.vocabulary == "shared"
        self._pace_step, self._pace_seconds = state.step, 0.0
        self._batches, self._evaluation, self._exporter = batches, evaluation, exporter
        self._folder, self._facts, self._starts = folder, facts, state.starts
        self._progress, self._stop, self._stuck, self._utilization = progress, stop, stuck, utilization
        self._stop_folder = folder.path if ranks.rank() == 0 else None
        self._divisor = gradient_divisor(student)
        on_gpu = self.device.type == "cuda"
        workers = int(on_gpu) if self.config.data.workers == "auto" else self.config.data.workers
        self._loader = iter(step_loader(batches, range(state.step, self.total_steps), workers, pin_memory=on_gpu))
        self._has_further_rows = teacher is not None and resolved.config.distill.soft_positions != "labelled"
        fourth: Fourth | None = "labelled_soft" if self._has_further_rows else None
        if self._shared_vocabulary:
            fourth = "shared_hard"
        self._meter = Meter(state.tokens, state.elapsed_seconds, fourth=fourth)
        self._guard = Guard(self.config.train, ranks.reduce_sum, self.device, state.guard)
        self._ranks_to_stop = LateNumber()
        self._done = self._saved = state.step
        stuck.beat(state.step)
        self.stopped = self._agree_to_stop()

    def steps(self) -> Iterator[int]:
        """Optimizer steps to take, counted from 0, until the last one or until the ranks agree to stop."""
        self._evaluate_if_missing()
        # Python would collect garbage at a different step on each rank, and each time all others would wait.
        gc.disable()
        try:
            for step in range(self.first_step, self.total_steps):
                if self.stopped:
                    return
                if step % _STEPS_BETWEEN_COLLECTIONS == 0:
                    gc.collect(1)
                yield step
        finally:
            gc.enable()

    def begin_step(self, step: int) -> tuple[list[Batch], StepNumbers]:
        """This rank's micro-batches of an optimizer step, on the CPU, and the numbers that all ranks share.

        The loss is to be a mean over the whole global batch. So its counts are summed over the ranks, which may have
        different numbers of labels, and divided by what DeepSpeed divides the loss by once more.
        """
        self._switch_quantization(step)
        asked = time.perf_counter()
        micro_batches: list[Batch] = next(self._loader)
        self._meter.add_wait(time.perf_counter() - asked)
        if self.teacher is None:
            micro_batches = [batch.without_teacher() for batch in micro_batches]
        labelled = sum(len(batch.labels) for batch in micro_batches)
        positions = sum(batch.soft_rows for batch in micro_batches)
        tokens = sum(batch.token_count for batch in micro_batches)
        asked_to_stop = self._stop.is_asked(self._stop_folder)
        distill = self.config.distill
        released, adaptive = self._teacher_released is not None, self._adaptive
        soft_weight = 0.0 if released else self._scheduled_weight(step)
        temperature = value_at(distill.temperature, step, self.total_steps)
        # One copy, for which the host does not wait. fp64 holds every count exactly.
        local = [labelled, positions, tokens, asked_to_stop, soft_weight, temperature]
        on_gpu = self.device.type == "cuda"
        shared = torch.tensor(local, dtype=torch.float64, pin_memory=on_gpu).to(self.device, non_blocking=True)
        counts = ranks.reduce_sum(shared[:4])
        self._meter.begin_step(counts[2])
        divisors = counts[:2].clamp(min=1).float() / self._divisor
        values = shared[4:].float()
        if adaptive is not None and not released:
            values[0] = adaptive.value()
        return micro_batches, StepNumbers(
            step,
            LossScale(values[0], values[1], hard_rows=divisors[0], soft_rows=divisors[1]),
            soft_weight=soft_weight if adaptive is None or released else values[0],
            temperature=temperature,
            learning_rate=float(self.student.get_lr()[0]),
            ranks_to_stop=counts[3],
            aligned_share=counts[1] / counts[0].clamp(min=1) if self._shared_vocabulary else None,
        )

    def record(self, loss: Losses) -> Tensor:
        """Add a micro-batch's losses to the step's. Returns the 0-d loss to back-propagate, NaN if the step is bad."""
        self._meter.add(loss)
        return self._guard.poison(loss.loss, last=self.student.is_gradient_accumulation_boundary())

    def end_step(self, numbers: StepNumbers) -> None:
        """Log, save, evaluate, export: whatever is due after this optimizer step."""
        done, train = numbers.step + 1, self.config.train
        self._done = done
        self._stuck.beat(done)
        self._progress.advance()
        self._note_skip(done)
        self.stopped = self._ranks_to_stop.exchange(numbers.ranks_to_stop) > 0
        if self._adaptive is not None and self.teacher is not None:
            _, hard, soft, *fourth = self._meter.losses(self._divisor)
            if numbers.aligned_share is not None:
                # What compares with the teacher's own; no number in a step without aligned tokens, which is left out.
                hard = torch.where(numbers.aligned_share > 0, fourth[0], torch.nan)
            elif self._has_further_rows:
                soft = torch.where(soft.isfinite(), fourth[0], torch.nan)  # on the tokens that `hard` is on
            squared = self.config.distill.temperature_squared
            self._adaptive.observe(hard, soft, 1.0 if squared else numbers.temperature)
        last = done == self.total_steps
        release = self.teacher is not None and self._release.is_due(done, self._idle_steps)
        if last or done == 1 or done % train.log_every == 0 or release:
            self._log(done, numbers)
        if release:
            self._release_teacher(done)
        began = time.perf_counter()
        # First, since what follows could fail; `finish` saves a run that is stopped.
        if last or (not self.stopped and train.checkpoint_every and done % train.checkpoint_every == 0):
            self._save(done)
        if self._evaluation.is_due(done):
            self._evaluate(done)
        if not last and train.export_every and done % train.export_every == 0:
            try:
                folder = self._folder.export / f"step_{done:08d}"
                self._export(folder, done)
            except (OSError, SafetensorError, NotFiniteError) as error:
                self._say(done, f"NOT EXPORTED: {error}")
        self._meter.add_pause(time.perf_counter() - began)
        self._stuck.beat(done)

    def finish(self) -> None:
        """Export the student and mark the run as complete; a run that was asked to stop is saved instead."""
        if self.stopped and self._done < self.total_steps:
            self._save_and_stop()
            self._stuck.end()
            return
        tokens, problem = self._meter.tokens, ""
        try:
            self._export(self._folder.export, self.total_steps)
            if ranks.rank() == 0:
                self._folder.finish(self.total_steps)
        except (OSError, SafetensorError, NotFiniteError) as error:
            problem = str(error)
        problem = ranks.broadcast_from_rank_0(problem)
        if problem:
            raise NotExportedError(problem)
        self._stuck.end()
        self._progress.close()
        self._progress.say(f"done: {self.total_steps} steps, {tokens:,} tokens; exported to {self._folder.export}")

    def _scheduled_weight(self, step: int) -> float:
        """The soft weight of the step to come, by its schedule alone."""
        schedule = self.config.distill.soft_weight
        share = self.student.lr_scheduler.share_of_highest() if schedule.schedule == "learning_rate" else None
        return value_at(schedule, step, self.total_steps, share)

    def _switch_quantization(self, step: int) -> None:
        """Fake quantization is on from its first step, also after a resume beyond it."""
        if self._quantization is not None:
            enable(self.student, step >= self._quantization.start_step)

    def _idle_steps(self) -> float:
        """Steps for which the adaptive weight has been low, one number for all ranks; waits for the device."""
        assert self._adaptive is not None  # the rule asks for no other schedule
        return float(ranks.reduce_sum(self._adaptive.idle_steps.clone())) / ranks.world_size()

    def _release_teacher(self, done: int) -> None:
        """Free the teacher; the student trains on alone, and an ETA is by its own pace."""
        assert self.teacher is not None
        self._say(done, f"teacher released: no soft loss from here on, {self.teacher.parameters:,} parameters freed")
        self.teacher.release()
        self.teacher, self._teacher_released = None, done
        self._pace_step, self._pace_seconds = done, self._meter.seconds_since_start
        if self._utilization is not None:
            self._utilization = self._utilization.without_teacher()

    def _export(self, folder: Path, done: int) -> None:
        tokens = self._meter.tokens
        self._exporter.export(folder, steps=done, tokens=tokens, teacher_released=self._teacher_released)

    def _say(self, done: int, text: str) -> None:
        self._progress.say(f"step {done}/{self.total_steps}  {text}")

    def _log(self, done: int, numbers: StepNumbers) -> None:
        row = {
            "step": done,
            **self._meter.row(self._divisor, with_teacher=self.teacher is not None),
            "soft_weight": float(numbers.soft_weight),
            "temperature": numbers.temperature,
            "learning_rate": numbers.learning_rate,
            "grad_norm": gradient_norm(self.student),
            "skipped_steps": int(self.student.skipped_steps),
        }
        if self.config.teacher.path is not None:
            row["teacher_active"] = self.teacher is not None
        if numbers.aligned_share is not None and self.teacher is not None:
            row["aligned_share"] = float(numbers.aligned_share)
        if self._utilization is not None:
            row |= self._utilization.shares(row["tokens_per_second"])
        scale = loss_scale(self.student)
        if scale is not None:
            row["loss_scale"] = scale
        seconds_a_step = (self._meter.seconds_since_start - self._pace_seconds) / (done - self._pace_step)
        seconds_left = seconds_a_step * (self.total_steps - done)
        self._progress.line(row, peak_memory_bytes=peak_memory_bytes(self.device), seconds_left=seconds_left)
        self._add_metrics(row)

    def _add_metrics(self, row: Mapping[str, Any]) -> None:
        if ranks.rank() == 0:
            self._folder.add_metrics(row)
            write_monitors(self.student, row)

    def _evaluate_if_missing(self) -> None:
        """The evaluation of the step that a resume begins at, if the last start did not complete it."""
        done = self.first_step
        if self._evaluation.is_due(done) and not ranks.broadcast_from_rank_0(self._folder.has_held_out_loss(done)):
            self._switch_quantization(done - 1)
            self._evaluate(done)

    def _evaluate(self, done: int) -> None:
        losses = self._evaluation.student_losses(self.student, self.teacher, self._until_stopped, done)
        if self.stopped and done < self.total_steps:
            return  # only a part of the rows was seen
        if not losses:
            data = self.config.data.dir
            self._say(done, f"held-out: {data} holds out no token to predict; prepare it with --validation above 0")
            return
        if "eval_shared_hard_loss" in losses and self._teacher_loss is not None and self._teacher_mass is not None:
            losses |= {"teacher_shared_hard_loss": self._teacher_loss, "teacher_shared_mass": self._teacher_mass}
        self._say(done, evaluation_words(losses))
        self._add_metrics({"step": done, **losses})

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Validation micro-batches, of which every rank has the same number, until the ranks agree to stop."""
        for number, batch in enumerate(batches):
            self._stuck.beat(self._done)
            if number % _BATCHES_BETWEEN_STOP_CHECKS == 0 and self._done < self.total_steps:
                self.stopped = self.stopped or self._agree_to_stop()
                if self.stopped:
                    return
            yield batch

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop."""
        asked = torch.tensor([int(self._stop.is_asked(self._stop_folder))]).to(self.device)
        return bool(ranks.reduce_sum(asked))

    def _save_and_stop(self) -> None:
        reasons = sorted({reason for reason in ranks.gather_from_ranks(self._stop.reason) if reason})
        if self._saved < self._done or self._done == 0:
            self._save(self._done)
        if ranks.rank() == 0:
            self._folder.clear_stop_request()
        self._progress.close()
        self._progress.say(
            f"stopped at step {self._done}/{self.total_steps} ({', '.join(reasons)}); the same command resumes at step "
            f"{self._saved}"
        )

    def _note_skip(self, done: int) -> None:
        """Count the step if the optimizer skipped it, and write down which rows it had."""
        skipped = step_was_skipped(self.student)
        if skipped and ranks.rank() == 0:
            first = self._batches.rows_consumed(done - 1)
            rows = {"first_row": first, "rows": self._batches.rows_consumed(done) - first}
            self._folder.add_skip({"step": done, **rows, "epoch": int(self._batches.epoch(done - 1))})
            self._say(done, "SKIPPED: loss or gradient not finite, or a loss spike")
        try:
            self._guard.end_step(skipped)
        except TooManySkipsError:
            self._save(done)
            raise

    def _save(self, done: int) -> None:
        state = RunState(
            step=done,
            rows=self._batches.rows_consumed(done),
            tokens=self._meter.tokens,
            elapsed_seconds=self._meter.elapsed_seconds,
            adaptive={} if self._adaptive is None else self._adaptive.state_dict(),
            guard=self._guard.state_dict(),
            teacher_loss=self._teacher_loss,
            teacher_mass=self._teacher_mass,
            teacher_released=self._teacher_released,
            starts=self._starts,
        )
        retention = Retention(self.config.train.keep_last, self.config.train.keep_every)
        try:
            seconds = save_checkpoint(self.student, self._folder.checkpoints, state, self._facts, retention)
        except OSError as error:
            # Training continues: there may be room again for the next checkpoint.
            self._say(done, f"CHECKPOINT NOT SAVED: {error}")
        else:
            self._saved = done
            self._say(done, f"checkpoint saved, training waited {seconds:.1f} s")
