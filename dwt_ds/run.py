"""A run in progress: batches, the step's numbers, and everything that happens around a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from dwt_kernels import DistillLoss
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dwt_ds.config import RunConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.distill.evaluate import HeldOut, held_out_loss
from dwt_ds.distill.objective import LossScale, MicroBatch, every_real_token
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint import RunState, save_checkpoint
from dwt_ds.engine.student import StudentEngine, gradient_divisor, gradient_norm, peak_memory_bytes, write_monitors
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.engine.weights import full_fp32_weights
from dwt_ds.export import model_card, write_export
from dwt_ds.meter import Meter
from dwt_ds.progress import Progress
from dwt_ds.run_folder import RunFolder


@dataclass(frozen=True)
class Parts:
    """What `assemble` puts together."""

    config: RunConfig
    total_steps: int
    student: StudentEngine
    """DeepSpeed's engine around the DistillObjective."""
    teacher: TeacherEngine | None
    batches: StepBatches
    """This rank's micro-batches by step."""
    validation: Callable[[], Iterator[Batch]]
    """Makes this rank's validation micro-batches anew."""
    tokenizer: PreTrainedTokenizerBase
    folder: RunFolder
    state: RunState
    """Where the run stands: zero, or from a checkpoint."""
    facts: dict[str, Any]
    """What a checkpoint's manifest and the export's card say of data, tokenizer and model."""
    progress: Progress


