"""Shows a data folder to people: the manifest as a table, and rows with their masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

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
    "cut_long": "sentences longer than --max-chars, cut; nothing is lost",
    "invalid_utf8": "invalid sequences of bytes, replaced by U+FFFD",
    "long_lines_cut": "very long lines, cut at a space",
    "unreadable_records": "records without text",
    "skipped_sources": "sources skipped (empty or binary)",
}
# Dropped on request, so not a reason for a warning.
_ASKED_FOR = "not_sampled"
_MUCH_DROPPED = 0.05
_MUCH_UNKNOWN = 0.02
# Times the share that was asked for.
_MUCH_HELD_OUT = 3
_SOURCES_NAMED = 3
_CHARACTERS_NAMED = 12


def manifest_table(manifest: Manifest) -> str:
    """Name, value and a note, one line each; then the sources."""
    form = "packed rows" if manifest.form == "packed" else "one sentence a row"
    held_out = f"{manifest.validation_documents:,} of them held out"
    if manifest.held_out_instead:
        held_out += ", one of them instead of documents whose text was all dropped"
    seen = manifest.characters_seen
    rows = [
        ("documents", f"{manifest.documents:,}", held_out),
        ("sentences seen", f"{manifest.sentences_seen:,}", f"{seen:,} characters" if seen else ""),
        ("sentences kept", f"{manifest.sentences_kept:,}", f"one of every {manifest.every}{_kept(manifest)}"),
        ("tokens", f"{manifest.tokens:,}", "[CLS] and [SEP] included"),
        ("training rows", f"{manifest.rows:,}", f"{form} of at most {manifest.seq_len} tokens"),
        ("validation rows", f"{manifest.validation_rows:,}", ""),
        ("padding", f"{manifest.padding_share:.2%}", f"of training rows padded to {manifest.seq_len}"),
        ("vocabulary", f"{manifest.vocab_size:,}", f"tokenizer {manifest.tokenizer_sha256[:12]}"),
        *([("capitals, accents", "", manifest.case_and_accents)] if manifest.case_and_accents else []),
        *([("unknown tokens", "", unknown_share_text(manifest))] if manifest.unknown_share is not None else []),
        ("fingerprint", manifest.fingerprint[:12], "of the rows; equal fingerprints, equal rows"),
        ("seed", str(manifest.seed), ""),
        ("shards", str(len(manifest.shards)), f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB"),
        ("made with", "", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    if "words" in manifest.settings:
        how = ", ".join(f"{script} {how}" for script, how in manifest.settings["words"].items())
        rows.append(("words", "", f"where they start is stored (data.whole_word); without spaces: {how}"))
    for name, count in manifest.dropped.items():
        if count:
            characters = manifest.dropped_characters.get(name, 0)
            share = f": {characters:,} characters, {characters / _all_characters(manifest):.2%}" if characters else ""
            rows.append((name.replace("_", " "), f"{count:,}", _REASONS[name] + share))
    sources = [("documents", "characters", "unknown", "source")]
    for source in manifest.sources:
        notes = f"  (skipped: {source['skipped']})" if source["skipped"] else ""
        if source.get("read_as"):
            notes += f"  (read as {source['read_as']})"
        if source["invalid_utf8"]:
            notes += f"  ({source['invalid_utf8']:,} invalid sequences of bytes)"
        unknown = source.get("unknown_share")
        shown = "" if unknown is None else f"{unknown:.2%}"
        sources.append((f"{source['documents']:,}", f"{source['characters']:,}", shown, f"{source['name']}{notes}"))
    return "\n".join([*table(rows, "<><"), "", *table(sources, ">>><")]) + "\n"


def unknown_share_text(manifest: Manifest) -> str:
    """The share of unknown tokens, and the sources in which it is highest."""
    worst = _worst_sources(manifest)
    return f"{manifest.unknown_share or 0:.2%} of the text's tokens" + (f"; highest in {worst}" if worst else "")


def unknown_warning(share: float, where: str, characters: Iterable[str]) -> str:
    """A sentence with the share of unknown tokens, where they are, and the first characters of their words."""
    named = " ".join(islice(characters, _CHARACTERS_NAMED))
    return f"{share:.1%} of the tokens are unknown to the tokenizer ({where}), in words with the characters {named}"


def warnings_of(manifest: Manifest) -> list[str]:
    """Warnings about a data folder, a line each."""
    found: list[str] = []
    lost = {name: count for name, count in manifest.dropped_characters.items() if count and name != _ASKED_FOR}
    share = sum(lost.values()) / _all_characters(manifest)
    if share > _MUCH_DROPPED:
        reasons = ", ".join(f"{_REASONS[name]} {count / _all_characters(manifest):.1%}" for name, count in lost.items())
        found.append(f"{share:.1%} of the characters were dropped: {reasons}")
    unknown = [manifest.unknown_share or 0.0, *(source.get("unknown_share") or 0.0 for source in manifest.sources)]
    if max(unknown) > _MUCH_UNKNOWN:
        where = f"highest in {_worst_sources(manifest)}"
        found.append(unknown_warning(unknown[0], where, manifest.unknown_characters))
    without_text = [
        (source["unreadable_records"] / source["records"], source["name"], source.get("column", "text"))
        for source in manifest.sources
        if source.get("records")  # not of text, nor in a folder of an earlier version
    ]
    skipped = sorted((each for each in without_text if each[0] > _MUCH_DROPPED), reverse=True)
    if skipped:
        named = _named([f'{share:.0%} of {name} (no "{column}")' for share, name, column in skipped])
        found.append(f"records without text were skipped: {named}; name another column with --text-column")
    binary = [str(source["name"]) for source in manifest.sources if source["skipped"] == "binary"]
    if binary:
        named = _named(binary)
        many = "1 source was" if len(binary) == 1 else f"{len(binary)} sources were"
        found.append(f"{many} skipped as binary (a zero byte near the start): {named}")
    asked = manifest.settings["identity"]["validation"]
    held_out = manifest.validation_rows / (manifest.rows + manifest.validation_rows)
    if manifest.validation_rows == 0 and asked:
        found.append("no text is held out, so training will show no held-out loss")
    if manifest.validation_rows > 1 and held_out > _MUCH_HELD_OUT * asked:
        found.append(
            f"{held_out:.1%} of the rows are held out, not {100 * asked:g}% (--validation): at least one whole line "
            "is held out, so break up long ones; if an earlier version made this folder, prepare it again"
        )
    return found


def _named(sources: list[str]) -> str:
    """The first of them."""
    return ", ".join(sources[:_SOURCES_NAMED]) + (" ..." if len(sources) > _SOURCES_NAMED else "")


def _all_characters(manifest: Manifest) -> int:
    """Of the whole text, duplicate lines included; at least 1."""
    return max(1, manifest.characters_seen + manifest.dropped_characters.get("duplicate_lines", 0))


def _kept(manifest: Manifest) -> str:
    if not manifest.characters_seen:
        return ""
    share = manifest.characters_kept / manifest.characters_seen
    return f"; {manifest.characters_kept:,} characters, {share:.2%}"


def _worst_sources(manifest: Manifest) -> str:
    """The sources with the largest shares of unknown tokens; "" if there are none."""
    shares = [(source.get("unknown_share") or 0.0, str(source["name"])) for source in manifest.sources]
    worst = sorted((each for each in shares if each[0]), key=lambda each: (-each[0], each[1]))[:_SOURCES_NAMED]
    return ", ".join(f"{name} {share:.2%}" for share, name in worst)


def examples(data: PreparedData, count: int, config: DataConfig, seed: int) -> Iterator[str]:
    """`count` training rows, spread over the table, as text, with {true -> shown} for tokens to predict."""
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
