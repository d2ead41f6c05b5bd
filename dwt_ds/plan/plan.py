"""A run's plan: every figure of the report, computed from settings, models and machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from dwt_ds.distill.release import TeacherRelease
from dwt_ds.models.flops import Work, recomputed_flops
from dwt_ds.models.growth.plan import GrowthPlan, check_growth
from dwt_ds.models.masked_lm.families import known_layers
from dwt_ds.plan.communication import Traffic, own_sums, step_traffic
from dwt_ds.plan.hardware import Device
from dwt_ds.plan.memory import STAGES, RankMemory, checkpoint_bytes, rank_memory
from dwt_ds.plan.shapes import Shapes
from dwt_ds.plan.sharded_teacher import ShardedTeacher, buffer_bytes
from dwt_ds.plan.simulation import MicroBatchCost, Simulator
from dwt_ds.plan.speed import (
    FURTHER_LOSS_LAUNCHES,
    REPLAY_LAUNCHES,
    SHARED_LOSS_LAUNCHES,
    StepTime,
    step_launches,
    step_time,
)
from dwt_ds.plan.zero import Partition, ZeroSettings, zero_settings
from dwt_ds.run.mfu import row_work
from dwt_ds.run.models import allows_graphs, can_be_recorded
from dwt_ds.run.resolve import Resolved


@dataclass(frozen=True)
class Plan:
    """A run as `dwt-ds plan` sees it."""

    settings: Resolved
    shapes: Shapes
    device: Device
    nodes: int
    release_at: float | None = None
    """Share of the steps after which the teacher is released; None: as the soft weight's schedule has it."""
    kept_projection: tuple[int, ...] = ()
    """Elements of the hidden loss's projection, which is trained on after its teacher's release; empty without one."""

    @property
    def ranks(self) -> int:
        return self.settings.world_size

    @property
    def stage(self) -> int:
        """The JSON's ZeRO stage."""
        return self.settings.ds.zero_stage

    @cached_property
    def simulator(self) -> Simulator:
        return Simulator(self.settings, self.shapes, on_cpu=self.device.is_cpu)

    @cached_property
    def sharded_teacher(self) -> ShardedTeacher | None:
        """None if every rank has the whole teacher."""
        teacher = self.simulator.teacher
        sharded = self.settings.config.teacher.sharded and self.ranks > 1
        if not sharded or teacher is None:
            return None
        overlap = self.shapes.overlap
        return ShardedTeacher(teacher, self.ranks, None if overlap is None else overlap.entries)

    @cached_property
    def _recurs(self) -> bool:
        """Whether all micro-batches have one shape, and CUDA graphs may be used."""
        config, corpus = self.settings.config, self.settings.corpus
        allowed = allows_graphs(self.settings) and not self.device.is_cpu
        same_labels = config.data.label_draw == "fixed" and not config.data.whole_word
        return allowed and same_labels and round(corpus.tokens_per_row) == corpus.seq_len

    @cached_property
    def replays_teacher(self) -> bool:
        """Whether the teacher's forward pass is a CUDA graph."""
        teacher, settings = self.simulator.teacher, self.settings.config.teacher
        plain = not settings.sharded and settings.kernel_inject is False and self.shapes.overlap is None
        plain = plain and not self.settings.config.distill.hidden_weight
        return self._recurs and plain and teacher is not None and known_layers(teacher.model) is not None

    def replays_training(self, stage: int) -> bool:
        """Whether the student's forward and backward pass are CUDA graphs."""
        flat = self.zero(stage).flat_gradients(self.partition)
        known = known_layers(self.shapes.student.model) is not None
        return self._recurs and flat and can_be_recorded(self.settings) and known and self.shapes.overlap is None

    @cached_property
    def partition(self) -> Partition:
        return Partition([*self.shapes.trainable_numels, *self._projection], self.ranks)

    @property
    def _projection(self) -> tuple[int, ...]:
        """Elements of the hidden loss's projection; empty without one. A teacher that is never loaded brings none."""
        teacher = self.shapes.teacher
        if teacher is None or not self.settings.config.distill.hidden_weight or not self.teacher_share:
            return self.kept_projection
        return (math.prod(each.model.config.hidden_size for each in (self.shapes.student, teacher)),)

    def zero(self, stage: int) -> ZeroSettings:
        """The JSON's numbers at this stage, which may differ from its own."""
        ds_values, precision = self.settings.ds_values, self.settings.ds.precision
        return zero_settings(ds_values, precision, stage, self.shapes.muon_share)

    @cached_property
    def frozen_bytes(self) -> int:
        """The student's buffers and untrained parameters."""
        student = self.shapes.student
        frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
        return buffer_bytes(student) + frozen * self.zero(self.stage).element_bytes

    def memory(self, stage: int, micro: MicroBatchCost | None = None) -> RankMemory:
        """One rank's memory at a ZeRO stage, with the recipe's micro-batch or another."""
        sharded, micro = self.sharded_teacher, micro or self.micro
        return rank_memory(
            stage,
            self.zero(stage),
            self.partition,
            micro,
            frozen_bytes=self.frozen_bytes,
            teacher_bytes=sharded.bytes if sharded else self.simulator.teacher_bytes(),
            teacher_gathered_bytes=sharded.gathered_bytes if sharded else 0,
            teacher_graph_bytes=micro.teacher_peak if self.replays_teacher else 0,
            accumulation=self.settings.config.train.gradient_accumulation_steps,
            replayed=self.replays_training(stage),
        )

    @cached_property
    def micro(self) -> MicroBatchCost:
        return self.simulator.micro_batch(self.settings.config.train.micro_batch_size)

    def largest_micro_batches(self) -> dict[int, int]:
        """ZeRO stage -> about the most rows whose peak fits the device; 0 if none does."""
        small = self.settings.config.train.micro_batch_size
        # Memory grows in proportion to the rows, except for logits, which are computed in chunks. So the second sample
        # for the slope is taken near the answer.
        samples = {small: self.micro, 4 * small: self.simulator.micro_batch(4 * small)}
        near = self._rows_that_fit(self.stage, samples)
        if near not in (0, small):
            samples = {small: self.micro, near: self.simulator.micro_batch(near)}
        return {stage: self._rows_that_fit(stage, samples) for stage in STAGES}

    def _rows_that_fit(self, stage: int, samples: dict[int, MicroBatchCost]) -> int:
        """On the line through the peaks of two micro-batches."""
        (few, at_few), (many, at_many) = (
            (rows, self.memory(stage, micro).peak) for rows, micro in sorted(samples.items())
        )
        a_row = max(1.0, (at_many - at_few) / (many - few))
        return max(0, int(few + (self.device.usable_bytes - at_few) / a_row))

    @cached_property
    def work(self) -> Work:
        settings, student = self.settings, self.shapes.student
        work = row_work(settings.config, settings.corpus, student, self.shapes.teacher, self.shapes.overlap)
        if settings.config.train.activation_checkpointing:
            rows = settings.with_mean_rows
            again = recomputed_flops(student, rows.corpus.seq_len, rows.labels_per_row)
            work = replace(work, recomputed=again)
        return work

    def traffic(self, stage: int) -> list[Traffic]:
        """Collectives of a step at a ZeRO stage."""
        config, sharded = self.settings.config, self.sharded_teacher
        accumulation = config.train.gradient_accumulation_steps
        students = step_traffic(stage, self.zero(stage), self.partition, accumulation, own_sums(config))
        return students if sharded is None else [*students, sharded.traffic(accumulation)]

    def launches(self, stage: int) -> int:
        """Operations that the host starts in a step at a ZeRO stage."""
        second_loss = FURTHER_LOSS_LAUNCHES if self.settings.further_per_row else 0
        if self.shapes.overlap is not None:
            second_loss = SHARED_LOSS_LAUNCHES
        return step_launches(
            stage,
            self.micro,
            len(self.partition.numels),
            self.settings.config.train.gradient_accumulation_steps,
            teacher_launches=REPLAY_LAUNCHES if self.replays_teacher else self.micro.teacher_launches,
            second_loss=second_loss,
            flat=self.zero(stage).flat_gradients(self.partition),
            replayed=self.replays_training(stage),
        )

    def step_time(self, stage: int) -> StepTime:
        """Seconds of a step at a ZeRO stage."""
        return step_time(
            self.work,
            self.traffic(stage),
            self.device,
            launches=self.launches(stage),
            precision=self.settings.ds.compute_precision,
            rows=self.settings.rows_per_step // self.ranks,
            nodes=self.nodes,
            ranks=self.ranks,
        )

    @property
    def teacher_share(self) -> float:
        """Share of the steps in which the teacher takes part.

        When an adaptive weight releases it shows only in the run: without `release_at`, all steps count.
        """
        return self.scheduled_steps / self.settings.total_steps if self.release_at is None else self.release_at

    @property
    def scheduled_steps(self) -> int:
        """Steps before the teacher's release by the soft weight's schedule; all of them without one."""
        step, steps = self._release.step, self.settings.total_steps
        return steps if step is None else min(step, steps)

    @property
    def release_is_unknown(self) -> bool:
        """Whether an adaptive weight decides when the teacher leaves, and `release_at` does not say when."""
        return self.release_at is None and self._release.follows_losses

    @cached_property
    def _release(self) -> TeacherRelease:
        return TeacherRelease(self.settings.config, self.settings.total_steps)

    @cached_property
    def after_release(self) -> Plan:
        """The plan of the steps that the student takes alone; a hidden loss's projection stays."""
        config = self.settings.config
        alone = replace(config, teacher=replace(config.teacher, path=None))
        shapes = replace(self.shapes, teacher=None, overlap=None)
        settings = replace(self.settings, config=alone)
        return replace(self, settings=settings, shapes=shapes, release_at=None, kept_projection=self._projection)

    @cached_property
    def _phases(self) -> list[tuple[float, Plan]]:
        """Shares of the steps, with the plan of each: before and after the release."""
        phases = [(self.teacher_share, self), (1 - self.teacher_share, self.after_release)]
        return [(share, plan) for share, plan in phases if share]

    @property
    def hours(self) -> float:
        """Hours of the whole run at the JSON's ZeRO stage."""
        seconds_a_step = sum(share * plan.step_time(plan.stage).total for share, plan in self._phases)
        return seconds_a_step * self.settings.total_steps / 3600

    @property
    def flops(self) -> float:
        """Operations of training, all ranks; evaluations are not counted."""
        a_row = sum(share * plan.work.per_row for share, plan in self._phases)
        return float(a_row * self.settings.rows_per_step * self.settings.total_steps)

    @property
    def tokens(self) -> float:
        """Real tokens of the whole run."""
        return self.settings.total_steps * self.settings.rows_per_step * self.settings.corpus.tokens_per_row

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.settings.total_steps * self.settings.rows_per_step / self.settings.corpus.rows

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint, all ranks' files."""
        return checkpoint_bytes(self.stage, self.zero(self.stage), self.partition, self.frozen_bytes)

    @property
    def older_checkpoints(self) -> int:
        """Those that `train.keep_every` keeps, when the last one is written beside the `keep_last` newest."""
        train, steps = self.settings.config.train, self.settings.total_steps
        if not train.keep_every or not train.checkpoint_every:
            return 0
        older = [*range(train.checkpoint_every, steps, train.checkpoint_every)][: -train.keep_last]
        return sum(step % train.keep_every == 0 for step in older)

    @property
    def exports_on_the_way(self) -> int:
        """Those of `train.export_every`, without the one at the end."""
        every = self.settings.config.train.export_every
        return (self.settings.total_steps - 1) // every if every else 0

    @cached_property
    def growth(self) -> GrowthPlan | None:
        """The source of each student layer; None for random weights. ValueError if the growth is impossible."""
        init = self.settings.config.student.init
        if init == "random":
            return None
        assert self.shapes.teacher is not None  # refused with the settings
        return check_growth(self.shapes.teacher.model.config, self.shapes.student.model.config, init)
