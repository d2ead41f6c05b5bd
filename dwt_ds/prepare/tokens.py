"""Encodes sentences, and finds the tokens that start a word.

Words are found in the text (see `segment`) and mapped to tokens by their offsets, so the bytes of a character stay
together with any vocabulary. WordPiece with BERT's pre-tokenizer has words of its own, which are used except in scripts
without spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import regex
from tokenizers import Encoding

from dwt_ds.data.text_tokenizer import by_character, bytes_of_fallback
from dwt_ds.prepare.rows_tokenizer import RowsTokenizer
from dwt_ds.prepare.segment import unspaced_spans, word_starts

# Sentences per call of the tokenizer, whose results take some 100 bytes a token.
_SENTENCES_A_CALL = 1024
# A longer run of letters is a sequence (a protein, a hash), of which each character counts as a word.
_LONGEST_WORD_CHARS = 50
_CHARACTER = regex.compile(r"\S\p{Mark}*")
# Characters inside words for BERT's pre-tokenizer: each Han character and punctuation mark is a word of its own.
_INSIDE = regex.compile(r"[[\p{Letter}\p{Mark}\p{Number}]--\p{Han}]", regex.VERSION1)
# By code point; there are no spaces beyond the last of these.
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])


class SentenceInText(NamedTuple):
    """A sentence and the gap before it in its text."""

    gap: str | None
    """The spaces or line end before it, maybe ""; None if it begins the text."""
    text: str


class Tokens(NamedTuple):
    """Tokens of sentences, concatenated."""

    ids: np.ndarray
    """(N,) int64."""
    starts_word: np.ndarray
    """(N,) bool."""
    lengths: np.ndarray
    """(sentences,) int64: tokens of each."""


class SentenceEncoder:
    """Encodes sentences as parts of their texts, with a tokenizer.json."""

    def __init__(self, tokenizer_file: str, vocab_size: int) -> None:
        self._tokenizer = RowsTokenizer(tokenizer_file)
        self.unknown_id = self._tokenizer.unknown_id
        self._bytes: np.ndarray | None = None
        if self._tokenizer.byte_fallback:
            entries = [self._tokenizer.beginning.id_to_token(index) for index in range(vocab_size)]
            self._bytes = bytes_of_fallback(entries)
        self._continues_word: np.ndarray | None = None
        prefix = self._tokenizer.continuation_prefix
        if prefix is not None:
            vocabulary = self._tokenizer.beginning.get_vocab()
            self._continues_word = np.zeros(vocab_size, dtype=bool)
            self._continues_word[[index for entry, index in vocabulary.items() if entry.startswith(prefix)]] = True
            self._inside_word = np.arange(vocab_size)
            for entry, index in vocabulary.items():
                self._inside_word[index] = vocabulary.get(prefix + entry, index)

    def encode(self, sentences: Sequence[SentenceInText]) -> Tokens:
        """The tokens of the sentences, without special ones."""
        return self._encode_joined(sentences) if self._tokenizer.ends_words else self._encode_each(sentences)

    def _encode_joined(self, sentences: Sequence[SentenceInText]) -> Tokens:
        """Encode sentences without a gap between them as one text, since the end of a text would end a word."""
        first = [number for number, sentence in enumerate(sentences) if sentence.gap != ""]
        runs = [sentences[start:end] for start, end in zip(first, [*first[1:], len(sentences)], strict=True)]
        texts = [SentenceInText(run[0].gap, "".join(sentence.text for sentence in run)) for run in runs]
        tokens = self._encode_each(texts)
        lengths = [
            [length] if len(run) == 1 else self._shares(text, run)
            for run, text, length in zip(runs, texts, tokens.lengths.tolist(), strict=True)
        ]
        return tokens._replace(lengths=np.array(list(chain.from_iterable(lengths)), dtype=np.int64))

    def _shares(self, joined: SentenceInText, sentences: Sequence[SentenceInText]) -> list[int]:
        """How many tokens of a joined text begin in each of its sentences."""
        text = self._with_gap(joined)
        [encoding] = self._encodings([joined], [text])
        starts = [start - (len(text) - len(joined.text)) for start, _ in encoding.offsets]
        ends = np.cumsum([len(sentence.text) for sentence in sentences])
        return np.diff(np.searchsorted(starts, ends), prepend=0).tolist()

    def _encode_each(self, sentences: Sequence[SentenceInText]) -> Tokens:
        batches = [
            self._encode(sentences[start : start + _SENTENCES_A_CALL])
            for start in range(0, len(sentences), _SENTENCES_A_CALL)
        ]
        none = Tokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64))
        return Tokens(*(np.concatenate(arrays) for arrays in zip(none, *batches, strict=True)))

    def _encode(self, sentences: Sequence[SentenceInText]) -> Tokens:
        if self._continues_word is None:
            texts = [self._with_gap(sentence) for sentence in sentences]
            return _with_words(texts, self._encodings(sentences, texts), self._bytes)
        texts = [sentence.text for sentence in sentences]
        unspaced = [unspaced_spans(text) for text in texts]
        # Offsets take time, and only words of scripts without spaces need them.
        with_offsets = [number for number, spans in enumerate(unspaced) if spans]
        without = [number for number, spans in enumerate(unspaced) if not spans]
        tokenizer = self._tokenizer.beginning
        found = tokenizer.encode_batch_fast([texts[number] for number in without], add_special_tokens=False)
        encodings = dict(zip(without, found, strict=True))
        found = tokenizer.encode_batch([texts[number] for number in with_offsets], add_special_tokens=False)
        encodings.update(zip(with_offsets, found, strict=True))
        ids, lengths = _ids([encodings[number] for number in range(len(texts))])
        # Text without spaces may have been cut inside a word: then its first token continues the word.
        going_on = [number for number in with_offsets if number and _goes_on(texts[number - 1], sentences[number])]
        first = (np.cumsum(lengths) - lengths)[going_on]
        ids[first] = self._inside_word[ids[first]]
        starts_word = ~self._continues_word[ids]
        if with_offsets:
            here = np.repeat([bool(spans) for spans in unspaced], lengths)
            segmented = [(texts[number], unspaced[number]) for number in with_offsets]
            starts_word[here] = _segmented(segmented, found, starts_word[here])
        return Tokens(ids, starts_word, lengths)

    def _with_gap(self, sentence: SentenceInText) -> str:
        if sentence.gap is None or not self._tokenizer.spaces_matter:
            return sentence.text
        return self._tokenizer.known_gap(sentence.gap) + sentence.text

    def _encodings(self, sentences: Sequence[SentenceInText], texts: Sequence[str]) -> list[Encoding]:
        """Encodings in order, with offsets into `texts`."""
        encodings: dict[int, Encoding] = {}
        for begins, tokenizer in ((True, self._tokenizer.beginning), (False, self._tokenizer.going_on)):
            numbers = [number for number, sentence in enumerate(sentences) if (sentence.gap is None) is begins]
            found = tokenizer.encode_batch([texts[number] for number in numbers], add_special_tokens=False)
            encodings.update(zip(numbers, found, strict=True))
        return [encodings[number] for number in range(len(texts))]

    def characters_of(self, sentence: SentenceInText, count: int) -> int:
        """Characters in the first `count` tokens of a sentence, which has more tokens."""
        text = self._with_gap(sentence)
        [encoding] = self._encodings([sentence], [text])
        return max(int(encoding.offsets[count][0]) - (len(text) - len(sentence.text)), 0)

    def unknown_characters(self, texts: Sequence[str]) -> Counter[str]:
        """Characters of the unknown words: those unknown by themselves, or all characters if a word has none."""
        counts: Counter[str] = Counter()
        alone: dict[str, bool] = {}
        for text in texts:
            encoding = self._tokenizer.beginning.encode(text, add_special_tokens=False)
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if index == self.unknown_id:
                    characters = [character for character in text[start:end] if not character.isspace()]
                    for character in characters:
                        if character not in alone:
                            alone[character] = self.unknown_id in self._tokenizer.beginning.encode(character).ids
                    counts.update([character for character in characters if alone[character]] or characters)
        return counts


def _goes_on(before: str, sentence: SentenceInText) -> bool:
    """Whether a sentence continues the last word of the text before it."""
    return sentence.gap == "" and bool(_INSIDE.match(before, len(before) - 1) and _INSIDE.match(sentence.text))


def _ids(encodings: Sequence[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all tokens, tokens of each encoding), int64."""
    ids_of_each = [encoding.ids for encoding in encodings]
    lengths = np.array([len(ids) for ids in ids_of_each], dtype=np.int64)
    return np.fromiter(chain.from_iterable(ids_of_each), dtype=np.int64, count=int(lengths.sum())), lengths


