"""What `dwt-ds plan` prints about settings, memory and speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dwt_ds.cli.main import main
from dwt_ds.plan.corpus import resolve_plan

OFFLOAD = "offload: transfers and the optimizer on the CPU are not counted"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_all_settings_as_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.max_steps=30"]
    _, _, after = plan(capsys, "paper_weak", "--config", *overrides).partition("\nrecipe, resolved\n")
    recipe, _, values = after.partition("\nDeepSpeed JSON, resolved (zero2_bf16.json)\n")
    settings = resolve_plan("paper_weak", overrides, None, 8)
    assert yaml.safe_load(recipe) == settings.config.to_dict()
    assert json.loads(values) == settings.ds_values
    assert "auto" not in values
    assert "resolved" not in plan(capsys, "paper_weak", *overrides)


def test_every_part_is_shown_at_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "paper_weak")
    for part in ("activations", "gradients", "temporaries", "loss: logits, head gradients"):
        assert re.search(rf"\n  {part}( +[\d.,]+){{4}}\n", text), part
    assert re.search(r"\n  peak( +[\d.,]+){4}\n", text)
    assert "the parts do not all peak at once" in text


def test_the_plan_says_what_its_time_counts(capsys: pytest.CaptureFixture[str]) -> None:
    plain = plan(capsys, "paper_weak")
    assert OFFLOAD not in plain
    assert "recomputed" not in plain
    unknown = "the adaptive weight may release the teacher; it is counted to the end (--release-at SHARE: until then)"
    assert unknown not in plain
    others = ["train.activation_checkpointing=true", "distill.soft_weight={schedule: adaptive, start: 4}"]
    text = plan(capsys, "paper_weak", *others, "--deepspeed_config", "zero2_offload")
    assert unknown in text
    assert OFFLOAD in text
    assert re.search(r"[\d.]+ GFLOP per row recomputed \(activation checkpointing\): time only", text)
