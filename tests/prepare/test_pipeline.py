"""Preparing a folder: counts, sampling, duplicates, hold-out, independence of workers, refusals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from harness.corpus import Make, as_text, made_up_documents, split_sentences

from dwt_ds.data.manifest import Manifest
from dwt_ds.data.prepared import PreparedData, data_problems
from dwt_ds.data.rows import RowTable
from dwt_ds.data.show import warnings_of
from dwt_ds.prepare import sources
from dwt_ds.prepare.corpus import is_held_out
from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.packing import RowSettings, _packed_rows, rows_of_sentences
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.rows import _sentences
from dwt_ds.prepare.tokens import Tokens


def text_of(data: PreparedData, table: RowTable) -> list[str]:
    """Each row's text without spaces and special tokens."""
    entries = data.tokenizer().convert_ids_to_tokens(list(range(data.manifest.vocab_size)))
    pieces = [
        "" if special else entry.removeprefix("##")
        for entry, special in zip(entries, data.facts.is_special, strict=True)
    ]
    ids, lengths = table.rows(np.arange(len(table)))
    rows = zip(ids.tolist(), lengths.tolist(), strict=True)
    return ["".join(pieces[index] for index in row[:length]) for row, length in rows]


def squeezed(text: str) -> str:
    return "".join(text.split()).lower()


def test_packed_rows_hold_the_whole_text_in_order(tmp_path: Path, make: Make) -> None:
    documents = made_up_documents(12, seed=3)
    (tmp_path / "text.txt").write_text(as_text(documents))
    data = make(tmp_path / "data", tmp_path / "text.txt", seq_len=32, validation=0.0)
    assert "".join(text_of(data, data.train)) == squeezed(as_text(documents))
    lengths = np.asarray(data.train.lengths)
    assert (lengths[:-1] >= 31).all()
    ids, _ = data.train.rows(np.arange(len(data.train)))
    facts = data.facts
    assert (ids[:, 0] == facts.cls_id).all()
    assert (ids[np.arange(len(ids)), lengths - 1] == facts.sep_id).all()
    assert data.manifest.padding_share < 0.05
    assert data.manifest.documents == 12
    assert data.manifest.tokens == lengths.sum()
    assert data.manifest.rows == len(data.train)


def test_documents_meet_at_a_separator_or_are_kept_apart(tmp_path: Path, make: Make) -> None:
    documents = made_up_documents(40, seed=4, lines=1)
    (tmp_path / "text.txt").write_text(as_text(documents))
    options: dict[str, Any] = {"seq_len": 64, "validation": 0.0}
    joined = make(tmp_path / "joined", tmp_path / "text.txt", **options)
    apart = make(tmp_path / "apart", tmp_path / "text.txt", join_documents=False, **options)
    whole = [squeezed(lines[0]) for lines in documents]
    assert "".join(text_of(apart, apart.train)) == "".join(whole)
    for row in text_of(apart, apart.train):
        assert any(row in document for document in whole)
    separators = [int((row == joined.facts.sep_id).sum()) for row in joined.train.rows(np.arange(len(joined.train)))[0]]
    # Each of the 39 borders has its separator, but for those that fall on the end of a row.
    assert 25 <= sum(separators) - len(joined.train) <= 39
    assert joined.manifest.padding_share < apart.manifest.padding_share
    assert squeezed(as_text(documents)) == "".join(text_of(joined, joined.train))


def test_documents_of_a_row_have_one_separator_between_them() -> None:
    """None where only the separator would fit, nor for a document without tokens."""
    settings = RowSettings("", 1, 2, 9, 8, False, True, every=1, min_chars=0, max_chars=9, seed=0)
    documents = [np.full(tokens, 2 * 5) for tokens in (5, 2, 0, 2)]
    rows = _packed_rows(documents, settings)
    assert rows.lengths.tolist() == [7, 7]
    assert rows.tokens.tolist() == [1, 5, 5, 5, 5, 5, 2, 1, 5, 5, 2, 5, 5, 2]


