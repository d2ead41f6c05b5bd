"""Starting from a checkpoint: where its run stands, which teacher it had, and whether this run can continue it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dwt_ds.base.run_files import RECIPE
from dwt_ds.base.trees import differences, flatten
from dwt_ds.base.words import prefix_errors
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.config.schema import RunConfig
from dwt_ds.distill.evaluate import TeacherHeldOut
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint, RunFacts, RunState
from dwt_ds.engine.checkpoint.save_and_load import load_checkpoint
from dwt_ds.engine.ds_json.combinations import precision, zero_stage
from dwt_ds.engine.student import StudentEngine
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.load import weights_origin
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.other_vocabulary import OtherVocabulary
from dwt_ds.run.resolve import Resolved
from dwt_ds.run.start_report import say

# Optimizers whose state DeepSpeed's universal checkpoints hold.
_RESHARDED = frozenset({"adam", "adamw", "apex.fusedadam"})
# Settings of ZeRO by which DeepSpeed cuts the state into its files, their defaults, and the stages that read them.
_CUTS = (("parameter_alignment", False, (1, 2)), ("sub_group_size", 1_000_000_000, (3,)))


class TeacherOrigin(NamedTuple):
    """Which teacher it is."""

    weights: str | None
    """Where they come from; None without a teacher."""
    tokenizer: str | None
    """Its sha256, where `teacher.vocabulary` is shared; None for the data folder's."""

    @classmethod
    def of(cls, checkpoint: NewestCheckpoint) -> TeacherOrigin:
        """That of the teacher which a checkpoint's run had."""
        return cls(checkpoint.manifest.get("teacher"), checkpoint.manifest.get("teacher_tokenizer"))


def is_finished_without_data(config: RunConfig) -> bool:
    """Whether the run in the folder is finished, with this data folder, which is no longer there; says so."""
    folder, steps = RunFolder(config.output_dir), 0
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0 and not Path(config.data.dir).exists() and (folder.path / RECIPE).exists():
            same = read_yaml(folder.path / RECIPE, "settings")["data"]["dir"] == config.data.dir
            steps = folder.finished_steps() if same else 0
    steps = ranks.broadcast_from_rank_0(steps)
    if steps == 0 or steps < (config.train.max_steps or 0):
        return False
    say(
        f"{folder.path}: already finished at step {steps}; nothing to do (data.dir {config.data.dir} is not there, so "
        "the settings were not compared with the run's)"
    )
    return True


def teacher_origin(resolved: Resolved, other: OtherVocabulary | None) -> TeacherOrigin:
    """That of the teacher which the recipe names."""
    config = resolved.config.teacher
    with prefix_errors("teacher.path"):
        weights = weights_origin(config.path, trust_remote_code=config.trust_remote_code)
    return TeacherOrigin(weights, None if other is None else other.tokenizer_sha256)


# The release of an adaptive weight's teacher depends on the losses and on the settings whose names begin like this.
_RULE_OF_RELEASE = ("distill.soft_weight", "teacher.path", "teacher.vocabulary", "teacher.release")
# Settings that the masks, and so the losses, follow from.
_MASKS = ("data.mask_probability", "data.mask_share", "data.random_share", "data.label_draw", "data.whole_word")


def same_rule_of_release(checkpoint: NewestCheckpoint, facts: RunFacts) -> bool:
    """Whether a checkpoint's run had the same teacher, soft weight and rule of release."""
    return _same_settings(checkpoint, facts, _RULE_OF_RELEASE)


def same_masks(checkpoint: NewestCheckpoint, facts: RunFacts) -> bool:
    """Whether a checkpoint's run masked tokens in the same way; if not, its losses do not compare with this run's."""
    return _same_settings(checkpoint, facts, _MASKS)


def _same_settings(checkpoint: NewestCheckpoint, facts: RunFacts, beginnings: tuple[str, ...]) -> bool:
    """For the settings whose names begin so; the version that wrote the checkpoint may have had fewer of them."""
    before = flatten(checkpoint.manifest.get("settings", {}))
    now = flatten(facts.settings)
    return all(before[name] == now.get(name) for name in before if name.startswith(beginnings))


def adaptive_before(checkpoint: NewestCheckpoint, facts: RunFacts) -> dict[str, float]:
    """The state of a checkpoint's adaptive weight; how long that had been low counts under the same rule only."""
    state = checkpoint.state.adaptive
    return state if same_rule_of_release(checkpoint, facts) or not state else {**state, "idle_steps": 0.0}


def measured_before(before: RunState) -> TeacherHeldOut | None:
    """What an earlier start found of the teacher."""
    return None if before.teacher_loss is None else TeacherHeldOut(before.teacher_loss, before.teacher_mass)


def _form(ds_values: Mapping[str, Any]) -> str:
    return f"ZeRO-{zero_stage(ds_values)}, {precision(ds_values)} and {ds_values['optimizer']['type']}"


def _layout(ds_values: Mapping[str, Any]) -> tuple[int, str, str]:
    """What DeepSpeed's files depend on. Those of ZeRO-1 are those of ZeRO-2, and Adam's state is AdamW's."""
    stage, optimizer = zero_stage(ds_values), str(ds_values["optimizer"]["type"]).lower()
    return 2 if stage == 1 else stage, precision(ds_values), "adamw" if optimizer == "adam" else optimizer


