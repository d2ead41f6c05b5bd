"""Runs that are also evaluated on further text: beside a teacher with another vocabulary, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.corpus import Make
from harness.runs import back_to, rows_of
from harness.tiny import TinyRun


@pytest.fixture(scope="module")
def books(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, make: Make) -> Path:
    """Other text than `tiny_data`, a sentence a row, with its tokenizer."""
    options = {"tokenizer": str(tiny_data), "seq_len": 24, "one_sentence_per_row": True}
    return make(tmp_path_factory.mktemp("books") / "data", corpus_file, **options, allow_unknown=True).folder


def evaluations(run: Path) -> list[dict[str, Any]]:
    rows = rows_of(run)
    return [row for row in rows if any(key.startswith("eval_hard_loss") for key in row)]


@pytest.mark.slow
def test_a_run_and_its_resume(
    tiny_run: TinyRun, tiny_data: Path, bpe_teacher: Path, books: Path, tmp_path: Path
) -> None:
    run, resumed, renamed = (tmp_path / name for name in ("run", "resumed", "renamed"))
    settings = [
        *(f"teacher.path={bpe_teacher}", "teacher.vocabulary=shared", "train.eval_every=2"),
        *("train.checkpoint_every=2", "train.keep_last=9", "deepspeed.csv_monitor.enabled=true"),
    ]
    sets = [f"train.eval_sets.same={tiny_data}", f"train.eval_sets.books={books}"]

    def start(folder: Path, *more: str) -> str:
        monitor = f"deepspeed.csv_monitor.output_path={tmp_path}/csv_{folder.name}"
        return tiny_run(folder, *settings, monitor, *more, ranks=2)

    output = start(run, *sets)
    rows = evaluations(run)
    keys = ("eval_hard_loss.same", "eval_hard_loss.books")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["eval_hard_loss.same"] == row["eval_hard_loss"], "the same rows, masks and student"
        assert row["eval_hard_loss.books"] != row["eval_hard_loss"]
        assert f"; same {row[keys[0]]:.4f}, books {row[keys[1]]:.4f}\n" in output
    card = (run / "export" / "README.md").read_text()
    assert f"| held-out MLM loss, books | {round(rows[1][keys[1]], 4)} |" in card
    curve = next((tmp_path / "csv_run").rglob("*eval_hard_loss.books.csv")).read_text().splitlines()
    assert curve == ["step,eval_hard_loss.books", *(f"{8 * row['step']},{row[keys[1]]}" for row in rows)]

    back_to(2, run, resumed)
    metrics = resumed / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"eval_hard_loss"' not in line]
    metrics.write_text("".join(f"{line}\n" for line in kept))  # killed after the checkpoint, before the evaluation
    assert "changed since" not in "".join(line for line in start(resumed, *sets).splitlines() if "eval_sets" in line)
    assert evaluations(resumed) == rows

    # A resume may change the sets; what is there stays as it is.
    back_to(2, run, renamed)
    output = start(renamed, f"train.eval_sets.novels={books}")
    assert f"changed since that checkpoint: train.eval_sets.novels: (not set) -> {books}" in output
    first, last = evaluations(renamed)
    assert first == rows[0]
    without = {key: loss for key, loss in rows[1].items() if key not in keys}
    assert last == {**without, "eval_hard_loss.novels": rows[1][keys[1]]}, "nothing else changes"


def test_a_mistake_ends_a_run_before_training(tiny_run: TinyRun, sentence_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = tiny_run(run, f"train.eval_sets.a={sentence_data}", code=2)
    assert f"error: train.eval_sets.a={str(sentence_data)!r}: has no held-out rows; prepare it with" in output
    assert not run.exists()
