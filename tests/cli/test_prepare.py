"""`dwt-ds prepare` as a user types it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from harness.errors import Refusal

from dwt_ds.cli.main import main
from dwt_ds.data.prepared import PreparedData


def run(*words: object) -> int:
    return main(["prepare", *map(str, words)])


def test_from_files_to_a_table_and_examples(
    tmp_path: Path, corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps({"text": "Another document stands here. It has two sentences."}) + "\n")
    options = ("--train-tokenizer", 300, "--out", out, "--every", 4, "--seq-len", 64, "--workers", 1)
    assert run("--text", corpus_file, second, *options, "--show", 2) == 0
    printed = capsys.readouterr().out
    data = PreparedData.open(out)
    assert data.manifest.documents == 61
    assert data.manifest.every == 4
    assert data.manifest.seq_len == 64
    assert f"{data.manifest.tokens:,}" in printed
    assert f"{out} is ready" in printed
    examples = printed.split("\nrow ")[1:]
    assert len(examples) == 2
    assert "-> [MASK]}" in examples[0]
    assert "[CLS]" in examples[0]
    assert examples[0].startswith("0: 64 tokens, 9 to predict")

    assert run("--out", out, "--show", 1) == 0
    again = capsys.readouterr().out
    assert examples[0].split("\n")[1] in again


def test_one_sentence_per_row_and_apart(tmp_path: Path, corpus_file: Path, vocab_file: Path) -> None:
    assert run("--text", corpus_file, "--tokenizer", vocab_file, "--out", tmp_path / "s", "--one-sentence-per-row") == 0
    assert PreparedData.open(tmp_path / "s").manifest.form == "one_sentence_per_row"
    assert run("--text", corpus_file, "--tokenizer", vocab_file, "--out", tmp_path / "a", "--keep-documents-apart") == 0
    assert PreparedData.open(tmp_path / "a").manifest.settings["identity"]["join_documents"] is False


def test_mistakes_are_reported_on_one_line(
    tmp_path: Path, corpus_file: Path, vocab_file: Path, refusal: Refusal
) -> None:
    usual = ("--text", corpus_file, "--tokenizer", vocab_file)
    for words, message in (
        (("--text", tmp_path / "none.txt", "--tokenizer", vocab_file), "none.txt: no such file"),
        (("--tokenizer", vocab_file), "nothing to read: give --text FILE"),
        (("--text", corpus_file), "give either --tokenizer"),
        ((*usual, "--train-tokenizer", 500), "give either --tokenizer"),
        (("--text", corpus_file, "--train-tokenizer", 0), "--train-tokenizer=0: must be above 0"),
        (("--text", corpus_file, "--tokenizer", tmp_path / "v.txt"), "v.txt: no such file; correct the path"),
        ((*usual, "--every", 0), "--every=0: must be at least 1"),
        ((*usual, "--seq-len", 4), "--seq-len=4: must be at least 8"),
        ((*usual, "--min-chars", 0), "--min-chars=0: must be at least 1"),
        ((*usual, "--max-chars", 5), "--max-chars=5: must be at least --min-chars, 10"),
        ((*usual, "--validation", 0.7), "--validation=0.7: must be below 0.5"),
        ((*usual, "--validation", "nan"), "--validation=nan: must be"),
        ((*usual, "--seed", -1), "--seed=-1: must be at least 0"),
        ((*usual, "--workers", 0), "--workers=0: must be at least 1"),
        ((*usual, "--show", -1), "--show=-1: must be at least 0"),
        (("--show", 3), "does not exist"),
    ):
        assert message in refusal("prepare", *words, "--out", tmp_path / "data")
        assert not (tmp_path / "data").exists()


def test_skipped_sources_are_listed(
    tmp_path: Path, corpus_file: Path, vocab_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    words = ("--text", tmp_path / "*.txt", corpus_file, "--tokenizer", vocab_file, "--out", tmp_path / "data")
    assert run(*words) == 0
    table = capsys.readouterr().out
    assert "empty.txt  (skipped: empty)" in table
    assert "binary.txt  (skipped: binary)" in table
    assert table.splitlines()[-1] == (
        f"warning: 1 source was skipped as binary (a zero byte near the start): {tmp_path / 'binary.txt'}"
    )
    assert PreparedData.open(tmp_path / "data").manifest.dropped["skipped_sources"] == 2
    assert run("--text", tmp_path / "empty.txt", "--tokenizer", vocab_file, "--out", tmp_path / "none") == 2
    assert "empty.txt (empty)" in capsys.readouterr().err.partition("no text in ")[2]
    (tmp_path / "nested.jsonl").write_text('{"text": {"body": "A line of text."}}\n')
    assert run("--text", tmp_path / "nested.jsonl", "--tokenizer", vocab_file, "--out", tmp_path / "none") == 2
    assert "nested.jsonl (1 records without text)" in capsys.readouterr().err


def test_letters_that_the_terminal_lacks_are_escaped(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in a file's name, and in the rows that are shown; the data was ready, and the command had failed."""
    (tmp_path / "tëxt.txt").write_bytes(corpus_file.read_bytes())
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert (
        run("--text", tmp_path / "tëxt.txt", "--train-tokenizer", 300, "--out", tmp_path / "data", "--workers", 1) == 0
    )
    sys.stdout.flush()
    assert rb"t\xebxt.txt" in printed.getvalue()
