"""From a recipe to a run that is ready to step: data, models, engines, folder, resume."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dwt_ds.base.files import read_manifest
from dwt_ds.base.software import host_name
from dwt_ds.base.trees import differences
from dwt_ds.config.schema import TrainConfig
from dwt_ds.data.batches import Batch, StepBatches, validation_batches
from dwt_ds.distill.adaptive import AdaptiveWeight
from dwt_ds.distill.evaluate import teacher_held_out_loss
from dwt_ds.distill.objective import DistillObjective
from dwt_ds.engine import ranks
from dwt_ds.engine.agreement import require_same_data, require_same_software
from dwt_ds.engine.checkpoint.resume import (
    NewestCheckpoint,
    agree_on_newest_checkpoint,
    check_world_size,
    load_checkpoint,
)
from dwt_ds.engine.checkpoint.save import RunState
from dwt_ds.engine.ds_json.resolve import resolved_recipe
from dwt_ds.engine.optimizers import check_optimizer
from dwt_ds.engine.student import (
    StudentEngine,
    check_monitors,
    check_precision,
    quieten_deepspeed,
    start_student,
)
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.build import parameter_count
from dwt_ds.models.swaps import check_layer_norm
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.models import build_objective, load_teacher
from dwt_ds.run.parts import Parts
from dwt_ds.run.progress import Progress
from dwt_ds.run.resolve import Settled, check_student, identity, run_facts, settle, timeout_seconds
from dwt_ds.run.session import Run
from dwt_ds.run.stop import StopRequest
from dwt_ds.run.stuck import StuckWatch


def assemble(recipe: str, overrides: list[str], deepspeed_config: str | None, stop: StopRequest) -> Run | None:
    """Everything up to the first step; None, after saying so, if the run in the folder is already finished.

    Raises AllRanksError (one line: field, value, fix) on the rank that found a mistake, OtherRankError on the others;
    ValueError and OSError where a rank fails alone.
    """
    quieten_deepspeed()
    ranks.start_ranks(timeout_seconds(recipe, overrides))
    require_same_software()
    with ranks.raise_on_all_ranks():
        settled = settle(recipe, overrides, deepspeed_config)
    manifest, settings = settled.data.manifest, {**settled.config.to_dict(), "deepspeed": settled.ds_values}
    require_same_data(manifest.fingerprint, manifest.tokenizer_sha256, settings)
    with ranks.raise_on_all_ranks():
        tokenizer = settled.data.tokenizer()
        check_student(settled, tokenizer)
        check_precision(settled.ds)
        check_monitors(settled.ds)
        check_optimizer(settled.ds_values, ranks.device(), settled.ds.origin)
        check_layer_norm(settled.config.fused.layer_norm, ranks.device())
        facts = run_facts(settled)
        folder = RunFolder(settled.config.output_dir)
        folder.check_identity(identity(facts))
        finished_steps = folder.finished_steps() if ranks.rank() == 0 else 0
    finished_steps = ranks.gather_from_ranks(finished_steps)[0]  # another host may see the file later than rank 0
    if finished_steps >= settled.total_steps:
        _say(f"{folder.path}: already finished at step {finished_steps}; nothing to do")
        return None

    stuck = _watch(folder, settled.config.train)
    checkpoint = agree_on_newest_checkpoint(folder.checkpoints)
    with ranks.raise_on_all_ranks():
        if checkpoint.path is not None:
            check_world_size(checkpoint.path, settled.ds.zero_stage)
            _check_length(checkpoint.path, settled)
        teacher = load_teacher(settled, tokenizer)
        objective = build_objective(settled, tokenizer)
    if teacher is not None:
        teacher.start()
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0:
            resolved = resolved_recipe(settled.config, settled.ds_values, settled.total_steps)
            folder.begin(identity(facts), resolved, settled.ds_values)
            tokenizer.save_pretrained(folder.path / "tokenizer")
    teacher_loss = _introduce(settled, objective, teacher)
    torch.manual_seed(settled.config.seed + 1 + ranks.rank())
    student = start_student(objective, settled.ds_values)
    state = _resume(student, checkpoint, folder, settled, facts)
    adaptive = _adaptive_weight(settled, teacher_loss, state)
    train = settled.config.train
    batches = StepBatches(
        settled.data.train,
        settled.data.facts,
        settled.config.data,
        seed=settled.config.seed,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.gradient_accumulation_steps,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        soft_positions=settled.config.distill.soft_positions,
        rows_before=state.rows,
        first_step=state.step,
    )
    return Run(
        Parts(
            config=settled.config,
            total_steps=settled.total_steps,
            student=student,
            teacher=teacher,
            adaptive=adaptive,
            batches=batches,
            quantization=settled.quantization,
            validation=_validation(settled),
            tokenizer=tokenizer,
            folder=folder,
            state=state,
            facts=facts,
            progress=Progress(
                state.step,
                settled.total_steps,
                hard_weight=settled.config.distill.hard_weight,
                shown=ranks.rank() == 0,
            ),
            stop=stop,
            stuck=stuck,
        )
    )


def _watch(folder: RunFolder, train: TrainConfig) -> StuckWatch:
    return StuckWatch(
        folder.path,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        host=host_name(),
        # A collective that times out ends the run, and then nobody is left to look.
        seconds=min(train.report_stuck_after_seconds, train.collective_timeout_seconds / 2),
        say=_say,
    )


def _check_length(checkpoint: Path, settled: Settled) -> None:
    step = int(read_manifest(checkpoint)["state"]["step"])
    if step > settled.total_steps:
        train = settled.config.train
        asked = f"train.epochs={train.epochs}" if train.max_steps is None else f"train.max_steps={train.max_steps}"
        raise ValueError(
            f"{asked}: {checkpoint} stands at step {step} of a longer run, this one would have {settled.total_steps}; "
            f"set train.max_steps={step} or more, or choose another output_dir"
        )


def _introduce(settled: Settled, objective: DistillObjective, teacher: TeacherEngine | None) -> float | None:
    """Tell both models' sizes and the teacher's held-out loss: weak means smaller, or worse at equal size.

    Returns that loss, None without a teacher.
    """
    ours = parameter_count(objective.student)
    config = settled.config
    _say(
        f"{ranks.world_size()} ranks, ZeRO-{settled.ds.zero_stage}, {settled.ds.precision}; "
        f"{settled.total_steps} steps of {settled.ds_values['train_batch_size']} rows; "
        f"{settled.data.manifest.rows:,} rows in {config.data.dir}"
    )
    _say(f"student: {config.student.family}, {ours:,} parameters")
    if settled.quantization is not None:
        _say(f"quantization-aware: {settled.quantization.describe()}")
    if teacher is None:
        return None
    theirs = teacher.parameters
    device = ranks.device()
    loss = teacher_held_out_loss(
        teacher,
        (batch.to(device) for batch in _validation(settled)()),
        settled.data.manifest.vocab_size,
        config.distill,
        ranks.reduce_sum,
        device,
    )
    judged = "no held-out rows to measure it by" if math.isnan(loss) else f"held-out MLM loss {loss:.4f}"
    _say(
        f"teacher: {config.teacher.path}, {theirs:,} parameters ({theirs / ours:.2f} of the student's), {judged}; "
        f"{teacher.injection}"
    )
    if theirs > ours:
        _say("warning: the teacher is larger than the student; distillation from a weak teacher expects the opposite")
    return loss


def _resume(
    student: StudentEngine, checkpoint: NewestCheckpoint, folder: RunFolder, settled: Settled, facts: dict[str, Any]
) -> RunState:
    path = checkpoint.path
    for problem in checkpoint.damaged:
        _say(f"checkpoint not used: {problem}")
    state = RunState()
    if path is None:
        if folder.metrics.is_file():
            _say(f"{folder.path}: the run there stopped before its first complete checkpoint; beginning at step 0")
    else:
        state, manifest = load_checkpoint(student, path, settled.config.seed)
        _say(f"resuming from {path} at step {state.step}")
        if manifest["world_size"] != ranks.world_size():
            _say(f"it was written by {manifest['world_size']} ranks: optimizer shards cut anew, new dropout streams")
        for name, before, now in differences(manifest["settings"], facts["settings"]):
            _say(f"changed since that checkpoint: {name}: {before} -> {now}")
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0:
            folder.cut_metrics_back(state.step)
    start = {"step": state.step, "ranks": ranks.world_size(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return replace(state, starts=[*state.starts, {**start, "versions": facts["versions"]}])


def _adaptive_weight(settled: Settled, teacher_loss: float | None, state: RunState) -> AdaptiveWeight | None:
    schedule = settled.config.distill.soft_weight
    if schedule.schedule != "adaptive" or teacher_loss is None:
        return None  # alone, a student has no soft loss to weigh
    adaptive = AdaptiveWeight(schedule, teacher_loss, ranks.device())
    if state.adaptive:
        adaptive.load_state_dict(state.adaptive)
    return adaptive


def _validation(settled: Settled) -> Callable[[], Iterator[Batch]]:
    def batches() -> Iterator[Batch]:
        return validation_batches(
            settled.data.validation,
            settled.data.facts,
            settled.config.data,
            micro_batch_size=settled.config.train.micro_batch_size,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            max_rows=settled.config.train.eval_rows,
        )

    return batches


def _say(text: str) -> None:
    if ranks.rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