def test_sentences_of_the_least_and_the_most_characters_are_kept() -> None:
    settings = RowSettings("", 1, 2, 9, 8, False, True, every=1, min_chars=3, max_chars=5, seed=0, drop_long=True)
    kept = _sentences(["ab", "abc", "abcde", "abcdef"], settings, ChunkCounts())
    assert [sentence.text for sentence in kept] == ["abc", "abcde"]


def test_the_gap_of_a_sentence_is_the_spaces_before_it_alone() -> None:
    settings = RowSettings("", 1, 2, 9, 8, False, True, every=1, min_chars=0, max_chars=99, seed=0)
    kept = _sentences(["The dog ran away. It slept.  Then it ate."], settings, ChunkCounts())
    assert [sentence.gap for sentence in kept] == ["", " ", "  "]


def test_a_sentence_without_tokens_has_no_row_of_its_own() -> None:
    settings = RowSettings("", 1, 2, 9, 8, True, False, every=1, min_chars=0, max_chars=9, seed=0)
    tokens = Tokens(np.array([5, 6]), np.array([True, True]), np.array([1, 0, 1]))
    rows = rows_of_sentences(tokens, np.arange(3), np.arange(3), settings)
    assert rows.tokens.tolist() == [1, 5, 2, 1, 6, 2]


def test_one_sentence_per_row(tmp_path: Path, make: Make) -> None:
    documents = made_up_documents(8, seed=5)
    (tmp_path / "text.txt").write_text(as_text(documents))
    data = make(tmp_path / "data", tmp_path / "text.txt", seq_len=128, one_sentence_per_row=True, validation=0.0)
    sentences = [squeezed(s) for lines in documents for line in lines for s in split_sentences(line)]
    assert text_of(data, data.train) == [s for s in sentences]
    assert data.manifest.sentences_kept == data.manifest.rows == len(sentences)
    cut = make(tmp_path / "cut", tmp_path / "text.txt", seq_len=16, one_sentence_per_row=True, validation=0.0)
    assert cut.manifest.rows == len(sentences)
    assert int(cut.train.lengths.max()) == 16
    assert cut.manifest.dropped["cut_to_row"] == int((np.asarray(data.train.lengths) > 16).sum())


