"""Whether a tokenizer keeps capitals and accents: by its vocabulary, by the text it is trained on, or by request.

Taking accents off decomposes text and removes every non-spacing mark (Unicode's Mn). That is harmless in English; in
Hindi, Arabic, Thai or Japanese it takes away vowels and makes other words, or words that a vocabulary does not know.
Korean syllables fall apart into letters.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerBase

# A vocabulary is cased if more than this share of the entries with a cased letter have a capital, and more than one: a
# few strays are in many an uncased one, and of a cased one it is a fifth or more.
_CAPITALS_OF_CASED = 0.05
# Text keeps its accents where more than this share of its letters carry one: 0.05% do in English Wikipedia, over 1% in
# German, Russian or Hindi. Letters that are not Latin count for more, since a part of the text in Hindi needs them all.
_ACCENTS_OF_TEXT = 0.005
_OTHER_ACCENTS_OF_TEXT = 0.001


@dataclass(frozen=True)
class Treatment:
    """What a tokenizer does to text before it looks for tokens."""

    lowercase: bool
    strip_accents: bool

    def __str__(self) -> str:
        case = "lower-cased" if self.lowercase else "capitals kept"
        return f"{case}, accents {'taken off' if self.strip_accents else 'kept'}"


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None leaves it to the vocabulary or the text."""

    cased: bool | None = None
    keep_accents: bool | None = None


def of_vocabulary(entries: Iterable[str], wishes: Wishes) -> Treatment:
    """The treatment that fits a WordPiece vocabulary with these ordinary entries."""
    found = _Entries.of(entries)
    cased = found.capitals > max(1, _CAPITALS_OF_CASED * found.with_case) if wishes.cased is None else wishes.cased
    keep = cased or found.accents > 0 if wishes.keep_accents is None else wishes.keep_accents
    return Treatment(lowercase=not cased, strip_accents=not keep)


def of_text(characters: Counter[str], wishes: Wishes, *, usually_cased: bool) -> Treatment:
    """The treatment that fits a text, given how often each character is in it."""
    letters = sum(count for c, count in characters.items() if unicodedata.category(c)[0] in "LM")
    marked = {c: count for c, count in characters.items() if _carries_mark(c)}
    other = sum(count for c, count in marked.items() if not _is_latin(c))
    needed = sum(marked.values()) > _ACCENTS_OF_TEXT * letters or other > _OTHER_ACCENTS_OF_TEXT * letters
    cased = usually_cased if wishes.cased is None else wishes.cased
    keep = cased or needed if wishes.keep_accents is None else wishes.keep_accents
    return Treatment(lowercase=not cased, strip_accents=not keep)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Treatment:
    """What a tokenizer does, by what it makes of a capital and an accent."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    shown = normalizer.normalize_str("A\u00e9") if normalizer is not None else "A\u00e9"
    return Treatment("A" not in shown, not any(map(_carries_mark, shown)))


def described(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does with capitals and accents, for people; of WordPiece with what its entries have of them."""
    treatment = str(of_tokenizer(tokenizer))
    if not isinstance(tokenizer.backend_tokenizer.model, WordPiece):
        return treatment
    found = _Entries.of(entry for entry in tokenizer.get_vocab() if not looks_special(entry))
    return f"{treatment} ({found.capitals:,} of {found.all:,} entries have a capital, {found.accents:,} an accent)"


def looks_special(entry: str) -> bool:
    """Whether an entry of a WordPiece vocabulary is no piece of text: [MASK], [unused7]."""
    return entry.startswith("[") and entry.endswith("]")


@dataclass(frozen=True)
class _Entries:
    """How many entries of a vocabulary have what."""

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
    """Raises ValueError where a tokenizer that is loaded whole does what the user asked it not to do."""
    for wished, does, option, opposite in (
        (wishes.cased, not treatment.lowercase, "--cased", "--uncased"),
        (wishes.keep_accents, not treatment.strip_accents, "--keep-accents", "--strip-accents"),
    ):
        if wished is not None and wished != does:
            asked = option if wished else opposite
            raise ValueError(
                f"{asked}: the tokenizer {name} is loaded whole and decides this itself ({treatment}); "
                f"leave {asked} out, or choose another tokenizer"
            )


def _carries_mark(character: str) -> bool:
    """Whether taking accents off changes this character: it carries one, is one, or falls apart (Korean syllables)."""
    if character.isascii():
        return False
    decomposed = unicodedata.normalize("NFD", character)
    return decomposed != character or unicodedata.category(character) == "Mn"


def _is_latin(character: str) -> bool:
    """Whether it is a Latin letter, or a mark as Latin letters carry it."""
    return unicodedata.name(character, "").startswith(("LATIN", "COMBINING"))
