"""Makes a data folder: from sources to manifest.

The sources are read twice: first for the survey and the tokenizer, then to turn chunks of documents into rows on all
cores. The rows of each chunk are stored as a part, and at the end the parts are joined into shards. An interruption
loses nothing that is finished: the same call resumes there.
"""

from __future__ import annotations

import errno
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dwt_ds.data.manifest import Manifest, Shard
from dwt_ds.data.prepared import TOKENIZER_FOLDER, TRAIN, VALIDATION
from dwt_ds.data.tokenizer import TokenizerFacts, save_tokenizer, tokenizer_sha256
from dwt_ds.prepare import manifest_counts
from dwt_ds.prepare.case_and_accents import described
from dwt_ds.prepare.corpus import Corpus, Survey, progress_bar, survey
from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.documentation import InstalledDocumentation
from dwt_ds.prepare.hold_out import hold_out_another, was_held_out_instead
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.output import finished_manifest, make_final, work_folder
from dwt_ds.prepare.packing import RowSettings
from dwt_ds.prepare.rows import part_path, read_part, store_part
from dwt_ds.prepare.segment import segmenters
from dwt_ds.prepare.shards import ShardWriter
from dwt_ds.prepare.sources import Source
from dwt_ds.prepare.tokenizer import find_tokenizer
from dwt_ds.prepare.train_tokenizer import train_tokenizer
from dwt_ds.prepare.workers import ordered_map

_LIBRARIES = ("tokenizers", "transformers", "syntok", "datasets", "pyarrow", "numpy")


def prepare(options: PrepareOptions) -> Manifest:
    """Make the data folder `options.out`, or finish an interrupted one; a finished folder is left as it is.

    Raises ValueError for mistakes of the user, OSError if the disk is full or a file cannot be read or written. Either
    way finished work is kept, and a half-written folder never looks finished.
    """
    tokenizer = find_tokenizer(options.tokenizer, options.wishes) if options.tokenizer else None
    identity = options.identity()
    if tokenizer is not None:
        TokenizerFacts.of(tokenizer)
        identity["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    manifest = finished_manifest(options.out, identity)
    if manifest is not None:
        return manifest
    try:
        with work_folder(options.out, identity | {"words": segmenters()}) as work:
            sources = _readable(options.sources, work)
            found, tokenizer = _surveyed(options, sources, tokenizer, work)
            corpus = Corpus(sources, found, options.validation, options.seed)
            print(f"tokenizer: {described(tokenizer)}", file=sys.stderr)
            settings = row_settings(options, TokenizerFacts.of(tokenizer), work / TOKENIZER_FOLDER)
            parts: list[ChunkCounts] = []
            with progress_bar("preparing", found.characters, "char") as bar:
                for counts in _parts(corpus, settings, work, options.workers):
                    parts.append(counts)
                    bar.update(counts.characters_seen)
            if options.validation and any(part.rows for part in parts) != any(part.validation_rows for part in parts):
                hold_out_another(corpus, parts, settings, work)
                if was_held_out_instead(work):
                    print(
                        "no text is left of the held-out documents, or of the others: another document is held out",
                        file=sys.stderr,
                    )
            manifest = _joined(options, identity, corpus, parts, tokenizer, work)
            make_final(options.out, manifest)
            return manifest
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"no space left for --out {options.out}; what is finished stays: free some space and repeat the command"
            ) from None
        raise


def _readable(sources: Sequence[Source], work: Path) -> list[Source]:
    """The sources to read; the documentation is stored as a file first, since sources are read twice."""
    return [
        source.stored(work / "documentation.txt") if isinstance(source, InstalledDocumentation) else source
        for source in sources
    ]


def _surveyed(
    options: PrepareOptions, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase | None, work: Path
) -> tuple[Survey, PreTrainedTokenizerBase]:
    """The first pass and the tokenizer, which is trained unless given; or both as an earlier attempt stored them."""
    tokenizer_folder = work / TOKENIZER_FOLDER
    stored = Survey.stored(work)
    if stored is not None:
        return stored, find_tokenizer(str(tokenizer_folder))
    found = survey(
        sources,
        work,
        find_duplicates=not options.keep_duplicates,
        want_sample=options.train_tokenizer is not None,
        seed=options.seed,
    )
    if found.documents == 0:
        raise ValueError(f"no text in {_listed(sources, found)}")
    if tokenizer is None:
        assert options.train_tokenizer is not None
        tokenizer = train_tokenizer(found.sample, options.train_tokenizer, options.kind, options.wishes)
    save_tokenizer(tokenizer, tokenizer_folder)
    found.store(work)
    return found, tokenizer


