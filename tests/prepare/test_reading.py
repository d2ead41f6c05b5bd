"""Documents out of files of every form, and what happens to bad ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from harness.corpus import compressed, read_file

from dwt_ds.prepare import reading, sources
from dwt_ds.prepare.hub import HubDataset
from dwt_ds.prepare.reading import find_files
from dwt_ds.prepare.sources import SourceCounts, TextForm

DOCUMENTS = ["A heading\nFirst line of the first.", "Second document, caf\u00e9.", "Third:\nits end."]
TEXT = "A heading\nFirst line of the first.\n\n\n  Second document, caf\u00e9.  \r\n\t\nThird:\nits end."


@pytest.mark.parametrize(
    "name",
    [form + suffix for form in (".txt", ".jsonl", ".md") for suffix in ("", ".gz", ".xz", ".zst")] + [".parquet"],
)
def test_every_form_and_compression(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"corpus{name}"
    form, _, suffix = name[1:].partition(".")
    suffix = suffix and "." + suffix
    if form == "parquet":
        pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3], "text": DOCUMENTS}), path)
    elif form == "jsonl":
        lines = [json.dumps({"text": document, "id": 1}) for document in DOCUMENTS]
        path.write_bytes(compressed("\n".join(lines).encode(), suffix))
    else:
        path.write_bytes(compressed(TEXT.encode(), suffix))
    documents, counts = read_file(path)
    assert documents == DOCUMENTS
    assert (counts.documents, counts.lines, counts.skipped) == (3, 5, "")
    assert counts.characters == sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.fasta", "corpus.jsonl", "corpus.parquet"])
def test_lines_end_with_lf_or_cr_or_both(name: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of few bytes, so that some begin within a line end; a CR alone is how lines of old Macs end."""
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 7)
    path, numbers = tmp_path / name, range(600)
    expected = [f"First {number}.\nSecond." for number in numbers]
    if name.endswith("fasta"):
        expected = [f"ACGT{'ACGT' * (number % 5)}" for number in numbers]
        path.write_bytes(
            "".join(f">{number}{end}ACGT{end}{line[4:]}{end}" for number, line in enumerate(expected)).encode()
        )
    elif name.endswith("txt"):
        path.write_bytes("".join(document.replace("\n", end) + end + end for document in expected).encode())
    elif name.endswith("jsonl"):
        path.write_bytes("".join(json.dumps({"text": text.replace("\n", end)}) + end for text in expected).encode())
    else:
        column = [text.replace("\n", end) for text in expected]
        pyarrow.parquet.write_table(pa.table({"text": column}), path)
    assert path.stat().st_size > reading._PROBE_BYTES or name.endswith("parquet")
    assert read_file(path)[0] == expected


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_several_members_in_one_compressed_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.txt{suffix}"
    path.write_bytes(compressed(b"One.\n\n", suffix) + compressed(b"Two.\n", suffix))
    assert read_file(path)[0] == ["One.", "Two."]


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary")])
def test_empty_and_binary_files_are_skipped_with_their_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    documents, counts = read_file(path)
    assert documents == []
    assert counts.skipped == reason


@pytest.mark.slow
@pytest.mark.parametrize("separator", [" ", ""])
def test_a_line_of_fifty_megabytes_is_cut_and_nothing_is_lost(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "long.txt"
    word = "vel\u00e9" + separator
    text = word * (50_000_000 // len(word.encode()))
    path.write_text(text)
    documents, counts = read_file(path)
    assert counts.long_lines_cut >= 40
    assert all(len(line) <= sources.LINE_CHARS for document in documents for line in document.split("\n"))
    assert all(len(document) <= sources.DOCUMENT_CHARS + sources.LINE_CHARS + 100 for document in documents)
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert counts.invalid_utf8 == 0


def test_each_cut_of_a_long_line_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 700)
    for module in (reading, sources):
        monkeypatch.setattr(module, "LINE_CHARS", 1000)
    path = tmp_path / "long.txt"
    path.write_text("words " * 3000)
    [document], counts = read_file(path)
    assert document.split() == ["words"] * 3000
    assert 18 <= counts.long_lines_cut == counts.lines - 1


def test_a_long_document_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DOCUMENT_CHARS", 50)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {n}\n" for n in range(30)) + "\nnext\n")
    documents, counts = read_file(path)
    assert "\n".join(documents) == "\n".join([f"line {n}" for n in range(30)] + ["next"])
    assert documents[-1] == "next"
    assert counts.documents == len(documents) == 5


def test_unreadable_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "Good."}\nnot json\n{"text": 5}\n["text"]\n\n{"text": "\\ud800x"}\n{"txt": "No text."}\n')
    documents, counts = read_file(path)
    assert documents == ["Good.", "?x"]
    assert (counts.unreadable_records, counts.invalid_utf8) == (4, 1)


