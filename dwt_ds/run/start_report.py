"""What a run prints about its models before its first step."""

from __future__ import annotations

from dwt_ds.base.run_files import RECIPE
from dwt_ds.base.trees import differences, merge
from dwt_ds.base.words import counted
from dwt_ds.base.yaml_and_json import read_yaml
from dwt_ds.config.schema import RunConfig
from dwt_ds.distill.evaluate import TeacherHeldOut
from dwt_ds.distill.objective import DistillObjective
from dwt_ds.engine import ranks
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.build import parameter_count
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.other_vocabulary import OtherVocabulary
from dwt_ds.run.progress import print_line
from dwt_ds.run.resolve import Resolved


def report_unused_settings(folder: RunFolder, resolved: Resolved) -> None:
    """Print which settings of this start are not those that the finished run in `folder` was trained with."""
    defaults = RunConfig().to_dict()  # an earlier version may have had fewer settings
    trained_with = merge(defaults, read_yaml(folder.path / RECIPE, "settings"))
    unlike = differences(trained_with, merge(defaults, resolved.to_recipe()))
    others = [f"{name}: {before} -> {now}" for name, before, now in unlike if name != "output_dir"]
    if others:
        say(f"it was trained with other settings ({', '.join(others)}); choose another output_dir to train with these")


def report_models(
    resolved: Resolved,
    objective: DistillObjective,
    teacher: TeacherEngine | None,
    *,
    measured: TeacherHeldOut | None,
    released: int | None,
) -> None:
    """Print both models' sizes and the teacher's held-out loss: weak means smaller, or worse at equal size.

    Args:
        teacher: None if the student trains alone from here on.
        measured: the teacher's loss; None without held-out rows.
        released: the step at which the teacher was released.
    """
    ours = parameter_count(objective.student)
    config = resolved.config
    say(
        f"{counted(resolved.world_size, 'rank')} on {ranks.device_name()}, "
        f"ZeRO-{resolved.ds.zero_stage}, {resolved.ds.precision}; "
        f"{resolved.total_steps} steps of {resolved.rows_per_step} rows; "
        f"{resolved.corpus.rows:,} rows in {config.data.dir}"
    )
    say(f"student: {config.student.family}, {ours:,} parameters")
    fixed = {name: p.numel() for name, p in objective.student.model.named_parameters() if not p.requires_grad}
    if fixed:
        named = ", ".join([*fixed][:3]) + (f" and {len(fixed) - 3} more tensors" if len(fixed) > 3 else "")
        say(
            f"{sum(fixed.values()):,} of these are not trained, as they are constant or the logits ignore them: {named}"
        )
    if resolved.quantization is not None:
        say(f"quantization-aware: {resolved.quantization.describe()}")
    if released is not None:
        say(f"teacher: {config.teacher.path}, released at step {released}, not loaded")
    if teacher is None:
        return
    theirs = teacher.parameters
    judged = "no held-out rows to measure it by" if measured is None else f"held-out MLM loss {measured.hard_loss:.4f}"
    if measured is not None and measured.shared_mass is not None:
        judged += f" on the shared entries, which get {measured.shared_mass:.0%} of its probability"
    say(
        f"teacher: {config.teacher.path}, {theirs:,} parameters ({theirs / ours:.2f} of the student's), {judged}; "
        f"{teacher.injection}"
    )
    if theirs > ours:
        say("warning: the teacher is larger than the student; distillation from a weak teacher expects the opposite")


def report_growth(resolved: Resolved, other: OtherVocabulary) -> None:
    """Print what a student grown from a teacher with another vocabulary has of it, on rank 0."""
    copied = int((other.entries_to_grow_from() >= 0).sum())
    say(
        f"student.init={resolved.config.student.init}: the encoder's weights and the embeddings of {copied:,} of the "
        f"student's {resolved.corpus.vocab_size:,} entries are the teacher's"
    )


def say(text: str) -> None:
    """Print on rank 0; the other ranks are silent."""
    if ranks.rank() == 0:
        print_line(text)
