"""Sums up, over all chunks, what was dropped and what the tokenizer does not know."""

from __future__ import annotations

from collections.abc import Sequence

from dwt_ds.data.show import unknown_warning
from dwt_ds.prepare.corpus import Survey
from dwt_ds.prepare.counts import ChunkCounts
from dwt_ds.prepare.sources import Source

# A larger share means that the tokenizer does not fit the text.
_TOO_MUCH_UNKNOWN = 0.2


def dropped(counts: ChunkCounts, found: Survey) -> dict[str, int]:
    """Reasons why text was left out or altered, with counts."""
    return {
        "duplicate_lines": found.duplicate_lines,
        "too_short": counts.too_short,
        "too_long": counts.too_long,
        "not_sampled": counts.not_sampled,
        "cut_to_row": counts.cut_to_row,
        "cut_long": counts.cut_long,
        "invalid_utf8": sum(of_source.invalid_utf8 for of_source in found.per_source),
        "long_lines_cut": sum(of_source.long_lines_cut for of_source in found.per_source),
        "unreadable_records": sum(of_source.unreadable_records for of_source in found.per_source),
        "skipped_sources": sum(bool(of_source.skipped) for of_source in found.per_source),
    }


def dropped_characters(counts: ChunkCounts, duplicate_characters: int) -> dict[str, int]:
    """Characters of the reasons of `dropped` by which text is left out."""
    return {
        "duplicate_lines": duplicate_characters,
        "too_short": counts.characters_too_short,
        "too_long": counts.characters_too_long,
        "not_sampled": counts.characters_not_sampled,
        "cut_to_row": counts.characters_cut_to_row,
    }


def unknown_shares(counts: ChunkCounts, sources: int) -> list[float]:
    """Share of unknown tokens in the text of each source; 0 for a source without text."""
    unknown, tokens = counts.unknown_by_source, counts.text_tokens_by_source
    return [unknown.get(number, 0) / tokens.get(number, 1) for number in range(sources)]


def check_unknown(counts: ChunkCounts, sources: Sequence[Source]) -> None:
    """Raises ValueError if more than a fifth of the tokens are unknown."""
    share = counts.unknown_tokens / max(1, counts.text_tokens)
    if share <= _TOO_MUCH_UNKNOWN:
        return
    shares = unknown_shares(counts, len(sources))
    worst = max(range(len(sources)), key=shares.__getitem__)
    where = f"{shares[worst]:.0%} in {sources[worst].name}"
    raise ValueError(
        f"{unknown_warning(share, where, counts.unknown_characters)}: choose a tokenizer that knows them and another "
        "--out, or accept this with --allow-unknown"
    )