def check_can_resume(checkpoint: NewestCheckpoint, resolved: Resolved) -> None:
    """Raise ValueError for a checkpoint that this run cannot continue.

    It is refused if its ZeRO stage, precision or optimizer differ, or how ZeRO cuts the state; if its number of ranks
    differs and this ZeRO stage or optimizer does not allow that; if its steps had another number of rows and the run's
    length is in epochs; or if it is beyond the run's last step.
    """
    if checkpoint.path is None:
        return
    before = checkpoint.manifest["settings"]["deepspeed"]
    if _layout(before) != _layout(resolved.ds_values):
        raise ValueError(
            f"deepspeed_config={resolved.config.deepspeed_config!r}: {_form(resolved.ds_values)}, and "
            f"{checkpoint.path.name} was written with {_form(before)}; resume with the DeepSpeed settings that it was "
            "written with, or choose another output_dir"
        )
    wrote, now, stage = checkpoint.manifest["world_size"], resolved.world_size, resolved.ds.zero_stage
    for key, default, stages in _CUTS:
        then, here = (each.get("zero_optimization", {}).get(key, default) for each in (before, resolved.ds_values))
        if stage in stages and then != here:
            raise ValueError(
                f"zero_optimization.{key}={json.dumps(here)}: {checkpoint.path.name} was written with "
                f"{json.dumps(then)}, and DeepSpeed reads such files with the same value only; set it to "
                f"{json.dumps(then)}, or choose another output_dir"
            )
    if wrote != now and stage not in (1, 2):
        raise ValueError(
            f"{checkpoint.path.name} was written by {wrote} ranks, this run has {now}: ZeRO-{stage} cannot resume "
            f"on a different number of ranks; start it with {wrote}"
        )
    optimizer = resolved.ds_values["optimizer"]
    amsgrad = bool(optimizer.get("params", {}).get("amsgrad"))
    if wrote != now and (amsgrad or str(optimizer["type"]).lower() not in _RESHARDED):
        raise ValueError(
            f"{checkpoint.path.name} was written by {wrote} ranks, this run has {now}: only the state of Adam "
            f"without amsgrad resumes on another number of ranks, not {optimizer['type']}'s here; start it with {wrote}"
        )
    step, train = checkpoint.state.step, resolved.config.train
    _check_epochs(checkpoint, resolved)
    if step > resolved.total_steps:
        asked = f"train.epochs={train.epochs}" if train.max_steps is None else f"train.max_steps={train.max_steps}"
        raise ValueError(
            f"{asked}: {checkpoint.path} is at step {step} of a longer run, this one would have "
            f"{resolved.total_steps}; set train.max_steps={step} or more, or choose another output_dir"
        )


def _check_epochs(checkpoint: NewestCheckpoint, resolved: Resolved) -> None:
    """Refuse a length in epochs if earlier steps had another number of rows: the steps would not add up to it."""
    train, now = resolved.config.train, resolved.rows_per_step
    step, rows = checkpoint.state.step, checkpoint.state.rows
    if train.max_steps is not None or train.epochs is None or rows == step * now:
        return
    left = max(0, math.ceil((train.epochs * resolved.corpus.rows - rows) / now))
    raise ValueError(
        f"train.epochs={train.epochs:g}: the {step:,} steps of {checkpoint.path} took {rows:,} rows, and a step has "
        f"{now:,} now, so that {resolved.total_steps:,} steps are not {train.epochs:g} epochs; keep micro-batch x "
        f"accumulation x ranks, or set train.max_steps={step + left}, which comes to {train.epochs:g} epochs"
    )


def hidden_loss_columns(checkpoint: NewestCheckpoint, resolved: Resolved, teacher: TeacherEngine | None) -> int | None:
    """Columns of the teacher's hidden states for the hidden loss; None without a hidden loss.

    Its projection is among what the optimizer trains, so a resume keeps it, also after the teacher's release.
    ValueError if that has changed since the run began.
    """
    wanted, began_with = resolved.config.distill.hidden_weight > 0, checkpoint.state.teacher_hidden_size
    now = int(teacher.model.config.hidden_size) if teacher is not None and wanted else None
    if checkpoint.path is None:
        return now
    if now == began_with or (teacher is None and wanted):
        return began_with
    if now is None or began_with is None:
        had = "a hidden loss, which ends with its teacher" if now is None else "none"
        raise ValueError(
            f"distill.hidden_weight: this run began with {had}; keep its setting, or choose another output_dir"
        )
    raise ValueError(
        f"teacher.path={resolved.config.teacher.path!r}: its hidden states have {now} columns, and this run began with "
        f"a teacher of {began_with}; choose another output_dir"
    )


def resume(
    student: StudentEngine, checkpoint: NewestCheckpoint, folder: RunFolder, resolved: Resolved, facts: RunFacts
) -> RunState:
    """Load the checkpoint, if there is one, and report what has changed since. Returns where the run stands."""
    path, manifest, state = checkpoint.path, checkpoint.manifest, checkpoint.state
    for problem in checkpoint.damaged:
        say(f"checkpoint not used: {problem}")
    if path is None:
        if folder.metrics.is_file():
            say(f"{folder.path}: the run there stopped before its first complete checkpoint; beginning at step 0")
    else:
        load_checkpoint(student, checkpoint, resolved.config.seed)
        say(f"resuming from {path} at step {state.step}")
        if manifest["world_size"] != ranks.world_size():
            say(f"written by {manifest['world_size']} ranks: optimizer state re-sharded, dropout draws new numbers")
        if student.lr_scheduler.two_steps_late:
            say("learning rate: this run keeps the timing of the earlier version that began it, two steps late")
        changed = {name: (before, now) for name, before, now in differences(manifest["settings"], facts.settings)}
        for name, (before, now) in changed.items():
            say(f"changed since that checkpoint: {name}: {before} -> {now}")
        if manifest.get("teacher") != facts.teacher and "teacher.path" not in changed:
            say(f"changed since that checkpoint: the weights in {resolved.config.teacher.path}")
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0:
            folder.cut_metrics_back(state.step)
    start = {"step": state.step, "ranks": ranks.world_size(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return replace(state, starts=[*state.starts, {**start, "versions": facts.versions}])
