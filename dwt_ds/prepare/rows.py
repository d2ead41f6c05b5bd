"""Turns one chunk of documents into rows: the work that is spread over all cores.

A chunk's rows depend only on the chunk and the settings, so neither the number of workers nor an interruption changes
them. Worker processes import this module, so it does not import torch or transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dwt_ds.base.files import atomic_file, file_sha256
from dwt_ds.data.row_hashes import below, hashes, key_of
from dwt_ds.prepare.counts import BY_SOURCE, CHARACTERS_KEPT, ChunkCounts
from dwt_ds.prepare.packing import Rows, RowSettings, rows_of_sentences
from dwt_ds.prepare.sentences import cut_span, sentence_spans
from dwt_ds.prepare.tokens import SentenceEncoder, SentenceInText, Tokens

_SAMPLE_STREAM = 4
# Unknown characters are looked up in this many of a chunk's sentences with unknown tokens, spread evenly.
_SENTENCES_LOOKED_UP = 200


@dataclass(frozen=True)
class Chunk:
    """Whole documents, some millions of characters together."""

    index: int
    documents: list[str]
    """Lines joined by newlines, without duplicate lines."""
    held_out: list[bool]
    """Of each document: whether it goes to the validation split."""
    source_of_document: list[int]
    """The index of each document's source."""


@dataclass(frozen=True)
class Part:
    """The rows of one chunk."""

    train: Rows
    validation: Rows
    counts: ChunkCounts


def rows_of_chunk(chunk: Chunk, settings: RowSettings) -> Part:
    """Split, filter, sample, tokenize and pack the documents of `chunk`."""
    counts = ChunkCounts()
    sentences = _sentences(chunk.documents, settings, counts)
    taken = _one_of_every(len(sentences), settings.every, key_of(_SAMPLE_STREAM, settings.seed, chunk.index))
    kept = [sentences[i] for i in taken]
    counts.not_sampled = len(sentences) - len(kept)
    counts.sentences_kept = len(kept)
    counts.characters_kept = sum(len(sentence.text) for sentence in kept)
    counts.characters_not_sampled = sum(len(sentence.text) for sentence in sentences) - counts.characters_kept

    encoder = _encoder(settings.tokenizer_file, file_sha256(Path(settings.tokenizer_file)), settings.vocab_size)
    in_text = _in_their_texts(kept, settings)
    tokens = encoder.encode(in_text)
    documents = np.array([sentence.document for sentence in kept], dtype=np.int64)
    _count_unknown(tokens, kept, np.array(chunk.source_of_document, dtype=np.int64)[documents], encoder, counts)
    if settings.one_sentence_per_row:
        for number in np.flatnonzero(tokens.lengths > settings.seq_len - 2).tolist():
            counts.cut_to_row += 1
            lost = len(kept[number].text) - encoder.characters_of(in_text[number], settings.seq_len - 2)
            counts.characters_cut_to_row += lost
            counts.characters_kept -= lost

    held_out = np.array(chunk.held_out, dtype=bool)[documents]
    train = rows_of_sentences(tokens, documents, np.flatnonzero(~held_out), settings)
    validation = rows_of_sentences(tokens, documents, np.flatnonzero(held_out), settings)
    counts.tokens = len(train.tokens) + len(validation.tokens)
    counts.rows, counts.validation_rows = len(train.lengths), len(validation.lengths)
    return Part(train, validation, counts)


class _Sentence(NamedTuple):
    text: str
    document: int
    line: int
    gap: str
    """The spaces before it in its line."""


def _sentences(documents: Sequence[str], settings: RowSettings, counts: ChunkCounts) -> list[_Sentence]:
    """The sentences that pass the length filters, in order; long ones are cut into pieces."""
    sentences: list[_Sentence] = []
    for number, document in enumerate(documents):
        for line_number, line in enumerate(document.split("\n")):
            before = 0
            for whole in sentence_spans(line):
                for start, end in _pieces(line, *whole, settings, counts):
                    length = end - start
                    counts.sentences_seen += 1
                    counts.characters_seen += length
                    if length < settings.min_chars:
                        counts.too_short += 1
                        counts.characters_too_short += length
                    elif length > settings.max_chars:
                        counts.too_long += 1
                        counts.characters_too_long += length
                    else:
                        sentences.append(_Sentence(line[start:end], number, line_number, line[before:start]))
                    before = end
    return sentences


