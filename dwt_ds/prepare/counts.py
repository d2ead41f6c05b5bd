"""Counts of a chunk: every loss in sentences and in characters, and the unknown tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

# Names of the counts that are kept for each source.
BY_SOURCE = ("text_tokens_by_source", "unknown_by_source")
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
    text_tokens_by_source: dict[int, int] = field(default_factory=dict)
    """By index of the source, only of sources with some: a chunk has text of a few of them."""
    unknown_by_source: dict[int, int] = field(default_factory=dict)
    unknown_characters: dict[str, int] = field(default_factory=dict)
    """The most frequent characters of unknown words, in a sample of the sentences that have such words."""
    tokens: int = 0
    rows: int = 0
    validation_rows: int = 0

    def add(self, other: ChunkCounts) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name in BY_SOURCE:  # in place, since a total has all sources
                for source, count in theirs.items():
                    mine[source] = mine.get(source, 0) + count
            elif isinstance(mine, dict):
                setattr(self, f.name, dict((Counter(mine) + Counter(theirs)).most_common(CHARACTERS_KEPT)))
            else:
                setattr(self, f.name, mine + theirs)
