"""From a recipe to a session that is ready for its first step: data, models, engines, folder, resume."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dwt_ds.base.run_files import TOKENIZER
from dwt_ds.base.software import host_name
from dwt_ds.base.words import prefix_errors
from dwt_ds.config.recipe import Recipe, load_recipe
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.data.batches import StepBatches
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.tokenizer import save_tokenizer
from dwt_ds.distill.objective import check_loss_kernel
from dwt_ds.distill.release import TeacherRelease
from dwt_ds.engine import ranks
from dwt_ds.engine.agreement import (
    require_same_choices,
    require_same_data,
    require_same_software,
    require_same_teacher,
    require_shared_folder,
)
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint, RunFacts, RunState, newest_checkpoint
from dwt_ds.engine.cuda_graphs import use_a_stream_that_can_be_recorded
from dwt_ds.engine.optimizers import check_optimizer, optimizer_used
from dwt_ds.engine.student import check_monitors, check_precision, occupy_nvme, quieten_deepspeed, start_student
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.layer_norm import check_layer_norm, layer_norm_used
from dwt_ds.run.evaluation import Evaluation, check_eval_sets, open_eval_sets
from dwt_ds.run.exports import Exporter
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.log import RunLog
from dwt_ds.run.mfu import Utilization
from dwt_ds.run.models import (
    build_objective,
    check_initial_weights,
    check_student,
    compiles,
    load_teacher,
    may_replay_student,
    recorder_of_student,
)
from dwt_ds.run.other_vocabulary import OtherVocabulary, overlap_lines
from dwt_ds.run.resolve import Corpus, Resolved, resolve, run_facts
from dwt_ds.run.resume import (
    TeacherOrigin,
    adaptive_before,
    check_can_resume,
    hidden_loss_columns,
    is_finished_without_data,
    measured_before,
    resume,
    same_masks,
    same_rule_of_release,
    teacher_origin,
)
from dwt_ds.run.session import Session
from dwt_ds.run.start_report import report_growth, report_models, report_unused_settings, say
from dwt_ds.run.stop import StopRequest
from dwt_ds.run.stuck import StuckWatch


class _Inputs(NamedTuple):
    """What is read before anything is built or written; the same on all ranks."""

    resolved: Resolved
    data: PreparedData
    eval_sets: dict[str, PreparedData]
    tokenizer: PreTrainedTokenizerBase
    """The data folder's."""
    facts: RunFacts
    """All but the teacher."""


class _Teaching(NamedTuple):
    """What a start has of the teacher."""

    teacher: TeacherEngine | None
    """Not started yet; None if the student trains alone from here on."""
    other: OtherVocabulary | None
    """Its vocabulary where that may differ from the data's, also if it only gives the student its first weights."""
    overlap: Overlap | None
    """With that vocabulary, on rank 0."""
    origin: TeacherOrigin
    released: int | None
    """The step at which it was released."""
    hidden_size: int | None
    """Columns of its hidden states for the hidden loss; None without one."""


