"""`dwt-ds export` gives what the run itself exported, from any ZeRO stage, and nothing of a damaged checkpoint."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from harness.runs import rows_of
from harness.tiny import TinyRun
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dwt_ds.base.files import read_manifest, write_manifest
from dwt_ds.cli.main import main
from dwt_ds.export.from_checkpoint import export_checkpoint
from dwt_ds.export.verify import verify


def held_out_loss(export: Path) -> str:
    """As its card has it."""
    return (export / "README.md").read_text().split("| held-out MLM loss | ")[1].split(" |")[0]


def last_evaluation(run: Path) -> str:
    return str(round(rows_of(run)[-1]["eval_hard_loss"], 4))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    "config",
    [
        "zero2_bf16",
        pytest.param("zero0", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_the_export_of_a_checkpoint_is_the_runs(
    config: str,
    tiny_run: TinyRun,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run[12] #2 'ü'"
    settings = ["train.max_steps=2", f"deepspeed_config={config}"]
    tiny_run(run, *settings, ranks=2)
    # DeepSpeed takes the name for a pattern, which this other run's folder matches.
    beside = shutil.copytree(run, tmp_path / "run1 #2 'ü'")
    for shard in (beside / "checkpoints").rglob("*.pt"):
        shard.write_bytes(b"other weights")
    out = tmp_path / "out"
    newest = run / "checkpoints" / "step_00000002"
    manifest = read_manifest(newest)
    manifest["settings"]["student"]["attention"] = "flash_attention_2"  # which an exporting machine need not have
    write_manifest(newest, manifest)
    assert main(["export", str(run), "--out", str(out)]) == 0
    manifest["settings"]["student"]["attention"] = "auto"
    write_manifest(newest, manifest)
    ours, runs = load_file(out / "model.safetensors"), load_file(run / "export" / "model.safetensors")
    assert ours.keys() == runs.keys()
    assert all(ours[name].equal(runs[name]) for name in runs)
    assert AutoModelForMaskedLM.from_pretrained(out).config.num_hidden_layers == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask()}
    assert len(AutoTokenizer.from_pretrained(out)) == 298
    assert "* step 0: 2 ranks" in (out / "README.md").read_text()
    assert held_out_loss(out) == held_out_loss(run / "export") == last_evaluation(run)
    assert not [finding.problems for finding in verify(run) if finding.problems]

    monkeypatch.chdir(newest.parent)
    assert main(["export", newest.name, "--out", str(tmp_path / "by its name")]) == 0

    # The last export was not written: it is written by the next start, which evaluates nothing anew.
    shutil.rmtree(run / "export")
    (run / "complete.json").unlink()
    tiny_run(run, *settings, ranks=2)
    assert held_out_loss(run / "export") == last_evaluation(run)

    with pytest.raises(ValueError, match="export: not a checkpoint; name a run, or a folder in its checkpoints/$"):
        export_checkpoint(run / "export", tmp_path / "of an export")
    with pytest.raises(ValueError, match="not a good checkpoint: manifest.json: lists no files; name the run"):
        export_checkpoint(tiny_data, tmp_path / "of a data set")
    tokenizer = run / "tokenizer" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.write_text("{}")
    with pytest.raises(FileNotFoundError, match="cannot be read: "):
        export_checkpoint(run, tmp_path / "without a tokenizer")
    tokenizer.write_bytes(content)
    newer = shutil.copytree(newest, newest.with_name("step_99999999"))
    next(newer.rglob("*model_states.pt")).write_bytes(b"cut off")
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "older")]) == 0
    assert capsys.readouterr().err.startswith("checkpoint not used: step_99999999/")
    shutil.rmtree(newer)
    shard = next((run / "checkpoints").rglob("*model_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["export", str(shard.parent), "--out", str(tmp_path / "damaged")]) == 2
    assert main(["export", str(run), "--out", str(tmp_path / "damaged")]) == 2
    assert not (tmp_path / "damaged").exists()
