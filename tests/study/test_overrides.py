"""Settings that a study's command line changes in its runs, and those that it may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dwt_ds.study import run as study_run
from dwt_ds.study.run import Study, StudyOptions


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["fair", "train.learning_rate=3e-3"], {"lr5e-4", "lr2e-3", "lr4e-3"}),
        (["fair", "train={learning_rate: 3e-3}"], {"lr5e-4", "lr2e-3", "lr4e-3"}),
        (["teacher_quality", "student.layers=5"], {"teacher4", "teacher2", "teacher1"}),
        (["soft_weight", "distill.soft_weight.start=2"], {"w4", "4to1", "1to0"}),
        (["vocabulary", "data.dir=data/mine"], {"own4"}),
        (["vocabulary", "student.max_positions=64"], {"own4"}),
    ],
)
def test_an_override_of_what_labels_set_is_refused(
    arguments: list[str], labels: set[str], refusal: Callable[..., str]
) -> None:
    error = refusal("study", *arguments, "--dry-run")
    told = re.fullmatch(r"error: override (.*): the grid's labels (.*) set this; leave it out, or write .*\n", error)
    assert told
    assert (told[1], set(told[2].split(", "))) == (repr(arguments[1]), labels)


def test_what_no_label_sets_may_be_changed(tiny_data: Path, tmp_path: Path) -> None:
    changed = ("train.max_steps=20", "train.micro_batch_size=2", "distill.soft_weight.span=0.5")
    for grid in ("fair", "teacher_quality"):
        study = Study.open(StudyOptions(grid, out=tmp_path / "study", overrides=(f"data.dir={tiny_data}", *changed)))
        assert {each.total_steps for each in study.settings.values()} == {20}


def test_eval_sets_are_for_the_runs_on_the_students_data(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no data/quickstart, whose tokenizer would be another
    overrides = (f"train.eval_sets.docs={tiny_data}",)
    study = Study.open(StudyOptions("vocabulary", out=tmp_path / "study", overrides=overrides))
    sets = {name: settings.config.train.eval_sets for name, settings in study.settings.items()}
    assert sets.pop("own4-s42") is None
    assert list(sets.values()) == [{"docs": str(tiny_data)}] * len(sets)
    started = dict[str, list[str]]()

    def command(recipe: Path, given: list[str], ranks: int) -> list[str]:
        started[recipe.stem] = given
        return ["false"]

    monkeypatch.setattr(study_run, "pretrain_command", command)
    study.run(report=lambda _: None)
    assert started == {"own4-s42": [], "teacher4-s42": [*overrides], "alone-s42": [*overrides]}
