"""Preparing a data folder, from sources to manifest.

Two passes over the sources: a survey (totals, duplicate lines, the tokenizer), then chunks of documents made into
rows by all cores, each stored as a part of its own; last the parts are joined into shards. What is finished survives
an interruption, and the same call goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dwt_ds.base.files import atomic_file
from dwt_ds.data.hashing import key_of
from dwt_ds.data.manifest import Manifest
from dwt_ds.data.prepared import TOKENIZER_FOLDER, TRAIN, VALIDATION
from dwt_ds.data.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_sha256, train_wordpiece
from dwt_ds.prepare.chunks import Chunk, ChunkCounts, RowSettings, part_path, read_part, store_part
from dwt_ds.prepare.documentation import InstalledDocumentation
from dwt_ds.prepare.duplicates import without_duplicates
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.output import finished_manifest, make_final, work_folder
from dwt_ds.prepare.progress import Progress
from dwt_ds.prepare.reading import Source, SourceCounts
from dwt_ds.prepare.shards import ShardWriter
from dwt_ds.prepare.survey import Survey, survey
from dwt_ds.prepare.workers import ordered_map

# Documents are handed to workers in chunks of at least this many characters. Part of what the rows depend on.
CHUNK_CHARS = 4_000_000
_HOLD_OUT_STREAM = 5
_LIBRARIES = ("tokenizers", "transformers", "syntok", "datasets", "pyarrow", "numpy")


def prepare(options: PrepareOptions) -> Manifest:
    """Make the data folder `options.out`, or finish one that was begun; one that is finished is left as it is.

    Raises ValueError for what the user must change, OSError where the disk is full or a file cannot be read or
    written; in every case what was finished stays, and no half-written folder looks finished.
    """
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    identity = options.identity()
    if tokenizer is not None:
        TokenizerFacts.of(tokenizer)
        identity["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    manifest = finished_manifest(options.out, identity)
    if manifest is not None:
        return manifest
    parts_done = 0
    try:
        with work_folder(options.out, identity) as work:
            sources = _readable(options.sources, work)
            result, duplicate_bits, tokenizer = _surveyed(options, sources, tokenizer, work)
            settings = _row_settings(options, tokenizer, work)
            corpus = _Corpus(sources, result, duplicate_bits, options.validation, options.seed)
            counts = ChunkCounts()
            with Progress("preparing", result.characters, "char") as progress:
                for done, chunk_counts in _parts(corpus, settings, work, options.workers):
                    parts_done += 1
                    counts.add(chunk_counts)
                    progress.at(done)
            manifest = _finish(options, identity, result, corpus, counts, parts_done, tokenizer, work)
            make_final(options.out, manifest)
            return manifest
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"no space left for --out {options.out}; what is finished stays: free some space and repeat the command"
            ) from None
        raise


def _readable(sources: Sequence[Source], work: Path) -> list[Source]:
    """The sources as they are read: the harvest of the documentation is stored, since it is read twice."""
    return [
        source.stored(work / "documentation.txt") if isinstance(source, InstalledDocumentation) else source
        for source in sources
    ]


def _surveyed(
    options: PrepareOptions, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase | None, work: Path
) -> tuple[Survey, np.ndarray, PreTrainedTokenizerBase]:
    """The first pass and the tokenizer, trained unless given; or what an earlier attempt stored of them."""
    tokenizer_folder, survey_path, bits_path = work / TOKENIZER_FOLDER, work / "survey.json", work / "duplicates.npy"
    if survey_path.is_file():
        result = Survey.from_json(json.loads(survey_path.read_text(encoding="utf-8")))
        return result, np.load(bits_path), load_tokenizer(str(tokenizer_folder))
    result, bits = survey(
        sources,
        work,
        find_duplicates=not options.keep_duplicates,
        want_sample=options.train_tokenizer is not None,
        seed=options.seed,
    )
    if result.documents == 0:
        raise ValueError(f"no text in {_listed(sources, result)}")
    if tokenizer is None:
        assert options.train_tokenizer is not None
        tokenizer = train_wordpiece(result.sample, options.train_tokenizer, lowercase=not options.cased)
    try:
        tokenizer.save_pretrained(tokenizer_folder)
    except Exception as error:  # the tokenizers library has no kinds of errors
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left") from None
        raise
    with atomic_file(bits_path) as file:
        np.save(file, bits)
    with atomic_file(survey_path) as file:
        file.write(json.dumps(result.to_json()).encode())
    return result, bits, tokenizer


def _listed(sources: Sequence[Source], result: Survey) -> str:
    named = [
        f"{source.name} ({counts.skipped or 'no lines'})"
        for source, counts in zip(sources, result.per_source, strict=True)
    ]
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def _row_settings(options: PrepareOptions, tokenizer: PreTrainedTokenizerBase, work: Path) -> RowSettings:
    facts = TokenizerFacts.of(tokenizer)
    return RowSettings(
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


@dataclass
class _Corpus:
    """The second pass over the sources: documents without duplicate lines, in chunks."""

    sources: Sequence[Source]
    survey: Survey
    duplicate_bits: np.ndarray
    """A bit a line; empty where duplicates are kept."""
    validation: float
    seed: int
    validation_documents: int = 0

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """(characters read so far, chunk), in order; each chunk's documents follow one another in the sources.

        Raises ValueError where a source has changed since the survey.
        """
        documents: list[str] = []
        held_out: list[bool] = []
        index = waiting = 0
        read = 0
        for document, out in self._documents():
            documents.append(document)
            held_out.append(out)
            read += len(document)
            waiting += len(document)
            if waiting >= CHUNK_CHARS:
                yield read, Chunk(index, documents, held_out)
                index, waiting, documents, held_out = index + 1, 0, [], []
        if documents:
            yield read, Chunk(index, documents, held_out)

    def _documents(self) -> Iterator[tuple[str, bool]]:
        number = line = 0
        for source, before in zip(self.sources, self.survey.per_source, strict=True):
            counts = SourceCounts()
            for document in source.documents(counts):
                lines = document.split("\n")
                kept = without_duplicates(lines, line, self.duplicate_bits) if len(self.duplicate_bits) else lines
                line += len(lines)
                yield from self._split_off(number, kept, document if kept is lines else "\n".join(kept))
                number += 1
            if counts != before:
                raise ValueError(f"{source.name} changed while it was read: remove the output folder and start again")

    def _split_off(self, number: int, lines: list[str], document: str) -> Iterator[tuple[str, bool]]:
        """The document and whether it is held out. A corpus of one document has its last lines held out instead."""
        if self.survey.documents > 1 or not self.validation:
            held_out = is_held_out(number, self.survey.documents, self.validation, self.seed)
            self.validation_documents += held_out
            yield document, held_out
            return
        tail = min(len(lines) - 1, max(1, round(self.validation * len(lines))))
        yield "\n".join(lines[: len(lines) - tail]), False
        if tail:
            self.validation_documents = 1
            yield "\n".join(lines[-tail:]), True


def is_held_out(number: int, documents: int, share: float, seed: int) -> bool:
    """Whether document `number` of `documents` (2 or more) is held out: one, at random, of each 1 / share that follow
    one another; one of all where there are fewer."""
    if not share:
        return False
    period = min(round(1 / share), documents)
    return number % period == key_of(_HOLD_OUT_STREAM, seed, number // period) % period


def _parts(corpus: _Corpus, settings: RowSettings, work: Path, workers: int) -> Iterator[tuple[int, ChunkCounts]]:
    """(characters read so far, counts) of each chunk in order, once its part is stored; stored ones are not remade."""
    positions: deque[int] = deque()

    def items() -> Iterator[Chunk | Path]:
        for read, chunk in corpus.chunks():
            positions.append(read)
            path = part_path(work, chunk.index)
            yield path if path.is_file() else chunk

    for counts in ordered_map(partial(store_part, settings=settings, folder=work), items(), workers):
        yield positions.popleft(), counts


def _finish(
    options: PrepareOptions,
    identity: dict[str, object],
    result: Survey,
    corpus: _Corpus,
    counts: ChunkCounts,
    parts: int,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
) -> Manifest:
    """Join the parts into shards under `work`; returns the manifest that describes them."""
    if counts.rows == 0:
        for index in range(parts):
            part_path(work, index).unlink()
        raise ValueError(
            f"no training rows: {counts.sentences_seen} sentences in {result.documents} documents, "
            f"{counts.sentences_kept} kept (too short: {counts.too_short}, too long: {counts.too_long}); "
            "give more text or loosen --min-chars, --max-chars, --every"
        )
    facts = TokenizerFacts.of(tokenizer)
    tokenizer_hash = tokenizer_sha256(tokenizer)
    content = hashlib.sha256(f"{tokenizer_hash} {options.form} {options.seq_len}".encode())
    shards = []
    train_tokens = 0
    for split, rows in ((TRAIN, counts.rows), (VALIDATION, counts.validation_rows)):
        writer = ShardWriter(work / split, facts.vocab_size)
        shards += writer.write((getattr(read_part(part_path(work, i)), split) for i in range(parts)), rows)
        content.update(writer.content_sha256().encode())
        train_tokens = train_tokens or writer.tokens
    of_sources = [
        {"name": source.name} | source.identity() | asdict(source_counts)
        for source, source_counts in zip(options.sources, result.per_source, strict=True)
    ]
    return Manifest(
        documents=result.documents,
        validation_documents=corpus.validation_documents,
        sentences_seen=counts.sentences_seen,
        sentences_kept=counts.sentences_kept,
        tokens=counts.tokens,
        rows=counts.rows,
        validation_rows=counts.validation_rows,
        padding_share=1 - train_tokens / (counts.rows * options.seq_len),
        form=options.form,
        seq_len=options.seq_len,
        vocab_size=facts.vocab_size,
        tokenizer_sha256=tokenizer_hash,
        fingerprint=content.hexdigest(),
        seed=options.seed,
        every=options.every,
        settings={"pad_id": facts.pad_id, "identity": identity},
        sources=of_sources,
        dropped={
            "duplicate_lines": result.duplicate_lines,
            "too_short": counts.too_short,
            "too_long": counts.too_long,
            "not_sampled": counts.not_sampled,
            "cut_to_row": counts.cut_to_row,
            "invalid_utf8": sum(source.invalid_utf8 for source in result.per_source),
            "long_lines_cut": sum(source.long_lines_cut for source in result.per_source),
            "unreadable_records": sum(source.unreadable_records for source in result.per_source),
            "skipped_sources": sum(bool(source.skipped) for source in result.per_source),
        },
        versions={name: metadata.version(name) for name in _LIBRARIES},
        shards=shards,
    )
