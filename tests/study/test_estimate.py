"""What a study's runs will cost, before any of them starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.gpus import have_gpus

from dwt_ds.cli.main import main
from dwt_ds.models.build import student_model_config
from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.study.estimate import Cost
from dwt_ds.study.run import Study, StudyOptions


def test_hours_are_for_the_gpus_that_runs_would_use_and_tokens_the_same_everywhere(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StudyOptions(grid="remapping", out=tmp_path / "study", overrides=(f"data.dir={tiny_data}",))
    for gpus, device in ((0, "cpu"), (1, "a100-80"), (4, "a100-80")):
        have_gpus(monkeypatch, gpus)
        study = Study.open(options)
        assert (study.ranks, study.device.name) == (2, device)
        assert {settings.rows_per_step for settings in study.settings.values()} == {2 * 4}
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert Study.open(options).device.name == "cpu"


def test_a_runs_hours_are_those_of_its_plan(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    options = StudyOptions(grid="remapping", out=out, ranks=2, gpu="cpu", overrides=(f"data.dir={tiny_data}",))
    study = Study.open(options)
    for run in study.grid.runs:
        recipe = study.folder.write_recipe(run, study.folder.recipe(run.name))
        settings = resolve_plan(str(recipe), list(options.overrides), None, 2)
        if run.teacher_run is None:
            sizes = {"vocab_size": settings.corpus.vocab_size, "seq_len": 32, "pad_token_id": 0}
            student_model_config(settings.config.student, **sizes).save_pretrained(study.folder.run(run.name).export)
        device = find_device("cpu", 2)
        plan = Plan(settings, build_shapes(settings), device, nodes=1)
        assert study.costs[run.name] == Cost(12, plan.tokens, plan.flops, plan.hours)
        assert plan.step_time(plan.stage).exposed > 0


def test_teachers_that_differ_in_their_vocabulary_alone_cost_different_hours(
    tiny_text: Path, tiny_data: Path, tmp_path: Path
) -> None:
    letters = tmp_path / "letters"
    arguments = ["--text", str(tiny_text), "--out", str(letters), "--seq-len", "32", "--workers", "1"]
    assert main(["prepare", *arguments, "--train-tokenizer", "60", "--kind", "characters", "--uncased"]) == 0
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"seeds: [1]\nsettings: {{teacher: {{vocabulary: shared}}, data: {{dir: {tiny_data}}}}}\n"
        f"teachers: {{words: {{}}, letters: {{data: {{dir: {letters}}}}}}}\nruns: [{{teacher: [words, letters]}}]\n"
    )
    costs = Study.open(StudyOptions(grid=str(grid), out=tmp_path / "study", ranks=1, gpu="cpu")).costs
    assert costs["with_letters-s1"].flops > 1.2 * costs["with_words-s1"].flops