def assemble(recipe_name: str, overrides: list[str], deepspeed_config: str | None, stop: StopRequest) -> Session | None:
    """Everything up to the first step; None, after saying so, if the run in the folder is already finished.

    Raises AllRanksError (one line: field, value, fix) on the rank that found a mistake, OtherRankError on the others;
    ValueError and OSError where a rank fails alone.
    """
    quieten_deepspeed()
    recipe = _recipe_or_error(recipe_name, overrides)
    config = recipe.config if isinstance(recipe, Recipe) else None
    with stop.while_ranks_meet(RunFolder(config.output_dir).path if config else None, rank=ranks.rank()):
        ranks.start_ranks((config or RunConfig()).train.collective_timeout_seconds)
    if config is not None and is_finished_without_data(config):
        return None
    require_same_software()
    inputs = _open(recipe, deepspeed_config)
    folder = _take_folder(inputs)
    if folder is None:
        return None
    resolved, data, eval_sets, tokenizer, facts = inputs
    stuck = _watch(folder, resolved.config.train)
    found = newest_checkpoint(folder.checkpoints) if ranks.rank() == 0 else None
    checkpoint: NewestCheckpoint = ranks.broadcast_from_rank_0(found)
    is_new = checkpoint.path is None
    if may_replay_student(resolved):
        use_a_stream_that_can_be_recorded()
    with ranks.raise_on_all_ranks():
        check_can_resume(checkpoint, resolved)
        teacher, other, overlap, origin, released, hidden_size = _load_teacher(inputs, checkpoint)
        objective = build_objective(resolved, tokenizer, other, grown=is_new, teacher_hidden_size=hidden_size)
    require_same_teacher(origin.weights, origin.tokenizer)
    if teacher is not None:
        teacher.start()
    facts = replace(facts, teacher=origin.weights, teacher_tokenizer=origin.tokenizer)
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0:
            folder.begin(facts.identity, resolved.to_recipe(), resolved.ds_values)
            save_tokenizer(tokenizer, folder.path / TOKENIZER)
    if other is not None and resolved.config.student.init != "random" and is_new:
        report_growth(resolved, other)
    if teacher is None:
        other = None  # it gave weights at most
    evaluation = Evaluation(resolved, data, eval_sets, other, overlap)
    same_losses = origin == TeacherOrigin.of(checkpoint) and (teacher is None or same_masks(checkpoint, facts))
    measured = evaluation.measure_teacher(teacher, measured_before(checkpoint.state) if same_losses else None)
    report_models(resolved, objective, teacher, measured=measured, released=released)
    if teacher is not None and other is not None:
        teacher.keep_shared(other.shared)
        if overlap is not None:  # on rank 0
            for line in overlap_lines(other, overlap):
                say(line)
    theirs = None if teacher is None else teacher.gathered
    utilization = Utilization.of(resolved, objective.student, theirs, overlap) if ranks.rank() == 0 else None
    torch.manual_seed(resolved.config.seed + 1 + ranks.rank())
    recorder = recorder_of_student(resolved, objective.student)
    student = start_student(objective, resolved.ds_values, recorder, compiles=compiles(resolved), folder=folder.path)
    state = resume(student, checkpoint, folder, resolved, facts)
    state = replace(
        state,
        teacher_loss=None if measured is None else measured.hard_loss,
        teacher_mass=None if measured is None else measured.shared_mass,
        teacher_released=released,
        teacher_hidden_size=hidden_size,
        # It has the teacher's loss, and averages of the distance to it.
        adaptive=adaptive_before(checkpoint, facts) if same_losses else {},
    )
    return Session(
        resolved=resolved,
        student=student,
        teacher=teacher,
        batches=_step_batches(resolved, data, state, other),
        evaluation=evaluation,
        exporter=Exporter(student, tokenizer, resolved.quantization, facts, folder.metrics),
        folder=folder,
        facts=facts,
        state=state,
        log=RunLog(resolved, student, folder, state.step, utilization),
        stop=stop,
        stuck=stuck,
    )


def _open(recipe: Recipe | Exception, deepspeed_config: str | None) -> _Inputs:
    """Settings and data folders, checked against each other and compared between the ranks."""
    with ranks.raise_on_all_ranks():
        if isinstance(recipe, Exception):
            raise recipe
        with prefix_errors("data.dir"):
            data = PreparedData.open(recipe.config.data.dir)
        corpus = Corpus.of(data.manifest, recipe.config.data.dir)
        eval_sets = open_eval_sets(recipe.config.train)
        corpora = {name: Corpus.of(each.manifest, str(each.folder)) for name, each in eval_sets.items()}
        resolved = resolve(recipe, deepspeed_config, ranks.world_size(), corpus, corpora)
        facts = run_facts(resolved, data.manifest)
        tokenizer = data.tokenizer()
    further = {f"train.eval_sets.{name}": each.manifest.fingerprint for name, each in eval_sets.items()}
    require_same_data({"data": facts.data, **further}, facts.tokenizer, facts.settings_sha256)
    return _Inputs(resolved, data, eval_sets, tokenizer, facts)