class Run:
    """The loop in pretrain.py drives it, one step after another."""

    def __init__(self, parts: Parts) -> None:
        self.config, self.total_steps, self.first_step = parts.config, parts.total_steps, parts.state.step
        self.student, self.teacher = parts.student, parts.teacher
        self._parts, self._folder, self._progress = parts, parts.folder, parts.progress
        self.device = ranks.device()
        self._divisor = gradient_divisor(parts.student)
        self._loader = iter(step_loader(parts.batches, parts.state.step, parts.total_steps, parts.config))
        self._meter = Meter(parts.state.tokens, parts.state.elapsed_seconds)
        self._held_out = HeldOut(float("nan"), float("nan"))

    def next_micro_batches(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, on the CPU."""
        asked = time.perf_counter()
        batches: list[Batch] = next(self._loader)
        self._meter.waited(time.perf_counter() - asked)
        self._rank_tokens = sum(batch.token_count for batch in batches)
        micro_batches = [as_micro_batch(batch) for batch in batches]
        if self.config.distill.soft_positions == "all":
            return [every_real_token(batch) for batch in micro_batches]
        return micro_batches

    def scale_for(self, step: int, micro_batches: list[MicroBatch]) -> LossScale:
        """Weight, temperature and the step's global counts, so that the loss is a mean over the whole global batch.

        Counts are summed over ranks, since ranks may have different numbers of labels and a mean of means would weigh
        them wrongly; they are divided by what DeepSpeed is going to divide the loss by once more.
        """
        labelled = sum(int((batch.labels >= 0).sum()) for batch in micro_batches)
        soft_rows = sum(batch.labels.numel() for batch in micro_batches)
        counts = ranks.sum_over_ranks(torch.tensor([labelled, soft_rows, self._rank_tokens]).to(self.device))
        self._meter.begin_step(counts[2])
        divisors = counts.clamp(min=1).float() / self._divisor
        soft_weight = value_at(self.config.distill.soft_weight, step, self.total_steps)
        temperature = value_at(self.config.distill.temperature, step, self.total_steps)
        values = torch.tensor([soft_weight, temperature]).to(self.device)
        self._settings = {
            "soft_weight": soft_weight,
            "temperature": temperature,
            "learning_rate": float(self.student.get_lr()[0]),
        }
        return LossScale(values[0], values[1], hard_rows=divisors[0], soft_rows=divisors[1])

    def count(self, loss: DistillLoss) -> None:
        """Add a micro-batch's loss to the step's."""
        self._meter.count(loss)

    def end_step(self, step: int) -> None:
        """Log, look at the held-out text, save: whatever is due after optimizer step `step` (counted from 0)."""
        done, train = step + 1, self.config.train
        self._progress.advance()
        last = done == self.total_steps
        if last or done == 1 or done % train.log_every == 0:
            self._log(done)
        began = time.perf_counter()
        if last or (train.eval_every and done % train.eval_every == 0):
            self._evaluate(done)
        if last or (train.checkpoint_every and done % train.checkpoint_every == 0):
            self._save(done)
        self._meter.paused(time.perf_counter() - began)

    def finish(self) -> None:
        """Export the student and mark the run as complete."""
        tokens = self._meter.tokens
        weights = full_fp32_weights(self.student.module.student.model, keep=ranks.rank() == 0)
        if ranks.rank() == 0:
            facts = {**self._parts.facts, "held-out MLM loss": round(self._held_out.hard_loss, 4)}
            card = model_card(self.config.to_dict(), facts, self.total_steps, tokens)
            model = self.student.module.student.model
            write_export(model, weights, self._parts.tokenizer, card, self._folder.export)
            self._folder.finish(self.total_steps)
        self._progress.close()
        self._progress.say(f"done: {self.total_steps} steps, {tokens:,} tokens; exported to {self._folder.export}")

    def _log(self, done: int) -> None:
        row = {"step": done, **self._meter.row(self._divisor), **self._settings}
        row["grad_norm"] = gradient_norm(self.student)
        seconds_a_step = self._meter.seconds_since_start / (done - self.first_step)
        if ranks.rank() == 0:
            self._folder.add_metrics(row)
            self._progress.line(
                row,
                peak_memory_bytes=peak_memory_bytes(self.device),
                seconds_left=seconds_a_step * (self.total_steps - done),
            )
            write_monitors(self.student, row)

    def _evaluate(self, done: int) -> None:
        self.student.eval()
        self._held_out = held_out_loss(
            self.student,
            self.teacher,
            (as_micro_batch(batch).to(self.device) for batch in self._parts.validation()),
            self._settings["temperature"],
            ranks.sum_over_ranks,
            self.device,
        )
        self.student.train()
        row = {"step": done, "eval_hard_loss": self._held_out.hard_loss, "eval_soft_loss": self._held_out.soft_loss}
        soft = f", soft {self._held_out.soft_loss:.4f}" if self.teacher else ""
        self._progress.say(f"step {done}/{self.total_steps}  held-out: hard {self._held_out.hard_loss:.4f}{soft}")
        if ranks.rank() == 0:
            self._folder.add_metrics(row)
            write_monitors(self.student, row)

    def _save(self, done: int) -> None:
        rows = self._parts.batches.rows_consumed(done)
        state = RunState(done, rows, self._meter.tokens, self._meter.elapsed_seconds)
        keep_last = self.config.train.keep_last
        try:
            seconds = save_checkpoint(self.student, self._folder.checkpoints, state, self._parts.facts, keep_last)
        except OSError as error:
            # The run goes on: its next checkpoint may find room again.
            self._progress.say(f"step {done}/{self.total_steps}  CHECKPOINT NOT SAVED: {error}")
        else:
            self._progress.say(f"step {done}/{self.total_steps}  checkpoint saved, training waited {seconds:.1f} s")


def as_micro_batch(batch: Batch) -> MicroBatch:
    """A data batch as the models take it, without a mask where there is no padding."""
    full = batch.token_count == batch.input_ids.numel()
    return MicroBatch(batch.input_ids, None if full else batch.attention_mask, batch.positions, batch.labels)


def step_loader(batches: StepBatches, first_step: int, total_steps: int, config: RunConfig) -> DataLoader[list[Batch]]:
    """Loads steps in order, in worker processes if the recipe asks for them.

    Its generator is private: a loader that drew from the global one would disturb dropout after a resume.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, total_steps),
        num_workers=config.data.workers,
        pin_memory=ranks.device().type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
