"""Runs in a study's folder that the study accepts as its own, and runs that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dwt_ds.cli.main import main
from dwt_ds.study.grid import load_grid


def test_a_folder_with_other_settings_is_refused(
    exit_codes: dict[int, int], remapping: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert main([*remapping, "train.warmup_ratio=0.2"]) == 0
    error = refusal(*remapping, "train.warmup_ratio=0.2", "train.learning_rate=0.5")
    assert "train.learning_rate=0.001, this study has 0.5" in error
    assert "train.warmup_ratio=0.2, this study has 0.05" in refusal(*remapping)  # a default of this study
    remapping.append("train.warmup_ratio=0.2")
    assert "deepspeed={}" in refusal(*remapping, "deepspeed.zero_optimization.overlap_comm=true")
    # These do not affect what is learned.
    assert main([*remapping, "train.log_every=3", "train.export_every=0", "data.workers=1"]) == 0

    # As an older version, which had fewer settings, would have left it.
    path = tmp_path / "study" / "alone-s42" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["fused"], config["teacher"]["sharded"], config["train"]["spike_sigma"]
    path.write_text(yaml.safe_dump(config))
    assert main(remapping) == 0
    assert "fused.layer_norm='auto'" in refusal(*remapping, "fused.layer_norm=torch")

    # A study that has moved, given by its absolute path.
    (tmp_path / "study").rename(tmp_path / "moved")
    assert main(["study", "remapping", "--out", str(tmp_path / "moved"), *remapping[4:], "--dry-run"]) == 0


def test_sets_may_come_and_go_but_one_name_is_one_text(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    grid = tmp_path / "one.yaml"
    grid.write_text("runs: [{teacher: none}]")
    arguments = ["study", str(grid), "--out", str(tmp_path / "study"), f"data.dir={tiny_data}"]
    books = f"train.eval_sets.books={tiny_data}"
    missing = f"train.eval_sets.books={tmp_path}/no"
    assert f"error: train.eval_sets.books: data folder {tmp_path}/no does not exist" in refusal(*arguments, missing)
    assert main([*arguments, missing, "--dry-run"]) == 0
    assert main([*arguments, books]) == 0
    assert main([*arguments, books, f"train.eval_sets.wiki={tiny_data}"]) == 0
    assert main(arguments) == 0
    assert f"was made with train.eval_sets.books={str(tiny_data)!r}, this study has" in refusal(*arguments, missing)


def test_a_folder_with_another_batch_or_other_data_is_refused(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    arguments = ["study", "remapping", "--out", str(tmp_path / "study")]
    assert main([*arguments, f"data.dir={tiny_data}"]) == 0
    error = refusal(*arguments, f"data.dir={tiny_data}", "--ranks", "1")
    assert "train_batch_size=8, this study has 4" in error
    assert main([*arguments, f"data.dir={tiny_data}", "--ranks", "1", "train.micro_batch_size=8"]) == 0

    manifest = json.loads((tiny_data / "manifest.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main([*arguments, f"data.dir={other}"]) == 0  # the same rows elsewhere
    (other / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0123"}))
    assert "this study has '0123'" in refusal(*arguments, f"data.dir={other}")
    assert "data.dir=" in refusal(*arguments, f"data.dir={tmp_path / 'nowhere'}", "--dry-run")


def test_what_only_the_json_says_is_compared_too(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    params = {"lr": "auto", "betas": [0.9, 0.98], "eps": "auto", "weight_decay": 0.02}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": params}}))
    settings = [f"data.dir={tiny_data}", f"deepspeed_config={path}"]
    arguments = ["study", "remapping", "--out", str(tmp_path / "study"), *settings]
    assert main(arguments) == 0
    assert "decay: 0.02" in (tmp_path / "study" / "alone-s42" / "config.yaml").read_text()
    assert main(arguments) == 0
    path.write_text(json.dumps({"optimizer": {"type": "Adam", "params": params}}))
    assert "optimizer.type='AdamW', this study has 'Adam'" in refusal(*arguments)
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {**params, "weight_decay": 0.03}}}))
    assert "train.weight_decay=0.02, this study has 0.03" in refusal(*arguments)


def test_runs_without_a_teacher_have_no_use_for_a_soft_weight(
    exit_codes: dict[int, int], remapping: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    adaptive = "distill.soft_weight={schedule: adaptive, start: 4, end: 0}"
    assert main([*remapping, adaptive]) == 0
    assert "with_teacher4-s42: was made with distill.soft_weight.schedule='adaptive'" in refusal(*remapping)
    grid = tmp_path / "alone.yaml"
    grid.write_text("runs: [{teacher: none}]")
    assert main(["study", str(grid), *remapping[2:]]) == 0
    assert (tmp_path / "study" / "alone-s42" / "starts").read_text() == "started\n"


def test_what_only_the_json_decides_is_the_same(
    exit_codes: dict[int, int], tiny_data: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A schedule without a warm-up leaves the grid's own warm-up without effect, and out of config.yaml."""
    one_cycle = [
        "deepspeed.scheduler.type=OneCycle",
        "deepspeed.scheduler.params={cycle_min_lr: 1e-5, cycle_max_lr: 1e-3}",
    ]
    settings = [f"data.dir={tiny_data}", "train.learning_rate=1e-3", "train.warmup_ratio=0.2", *one_cycle]
    arguments = ["study", "remapping", "--out", str(tmp_path / "study"), *settings]
    assert main(arguments) == 0
    assert "warmup_ratio" not in (tmp_path / "study" / "alone-s42" / "config.yaml").read_text()
    assert main(arguments) == 0
    assert "cycle_min_lr" in refusal(*arguments, "deepspeed.scheduler.params.cycle_min_lr=2e-5")


@pytest.mark.usefixtures("exit_codes")
@pytest.mark.parametrize("name", ["remapping.json", "recipes/{run}.yaml"])
def test_a_file_that_no_study_wrote_is_never_written_over(
    name: str, remapping: list[str], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    file = tmp_path / "study" / name.format(run=load_grid("remapping", "smoke", ()).runs[0].name)
    file.parent.mkdir(parents=True)
    file.write_text('# mine\n{"runs": [{"teacher": "none"}]}\n')
    assert f"the study would replace {file}; rename it" in refusal(*remapping)
    assert file.read_text().startswith("# mine")
    file.unlink()
    assert main(remapping) == 0
    assert main(remapping) == 0