def _take_folder(inputs: _Inputs) -> RunFolder | None:
    """The run's folder, if this machine can do what is asked; None, after saying so, if the run in it is finished."""
    resolved = inputs.resolved
    with ranks.raise_on_all_ranks():
        check_eval_sets(resolved, inputs.eval_sets, inputs.data.facts)
        check_student(resolved, inputs.tokenizer)
        used = _check_device(resolved)
        occupy_nvme(resolved.ds)
        folder = RunFolder(resolved.config.output_dir)
        folder.check_identity(inputs.facts.identity)
        finished_steps = _occupy(folder, resolved.total_steps) if ranks.rank() == 0 else 0
    require_same_choices(used)
    finished_steps = ranks.broadcast_from_rank_0(finished_steps)
    if finished_steps >= resolved.total_steps:
        say(f"{folder.path}: already finished at step {finished_steps}; nothing to do")
        with ranks.raise_on_all_ranks():
            if ranks.rank() == 0:
                report_unused_settings(folder, resolved)
        return None
    require_shared_folder(folder.path)
    return folder


def _load_teacher(inputs: _Inputs, checkpoint: NewestCheckpoint) -> _Teaching:
    """The teacher, or what is left of it in a run that has released it (ValueError, OSError of one line)."""
    resolved, tokenizer, before = inputs.resolved, inputs.tokenizer, checkpoint.state
    is_new = checkpoint.path is None
    released = TeacherRelease(resolved.config, resolved.total_steps).at_start(
        before.step, before.teacher_released, same_rule=same_rule_of_release(checkpoint, inputs.facts)
    )
    if is_new:
        check_initial_weights(resolved, tokenizer)
    # A run that resumes without its teacher needs nothing of it, not even its folder.
    alone = released is not None and not is_new
    other = None if alone else OtherVocabulary.load(resolved.config.teacher, tokenizer)
    origin = TeacherOrigin.of(checkpoint) if alone else teacher_origin(resolved, other)
    teacher = None if released is not None else load_teacher(resolved, tokenizer, other)
    hidden_size = hidden_loss_columns(checkpoint, resolved, teacher)
    overlap = None
    if other is not None and teacher is not None and ranks.rank() == 0:
        overlap = Overlap.measure(other.tokens, inputs.data, resolved.config.data)
    return _Teaching(teacher, other, overlap, origin, released, hidden_size)


def _check_device(resolved: Resolved) -> dict[str, str]:
    """Whether this machine can run what the settings ask for; what it uses where it has a choice."""
    ds, layer_norm, device = resolved.ds, resolved.config.fused.layer_norm, ranks.device()
    check_precision(ds)
    check_monitors(ds)
    check_optimizer(resolved.ds_values, device, ds.origin)
    check_layer_norm(layer_norm, device)
    check_loss_kernel(resolved.config.distill, device)
    return {
        "optimizer": optimizer_used(resolved.ds_values, device),
        "layer norm": layer_norm_used(layer_norm, device),
    }


def _occupy(folder: RunFolder, total_steps: int) -> int:
    """On rank 0: become the folder's only writer, unless the run in it is finished; returns the steps it finished."""
    if folder.finished_steps() < total_steps:
        folder.check_contents()
        folder.lock()
    return folder.finished_steps()  # again: the former writer may have ended well meanwhile


def _recipe_or_error(name: str, overrides: list[str]) -> Recipe | Exception:
    """The recipe, or what is wrong with it: the ranks cannot report that together before they are started."""
    try:
        return load_recipe(name, overrides)
    except (ValueError, OSError) as error:
        return error


def _watch(folder: RunFolder, train: TrainConfig) -> StuckWatch:
    return StuckWatch(
        folder.path,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        host=host_name(),
        # A collective that times out ends the run: the report has to come before that.
        seconds=min(train.report_stuck_after_seconds, train.collective_timeout_seconds / 2),
        say=say,
    )


def _step_batches(
    resolved: Resolved, data: PreparedData, state: RunState, other: OtherVocabulary | None
) -> StepBatches:
    train = resolved.config.train
    return StepBatches(
        data.train,
        data.facts,
        resolved.config.data,
        seed=resolved.config.seed,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.gradient_accumulation_steps,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        soft_positions=resolved.config.distill.soft_positions,
        teacher_tokens=None if other is None else other.tokens,
        rows_before=state.rows,
        first_step=state.step,
    )
