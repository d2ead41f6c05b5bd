"""Preparing a data folder, from sources to manifest."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from dwt_ds.data.atomic import atomic_file
from dwt_ds.data.chunks import Chunk, ChunkCounts, RowSettings, part_path, read_counts, read_part, write_part
from dwt_ds.data.hashing import key_of
from dwt_ds.data.manifest import (
    MANIFEST_NAME,
    ONE_SENTENCE_PER_ROW,
    PACKED,
    UNFINISHED_NAME,
    Manifest,
)
from dwt_ds.data.prepared import TOKENIZER_FOLDER, TRAIN, VALIDATION
from dwt_ds.data.reading import Source, SourceCounts
from dwt_ds.data.shards import ShardWriter
from dwt_ds.data.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_sha256, train_wordpiece

CHUNK_CHARS = 4_000_000
_SPLIT_STREAM = 5
_TOKENIZER_CHARS = 100_000_000


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` makes."""

    sources: Sequence[Source]
    out: Path
    tokenizer: str | None = None
    """A vocab.txt, a folder or a hub name; or train one:"""
    train_tokenizer: int | None = None
    cased: bool = False
    seq_len: int = 128
    every: int = 1
    one_sentence_per_row: bool = False
    join_documents: bool = True
    min_chars: int = 10
    max_chars: int = 2000
    keep_duplicates: bool = False
    validation: float = 0.01
    seed: int = 0
    workers: int = 1


def prepare(options: PrepareOptions) -> Manifest:
    work = options.out / UNFINISHED_NAME
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(options)
    facts = TokenizerFacts.of(tokenizer)
    tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
    settings = RowSettings(
        tokenizer_file=str(work / TOKENIZER_FOLDER / "tokenizer.json"),
        cls_id=facts.cls_id,
        sep_id=facts.sep_id,
        vocab_size=facts.vocab_size,
        seq_len=options.seq_len,
        one_sentence_per_row=options.one_sentence_per_row,
        join_documents=options.join_documents,
        every=options.every,
        min_chars=options.min_chars,
        max_chars=options.max_chars,
        seed=options.seed,
    )
    per_source = [SourceCounts() for _ in options.sources]
    counts = ChunkCounts()
    chunk_count = 0
    duplicates = [0]
    held = [0]
    if options.workers == 1:
        for chunk in _chunks(options, per_source, duplicates, held):
            counts.add(write_part(chunk, settings, work))
            chunk_count += 1
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            waiting: deque[Future[ChunkCounts]] = deque()
            for chunk in _chunks(options, per_source, duplicates, held):
                waiting.append(pool.submit(write_part, chunk, settings, work))
                chunk_count += 1
                while len(waiting) > 2 * options.workers:
                    counts.add(waiting.popleft().result())
            while waiting:
                counts.add(waiting.popleft().result())
    shards = []
    digest = hashlib.sha256()
    for split in (TRAIN, VALIDATION):
        writer = ShardWriter(work / split, facts.vocab_size)
        shards += writer.write(getattr(read_part(part_path(work, i)), split) for i in range(chunk_count))
        digest.update(writer.content_sha256().encode())
    sha = tokenizer_sha256(tokenizer)
    form = ONE_SENTENCE_PER_ROW if options.one_sentence_per_row else PACKED
    digest.update(f"{sha} {form} {options.seq_len}".encode())
    manifest = Manifest(
        documents=sum(c.documents for c in per_source),
        validation_documents=held[0],
        sentences_seen=counts.sentences_seen,
        sentences_kept=counts.sentences_kept,
        tokens=counts.tokens,
        rows=counts.rows,
        validation_rows=counts.validation_rows,
        padding_share=1 - counts.tokens / max(1, (counts.rows + counts.validation_rows) * options.seq_len),
        form=form,
        seq_len=options.seq_len,
        vocab_size=facts.vocab_size,
        tokenizer_sha256=sha,
        fingerprint=digest.hexdigest(),
        seed=options.seed,
        every=options.every,
        settings={"pad_id": facts.pad_id},
        sources=[s.identity() | asdict(c) for s, c in zip(options.sources, per_source)],
        dropped={"duplicate_lines": duplicates[0], "too_short": counts.too_short, "too_long": counts.too_long},
        versions={name: metadata.version(name) for name in ("datasets", "pyarrow", "tokenizers", "sentencex")},
        shards=shards,
    )
    for name in (TRAIN, VALIDATION, TOKENIZER_FOLDER):
        os.replace(work / name, options.out / name)
    with atomic_file(options.out / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())
    shutil.rmtree(work)
    return manifest


def _tokenizer(options: PrepareOptions) -> PreTrainedTokenizerBase:
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    assert options.train_tokenizer is not None

    def texts() -> Iterator[str]:
        total = 0
        for source in options.sources:
            for document in source.documents(SourceCounts()):
                yield document
                total += len(document)
                if total > _TOKENIZER_CHARS:
                    return

    return train_wordpiece(texts(), options.train_tokenizer, lowercase=not options.cased)


def _chunks(
    options: PrepareOptions, per_source: list[SourceCounts], duplicates: list[int], held: list[int]
) -> Iterator[Chunk]:
    seen: set[int] = set()
    period = round(1 / options.validation) if options.validation else 0
    index = 0
    documents: list[str] = []
    held_out: list[bool] = []
    number = size = 0
    for source, counts in zip(options.sources, per_source):
        for document in source.documents(counts):
            if not options.keep_duplicates:
                lines = document.split("\n")
                kept = []
                for line in lines:
                    key = xxhash.xxh3_64_intdigest(line.encode())
                    if key not in seen:
                        seen.add(key)
                        kept.append(line)
                duplicates[0] += len(lines) - len(kept)
                document = "\n".join(kept)
            documents.append(document)
            out = bool(period) and number % period == key_of(_SPLIT_STREAM, options.seed, number // period) % min(
                period, 4 if number < period else period
            )
            held[0] += out
            held_out.append(out)
            number += 1
            size += len(document)
            if size >= CHUNK_CHARS:
                yield Chunk(index, documents, held_out)
                index, documents, held_out, size = index + 1, [], [], 0
    if documents:
        yield Chunk(index, documents, held_out)