def _with_words(
    texts: Sequence[str], encodings: Sequence[Encoding], bytes_of_tokens: np.ndarray | None = None
) -> Tokens:
    """The tokens of `encodings`, with the words of their `texts`.

    A token starts a word if it begins in a later word than the one in which the token before it ends. A single space
    before a word belongs to the word; line ends and other spaces are words of their own, all bytes of one together.

    `bytes_of_tokens` (V,) has the byte that a token of byte fallback stands for, -1 for other tokens.
    """
    ids, lengths = _ids(encodings)
    if len(ids) == 0:
        return Tokens(ids, np.zeros(0, dtype=bool), lengths)
    # All texts at once: offsets are into their concatenation.
    text = "".join(texts)
    begins = np.array([0, *accumulate(map(len, texts))], dtype=np.int64)
    words = _words(texts, begins)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    is_space = _IS_SPACE[np.minimum(characters, len(_IS_SPACE) - 1)]
    before = np.concatenate([[0], np.cumsum(~is_space)])  # number of non-spaces before each offset
    starts_word = np.zeros(len(text) + 1, dtype=bool)
    starts_word[words] = True

    offsets = np.array(list(chain.from_iterable(encoding.offsets for encoding in encodings)), dtype=np.int64)
    start, end = (offsets + np.repeat(begins[:-1], lengths)[:, None]).T
    if bytes_of_tokens is not None:
        start, end = by_character(start, end, bytes_of_tokens[ids])
    inside_character = start[1:] < end[:-1]
    start = np.minimum(start, len(text) - 1)
    is_blank = before[end] <= before[start]
    stands_alone = is_blank & ~(starts_word[end] & (end - start <= 1) & (characters[start] == ord(" ")))
    first_word = np.searchsorted(words, start, side="right") - ~is_space[start]
    last_word = np.maximum(first_word, np.searchsorted(words, end - 1, side="right") - 1)
    last_word[stands_alone] = first_word[stands_alone] - 1
    starts = np.ones(len(ids), dtype=bool)
    starts[1:] = ((first_word[1:] > last_word[:-1]) | stands_alone[1:]) & ~inside_character
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return Tokens(ids, starts, lengths)


