"""`dwt-ds export` gives what the run itself exported, from any ZeRO stage, and nothing of a damaged checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dwt_ds.cli.main import main
from dwt_ds.export.verify import verify

Train = Callable[..., tuple[int, str]]


def held_out_loss(export: Path) -> str:
    """As its card has it."""
    return (export / "README.md").read_text().split("| held-out MLM loss | ")[1].split(" |")[0]


def last_evaluation(run: Path) -> str:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return str(round(rows[-1]["eval_hard_loss"], 4))


@pytest.mark.parametrize(
    "config",
    [
        "zero2_bf16",
        pytest.param("zero0", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_the_export_of_a_checkpoint_is_the_runs(config: str, train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path / 'run'}", "train.max_steps=2", f"deepspeed_config={config}"]
    code, output = train(2, [str(tiny_recipe), *settings])
    assert code == 0, output
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    ours, runs = load_file(out / "model.safetensors"), load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert ours.keys() == runs.keys()
    assert all(ours[name].equal(runs[name]) for name in runs)
    assert AutoModelForMaskedLM.from_pretrained(out).config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(out)) == 298
    assert "* step 0: 2 ranks" in (out / "README.md").read_text()
    assert held_out_loss(out) == held_out_loss(tmp_path / "run" / "export") == last_evaluation(tmp_path / "run")
    assert not [finding.problems for finding in verify(tmp_path / "run") if finding.problems]

    # The last export was not written: it is written by the next start, which evaluates nothing anew.
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "run" / "complete.json").unlink()
    code, output = train(2, [str(tiny_recipe), *settings])
    assert code == 0, output
    assert held_out_loss(tmp_path / "run" / "export") == last_evaluation(tmp_path / "run")

    shard = next((tmp_path / "run" / "checkpoints").rglob("*model_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["export", str(shard.parent), "--out", str(tmp_path / "damaged")]) == 2
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "damaged")]) == 2
    assert not (tmp_path / "damaged").exists()
