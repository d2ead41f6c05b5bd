"""Records known by their content, broken ones, FASTA, and files that are refused before anything is read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from harness.corpus import compressed, read_file

from dwt_ds.cli.main import main
from dwt_ds.prepare import reading, records, sources
from dwt_ds.prepare.reading import find_files
from dwt_ds.prepare.sources import SourceCounts, TextForm

DOCUMENTS = ["A heading\nFirst line of the first.", "Second document, caf\u00e9.", "Third:\nits end."]
JSON_LINES = "".join(json.dumps({"id": "1", "url": "x", "title": "A", "text": text}) + "\n" for text in DOCUMENTS)
DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["wiki_00", "wiki_00.gz", "AA/wiki_00.zst", "c4.json", "c4.json.gz", "books.txt"])
def test_json_lines_of_any_name_are_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    suffix = path.suffix if path.suffix in (".gz", ".zst") else ""
    path.write_bytes(compressed(JSON_LINES.encode(), suffix))
    [file] = find_files([f"{tmp_path}/**"], TextForm())
    counts = SourceCounts()
    assert list(file.documents(counts)) == DOCUMENTS
    assert counts.read_as == "JSON lines"


@pytest.mark.parametrize(
    "content",
    [
        "\n\n" + JSON_LINES,
        "\ufeff" + JSON_LINES,
        "{broken\n" + JSON_LINES,
        JSON_LINES.split("\n")[0] + "\nnot json" * 5 + "\n" + JSON_LINES,
        JSON_LINES + f"{DEEP}\nnot json\n",
        json.dumps({"text": DOCUMENTS[0], "more": "x" * 30_000}) + "\n" + JSON_LINES,
    ],
)
def test_json_lines_are_known_by_several_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "wiki_00").write_text(content)
    documents, counts = read_file(tmp_path / "wiki_00")
    assert documents[-3:] == DOCUMENTS
    assert counts.unreadable_records == content.count("not json") + content.count(DEEP) + content.count("{broken")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[" + json.dumps({"text": "Prose."}) + "]"),
        ("wiki", json.dumps([{"text": "Prose."}, {"text": "More."}], indent=1)),
        ("wiki", json.dumps({"text": "Prose.", "more": 1}, indent=1)),
        ("wiki", '["One sentence.", "Another."]'),
        ("a.json.gz", "[\n1\n]"),
    ],
)
def test_json_of_another_layout_is_refused(tmp_path: Path, name: str, content: str) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match=f"{name} is JSON, but not one record a line: convert it"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "[[Category:Lamps]] are on this page.\n",
        "{{Infobox|name=Lamp}}\nA lamp.\n",
        '{"quoted" braces} are prose.\n',
        'The record is:\n{"text": "x"}\n',
        "[1] A footnote.\n",
        '["Quoted," he said.]\n',
    ],
)
def test_prose_that_begins_with_brackets_is_prose(tmp_path: Path, content: str) -> None:
    (tmp_path / "page").write_text(content)
    documents, counts = read_file(tmp_path / "page")
    assert documents == [content.strip()]
    assert counts.read_as == ""


def test_json_lines_without_the_column_name_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text('{"id": 1, "body": "Prose."}\n' * 7)
    with pytest.raises(ValueError, match='wiki_00 has no column "text" but id, body: name one with --text-column'):
        read_file(tmp_path / "wiki_00")
    assert len(read_file(tmp_path / "wiki_00", TextForm("body"))[0]) == 7


def test_a_deep_line_is_a_broken_line(tmp_path: Path) -> None:
    for deep in (DEEP, '{"text": ' * 100_000):
        (tmp_path / "deep.jsonl").write_text(f'{{"text": "A record."}}\n{deep}\n{{"text": "Another."}}\n')
        documents, counts = read_file(tmp_path / "deep.jsonl")
        assert documents == ["A record.", "Another."]
        assert counts.unreadable_records == 1


def test_a_record_longer_than_a_line_may_be_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 500_000
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "Next."}) + "\n")
    documents, counts = read_file(tmp_path / "book.jsonl")
    assert documents[-1] == "Next."
    assert "".join(documents[0].split()) == "".join(text.split())
    assert (counts.unreadable_records, counts.documents) == (0, 2)
    monkeypatch.setattr(records, "RECORD_CHARS", 1_500_000)  # memory holds no longer one
    monkeypatch.setattr(reading, "RECORD_CHARS", 1_500_000)
    assert read_file(tmp_path / "book.jsonl")[0] == ["Next."]


PROTEINS = ">sp|P1|ONE first\nMKVLA\nGGST*\n\n>two\nMKTAYIAK  QRQIS\nFV\n>empty\n>three\nACDEF\n>empty\n"


@pytest.mark.parametrize("name", ["p.fasta", "p.fa", "p.FAA", "p.fna", "p.fasta.gz", "p.fa.zst", "p.faa.xz"])
def test_fasta_is_a_document_a_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    suffix = path.suffix if path.suffix in (".gz", ".zst", ".xz") else ""
    path.write_bytes(compressed(PROTEINS.encode(), suffix))
    documents, counts = read_file(path)
    assert documents == ["MKVLAGGST*", "MKTAYIAKQRQISFV", "ACDEF"]
    assert (counts.documents, counts.lines, counts.unreadable_records) == (3, 3, 2)


FOLDED = "".join(
    f">{n} <mask>\n{line * 3}\n{line[:n]}\n" for n, line in enumerate(("ACDEFGHIK", "LMNPQRSTV", "WYACDEFGH"), start=1)
)


@pytest.mark.parametrize("name", ["proteins.txt", "p.pep", "p.seq.gz", "proteins"])
@pytest.mark.parametrize("lower", [False, True])
def test_fasta_of_any_name_is_read_as_fasta(tmp_path: Path, name: str, lower: bool) -> None:
    text = FOLDED if not lower else ">1\nacgtacgtacgtacgtacgtacgt\nacg\n>2\nttgg\n"
    (tmp_path / name).write_bytes(compressed(text.encode(), ".gz" if name.endswith(".gz") else ""))
    documents, counts = read_file(tmp_path / name)
    assert documents[0] == ("acgtacgtacgtacgtacgtacgtacg" if lower else "ACDEFGHIK" * 3 + "A")
    assert (counts.documents, counts.read_as) == (2 if lower else 3, "FASTA")


@pytest.mark.parametrize(
    "text", ["> quoted words of a mail\nAN ANSWER\n", ">ONE\nTWO\n", "> A\nA line of prose follows it.\n"]
)
def test_prose_that_begins_as_fasta_does_is_prose(tmp_path: Path, text: str) -> None:
    (tmp_path / "mail.txt").write_text(text)
    assert read_file(tmp_path / "mail.txt")[0] == [text.strip()]


def test_a_chromosome_comes_in_parts_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dwt_ds.prepare import fasta

    for module in (sources, fasta):
        monkeypatch.setattr(module, "LINE_CHARS", 100)
    monkeypatch.setattr(sources, "DOCUMENT_CHARS", 300)
    sequence = "ACGTTGCA" * 150
    lines = "\n".join(sequence[start : start + 7] for start in range(0, len(sequence), 7))
    (tmp_path / "c.fna").write_text(f";a comment\n>chr1\n{lines}\n>chr2\nAAAA\n")
    documents, counts = read_file(tmp_path / "c.fna")
    assert "".join(documents[:-1]).replace("\n", "") == sequence
    assert documents[-1] == "AAAA"
    assert all(len(line) <= 100 for document in documents for line in document.split("\n"))
    assert counts.long_lines_cut == len(sequence) // 100 - 1


def test_a_fasta_file_without_headers_is_refused_and_a_persian_text_is_not(tmp_path: Path) -> None:
    for name in ("corpus.fasta", "corpus.faa", "corpus.fa"):
        (tmp_path / name).write_text("A line of text.\n")
    for name in ("corpus.fasta", "corpus.faa"):
        with pytest.raises(ValueError, match=f'{name} is not FASTA: its first line does not begin with ">"'):
            read_file(tmp_path / name)
    assert read_file(tmp_path / "corpus.fa")[0] == ["A line of text."]


def test_a_zst_of_a_long_window_says_what_to_do(tmp_path: Path) -> None:
    # The header of a frame whose window is 2^31 bytes, and one raw block: RFC 8878, section 3.1.1.
    window = bytes([(31 - 10) << 3])
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + window + b"\x01\x00\x00"
    (tmp_path / "corpus.txt.zst").write_bytes(frame)
    with pytest.raises(ValueError, match=r"zst was compressed with a window .*: decompress it with `zstd -d"):
        read_file(tmp_path / "corpus.txt.zst")


@pytest.mark.parametrize("content", [b"PAR1 no parquet", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_errors_of_parquet_name_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged"):
        read_file(tmp_path / "bad.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["x" * 1000] * 5000}), tmp_path / "cut.parquet")
    raw = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(raw[:40] + b"\xff" * 40 + raw[80:])
    with pytest.raises(ValueError, match=r"cut\.parquet is damaged"):
        read_file(tmp_path / "cut.parquet")


def test_file_names_that_are_not_utf_8_are_refused_at_the_start(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    os.mkdir(folder + b"/dossier\xe9")
    for name in (b"/caf\xe9.txt", b"/dossier\xe9/plain.txt"):
        with open(folder + name, "w") as file:
            file.write("Some text.\n")
    for pattern, shown in (("caf*.txt", r"caf\\udce9.txt"), ("doss*/*.txt", r"dossier\\udce9/plain.txt")):
        with pytest.raises(ValueError, match=rf"{shown}': has .* a byte that is not UTF-8; rename it"):
            find_files([f"{tmp_path}/{pattern}"], TextForm())


def test_output_and_manifest_tell_what_was_read_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"Plain paragraph number {i} has a few words."}).encode() for i in range(60)]
    lines[7] = lines[7].replace(b"words", b"w\xf6rds")
    lines.append(DEEP.encode())
    (tmp_path / "wiki_00").write_bytes(b"\n".join(lines))
    words = ["prepare", "--text", "wiki_00", "--train-tokenizer", "300", "--out", "out", "--workers", "1"]
    assert main([*words, "--seq-len", "32"]) == 0
    assert "wiki_00  (read as JSON lines)  (1 invalid sequences of bytes)" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["documents"], manifest["dropped"]["invalid_utf8"]) == (60, 1)
    assert manifest["dropped"]["unreadable_records"] == 1
    assert manifest["sources"][0]["read_as"] == "JSON lines"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "text,id\nA lamp.,1\n", "is a table, not text"),
        ("a.TSV.gz", "text\tid\nA lamp.\t1\n", "is a table, not text"),
        ("dump.xml", '\n<?xml version="1.0"?>\n<page>A lamp.</page>\n', "is XML or HTML"),
        ("dump", '<mediawiki xml:lang="en">\n<page>A lamp.</page>\n', "is XML or HTML"),
        ("page.html", "<!DOCTYPE html>\n<p>A lamp.</p>\n", "is XML or HTML"),
        ("wiki_00", '<doc id="1" title="Lamp">\nLamp\n\nA lamp.\n</doc>\n', "is XML or HTML"),
    ],
)
def test_tables_and_markup_are_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match=f"{name} {told}"):
        read_file(tmp_path / name)


@pytest.mark.parametrize("content", ["<p> is a tag of HTML.\n", "<document> is a word here.\n", "a,b\n1,2\n"])
def test_prose_that_speaks_of_markup_is_prose(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert read_file(tmp_path / "a.txt")[0] == [content.strip()]
