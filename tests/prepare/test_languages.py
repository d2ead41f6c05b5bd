"""Rows give the text back, in any language and with any kind of tokenizer, and tell what they lost of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.corpus import split_sentences
from harness.languages import (
    KINDS,
    LOSSLESS,
    PARAGRAPHS,
    SPECIAL,
    WITH_SPECIAL,
    WITHOUT_SPACES,
    byte_fallback_bpe,
    tokenizer_of,
    trained,
)
from tokenizers import Tokenizer, pre_tokenizers

from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.manifest_counts import unknown_shares
from dwt_ds.prepare.packing import RowSettings
from dwt_ds.prepare.rows import Chunk, Part, part_path, rows_of_chunk, store_part
from dwt_ds.prepare.train_tokenizer import train_tokenizer


def settings_of(tokenizer: Tokenizer, folder: Path, **options: Any) -> RowSettings:
    file = folder / f"{len(list(folder.iterdir()))}.json"  # settings with equal paths share a tokenizer
    tokenizer.save(str(file))
    settings: dict[str, Any] = {
        "tokenizer_file": str(file),
        "cls_id": tokenizer.token_to_id("<s>"),
        "sep_id": tokenizer.token_to_id("</s>"),
        "vocab_size": tokenizer.get_vocab_size(),
        "seq_len": 2048,
        "one_sentence_per_row": False,
        "join_documents": False,
        "every": 1,
        "min_chars": 1,
        "max_chars": 2000,
        "seed": 0,
    }
    return RowSettings(**(settings | options))


def part_of(documents: list[str], tokenizer: Tokenizer, folder: Path, **options: Any) -> Part:
    chunk = Chunk(0, documents, [False] * len(documents), options.pop("sources", [0] * len(documents)))
    return rows_of_chunk(chunk, settings_of(tokenizer, folder, **options))


def ids_of_rows(part: Part) -> list[list[int]]:
    """Token ids of each row, without its first and last."""
    ends = np.cumsum(part.train.lengths)
    return [row[1:-1].tolist() for row in np.split(part.train.tokens, ends[:-1])]


def texts_of(part: Part, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in ids_of_rows(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_paragraph_back(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    paragraphs = list(PARAGRAPHS.values())
    part = part_of(paragraphs, tokenizer, tmp_path)
    texts = texts_of(part, tokenizer)
    assert texts == [tokenizer.decode(tokenizer.encode(paragraph).ids) for paragraph in paragraphs]
    assert part.counts.unknown_tokens == 0
    if kind in LOSSLESS:
        assert [text.removeprefix(" ") for text in texts] == paragraphs


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("language", PARAGRAPHS)
def test_sentences_keep_their_spaces_where_others_are_left_out(kind: str, language: str, tmp_path: Path) -> None:
    sentences = split_sentences(PARAGRAPHS[language])
    tokenizer = tokenizer_of(kind)
    for seed in range(4):
        part = part_of([PARAGRAPHS[language]], tokenizer, tmp_path, every=2, seed=seed)
        if part.counts.sentences_kept == len(sentences):
            continue
        [text] = texts_of(part, tokenizer)
        kept = [sentence for sentence in sentences if sentence in text]
        assert len(kept) == part.counts.sentences_kept
        assert text.removeprefix(" ") == ("" if language in WITHOUT_SPACES else " ").join(kept)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lines_are_never_glued(kind: str, tmp_path: Path) -> None:
    """The line end itself where the vocabulary has it, else a space."""
    tokenizer = tokenizer_of(kind)
    lines = [PARAGRAPHS["English"], PARAGRAPHS["Chinese"], PARAGRAPHS["English"].upper().lower()]
    [text] = texts_of(part_of(["\n".join(lines)], tokenizer, tmp_path), tokenizer)
    assert text.removeprefix(" ") == ("\n" if kind.startswith("byte-level") else " ").join(lines)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("language", WITHOUT_SPACES)
def test_a_sentence_end_ends_no_word_where_no_space_follows(language: str, every: int, tmp_path: Path) -> None:
    tokenizer = trained("BPE </w>")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sentences = split_sentences(PARAGRAPHS[language])
    part = part_of([PARAGRAPHS[language] + "\n" + PARAGRAPHS["English"]], tokenizer, tmp_path, every=every)
    [text] = texts_of(part, tokenizer)
    kept = [sentence for sentence in sentences if sentence in text]
    english = [sentence for sentence in split_sentences(PARAGRAPHS["English"]) if sentence in text]
    assert len(kept) + len(english) == part.counts.sentences_kept
    assert text == "".join(kept) + " " + " ".join(english)


def test_text_without_spaces_that_is_cut_gets_none(tmp_path: Path) -> None:
    """Thai is cut at 200 characters; the next piece goes on inside the word, as WordPiece writes it."""
    text = PARAGRAPHS["Thai"].replace(" ", "") * 6
    tokenizer = train_tokenizer([text], 400)
    special = {"cls_id": tokenizer.cls_token_id, "sep_id": tokenizer.sep_token_id}
    part = part_of([text], tokenizer.backend_tokenizer, tmp_path, **special)
    assert part.counts.sentences_kept > 2
    assert texts_of(part, tokenizer.backend_tokenizer) == [text]


def test_a_space_before_a_sentence_is_in_its_first_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level BPE")
    part = part_of(["The lamp. The lamp. The lamp."], tokenizer, tmp_path)
    [ids] = ids_of_rows(part)
    assert ids == tokenizer.encode("The lamp. The lamp. The lamp.").ids


def test_a_sentence_alone_in_its_row_is_a_text_of_its_own(tmp_path: Path) -> None:
    for kind in ("byte-level BPE", "Unigram"):
        tokenizer = tokenizer_of(kind)
        part = part_of([PARAGRAPHS["English"]], tokenizer, tmp_path, one_sentence_per_row=True)
        expected = [tokenizer.encode(sentence).ids for sentence in split_sentences(PARAGRAPHS["English"])]
        assert ids_of_rows(part) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_in_a_text_are_text(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    part = part_of([WITH_SPECIAL], tokenizer, tmp_path)
    special = {tokenizer.token_to_id(name) for name in SPECIAL}
    [ids] = ids_of_rows(part)
    assert tokenizer.token_to_id("<mask>") in tokenizer.encode(WITH_SPECIAL).ids  # what it does by itself
    assert not special.intersection(ids)
    decoded = "".join(tokenizer.decode(ids, skip_special_tokens=False).split()).lower()
    assert decoded == "".join(WITH_SPECIAL.split()).lower()


def test_tokens_that_are_no_special_ones_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = trained("byte-level BPE")
    tokenizer.add_tokens(["lamplight"])
    tokenizer.add_special_tokens(["<entity>"])
    tokenizer.add_tokens(["moonlight"])
    part = part_of(["The lamplight, the <entity> and the moonlight."], tokenizer, tmp_path)
    [ids] = ids_of_rows(part)
    assert tokenizer.token_to_id("lamplight") in ids
    assert tokenizer.token_to_id("moonlight") in ids
    assert tokenizer.token_to_id("<entity>") not in ids


def test_a_special_token_that_the_vocabulary_needs_for_text_is_text(tmp_path: Path) -> None:
    """As where a tokenizer without a padding token was given "!" for one."""
    text = "The old lamp."
    tokenizer = trained("byte-level BPE")
    expected = tokenizer.encode(text).ids
    pieces = [token for token in tokenizer.encode(text).tokens if token.isalpha() and len(token) > 1]
    tokenizer.add_special_tokens([pieces[-1][:2], "o", "l"])
    assert tokenizer.encode(text).ids != expected
    assert ids_of_rows(part_of([text], tokenizer, tmp_path)) == [expected]


def test_bytes_that_were_trained_as_special_tokens_hold_text(tmp_path: Path) -> None:
    tokenizer = byte_fallback_bpe()
    text = PARAGRAPHS["Russian"] + " " + PARAGRAPHS["English"]
    part = part_of([text], tokenizer, tmp_path)
    assert texts_of(part, tokenizer) == [text]


@pytest.mark.parametrize("drop_long", [False, True])
@pytest.mark.parametrize("one_sentence_per_row", [False, True])
def test_every_loss_is_counted_in_characters(drop_long: bool, one_sentence_per_row: bool, tmp_path: Path) -> None:
    long = "Word " * 100 + "end."
    documents = [f"No. {PARAGRAPHS['English']} {long}", PARAGRAPHS["Chinese"], "Yes.\n" + PARAGRAPHS["Thai"]]
    counts = part_of(
        documents,
        tokenizer_of("WordPiece, cased"),
        tmp_path,
        min_chars=10,
        max_chars=200,
        every=2,
        seq_len=8,
        drop_long=drop_long,
        one_sentence_per_row=one_sentence_per_row,
    ).counts
    assert counts.characters_seen == (
        counts.characters_kept
        + counts.characters_too_short
        + counts.characters_too_long
        + counts.characters_not_sampled
        + counts.characters_cut_to_row
    )
    assert counts.characters_too_short == len("No." + "Yes.")
    assert counts.characters_too_long == (len(long) if drop_long else 0)
    assert counts.cut_long == (0 if drop_long else 1)
    assert counts.characters_not_sampled > 0
    assert (counts.characters_cut_to_row > 0) == one_sentence_per_row
    without_spaces = len("".join("".join(documents).split()))
    assert counts.characters_seen >= without_spaces


def test_what_a_row_cuts_off_is_counted_to_the_character(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("characters")
    counts = part_of([PARAGRAPHS["German"]], tokenizer, tmp_path, one_sentence_per_row=True, seq_len=12).counts
    sentences = split_sentences(PARAGRAPHS["German"])
    assert counts.characters_cut_to_row == sum(len(sentence) - 10 for sentence in sentences)
    assert counts.characters_kept == 10 * len(sentences)


def test_unknown_tokens_are_counted_by_source_with_their_characters(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("WordPiece, cased")
    documents = ["The old lamp ♜ on the ♜ table ♞ .", "We bought another one.", "The lamp ♞."]
    counts = part_of(documents, tokenizer, tmp_path, sources=[0, 1, 1]).counts
    assert counts.unknown_by_source == {0: 3, 1: 1}
    assert counts.unknown_tokens == 4
    assert counts.unknown_characters == {"♜": 2, "♞": 2}
    alone = [part_of([document], tokenizer, tmp_path).counts.text_tokens for document in documents]
    assert counts.text_tokens_by_source == {0: alone[0], 1: alone[1] + alone[2]}
    assert counts.text_tokens == sum(alone)
    total = part_of([documents[1]], tokenizer, tmp_path, sources=[0]).counts
    assert total.unknown_characters == {}
    total.add(counts)
    assert total.unknown_by_source == {0: 3, 1: 1}
    assert total.text_tokens_by_source == {0: alone[0] + alone[1], 1: alone[1] + alone[2]}
    assert total.unknown_characters == {"♜": 2, "♞": 2}


def test_a_chunk_has_counts_of_its_own_sources_only(tmp_path: Path) -> None:
    """Whatever their indices, also as stored, so that memory does not grow as chunks times sources."""
    tokenizer = tokenizer_of("WordPiece, cased")
    far = part_of(["The old lamp ♜ on the table.", "We bought another one."], tokenizer, tmp_path, sources=[7, 50_000])
    assert far.counts.unknown_by_source == {7: 1}
    assert list(far.counts.text_tokens_by_source) == [7, 50_000]
    total = ChunkCounts()
    total.add(far.counts)
    total.add(part_of(["The lamp ♞."], tokenizer, tmp_path, sources=[50_000]).counts)
    shares = unknown_shares(total, 50_001)
    assert {number: share for number, share in enumerate(shares) if share} == {
        7: 1 / far.counts.text_tokens_by_source[7],
        50_000: 1 / total.text_tokens_by_source[50_000],
    }
    assert far.counts.unknown_by_source == {7: 1}  # the total has not changed it


def test_counts_of_a_stored_part_are_those_of_its_chunk(tmp_path: Path) -> None:
    settings = settings_of(tokenizer_of("WordPiece, cased"), tmp_path)
    chunk = Chunk(0, ["The old lamp ♜ on the table."], [False], [50_000])
    made = store_part(chunk, settings, tmp_path)
    assert store_part(part_path(tmp_path, 0), settings, tmp_path) == made


def test_a_word_of_known_characters_can_be_unknown(tmp_path: Path) -> None:
    """Then all its characters are named: WordPiece has no piece for one of them inside a word."""
    tokenizer = Tokenizer.from_str(tokenizer_of("WordPiece, cased").to_str())
    counts = part_of(["!a " + "a" * 101 + " the old lamp."], tokenizer, tmp_path).counts
    assert counts.unknown_characters == {"a": 101}