def _pieces(line: str, start: int, end: int, settings: RowSettings, counts: ChunkCounts) -> list[tuple[int, int]]:
    if settings.drop_long or end - start <= settings.max_chars:
        return [(start, end)]
    counts.cut_long += 1
    return cut_span(line, start, end, settings.max_chars)


def _one_of_every(count: int, every: int, key: int) -> list[int]:
    """Ascending indices in [0, count): one at random of each `every` consecutive ones.

    The last, shorter group contributes one with probability size / every, so that each index has the same chance.
    """
    groups = np.arange(-(-count // every))
    taken = groups * every + below(hashes(key, groups), every)
    return taken[taken < count].tolist()


@lru_cache(maxsize=1)
def _encoder(tokenizer_file: str, sha256: str, vocab_size: int) -> SentenceEncoder:
    """The hash of the file is a part of the key, since a folder made again in this process reuses the path."""
    return SentenceEncoder(tokenizer_file, vocab_size)


def _in_their_texts(sentences: Sequence[_Sentence], settings: RowSettings) -> list[SentenceInText]:
    """Each sentence with the gap to the sentence before it in the row's text; without a gap if it begins a document or
    is alone in its row."""
    in_text: list[SentenceInText] = []
    document = line = -1
    for sentence in sentences:
        if settings.one_sentence_per_row or sentence.document != document:
            gap = None
        else:
            gap = sentence.gap if sentence.line == line else "\n"
        in_text.append(SentenceInText(gap, sentence.text))
        document, line = sentence.document, sentence.line
    return in_text


def _count_unknown(
    tokens: Tokens, sentences: Sequence[_Sentence], sources: np.ndarray, encoder: SentenceEncoder, counts: ChunkCounts
) -> None:
    """sources: (sentences,) the index of each sentence's source."""
    is_unknown = tokens.ids == (-1 if encoder.unknown_id is None else encoder.unknown_id)
    sentence_of_unknown = np.repeat(np.arange(len(sentences)), tokens.lengths)[is_unknown]
    counts.text_tokens, counts.unknown_tokens = len(tokens.ids), len(sentence_of_unknown)
    counts.text_tokens_by_source = dict(Counter(np.repeat(sources, tokens.lengths).tolist()))
    counts.unknown_by_source = dict(Counter(sources[sentence_of_unknown].tolist()))
    with_unknown = np.unique(sentence_of_unknown)
    looked_up = with_unknown[:: max(-(-len(with_unknown) // _SENTENCES_LOOKED_UP), 1)].tolist()
    found = encoder.unknown_characters([sentences[number].text for number in looked_up])
    counts.unknown_characters = dict(found.most_common(CHARACTERS_KEPT))


def part_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:06d}.npz"


def has_parts(folder: Path) -> bool:
    return any(folder.glob("part-*.npz"))


def store_part(item: Chunk | Path, settings: RowSettings, folder: Path) -> ChunkCounts:
    """Make the rows of a chunk and store them atomically under `folder`; returns the counts.

    If an earlier attempt has stored them, `item` is the path of that part, and only its counts are read.
    """
    if isinstance(item, Path):
        with np.load(item) as arrays:
            return _counts(arrays)
    part = rows_of_chunk(item, settings)
    with atomic_file(part_path(folder, item.index)) as file:
        np.savez(
            file,
            train_tokens=part.train.tokens,
            train_starts_word=np.packbits(part.train.starts_word),
            train_lengths=part.train.lengths,
            validation_tokens=part.validation.tokens,
            validation_starts_word=np.packbits(part.validation.starts_word),
            validation_lengths=part.validation.lengths,
            counts=np.frombuffer(json.dumps(asdict(part.counts)).encode(), dtype=np.uint8),
        )
    return part.counts


def read_part(path: Path) -> Part:
    """A part that `store_part` wrote."""
    with np.load(path) as arrays:
        return Part(_stored_rows(arrays, "train"), _stored_rows(arrays, "validation"), _counts(arrays))


def _stored_rows(arrays: Mapping[str, np.ndarray], split: str) -> Rows:
    tokens = arrays[f"{split}_tokens"]
    starts_word = np.unpackbits(arrays[f"{split}_starts_word"], count=len(tokens)).astype(bool)
    return Rows(tokens, starts_word, arrays[f"{split}_lengths"])


def _counts(arrays: Mapping[str, np.ndarray]) -> ChunkCounts:
    values = json.loads(arrays["counts"].tobytes())
    for name in BY_SOURCE:  # JSON made texts of the indices
        values[name] = {int(source): count for source, count in values[name].items()}
    return ChunkCounts(**values)
