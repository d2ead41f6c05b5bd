"""Counts of a chunk: every loss in sentences and in characters, and the unknown tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

# So many of the most frequent characters of unknown words are kept; a warning names the first few.
CHARACTERS_KEPT = 200


@dataclass
class ChunkCounts:
    """Sentences, characters and tokens of one chunk, or the total of several.

    Characters are those of sentences, without the spaces between them: `characters_seen` is the sum of
    `characters_kept` and of the characters too short, too long, not sampled and cut to a row.
    """

    sentences_seen: int = 0
    """Each piece of a cut sentence counts as one."""
    sentences_kept: int = 0
    too_short: int = 0
    too_long: int = 0
    not_sampled: int = 0
    cut_to_row: int = 0
    cut_long: int = 0
    """Sentences longer than max_chars that were cut."""
    characters_seen: int = 0
    characters_kept: int = 0
    characters_too_short: int = 0
    characters_too_long: int = 0
    characters_not_sampled: int = 0
    characters_cut_to_row: int = 0
    text_tokens: int = 0
    """Tokens of text, without special ones; unknown tokens are among them."""
    unknown_tokens: int = 0
    text_tokens_by_source: list[int] = field(default_factory=list)
    """By index of the source; sources beyond the end have none."""
    unknown_by_source: list[int] = field(default_factory=list)
    unknown_characters: dict[str, int] = field(default_factory=dict)
    """The most frequent characters of unknown words, in a sample of the sentences that have such words."""
    tokens: int = 0
    rows: int = 0
    validation_rows: int = 0

    def add(self, other: ChunkCounts) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, _sum(mine, theirs))


def _sum(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, dict):
        return dict((Counter(mine) + Counter(theirs)).most_common(CHARACTERS_KEPT))
    if isinstance(mine, list):
        return [sum(pair) for pair in zip_longest(mine, theirs, fillvalue=0)]
    return mine + theirs
