"""A data folder for people: the manifest as a table, and rows with their masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dwt_ds.base.words import table
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.manifest import Manifest
from dwt_ds.data.masks import draw_masks
from dwt_ds.data.prepared import PreparedData

_REASONS = {
    "duplicate_lines": "lines that repeat an earlier one",
    "too_short": "sentences shorter than --min-chars",
    "too_long": "sentences longer than --max-chars",
    "not_sampled": "sentences skipped by --every",
    "cut_to_row": "sentences cut to one row",
    "invalid_utf8": "invalid sequences of bytes, replaced by U+FFFD",
    "long_lines_cut": "very long lines, cut at a space",
    "unreadable_records": "records without text",
    "skipped_sources": "sources skipped (empty or binary)",
}


def manifest_table(manifest: Manifest) -> str:
    """Name, value and a note, one line each; then the sources."""
    form = "packed rows" if manifest.form == "packed" else "one sentence a row"
    rows = [
        ("documents", f"{manifest.documents:,}", f"{manifest.validation_documents:,} of them held out"),
        ("sentences seen", f"{manifest.sentences_seen:,}", ""),
        ("sentences kept", f"{manifest.sentences_kept:,}", f"one of every {manifest.every}"),
        ("tokens", f"{manifest.tokens:,}", "[CLS] and [SEP] included"),
        ("training rows", f"{manifest.rows:,}", f"{form} of at most {manifest.seq_len} tokens"),
        ("validation rows", f"{manifest.validation_rows:,}", ""),
        ("padding", f"{manifest.padding_share:.2%}", f"of training rows padded to {manifest.seq_len}"),
        ("vocabulary", f"{manifest.vocab_size:,}", f"tokenizer {manifest.tokenizer_sha256[:12]}"),
        *([("capitals, accents", "", manifest.case_and_accents)] if manifest.case_and_accents else []),
        ("fingerprint", manifest.fingerprint[:12], "of the rows; equal fingerprints, equal rows"),
        ("seed", str(manifest.seed), ""),
        ("shards", str(len(manifest.shards)), f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB"),
        ("made with", "", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    if "words" in manifest.settings:
        how = ", ".join(f"{script} {how}" for script, how in manifest.settings["words"].items())
        rows.append(("words", "", f"where they start is stored (data.whole_word); without spaces: {how}"))
    rows += [
        (name.replace("_", " "), f"{count:,}", _REASONS[name]) for name, count in manifest.dropped.items() if count
    ]
    sources = [("documents", "characters", "source")]
    for source in manifest.sources:
        notes = f"  (skipped: {source['skipped']})" if source["skipped"] else ""
        if source.get("read_as"):
            notes += f"  (read as {source['read_as']})"
        if source["invalid_utf8"]:
            notes += f"  ({source['invalid_utf8']:,} invalid sequences of bytes)"
        sources.append((f"{source['documents']:,}", f"{source['characters']:,}", f"{source['name']}{notes}"))
    return "\n".join([*table(rows, "<><"), "", *table(sources, ">><")]) + "\n"


def examples(data: PreparedData, count: int, config: DataConfig, seed: int) -> Iterator[str]:
    """`count` training rows, spread over the table, as text: {true -> shown} where a token is to be predicted."""
    tokenizer = data.tokenizer()
    count = min(count, len(data.train))
    rows = np.arange(count, dtype=np.int64) * len(data.train) // max(count, 1)
    for row in rows.tolist():
        index = np.array([row], dtype=np.int64)
        true_ids, lengths = data.train.rows(index)
        masked = draw_masks(true_ids, lengths, index, np.zeros_like(index), data.facts, config, seed)
        true = list(tokenizer.convert_ids_to_tokens(true_ids[0].tolist()))
        shown = list(tokenizer.convert_ids_to_tokens(masked.input_ids[0].tolist()))
        for position in masked.positions.tolist():
            true[position] = f"{{{true[position]} -> {shown[position]}}}"
        yield f"row {row}: {lengths[0]} tokens, {len(masked.labels)} to predict\n" + " ".join(true)