def test_one_of_every_four_is_uniform_and_by_seed(tmp_path: Path, make: Make) -> None:
    documents = made_up_documents(30, seed=6)
    (tmp_path / "text.txt").write_text(as_text(documents))
    sentences = [squeezed(s) for lines in documents for line in lines for s in split_sentences(line)]
    position = {sentence: index for index, sentence in enumerate(sentences)}
    assert len(position) == len(sentences)
    taken_at: list[int] = []
    picked = []
    for seed in range(6):
        out = tmp_path / f"data{seed}"
        options: dict[str, Any] = {"seed": seed, "one_sentence_per_row": True, "validation": 0.0}
        data = make(out, tmp_path / "text.txt", every=4, seq_len=128, **options)
        kept = [position[row] for row in text_of(data, data.train)]
        assert abs(len(kept) - len(sentences) / 4) <= 1
        assert kept == sorted(kept)
        assert [index // 4 for index in kept] == list(range(len(kept)))
        assert data.manifest.sentences_seen == len(sentences)
        assert data.manifest.sentences_kept == len(kept)
        assert data.manifest.dropped["not_sampled"] == len(sentences) - len(kept)
        taken_at += [index % 4 for index in kept]
        picked.append(kept)
    counts = Counter(taken_at)
    expected = len(taken_at) / 4
    assert max(abs(counts[place] - expected) for place in range(4)) < 5 * np.sqrt(expected * 0.75)
    assert picked[0] != picked[1]


def test_duplicate_lines_and_short_sentences_are_dropped_and_counted_and_long_ones_cut(
    tmp_path: Path, make: Make
) -> None:
    documents = made_up_documents(10, seed=7)
    documents[3].insert(2, documents[1][0])
    documents[9].append(documents[1][0])
    documents[4].append("No.")
    documents[5].append("Long " + "vel " * 100 + "end.")
    (tmp_path / "text.txt").write_text(as_text(documents))
    options: dict[str, Any] = {"seq_len": 128, "one_sentence_per_row": True, "validation": 0.0, "max_chars": 300}
    data = make(tmp_path / "data", tmp_path / "text.txt", **options)
    dropped = data.manifest.dropped
    assert (dropped["duplicate_lines"], dropped["too_short"], dropped["too_long"]) == (2, 1, 0)
    texts = text_of(data, data.train)
    assert squeezed("Long " + "vel " * 100 + "end.") in "".join(texts)
    assert len(texts) == len(set(texts))
    repeated = [squeezed(s) for s in split_sentences(documents[1][0])]
    assert [texts.count(s) for s in repeated] == [1] * len(repeated)
    assert texts.index(repeated[0]) < texts.index(squeezed(split_sentences(documents[2][0])[0]))  # the first stays
    kept = make(tmp_path / "kept", tmp_path / "text.txt", keep_duplicates=True, **options)
    assert kept.manifest.rows == data.manifest.rows + 2 * len(repeated)


def test_held_out_documents_are_whole_and_in_no_training_row(tmp_path: Path, make: Make) -> None:
    documents = made_up_documents(50, seed=8)
    (tmp_path / "text.txt").write_text(as_text(documents))
    options: dict[str, Any] = {"seq_len": 128, "one_sentence_per_row": True, "validation": 0.1}
    data = make(tmp_path / "data", tmp_path / "text.txt", **options)
    train, held_out = set(text_of(data, data.train)), set(text_of(data, data.validation))
    of_document = [{squeezed(s) for line in lines for s in split_sentences(line)} for lines in documents]
    assert not train & held_out
    assert sum(sentences <= held_out for sentences in of_document) == 5
    assert sum(sentences <= train for sentences in of_document) == 45
    assert data.manifest.validation_documents == 5
    other = make(tmp_path / "other", tmp_path / "text.txt", seed=1, **options)
    assert set(text_of(other, other.validation)) != held_out


@pytest.mark.parametrize(
    ("documents", "share", "expected"), [(2, 0.01, 1), (99, 0.01, 1), (1000, 0.01, 10), (7, 0.0, 0)]
)
def test_share_held_out(documents: int, share: float, expected: int) -> None:
    chosen = [sum(is_held_out(n, documents, share, seed) for n in range(documents)) for seed in range(20)]
    assert set(chosen) == {expected}


@pytest.mark.parametrize("times", [1, 5])  # the same share if most of its lines are duplicates
def test_a_single_document_holds_out_its_last_lines(times: int, tmp_path: Path, make: Make) -> None:
    lines = made_up_documents(1, seed=9, lines=50)[0]
    (tmp_path / "text.txt").write_text("\n".join(times * lines))
    data = make(tmp_path / "data", tmp_path / "text.txt", seq_len=32, validation=0.1)
    assert "".join(text_of(data, data.validation)) == squeezed("".join(lines[-5:]))
    assert "".join(text_of(data, data.train)) == squeezed("".join(lines[:-5]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_of_a_long_document_hold_out_the_share_that_is_asked(
    parts: int, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [s for line in made_up_documents(1, seed=10, lines=200)[0] for s in split_sentences(line)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sources, "DOCUMENT_CHARS", sum(map(len, lines)) / (parts - 0.5))  # the last part is a short one
    for seed in range(4):
        data = make(tmp_path / f"{seed}", tmp_path / "text.txt", seq_len=16, validation=0.01, seed=seed)
        assert data.manifest.documents == parts
        assert data.manifest.validation_documents == 1
        assert 0 < len(data.validation) <= 0.02 * (len(data.train) + len(data.validation))
        held_out = "".join(text_of(data, data.validation))
        before, after = squeezed("".join(lines)).split(held_out)
        assert "".join(text_of(data, data.train)) == before + after
    spread = make(tmp_path / "spread", tmp_path / "text.txt", seq_len=16, validation=0.01, seed=3, workers=2)
    assert spread.manifest.fingerprint == data.manifest.fingerprint


@pytest.mark.usefixtures("small_chunks")
def test_long_documents_without_lines_are_held_out_whole_with_a_warning(tmp_path: Path, make: Make) -> None:
    """As the chromosomes of a genome are. Documents that are no longer than usual are held out without a warning."""
    long = [[" ".join(lines)] for lines in made_up_documents(5, seed=11)]
    for name, documents in (("few", long), ("many", made_up_documents(50, seed=11))):
        (tmp_path / f"{name}.txt").write_text(as_text(documents))
    few = make(tmp_path / "few", tmp_path / "few.txt", seq_len=32, validation=0.01)
    assert few.manifest.validation_documents == 1
    share = len(few.validation) / (len(few.train) + len(few.validation))
    assert warnings_of(few.manifest) == [
        f"{share:.1%} of the rows are held out, not 1% (--validation): at least one whole line is held out, so "
        "break up long ones; if an earlier version made this folder, prepare it again"
    ]
    many = make(tmp_path / "many", tmp_path / "many.txt", seq_len=32, validation=0.01)
    assert len(many.validation) > 1
    assert warnings_of(many.manifest) == []


@pytest.mark.usefixtures("small_chunks")
def test_workers_do_not_change_the_result(tmp_path: Path, make: Make, corpus_file: Path) -> None:
    alone = make(tmp_path / "1", corpus_file, every=2, seq_len=32, workers=1, train_tokenizer=300)
    spread = make(tmp_path / "3", corpus_file, every=2, seq_len=32, workers=3, train_tokenizer=300)
    assert alone.manifest.fingerprint == spread.manifest.fingerprint
    assert alone.manifest.shards == spread.manifest.shards
    assert alone.manifest.tokenizer_sha256 == spread.manifest.tokenizer_sha256
    assert (alone.folder / "tokenizer/tokenizer.json").read_bytes() == (
        spread.folder / "tokenizer/tokenizer.json"
    ).read_bytes()


def test_a_folder_made_again_in_the_same_process_has_its_new_tokenizer(
    tmp_path: Path, make: Make, corpus_file: Path, vocab_file: Path
) -> None:
    """As from a notebook: the same folder, and a vocabulary of the same size."""
    entries = vocab_file.read_text().split()
    first, out = tmp_path / "vocab.txt", tmp_path / "data"
    first.write_text("\n".join(entries[:5] + entries[:4:-1]) + "\n")
    turned = make(out, corpus_file, tokenizer=str(first))
    texts = text_of(turned, turned.train)
    shutil.rmtree(out)
    again = make(out, corpus_file)
    assert text_of(again, again.train) == texts


def test_fingerprint_follows_the_rows(tmp_path: Path, make: Make, corpus_file: Path, packed: PreparedData) -> None:
    same = make(tmp_path / "same", corpus_file, seq_len=32)
    other = make(tmp_path / "other", corpus_file, seq_len=32, seed=1)
    assert same.manifest.fingerprint == packed.manifest.fingerprint
    assert other.manifest.fingerprint != packed.manifest.fingerprint


def test_fingerprint_follows_what_the_tokens_do_not_show(
    tmp_path: Path, make: Make, corpus_file: Path, vocab_file: Path
) -> None:
    """A row's greatest length, and an entry of the vocabulary that the text does not have."""
    larger = tmp_path / "vocab.txt"
    larger.write_text(vocab_file.read_text() + "unused\n")
    options: list[dict[str, Any]] = [{}, {"seq_len": 160}, {"tokenizer": str(larger)}]
    made = [make(tmp_path / f"{n}", corpus_file, one_sentence_per_row=True, **each) for n, each in enumerate(options)]
    rows = [data.train.rows(np.arange(len(data.train)))[0].tolist() for data in made]
    assert rows[0] == rows[1] == rows[2]
    assert len({data.manifest.fingerprint for data in made}) == 3


def test_datasets_opens_the_splits(packed: PreparedData) -> None:
    train = datasets.load_from_disk(str(packed.folder / "train"))
    assert len(train) == len(packed.train)
    ids, lengths = packed.train.rows(np.array([3, 0]))
    assert train[3]["input_ids"] == ids[0, : lengths[0]].tolist()
    assert train[0]["input_ids"] == ids[1, : lengths[1]].tolist()


@pytest.mark.usefixtures("small_chunks")
def test_several_shards_read_as_one_table(
    tmp_path: Path, make: Make, corpus_file: Path, packed: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwt_ds.prepare.shards.SHARD_TOKENS", 1500)
    data = make(tmp_path / "data", corpus_file, seq_len=32)
    train = [shard for shard in data.manifest.shards if shard.name.startswith("train/")]
    assert len(train) > 3
    assert sum(shard.rows for shard in train) == len(data.train)
    assert squeezed("".join(text_of(data, data.train))) == squeezed("".join(text_of(packed, packed.train)))
    assert len(datasets.load_from_disk(str(data.folder / "train"))) == len(data.train)
    assert data_problems(data.folder) == []


def test_a_finished_folder_is_left_alone(tmp_path: Path, make: Make, corpus_file: Path) -> None:
    out = tmp_path / "data"
    make(out, corpus_file, seq_len=32)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make(out, corpus_file, seq_len=32, workers=2)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"already holds data made with other settings \(every is 1 there, 4 now\)"):
        make(out, corpus_file, seq_len=32, every=4)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_folder_made_with_any_other_setting_is_not_taken_for_this_one(corpus_file: Path) -> None:
    plain = PrepareOptions([LocalFile(corpus_file)], Path("data"), train_tokenizer=300)
    given = replace(plain, train_tokenizer=None, tokenizer="a.txt")
    others: dict[str, Any] = {
        **{"train_tokenizer": 400, "kind": "bpe", "cased": True, "keep_accents": False, "seq_len": 64, "every": 2},
        **{"one_sentence_per_row": True, "join_documents": False, "min_chars": 5, "max_chars": 99, "drop_long": True},
        **{"keep_duplicates": True, "validation": 0.1, "seed": 1},
    }
    alike: dict[str, Any] = {"out": Path("other"), "workers": 2, "allow_unknown": True}
    assert {field.name for field in fields(PrepareOptions)} == {*others, *alike, "sources", "tokenizer"}
    identities = [each.identity() for each in (plain, given, replace(given, tokenizer="b.txt"))]
    identities += [replace(plain, **{name: value}).identity() for name, value in others.items()]
    assert all(one != other for one, other in itertools.combinations(identities, 2))
    assert replace(plain, **alike).identity() == plain.identity()


def test_an_output_folder_with_other_things_is_refused(tmp_path: Path, make: Make, corpus_file: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no data folder"):
        make(tmp_path, corpus_file)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_corpus_without_a_usable_sentence(tmp_path: Path, make: Make) -> None:
    (tmp_path / "short.txt").write_text("Yes.\n\nNo.\n")
    with pytest.raises(ValueError, match=r"no training rows: 2 sentences in 2 documents, 0 kept \(too short: 2"):
        make(tmp_path / "data", tmp_path / "short.txt")
    assert not (tmp_path / "data").exists()
    assert make(tmp_path / "data", tmp_path / "short.txt", min_chars=1).manifest.rows == 1


def test_no_permission(tmp_path: Path, corpus_file: Path, vocab_file: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, where a folder is asked for")
    with pytest.raises(OSError, match="blocked"):
        prepare(PrepareOptions([LocalFile(corpus_file)], blocked / "data", tokenizer=str(vocab_file)))
    if os.getuid() != 0:
        readonly = tmp_path / "readonly"
        readonly.mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="readonly"):
            prepare(PrepareOptions([LocalFile(corpus_file)], readonly / "data", tokenizer=str(vocab_file)))


def test_manifest_on_disk(packed: PreparedData) -> None:
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    assert manifest["rows"] == len(packed.train)
    assert manifest["validation_rows"] == len(packed.validation)
    assert manifest["tokens"] == packed.train.lengths.sum() + packed.validation.lengths.sum()
    assert set(manifest["versions"]) >= {"tokenizers", "syntok", "datasets"}
    assert Manifest.from_json(json.dumps(manifest)) == packed.manifest
    table = (packed.folder / "manifest.txt").read_text()
    assert f"{manifest['tokens']:,}" in table
    assert manifest["sources"][0]["name"] in table