def test_records_that_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"line": text}) + "\n" for text in ["a 1", "a 2", "", "", "b 1", " ", "c 1"]))
    assert read_file(path, TextForm("line", are_lines=True))[0] == ["a 1\na 2", "b 1", "c 1"]


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ValueError, match='has no column "text" but id, body: name one with --text-column'):
        read_file(path)
    assert read_file(path, TextForm("body"))[0] == ["x"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_compression_names_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.txt{suffix}"
    whole = compressed(b"".join(b"Line %d of many.\n" % n for n in range(20000)), suffix)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"corpus.txt\.\w+ is damaged"):
        read_file(path)
    path.write_bytes(b"this is no archive at all")
    with pytest.raises(ValueError, match=r"corpus.txt\.\w+ is damaged"):
        read_file(path)


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    found = find_files([f"{tmp_path}/*.txt", str(tmp_path / "c.md")], TextForm())
    assert [file.path.name for file in found] == ["a.txt", "b.txt", "c.md"]
    with pytest.raises(FileNotFoundError, match=r"--text .*\*.rst: no such file"):
        find_files([f"{tmp_path}/*.rst"], TextForm())
    with pytest.raises(ValueError, match="is a folder: name its files"):
        find_files([str(tmp_path)], TextForm())
    (tmp_path / "link").symlink_to(tmp_path)
    for again in ("a.txt", "link/a.txt"):
        with pytest.raises(ValueError, match="a.txt is named twice"):
            find_files([f"{tmp_path}/*.txt", str(tmp_path / again)], TextForm())


def test_a_file_that_is_written_again_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    [file] = find_files([str(path)], TextForm())
    before = file.identity()
    path.write_text("two")
    os.utime(path, ns=(0, before["modified_ns"] + 1))
    assert file.identity() != before


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    table = datasets.Dataset.from_dict({"text": DOCUMENTS + [None], "id": [1, 2, 3, 4]})

    def save(kind: str) -> str:
        folder = tmp_path / kind
        if kind == "disk":
            table.save_to_disk(str(folder))
        else:
            folder.mkdir()
            table.to_parquet(str(folder / "train.parquet"))
        return str(folder)

    return save


@pytest.mark.parametrize(("kind", "streaming"), [("disk", False), ("parquet", False), ("parquet", True)])
def test_datasets(saved: Callable[[str], str], kind: str, streaming: bool) -> None:
    source = HubDataset.parse(saved(kind), streaming, TextForm())
    for _ in range(2):  # it is read twice
        counts = SourceCounts()
        assert list(source.documents(counts)) == DOCUMENTS
        assert (counts.unreadable_records, counts.position) == (1, 4)
    assert source.size == (0 if streaming else 4)
    assert json.loads(json.dumps(source.identity())) == source.identity()


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_a_dataset_of_as_many_other_records_is_another(saved: Callable[[str], str], kind: str) -> None:
    folder = saved(kind)
    before = HubDataset(folder).identity()
    shutil.rmtree(folder)
    others = datasets.Dataset.from_dict({"text": ["Other text."] * 4})
    others.save_to_disk(folder) if kind == "disk" else others.to_parquet(f"{folder}/train.parquet")
    assert HubDataset(folder).identity() != before


def test_the_config_of_a_dataset_is_the_one_that_is_named(tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.txt\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Text of {name}.\n")
    source = HubDataset.parse(f"{tmp_path}:two", False, TextForm())
    assert list(source.documents(SourceCounts())) == ["Text of two."]


def test_splits_of_saved_datasets(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}, split=name) for name in ("seen", "held_out")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["seen"].save_to_disk(str(tmp_path / "one"))

    def read(name: str) -> list[str]:
        return list(HubDataset.parse(f"{tmp_path}/{name}", False, TextForm()).documents(SourceCounts()))

    assert [read("both::seen"), read("both::held_out"), read("one"), read("one::seen")] == [
        ["seen"],
        ["held_out"],
        ["seen"],
        ["seen"],
    ]
    for name, splits_there in (("both", "seen, held_out"), ("one::held_out", "train, seen")):
        with pytest.raises(ValueError, match=rf"cannot be loaded: it has no split \w+ \(but {splits_there}\)"):
            read(name)


def test_a_folder_named_like_a_reader_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset("text")` reads all files of the current folder as text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Nobody named these notes.\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="--dataset text::train: there is no such folder, nor such a dataset"):
            list(HubDataset("text", streaming=streaming).documents(SourceCounts()))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "corpus.txt").write_text("The text of the folder.\n")
    for streaming in (False, True):
        documents = list(HubDataset("text", streaming=streaming).documents(SourceCounts()))
        assert documents == ["The text of the folder."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", ("name", None, "train")),
        ("org/name:20231101.en", ("org/name", "20231101.en", "train")),
        ("name::validation", ("name", None, "validation")),
    ],
)
def test_dataset_names(text: str, expected: tuple[Any, ...]) -> None:
    source = HubDataset.parse(text, False, TextForm())
    assert (source.dataset, source.config, source.split) == expected


def test_datasets_that_cannot_be_read(saved: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write NAME, NAME:CONFIG"):
        HubDataset.parse("a:b:c:d", False, TextForm())
    with pytest.raises(ValueError, match="^--dataset [^ ]*nowhere::train cannot be loaded: "):
        list(HubDataset(str(tmp_path / "nowhere")).documents(SourceCounts()))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_bytes("text\nstraße\n".encode("latin-1"))
    with pytest.raises(ValueError, match="tables::train cannot be loaded: 'utf-8' codec can't decode byte 0xdf"):
        list(HubDataset(str(tmp_path / "tables")).documents(SourceCounts()))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "Good."}\n{"text": ' + "[" * 5000)
    with pytest.raises(ValueError, match=r"--dataset .*broken::train cannot be (read|loaded): "):
        list(HubDataset(str(tmp_path / "broken"), streaming=True).documents(SourceCounts()))
    with pytest.raises(ValueError, match='has no column "body" but '):
        list(HubDataset(saved("disk"), form=TextForm("body")).documents(SourceCounts()))