def _listed(sources: Sequence[Source], found: Survey) -> str:
    """The first sources, each with the reason why it has no text."""
    named = []
    for source, counts in zip(sources, found.per_source, strict=True):
        records = f"{counts.unreadable_records:,} records without text" if counts.unreadable_records else ""
        named.append(f"{source.name} ({counts.skipped or records or 'no lines'})")
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def row_settings(options: PrepareOptions, facts: TokenizerFacts, tokenizer_folder: Path) -> RowSettings:
    """What the workers need of the options and the tokenizer."""
    names = {field.name for field in fields(RowSettings)} & {field.name for field in fields(options)}
    same = {name: getattr(options, name) for name in names}
    path = str(tokenizer_folder / "tokenizer.json")
    return RowSettings(path, facts.cls_id, facts.sep_id, facts.vocab_size, **same)


def _parts(corpus: Corpus, settings: RowSettings, work: Path, workers: int) -> Iterator[ChunkCounts]:
    """The counts of each chunk in order, once its part is stored; existing parts are reused."""
    places = ((part_path(work, chunk.index), chunk) for chunk in corpus.chunks())
    items = (path if path.is_file() else chunk for path, chunk in places)
    return ordered_map(partial(store_part, settings=settings, folder=work), items, workers)


def _joined(
    options: PrepareOptions,
    identity: dict[str, Any],
    corpus: Corpus,
    parts: Sequence[ChunkCounts],
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
) -> Manifest:
    """Join the parts into shards under `work`; returns the manifest that describes them."""
    counts = ChunkCounts()
    for part in parts:
        counts.add(part)
    part_paths = [part_path(work, index) for index in range(len(parts))]
    _check_rows(counts, corpus.survey.documents, part_paths)
    if not options.allow_unknown:
        manifest_counts.check_unknown(counts, options.sources)
    found, facts = corpus.survey, TokenizerFacts.of(tokenizer)
    content = hashlib.sha256(f"{tokenizer_sha256(tokenizer)} {options.form} {options.seq_len}".encode())
    shards: list[Shard] = []
    tokens = {}
    for split, rows in ((TRAIN, counts.rows), (VALIDATION, counts.validation_rows)):
        writer = ShardWriter(work / split, facts.vocab_size)
        shards += writer.write((getattr(read_part(path), split) for path in part_paths), rows)
        content.update(writer.content_sha256().encode())
        tokens[split] = writer.tokens
    return Manifest(
        documents=found.documents,
        validation_documents=corpus.validation_documents + was_held_out_instead(work) if counts.validation_rows else 0,
        held_out_instead=was_held_out_instead(work),
        sentences_seen=counts.sentences_seen,
        sentences_kept=counts.sentences_kept,
        tokens=counts.tokens,
        rows=counts.rows,
        validation_rows=counts.validation_rows,
        padding_share=1 - tokens[TRAIN] / (counts.rows * options.seq_len),
        form=options.form,
        seq_len=options.seq_len,
        vocab_size=facts.vocab_size,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        case_and_accents=described(tokenizer),
        fingerprint=content.hexdigest(),
        seed=options.seed,
        every=options.every,
        settings={"pad_id": facts.pad_id, "identity": identity, "words": segmenters()},
        sources=[
            {"name": source.name} | source.identity() | asdict(of_source) | {"unknown_share": unknown}
            for source, of_source, unknown in zip(
                options.sources,
                found.per_source,
                manifest_counts.unknown_shares(counts, len(options.sources)),
                strict=True,
            )
        ],
        dropped=manifest_counts.dropped(counts, found),
        dropped_characters=manifest_counts.dropped_characters(counts, corpus.duplicate_characters),
        characters_seen=counts.characters_seen,
        characters_kept=counts.characters_kept,
        unknown_share=counts.unknown_tokens / max(1, counts.text_tokens),
        unknown_characters=counts.unknown_characters,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        shards=shards,
    )


def _check_rows(counts: ChunkCounts, documents: int, part_paths: Sequence[Path]) -> None:
    """If no row is left to train on, removes the parts and raises ValueError."""
    if counts.rows:
        return
    for path in part_paths:
        path.unlink()
    raise ValueError(
        f"no training rows: {counts.sentences_seen} sentences in {documents} documents, "
        f"{counts.sentences_kept} kept (too short: {counts.too_short}, too long: {counts.too_long}); "
        "give more text or loosen --min-chars, --max-chars, --every"
    )
