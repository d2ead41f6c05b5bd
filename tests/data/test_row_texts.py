"""Rows back to text, with the place of each token."""

from __future__ import annotations

import numpy as np
import pytest
from harness.languages import KINDS, LOSSLESS, PARAGRAPHS, byte_fallback_bpe, tokenizer_of, trained, with_roles
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from dwt_ds.data.row_texts import RowReader, RowTexts
from dwt_ds.data.text_tokenizer import all_is_text, load_form
from dwt_ds.data.token_texts import TokenTexts
from dwt_ds.prepare.case_and_accents import Treatment
from dwt_ds.prepare.tokenizer import wordpiece_tokenizer


def read(tokenizer: PreTrainedTokenizerBase, *texts: list[int]) -> RowTexts:
    """The texts, each between two special tokens."""
    ids = [tokenizer.cls_token_id]
    for text in texts:
        ids += [*text, tokenizer.sep_token_id]
    reader = RowReader(TokenTexts.of(tokenizer, "the data folder's"), tokenizer.unk_token_id)
    return reader.read(np.array(ids))


def segments(texts: RowTexts) -> list[str]:
    return [texts.text[texts.start[first] : texts.end[end - 1]] for first, end in texts.segments.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gives_its_text_back(kind: str) -> None:
    """The text makes the same tokens again, each in its place."""
    tokenizer = with_roles(tokenizer_of(kind))
    plain = load_form(all_is_text(tokenizer.backend_tokenizer))
    known = 0
    for paragraph in PARAGRAPHS.values():
        ids = plain.encode(paragraph).ids
        if tokenizer.unk_token_id in ids:
            continue
        known += 1
        texts = read(tokenizer, ids)
        [text] = segments(texts)
        again = plain.encode(text)
        assert again.ids == ids
        if kind in LOSSLESS:
            assert text.strip() == paragraph
        for start, end, place in zip(texts.start[1:-1] - 1, texts.end[1:-1] - 1, again.offsets, strict=True):
            assert text[start:end].strip() in ("", text[slice(*place)].strip())
    assert known > 2


def test_bytes_that_were_trained_as_special_tokens_are_text() -> None:
    tokenizer = with_roles(byte_fallback_bpe())
    text = PARAGRAPHS["Russian"]
    ids = load_form(all_is_text(tokenizer.backend_tokenizer)).encode(text).ids
    assert segments(read(tokenizer, ids)) == [text]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """WordPiece that knows letters, digits and marks, and some words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + each for each in letters)]
    entries += [*".,:;!?'’\"()[]-–$%&#/“”", "中", "文", "。", "doesn", "dogs", "ll"]
    return wordpiece_tokenizer({entry: index for index, entry in enumerate(entries)}, Treatment(True, True))


@pytest.mark.parametrize(
    "text",
    [
        "it doesn't end; it's over, isn't it? we'll see!",
        'he said "no (never)" and "why?"',
        "“so” he said – well-known l’ete, o'neil",
        "3.50 or 3,450,000 at 10:30, no. 5 for $20 & 50%",
        "all 'so we saw' is #1 and/or 2",
        "中文。中文",
    ],
)
def test_spaces_around_marks(words: PreTrainedTokenizerBase, text: str) -> None:
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert words.unk_token_id not in ids
    expected = text.replace(" – ", "–")  # a dash may have spaces or not
    assert segments(read(words, ids)) == [expected]
    # Quotes are counted in each text by itself.
    assert segments(read(words, words('a "b', add_special_tokens=False)["input_ids"], ids)) == ['a "b', expected]


def test_a_text_goes_on_after_an_unknown_word(words: PreTrainedTokenizerBase) -> None:
    ids = words("so \u2603 is, \u2603. \u2603 a", add_special_tokens=False)["input_ids"]
    assert segments(read(words, ids)) == ["so", " is,", ".", " a"]


def test_bytes_of_different_texts_make_no_character() -> None:
    """The end of one row and the beginning of the next, side by side in a batch."""
    tokenizer = with_roles(tokenizer_of("byte-level BPE"))
    alone = [tokenizer.convert_tokens_to_ids(each) for each in "âĤ¬"]
    texts = read(tokenizer, alone[:2], alone[2:], alone)
    assert segments(texts) == ["  ", " ", "\u20ac"]
    assert texts.text.count("\u20ac") == 1


def test_added_tokens_are_text_as_they_are_written() -> None:
    """ModernBERT's tokenizer has added ones for runs of spaces."""
    tokenizer = with_roles(trained("byte-level BPE"))
    tokenizer.add_tokens([AddedToken("   ", normalized=False), AddedToken("|||PHONE|||", normalized=False)])
    text = "The old   lamp |||PHONE||| works"
    ids = load_form(all_is_text(tokenizer.backend_tokenizer)).encode(text).ids
    assert len(tokenizer) - 1 in ids
    assert len(tokenizer) - 2 in ids
    assert segments(read(tokenizer, ids)) == [text]
