"""One chunk of documents made into rows: the work that all cores share.

A chunk's rows depend only on the chunk and the settings, so neither the number of workers nor an interruption changes
them. Worker processes import this module, so it does not import torch or transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dwt_ds.base.files import atomic_file
from dwt_ds.data.hashing import below, hashes, key_of
from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.sentences import cut_span, sentence_spans

_SAMPLE_STREAM = 4
# Sentences handed to the tokenizer at once: its result objects take some 100 bytes a token.
_SENTENCES_A_CALL = 1024


@dataclass(frozen=True)
class RowSettings:
    """What the rows of a chunk depend on, beside its text."""

    tokenizer_file: str
    """Path of a tokenizer.json."""
    cls_id: int
    sep_id: int
    vocab_size: int
    seq_len: int
    one_sentence_per_row: bool
    join_documents: bool
    every: int
    min_chars: int
    max_chars: int
    seed: int
    drop_long: bool = False
    """Whether sentences longer than max_chars are dropped; they are cut otherwise."""


@dataclass(frozen=True)
class Chunk:
    """Whole documents, some millions of characters together."""

    index: int
    documents: list[str]
    """Each its lines, joined by newlines; duplicate lines are already left out."""
    held_out: list[bool]
    """Which documents go to the validation split."""
    source_of_document: list[int]
    """The index of each document's source."""


@dataclass(frozen=True)
class Rows:
    """Rows one after the other."""

    tokens: np.ndarray
    """Token ids of all rows, 1-d."""
    lengths: np.ndarray
    """int32 (rows,): tokens of each row, [CLS] and [SEP] included."""


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
    ids = _token_ids([sentence.text for sentence in kept], settings)
    documents = np.array([sentence.document for sentence in kept], dtype=np.int64)
    held_out = np.array(chunk.held_out, dtype=bool)[documents]
    counts.cut_to_row = sum(len(sentence) > settings.seq_len - 2 for sentence in ids) * settings.one_sentence_per_row

    train = _rows(ids, documents, np.flatnonzero(~held_out), settings)
    validation = _rows(ids, documents, np.flatnonzero(held_out), settings)
    counts.tokens = len(train.tokens) + len(validation.tokens)
    counts.rows, counts.validation_rows = len(train.lengths), len(validation.lengths)
    return Part(train, validation, counts)


class _Sentence(NamedTuple):
    text: str
    document: int


def _sentences(documents: Sequence[str], settings: RowSettings, counts: ChunkCounts) -> list[_Sentence]:
    """The sentences that pass the filters on length, in order; a long one in pieces."""
    sentences: list[_Sentence] = []
    for number, document in enumerate(documents):
        for line in document.split("\n"):
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
                        sentences.append(_Sentence(line[start:end], number))
    return sentences


def _pieces(line: str, start: int, end: int, settings: RowSettings, counts: ChunkCounts) -> list[tuple[int, int]]:
    if settings.drop_long or end - start <= settings.max_chars:
        return [(start, end)]
    counts.cut_long += 1
    return cut_span(line, start, end, settings.max_chars)