def _segmented(
    texts: Sequence[tuple[str, list[tuple[int, int]]]], encodings: Sequence[Encoding], starts_word: np.ndarray
) -> np.ndarray:
    """`starts_word` (N,), changed inside runs of scripts without spaces to the words of these scripts.

    Each text has the (start, end) offsets of these runs beside it.
    """
    words = _with_words([text for text, _ in texts], encodings)
    begins = np.cumsum([0, *(len(text) for text, _ in texts)])
    is_unspaced = np.zeros(begins[-1], dtype=bool)
    for begin, (_, runs) in zip(begins.tolist(), texts, strict=False):
        for start, end in runs:
            is_unspaced[begin + start : begin + end] = True
    offsets = np.array(list(chain.from_iterable(encoding.offsets for encoding in encodings)), dtype=np.int64)
    first, last = (offsets.reshape(-1, 2) + np.repeat(begins[:-1], words.lengths)[:, None]).T
    touches = is_unspaced[first]
    touches[1:] |= is_unspaced[last[:-1] - 1]
    return np.where(touches, words.starts_word, starts_word)


def _words(texts: Sequence[str], begins: np.ndarray) -> np.ndarray:
    """Ascending offsets of the words in the concatenation of `texts`, which begin at the offsets `begins`."""
    found: list[int] = []
    for text, begin in zip(texts, begins.tolist(), strict=False):
        starts = word_starts(text)
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            if end - start > _LONGEST_WORD_CHARS and len(text[start:end].rstrip()) > _LONGEST_WORD_CHARS:
                found.extend(begin + match.start() for match in _CHARACTER.finditer(text, start, end))
            else:
                found.append(begin + start)
    return np.array(found, dtype=np.int64)
