"""Decides whether a tokenizer keeps capitals and accents: by its vocabulary, its training text, or on request.

Stripping accents decomposes text and removes every non-spacing mark (Unicode's Mn). That is harmless in English, but in
Hindi, Arabic, Thai or Japanese it removes vowels, which makes other words or words that a vocabulary does not have.
Korean syllables fall apart into letters.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerBase

# A vocabulary is cased if more than this share of its entries with cased letters, and more than one entry, have a
# capital: uncased vocabularies may have a few, in cased ones it is a fifth or more.
_CAPITALS_OF_CASED = 0.05
# Text keeps its accents if more than this share of its letters have one: 0.05% in English Wikipedia, over 1% in German,
# Russian or Hindi. For non-Latin letters a smaller share is enough, since even a little Hindi needs its marks.
_ACCENTS_OF_TEXT = 0.005
_OTHER_ACCENTS_OF_TEXT = 0.001


@dataclass(frozen=True)
class Treatment:
    """What a tokenizer's normalizer does to capitals and accents."""

    lowercase: bool
    strip_accents: bool

    def __str__(self) -> str:
        case = "lower-cased" if self.lowercase else "capitals kept"
        return f"{case}, accents {'removed' if self.strip_accents else 'kept'}"


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None: decide by the vocabulary or the text."""

    cased: bool | None = None
    keep_accents: bool | None = None

    def treatment(self, *, cased: bool, accents: bool) -> Treatment:
        """What was asked for; what was left open follows from whether capitals (`cased`) or `accents` are in use."""
        cased = cased if self.cased is None else self.cased
        keep = cased or accents if self.keep_accents is None else self.keep_accents
        return Treatment(lowercase=not cased, strip_accents=not keep)


def of_vocabulary(entries: Iterable[str], wishes: Wishes) -> Treatment:
    """The treatment that fits a WordPiece vocabulary with these ordinary entries."""
    found = _Entries.of(entries)
    cased = found.capitals > max(1, _CAPITALS_OF_CASED * found.with_case)
    return wishes.treatment(cased=cased, accents=found.accents > 0)


def of_text(characters: Counter[str], wishes: Wishes, *, usually_cased: bool) -> Treatment:
    """The treatment that fits a text, given how often each character is in it."""
    letters = sum(count for c, count in characters.items() if unicodedata.category(c)[0] in "LM")
    marked = {c: count for c, count in characters.items() if _carries_mark(c)}
    other = sum(count for c, count in marked.items() if not _is_latin(c))
    needed = sum(marked.values()) > _ACCENTS_OF_TEXT * letters or other > _OTHER_ACCENTS_OF_TEXT * letters
    return wishes.treatment(cased=usually_cased, accents=needed)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Treatment:
    """The treatment of a tokenizer, found by normalizing a capital and an accent."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    shown = normalizer.normalize_str("A\u00e9") if normalizer is not None else "A\u00e9"
    return Treatment("A" not in shown, not any(map(_carries_mark, shown)))


def described(tokenizer: PreTrainedTokenizerBase) -> str:
    """The treatment in words; for WordPiece with the number of entries that have capitals and accents."""
    treatment = str(of_tokenizer(tokenizer))
    if not isinstance(tokenizer.backend_tokenizer.model, WordPiece):
        return treatment
    found = _Entries.of(entry for entry in tokenizer.get_vocab() if not looks_special(entry))
    return f"{treatment} ({found.capitals:,} of {found.all:,} entries have a capital, {found.accents:,} an accent)"


def looks_special(entry: str) -> bool:
    """Whether an entry of a WordPiece vocabulary is not text, such as [MASK] or [unused7]."""
    return entry.startswith("[") and entry.endswith("]")


@dataclass(frozen=True)
class _Entries:
    """Counts of entries of a vocabulary."""

    all: int
    with_case: int
    capitals: int
    accents: int

    @classmethod
    def of(cls, entries: Iterable[str]) -> _Entries:
        entries = list(entries)
        return cls(
            len(entries),
            with_case=sum(entry.lower() != entry.upper() for entry in entries),
            capitals=sum(entry != entry.lower() for entry in entries),
            accents=sum(any(map(_carries_mark, entry)) for entry in entries),
        )


def check_wishes(name: str, treatment: Treatment, wishes: Wishes) -> None:
    """Raises ValueError if a complete tokenizer does not do what the user asked for."""
    for wished, does, option, opposite in (
        (wishes.cased, not treatment.lowercase, "--cased", "--uncased"),
        (wishes.keep_accents, not treatment.strip_accents, "--keep-accents", "--strip-accents"),
    ):
        if wished is not None and wished != does:
            asked = option if wished else opposite
            raise ValueError(
                f"{asked}: the tokenizer {name} is complete and decides this itself ({treatment}); "
                f"leave {asked} out, or choose another tokenizer"
            )


def _carries_mark(character: str) -> bool:
    """Whether stripping accents changes this character: it has one, is one, or decomposes (Korean syllables)."""
    if character.isascii():
        return False
    decomposed = unicodedata.normalize("NFD", character)
    return decomposed != character or unicodedata.category(character) == "Mn"


def _is_latin(character: str) -> bool:
    """Whether it is a Latin letter, or a mark as Latin letters carry it."""
    return unicodedata.name(character, "").startswith(("LATIN", "COMBINING"))