def _one_of_every(count: int, every: int, key: int) -> list[int]:
    """Ascending indices in [0, count): one at random of each `every` consecutive ones.

    A last, shorter group gives its one with probability size / every, so that each index has the same chance.
    """
    groups = np.arange(-(-count // every))
    taken = groups * every + below(hashes(key, groups), every)
    return taken[taken < count].tolist()


def _token_ids(sentences: list[str], settings: RowSettings) -> list[np.ndarray]:
    tokenizer = _tokenizer(settings.tokenizer_file)
    dtype = np.uint16 if settings.vocab_size <= 1 << 16 else np.uint32
    ids: list[np.ndarray] = []
    for start in range(0, len(sentences), _SENTENCES_A_CALL):
        encodings = tokenizer.encode_batch_fast(sentences[start : start + _SENTENCES_A_CALL], add_special_tokens=False)
        ids.extend(np.array(encoding.ids, dtype=dtype) for encoding in encodings)
    return ids


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are processes; threads inside them would only compete
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _rows(ids: list[np.ndarray], documents: np.ndarray, chosen: np.ndarray, settings: RowSettings) -> Rows:
    if settings.one_sentence_per_row:
        return _one_sentence_rows([ids[i] for i in chosen.tolist()], settings)
    starts = np.flatnonzero(np.diff(documents[chosen], prepend=-1))
    texts = [
        np.concatenate([ids[i] for i in of_document.tolist()])
        for of_document in np.split(chosen, starts[1:])
        if len(of_document)
    ]
    return _packed_rows(texts, settings)


def _packed_rows(documents: Sequence[np.ndarray], settings: RowSettings) -> Rows:
    """Fill rows of `seq_len` tokens with the running text of `documents` (token ids, 1-d each).

    A row is [CLS] text [SEP]; text that does not fit continues in the next row, so only a last row is short. Joined
    documents share rows, with a [SEP] between them (Liu et al. 2019, section 4.2, "full-sentences"); otherwise each
    document starts a row, and its last one stays short.
    """
    capacity = settings.seq_len - 2
    separator = np.array([settings.sep_id])
    pieces: list[np.ndarray] = []
    contents: list[int] = []
    fill = 0  # text tokens in the row under way; 0 where none is
    for document in documents:
        if len(document) == 0:
            continue
        room = capacity - fill
        if fill and settings.join_documents and room >= 2:
            pieces.append(separator)
            fill += 1
        elif fill:
            contents.append(fill)
            fill = 0
        pieces.append(document)
        full, fill = divmod(fill + len(document), capacity)
        contents.extend([capacity] * full)
    if fill:
        contents.append(fill)
    return _framed(pieces, contents, settings)


def _one_sentence_rows(sentences: Sequence[np.ndarray], settings: RowSettings) -> Rows:
    """A row for each sentence (token ids), cut to `seq_len`."""
    cut = [sentence[: settings.seq_len - 2] for sentence in sentences if len(sentence)]
    return _framed(cut, [len(sentence) for sentence in cut], settings)


def _framed(pieces: list[np.ndarray], contents: list[int], settings: RowSettings) -> Rows:
    """Rows of `contents` text tokens each, with [CLS] before and [SEP] after each; `pieces` is their text."""
    text = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    lengths = np.array(contents, dtype=np.int64) + 2
    ends = np.cumsum(lengths)
    tokens = np.empty(int(lengths.sum()), dtype=text.dtype)
    tokens[ends - lengths] = settings.cls_id
    tokens[ends - 1] = settings.sep_id
    row_of_token = np.repeat(np.arange(len(lengths)), lengths - 2)
    tokens[np.arange(len(text)) + 2 * row_of_token + 1] = text
    return Rows(tokens, lengths.astype(np.int32))


def part_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:06d}.npz"


def has_parts(folder: Path) -> bool:
    """Whether any part is stored under `folder`."""
    return any(folder.glob("part-*.npz"))


def store_part(item: Chunk | Path, settings: RowSettings, folder: Path) -> ChunkCounts:
    """Make the rows of a chunk and store them under `folder`, whole or not at all; or read the counts of a stored part.

    Args:
        item: the chunk, or the path of its part where an earlier attempt stored it.
    """
    if isinstance(item, Path):
        with np.load(item) as arrays:
            return _counts(arrays)
    part = rows_of_chunk(item, settings)
    with atomic_file(part_path(folder, item.index)) as file:
        np.savez(
            file,
            train_tokens=part.train.tokens,
            train_lengths=part.train.lengths,
            validation_tokens=part.validation.tokens,
            validation_lengths=part.validation.lengths,
            counts=np.frombuffer(json.dumps(asdict(part.counts)).encode(), dtype=np.uint8),
        )
    return part.counts


def read_part(path: Path) -> Part:
    """A part that `store_part` wrote."""
    with np.load(path) as arrays:
        return Part(
            Rows(arrays["train_tokens"], arrays["train_lengths"]),
            Rows(arrays["validation_tokens"], arrays["validation_lengths"]),
            _counts(arrays),
        )


def _counts(arrays: Mapping[str, np.ndarray]) -> ChunkCounts:
    return ChunkCounts(**json.loads(arrays["counts"].tobytes()))
