"""Whole words in any language and with any tokenizer: where they start is stored with the rows, and masks follow it."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import regex
from harness.corpus import Make, as_text, made_up_documents
from harness.languages import KINDS, LOSSLESS, PARAGRAPHS, tokenizer_of, with_roles
from tokenizers import Tokenizer, models

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import StepBatches, validation_batches
from dwt_ds.data.manifest import Manifest
from dwt_ds.data.masks import draw_masks
from dwt_ds.data.prepared import PreparedData, data_problems
from dwt_ds.data.tokenizer import TokenizerFacts
from dwt_ds.prepare import segment
from dwt_ds.prepare.tokens import SentenceEncoder, SentenceInText
from dwt_ds.prepare.train_tokenizer import train_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]\p{M}*"


@pytest.fixture(autouse=True, scope="module")
def by_character() -> Iterator[None]:
    """Chinese and Thai by character, as without the extra `words`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segment, "find_spec", lambda name: None)
        segment._segmenter.cache_clear()
        yield
    segment._segmenter.cache_clear()


def word_offsets(text: str, pattern: str) -> set[int]:
    """Offsets of the words of `text` once its spaces are left out."""
    return {len("".join(text[: match.start()].split())) for match in regex.finditer(pattern, text)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", PARAGRAPHS)
def test_tokens_that_start_a_word(kind: str, language: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = SentenceEncoder(str(tmp_path / "tokenizer.json"), tokenizer.get_vocab_size())
    text = PARAGRAPHS[language]
    ids, starts_word, _ = encoder.encode([SentenceInText(None, text)])
    starts = np.flatnonzero(starts_word).tolist()
    # The length of the text before each token that starts a word: its bytes make whole characters.
    before = ["".join(tokenizer.decode(ids[:start].tolist()).split()) for start in starts]
    assert "\ufffd" not in "".join(before)

    normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    apostrophe = "" if kind.startswith("WordPiece") else r"(?:['’][\p{L}\p{M}]+)*"
    pattern = rf"{UNSPACED}|[\p{{L}}\p{{M}}\p{{N}}--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Thai}}]]+{apostrophe}|\S"
    expected = word_offsets(normalized, "(?V1)" + pattern)
    found = {len(prefix) for prefix in before}
    assert found <= expected
    if language in ("Chinese", "Japanese", "Thai"):  # a token may hold several words, which are then one
        assert len(found) > 5
    elif language == "Hindi" and kind.startswith("byte-level"):  # or a vowel sign with the danda after it
        assert found >= expected - word_offsets(normalized, "।")
    else:
        assert found == expected


def test_a_full_stop_is_no_part_of_the_next_sentence(tmp_path: Path) -> None:
    for kind in LOSSLESS:
        tokenizer = tokenizer_of(kind)
        tokenizer.save(str(tmp_path / f"{kind}.json"))
        encoder = SentenceEncoder(str(tmp_path / f"{kind}.json"), tokenizer.get_vocab_size())
        for gap, sentence in ((" ", "Would you like it?"), ("\n", "Would you like it?"), ("", "你想不想过来")):
            tokens = encoder.encode([SentenceInText(None, "The old lamp."), SentenceInText(gap, sentence)])
            first = int(tokens.lengths[0])
            assert tokens.starts_word[first - 1]  # the full stop
            assert tokens.starts_word[first]
            if gap == "\n" and kind.startswith("byte-level"):
                assert tokens.starts_word[first + 1]  # a line end is no part of the word after it


def test_a_sequence_is_no_word(tmp_path: Path) -> None:
    """A protein of letters without spaces: each of its characters counts as a word."""
    letters = {name: index for index, name in enumerate(["<unk>", *"ACDEFGHIKLMNPQRSTVWY"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = SentenceEncoder(str(tmp_path / "tokenizer.json"), len(letters))
    ids, starts_word, _ = encoder.encode([SentenceInText(None, "ACDEFGHIKL" * 6), SentenceInText(None, "ACDEF")])
    assert starts_word.tolist() == [True] * 60 + [True, False, False, False, False]


def test_bytes_of_unknown_characters_are_words_by_character(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([*PARAGRAPHS.values()] * 3, 900, "unigram")
    tokenizer.save_pretrained(tmp_path)
    encoder = SentenceEncoder(str(tmp_path / "tokenizer.json"), len(tokenizer))
    ids, starts_word, _ = encoder.encode([SentenceInText(None, "The lamp 龘龘齾."), SentenceInText("", "齾 lamp")])
    words = np.split(ids, np.flatnonzero(starts_word)[1:])
    assert [tokenizer.decode(word.tolist()).strip() for word in words] == ["The", "lamp", *"龘龘齾.齾", "lamp"]


def test_the_bytes_of_a_rare_space_are_one_word(tmp_path: Path) -> None:
    """French has narrow spaces before its marks; byte-level BPE has no entry for a whole one."""
    tokenizer = tokenizer_of("byte-level BPE")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = SentenceEncoder(str(tmp_path / "tokenizer.json"), tokenizer.get_vocab_size())
    ids, starts_word, _ = encoder.encode([SentenceInText(None, "Where\u202f? Here\u2003\u2028there.")])
    words = np.split(ids, np.flatnonzero(starts_word)[1:])
    expected = ["Where", "\u202f", "?", " Here", "\u2003", "\u2028", "there", "."]
    assert [tokenizer.decode(word.tolist()) for word in words] == expected


@pytest.fixture(scope="module")
def many_languages(tmp_path_factory: pytest.TempPathFactory, make: Make) -> PreparedData:
    """All languages in byte-level BPE, in rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("languages")
    with_roles(tokenizer_of("byte-level BPE")).save_pretrained(folder / "tokenizer")
    texts = list(PARAGRAPHS.values())
    documents = [" ".join(order) for order in itertools.islice(itertools.permutations(texts, 3), 0, None, 5)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return make(folder / "data", folder / "text.txt", tokenizer=str(folder / "tokenizer"), seq_len=32)


def test_words_are_masked_whole_and_every_row_has_labels(many_languages: PreparedData) -> None:
    data = many_languages
    rows = np.arange(len(data.train))
    ids, lengths = data.train.rows(rows)
    starts = data.train.starts_word(rows, 32)
    word = np.maximum.accumulate(np.where(starts, np.arange(32), 0), axis=1)
    tokenizer = data.tokenizer()
    for label_draw in ("fixed", "bernoulli"):
        masking = DataConfig(whole_word=True, label_draw=label_draw)  # type: ignore[arg-type]
        masked = draw_masks(ids, lengths, rows, rows * 0, data.facts, masking, 1, starts)
        labelled = np.zeros(ids.shape, dtype=bool)
        labelled.reshape(-1)[masked.positions] = True
        labels_of_row = labelled.sum(axis=1)
        if label_draw == "fixed":
            assert labels_of_row.min() >= 1
            assert labels_of_row.max() == 5  # round(0.15 * 30)
        partly = 0
        for row in rows.tolist():
            content = range(1, int(lengths[row]) - 1)
            for start in {int(word[row, column]) for column in content}:
                columns = [column for column in content if word[row, column] == start]
                states = labelled[row, columns]
                partly += bool(states.any() and not states.all())
                if content[0] < start and columns[-1] < content[-1]:  # a row may begin and end inside a word
                    assert "\ufffd" not in tokenizer.decode(ids[row, columns].tolist())
        # Only where no word of the row fits, which is rare.
        assert partly <= 0.02 * len(rows)


def test_the_stored_column_is_read_as_it_was_written(many_languages: PreparedData) -> None:
    table = datasets.load_from_disk(str(many_languages.folder / "train"))
    rows = np.random.default_rng(0).permutation(len(table))
    read = pickle.loads(pickle.dumps(many_languages.train)).starts_word(rows, 40)
    for row, starts in zip(rows.tolist(), read, strict=True):
        stored = table[row]["starts_word"]
        assert starts[: len(stored)].tolist() == stored
        assert starts[len(stored) :].all()
        assert stored[0]
        assert stored[-1]
    assert data_problems(many_languages.folder) == []
    assert many_languages.manifest.settings["words"] == {"Chinese": "by character", "Thai": "by character"}
    assert "Chinese by character" in (many_languages.folder / "manifest.txt").read_text()


def without_column(data: PreparedData) -> PreparedData:
    """The folder as versions before made it: without the column that says where words start."""
    manifest = data.manifest
    for shard in manifest.shards:
        path = data.folder / shard.name
        with pa.memory_map(str(path)) as source:
            batches = [batch.select(["input_ids"]) for batch in pa.ipc.open_stream(source)]
            with pa.ipc.new_stream(str(path) + ".new", batches[0].schema if batches else pa.schema([])) as arrow:
                for batch in batches:
                    arrow.write_batch(batch)
        Path(str(path) + ".new").rename(path)
        shard.bytes, shard.sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    (data.folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    assert Manifest.from_json(manifest.to_json()) == manifest
    return PreparedData.open(data.folder)


# Computed on the fixtures' corpus by the version before folders said where words start.
MASKS_BEFORE = {
    "fixed": "63376dd50c56d2af5c4f9701e6061d14dab159ecda535c801044f9b1ac5f50ca",
    "bernoulli": "7479abfd103684ef00f02faba03ad7fe7626bdfbc28d216e2c6966a0998256ae",
}


@pytest.mark.parametrize("label_draw", MASKS_BEFORE)
def test_wordpiece_masks_are_what_they_were(label_draw: str, tmp_path: Path, make: Make, corpus_file: Path) -> None:
    """In a folder of before, whose vocabulary tells, and in one of now, which says it itself."""
    new = make(tmp_path / "data", corpus_file, seq_len=32)
    rows = np.arange(len(new.train))
    starts = new.train.starts_word(rows, 32)
    old = without_column(new)
    assert not old.train.knows_words
    ids, lengths = old.train.rows(rows)
    masking = DataConfig(whole_word=True, label_draw=label_draw)  # type: ignore[arg-type]
    for starts_word in (None, starts):
        masked = draw_masks(ids, lengths, rows, rows % 3, old.facts, masking, 5, starts_word)
        content = masked.input_ids.astype("<i8").tobytes() + masked.positions.astype("<i8").tobytes()
        assert hashlib.sha256(content).hexdigest() == MASKS_BEFORE[label_draw]
    options: dict[str, Any] = {"seed": 0, "micro_batch_size": 8, "accumulation": 1, "rank": 0, "world_size": 1}
    [of_old], [of_new] = (StepBatches(each.train, each.facts, masking, **options)[0] for each in (old, new))
    assert (of_old.input_ids == of_new.input_ids).all()


def test_an_old_folder_whose_vocabulary_does_not_tell_is_refused(tmp_path: Path, make: Make) -> None:
    with_roles(tokenizer_of("byte-level BPE")).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(as_text(made_up_documents(30)))
    data = make(tmp_path / "data", tmp_path / "text.txt", tokenizer=str(tmp_path / "tokenizer"), seq_len=32)
    old = without_column(data)
    options = {"seed": 0, "micro_batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1}
    StepBatches(old.train, old.facts, DataConfig(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'^data.whole_word=true: .*make the folder again.*"dwt-ds prepare".*$'):
        StepBatches(old.train, old.facts, DataConfig(whole_word=True), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data.whole_word=true"):
        next(
            validation_batches(
                old.validation, old.facts, DataConfig(whole_word=True), micro_batch_size=2, rank=0, world_size=1
            )
        )


@pytest.fixture(scope="module")
def facts() -> TokenizerFacts:
    return TokenizerFacts(1000, PAD, CLS, SEP, MASK, np.arange(1000) < 5, None, np.arange(5, 1000))


def one_word(batch: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, lengths, starts_word) of rows that are one word each."""
    ids = np.random.default_rng(0).integers(5, 1000, (batch, width))
    ids[:, 0], ids[:, -1] = CLS, SEP
    starts = np.zeros((batch, width), dtype=bool)
    starts[:, [0, 1, -1]] = True
    return ids, np.full(batch, width), starts


def test_a_word_over_the_budget_is_masked_in_part(facts: TokenizerFacts) -> None:
    ids, lengths, starts = one_word(2000, 34)
    rows = np.arange(2000)
    masked = draw_masks(ids, lengths, rows, rows * 0, facts, DataConfig(whole_word=True), 1, starts)
    columns = masked.positions.reshape(2000, -1) % 34
    assert columns.shape[1] == 5  # round(0.15 * 32): no row without, none with more
    assert (np.diff(columns, axis=1) == 1).all()  # a run
    counts = np.bincount(columns[:, 0], minlength=34)[1:29]
    assert np.abs(counts - 2000 / 28).max() < 5 * np.sqrt(2000 / 28)  # which begins anywhere in the word
    again = draw_masks(ids[7:8], lengths[:1], rows[7:8], rows[:1], facts, DataConfig(whole_word=True), 1, starts[7:8])
    assert (again.positions == columns[7]).all()

    bernoulli = DataConfig(whole_word=True, label_draw="bernoulli")
    masked = draw_masks(ids, lengths, rows, rows * 0, facts, bernoulli, 1, starts)
    labels_of_row = np.bincount(masked.positions // 34, minlength=2000)
    assert labels_of_row.max() < 20  # never all of it
    assert abs(labels_of_row.mean() - 0.15 * 32) < 0.3


def test_a_word_that_fits_is_taken_instead_of_a_part(facts: TokenizerFacts) -> None:
    ids, lengths, starts = one_word(200, 34)
    starts[:, 30] = True  # a second word, of three tokens
    rows = np.arange(200)
    masked = draw_masks(ids, lengths, rows, rows * 0, facts, DataConfig(whole_word=True), 1, starts)
    assert (masked.positions.reshape(200, -1) % 34 == [30, 31, 32]).all()
