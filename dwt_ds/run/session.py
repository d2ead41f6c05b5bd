"""A run in progress: batches, the step's numbers, and everything that happens around a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dwt_kernels import DistillLoss
from safetensors import SafetensorError
from torch import Tensor

from dwt_ds.data.batches import Batch
from dwt_ds.distill.evaluate import HeldOut, held_out_loss
from dwt_ds.distill.objective import LossScale
from dwt_ds.distill.schedules import value_at
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.save import Retention, RunState, save_checkpoint
from dwt_ds.engine.checkpoint.weights import full_fp32_weights
from dwt_ds.engine.student import (
    gradient_divisor,
    gradient_norm,
    loss_scale,
    peak_memory_bytes,
    step_was_skipped,
    write_monitors,
)
from dwt_ds.export.model_card import model_card
from dwt_ds.export.writer import write_export
from dwt_ds.models.quantization import enable
from dwt_ds.run.guard import Guard, TooManySkipsError
from dwt_ds.run.loading import step_loader
from dwt_ds.run.meter import Meter
from dwt_ds.run.parts import Parts

# Looks at a request to stop during validation cost a collective each.
_BATCHES_BETWEEN_LOOKS = 8


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
        self._guard = Guard(parts.config.train, ranks.reduce_sum, self.device, parts.state.guard)
        self._stuck = parts.stuck
        self._stuck.beat(parts.state.step)
        self._held_out = HeldOut(float("nan"), float("nan"))
        self._done = self._saved = parts.state.step
        self.stopped = self._agree_to_stop()

    def steps(self) -> Iterator[int]:
        """Optimizer steps to take, counted from 0, until the last one or until the ranks agree to stop."""
        self._catch_up()
        for step in range(self.first_step, self.total_steps):
            if self.stopped:
                return
            yield step

    def _catch_up(self) -> None:
        """The look at the held-out text that the last start was stopped in, or did not come back from."""
        if self._evaluation_due(self.first_step) and not ranks.broadcast_from_rank_0(
            self._folder.has_held_out_loss(self.first_step)
        ):
            self.begin_step(self.first_step - 1)
            self._evaluate(self.first_step)

    def _evaluation_due(self, done: int) -> bool:
        every = self.config.train.eval_every
        return done > 0 and (done == self.total_steps or (every > 0 and done % every == 0))

    def begin_step(self, step: int) -> None:
        """Switch fake quantization on at its first step, and after a resume beyond it."""
        quantization = self._parts.quantization
        if quantization is not None:
            enable(self.student, step >= quantization.start_step)

    def next_micro_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step, on the CPU."""
        asked = time.perf_counter()
        batches: list[Batch] = next(self._loader)
        self._meter.waited(time.perf_counter() - asked)
        self._rank_tokens = sum(batch.token_count for batch in batches)
        return batches

    def scale_for(self, step: int, micro_batches: list[Batch]) -> LossScale:
        """Weight, temperature and the step's global counts, so that the loss is a mean over the whole global batch.

        Counts are summed over ranks, since ranks may have different numbers of labels and a mean of means would weigh
        them wrongly; they are divided by what DeepSpeed is going to divide the loss by once more.
        """
        labelled = sum(int((batch.labels >= 0).sum()) for batch in micro_batches)
        soft_rows = sum(batch.labels.numel() for batch in micro_batches)
        asked = int(self._asked_to_stop())
        counts = ranks.reduce_sum(torch.tensor([labelled, soft_rows, self._rank_tokens, asked]).to(self.device))
        self._ranks_asked_to_stop = counts[3]
        self._meter.begin_step(counts[2])
        divisors = counts[:2].clamp(min=1).float() / self._divisor
        soft_weight = value_at(self.config.distill.soft_weight, step, self.total_steps)
        temperature = value_at(self.config.distill.temperature, step, self.total_steps)
        values = torch.tensor([soft_weight, temperature]).to(self.device)
        if self._parts.adaptive is not None:
            values[0] = self._parts.adaptive.value()
        self._settings: dict[str, Any] = {
            "soft_weight": soft_weight if self._parts.adaptive is None else values[0],
            "temperature": temperature,
            "learning_rate": float(self.student.get_lr()[0]),
        }
        return LossScale(values[0], values[1], hard_rows=divisors[0], soft_rows=divisors[1])

    def count(self, loss: DistillLoss) -> Tensor:
        """Add a micro-batch's loss to the step's; what is to go backward, 0-d."""
        self._meter.count(loss)
        return self._guard.poison(loss.loss, last=self.student.is_gradient_accumulation_boundary())

    def end_step(self, step: int) -> None:
        """Log, save, look at the held-out text: whatever is due after optimizer step `step` (counted from 0)."""
        done, train = step + 1, self.config.train
        self._done = done
        self._stuck.beat(done)
        self._progress.advance()
        self._note_skip(done)
        self.stopped = bool(self._ranks_asked_to_stop)
        if self._parts.adaptive is not None:
            _, hard, soft = self._meter.losses(self._divisor)
            squared = self.config.distill.temperature_squared
            self._parts.adaptive.observe(hard, soft, 1.0 if squared else self._settings["temperature"])
        last = done == self.total_steps
        if last or done == 1 or done % train.log_every == 0:
            self._log(done)
        began = time.perf_counter()
        # Before anything that could fail; `finish` saves a run that is stopped.
        if last or (not self.stopped and train.checkpoint_every and done % train.checkpoint_every == 0):
            self._save(done)
        if self._evaluation_due(done):
            self._evaluate(done)
        if not last and train.export_every and done % train.export_every == 0:
            try:
                self._export(done, self._folder.export / f"step_{done:08d}")
            except (OSError, SafetensorError) as error:
                self._progress.say(f"step {done}/{self.total_steps}  NOT EXPORTED: {error}")
        self._meter.paused(time.perf_counter() - began)
        self._stuck.beat(done)

    def finish(self) -> None:
        """Export the student and mark the run as complete; a run that was asked to stop is saved instead."""
        if self.stopped and self._done < self.total_steps:
            self._stop_early()
            self._stuck.end()
            return
        self._export(self.total_steps, self._folder.export)
        if ranks.rank() == 0:
            self._folder.finish(self.total_steps)
        self._stuck.end()
        self._progress.close()
        tokens = self._meter.tokens
        self._progress.say(f"done: {self.total_steps} steps, {tokens:,} tokens; exported to {self._folder.export}")

    def _export(self, done: int, folder: Path) -> None:
        model = self.student.module.student.model
        weights = full_fp32_weights(model, keep=ranks.rank() == 0)
        if ranks.rank() == 0:
            card = model_card(
                self._parts.facts,
                steps=done,
                tokens=self._meter.tokens,
                starts=self._parts.state.starts,
                held_out_loss=self._held_out.hard_loss,
            )
            with torch.random.fork_rng(devices=[]):  # it draws weights for a model that it then fills
                write_export(model, weights, self._parts.tokenizer, card, folder, self._parts.quantization)

    def _log(self, done: int) -> None:
        settings = {name: float(value) for name, value in self._settings.items()}
        row = {"step": done, **self._meter.row(self._divisor), **settings}
        row["grad_norm"] = gradient_norm(self.student)
        row["skipped_steps"] = int(self.student.skipped_steps)
        scale = loss_scale(self.student)
        if scale is not None:
            row["loss_scale"] = scale
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
            (batch.to(self.device) for batch in self._until_stopped(self._parts.validation())),
            value_at(self.config.distill.temperature, done - 1, self.total_steps),
            ranks.reduce_sum,
            self.device,
        )
        self.student.train()
        if self.stopped and done < self.total_steps:
            return  # of what it has seen only a part
        row = {"step": done, "eval_hard_loss": self._held_out.hard_loss, "eval_soft_loss": self._held_out.soft_loss}
        soft = f", soft {self._held_out.soft_loss:.4f}" if self.teacher else ""
        self._progress.say(f"step {done}/{self.total_steps}  held-out: hard {self._held_out.hard_loss:.4f}{soft}")
        if ranks.rank() == 0:
            self._folder.add_metrics(row)
            write_monitors(self.student, row)

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Validation micro-batches, of which every rank has the same number, until the ranks agree to stop."""
        for number, batch in enumerate(batches):
            self._stuck.beat(self._done)
            if number % _BATCHES_BETWEEN_LOOKS == 0 and self._done < self.total_steps:
                self.stopped = self.stopped or self._agree_to_stop()
                if self.stopped:
                    return
            yield batch

    def _asked_to_stop(self) -> bool:
        """Whether this rank has a reason to stop."""
        if ranks.rank() == 0:
            self._parts.stop.look_for_file(self._folder.path)
        return bool(self._parts.stop.reason)

    def _agree_to_stop(self) -> bool:
        asked = torch.tensor([int(self._asked_to_stop())]).to(self.device)
        return bool(ranks.reduce_sum(asked))

    def _stop_early(self) -> None:
        reasons = sorted({reason for reason in ranks.gather_from_ranks(self._parts.stop.reason) if reason})
        if self._saved < self._done or self._done == 0:
            self._save(self._done)
        if ranks.rank() == 0:
            self._folder.forget_stop()
        self._progress.close()
        self._progress.say(
            f"stopped at step {self._done}/{self.total_steps} ({', '.join(reasons)}); the same command goes on from "
            f"step {self._saved}"
        )

    def _note_skip(self, done: int) -> None:
        """Count the step if the optimizer skipped it, and write down which rows it had."""
        skipped = step_was_skipped(self.student)
        if skipped and ranks.rank() == 0:
            first = self._parts.batches.rows_consumed(done - 1)
            rows = {"first_row": first, "rows": self._parts.batches.rows_consumed(done) - first}
            self._folder.add_skip({"step": done, **rows, "epoch": int(self._parts.batches.epoch(done - 1))})
            self._progress.say(f"step {done}/{self.total_steps}  SKIPPED: loss or gradient not finite, or a loss spike")
        try:
            self._guard.end_step(skipped)
        except TooManySkipsError:
            self._save(done)
            raise

    def _save(self, done: int) -> None:
        rows = self._parts.batches.rows_consumed(done)
        adaptive = self._parts.adaptive.state_dict() if self._parts.adaptive is not None else {}
        state = RunState(
            done,
            rows,
            self._meter.tokens,
            self._meter.elapsed_seconds,
            adaptive,
            self._guard.state_dict(),
            self._parts.state.starts,
        )
        retention = Retention(self.config.train.keep_last, self.config.train.keep_every)
        try:
            seconds = save_checkpoint(self.student, self._folder.checkpoints, state, self._parts.facts, retention)
        except OSError as error:
            # The run goes on: its next checkpoint may find room again.
            self._progress.say(f"step {done}/{self.total_steps}  CHECKPOINT NOT SAVED: {error}")
        else:
            self._saved = done
            self._progress.say(f"step {done}/{self.total_steps}  checkpoint saved, training waited {seconds:.1f} s")
