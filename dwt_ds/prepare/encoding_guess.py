"""Guesses the encoding of bytes that are not UTF-8: for error messages only, never for reading.

Each candidate encoding decodes the bytes. Its score is the share of the non-ASCII characters that are usual in the
languages it was made for: frequent Chinese characters and kanji (the standards list them first), Cyrillic words with
capitals only in front, accented Latin letters beside plain ones.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

_LINES_BYTES = 20_000
# Candidates below the least score are not guessed. An earlier one that is this close to the best one is preferred.
_LEAST_SCORE = 0.7
_CLOSE = 0.08
_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Escapes that switch the character set in text that is valid ASCII.
_ESCAPES = ((b"\x1b$B", "iso2022_jp"), (b"\x1b$@", "iso2022_jp"), (b"\x1b$)C", "iso2022_kr"))
_HAN_MARKS = "，。、：；？！“”‘’（）《》「」『』…—\u3000·"
_WESTERN = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœÀÁÂÄÅÆÇÈÉÊËÍÎÏÑÓÔÖØÙÚÛÜŒ"
_CENTRAL = "ąćęłńóśźżáčďéěíňřšťúůýžôľĺŕäëâăîşţöüßőűĄĆĘŁŃÓŚŹŻÁČĎÉĚÍŇŘŠŤÚŮÝŽÖÜŐŰ"
_QUOTES = "‘’“”„–—…«»¿¡°£€§©®\u00a0"


class _Candidate(NamedTuple):
    encoding: str
    usual: re.Pattern[str]
    weight: float = 1.0
    """The usual characters make up about 1 / weight of such a text."""


def guess_encoding(sample: bytes) -> str | None:
    """Python's name of the encoding that `sample`, some kilobytes, looks like; None if none fits.

    UTF-16 and UTF-32 are recognized only at the start of a file.
    """
    marked = guess_by_marks(sample)
    if marked is not None:
        return marked
    scores = [(_score(sample, candidate), candidate.encoding) for candidate in _candidates()]
    best, _ = max(scores)
    return next((encoding for score, encoding in scores if score >= max(_LEAST_SCORE, best - _CLOSE)), None)


def guess_by_marks(sample: bytes) -> str | None:
    """UTF-16 or UTF-32, by their byte order mark or by zero bytes in every second place; ISO-2022, by its escapes."""
    escaped = next((encoding for escape, encoding in _ESCAPES if escape in sample), None)
    if escaped is not None:
        return escaped
    guess = next((encoding for mark, encoding in _WIDE_MARKS if sample.startswith(mark)), None)
    if guess is None:
        zeros = [sample[place::2].count(0) / max(1, len(sample) // 2) for place in (0, 1)]
        if max(zeros) < 0.5 or min(zeros) > 0.1:
            return None
        guess = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    text = codecs.getincrementaldecoder(guess)("replace").decode(sample).removeprefix("\ufeff")
    return guess if text and all(map(_is_of_text, text)) else None


def _is_of_text(character: str) -> bool:
    if character in "\t\r\n\f":
        return True
    return character != "\ufffd" and unicodedata.category(character) not in ("Cc", "Cn", "Co", "Cs")


def in_encoding(sample: bytes, encoding: str) -> str:
    """The non-ASCII lines of `sample`, decoded; whole lines if it has any."""
    if encoding.startswith(("utf-16", "utf-32")):
        return codecs.getincrementaldecoder(encoding)("replace").decode(sample).removeprefix("\ufeff")
    lines = sample.split(b"\n")
    # The sample may begin and end inside a character.
    lines = [line for line in (lines[1:-1] or lines) if not line.isascii()] or lines
    return b"\n".join(lines)[:_LINES_BYTES].decode(encoding, "replace")


def _score(sample: bytes, candidate: _Candidate) -> float:
    text = in_encoding(sample, candidate.encoding)
    foreign = sum(not character.isascii() for character in text)
    usual = sum(not c.isascii() for match in candidate.usual.finditer(text) for c in match[0])
    return min(1.0, candidate.weight * usual / max(1, foreign)) - 5 * text.count("\ufffd") / max(1, len(text))


@lru_cache(maxsize=1)
def _candidates() -> list[_Candidate]:
    """The more specific ones first: Korean bytes are also frequent Chinese characters, and Hebrew bytes Cyrillic."""
    every = range(0xA1, 0xFF)
    chinese = _block("gb2312", range(0xB0, 0xD8), every)
    korean = _block("euc_kr", range(0xB0, 0xC9), every)
    taiwanese = _block("big5", range(0xA4, 0xC7), [*range(0x40, 0x7F), *every])
    kana = re.compile("[\u3041-\u30ff]")
    cyrillic = re.compile(r"\b[А-ЯЁІЇЄҐЎ]?[а-яёіїєґў]+\b")
    return [
        _Candidate("cp949", re.compile(f"[{korean}]")),
        _Candidate("euc_jp", kana, 1.6),
        _Candidate("cp932", kana, 1.6),
        _Candidate("gb18030", re.compile(f"[{chinese}{_HAN_MARKS}]")),
        _Candidate("big5", re.compile(f"[{taiwanese}{_HAN_MARKS}]")),
        _Candidate("cp1255", re.compile("[א-ת\u05b0-\u05c2]{2,}")),
        _Candidate("cp1251", cyrillic),
        _Candidate("koi8_r", cyrillic),
        _Candidate("iso8859_5", cyrillic),
        _Candidate("cp866", cyrillic),
        _Candidate("cp1252", _beside_latin(_WESTERN)),
        _Candidate("mac_roman", _beside_latin(_WESTERN)),
        _Candidate("cp850", _beside_latin(_WESTERN)),
        _Candidate("cp1254", _beside_latin(_WESTERN + "ğışİ")),
        _Candidate("cp1250", _beside_latin(_CENTRAL)),
        _Candidate("iso8859_2", _beside_latin(_CENTRAL)),
        _Candidate("cp1253", re.compile("[α-ωάέήίόύώϊϋ]{3,}")),
        _Candidate("cp1256", re.compile("[ء-\u0652]{2,}")),
        _Candidate("cp874", re.compile("[ก-๛]{3,}")),
    ]


def _block(encoding: str, leads: range, trails: list[int] | range) -> str:
    return "".join(bytes((lead, trail)).decode(encoding, "ignore") for lead in leads for trail in trails)


def _beside_latin(letters: str) -> re.Pattern[str]:
    return re.compile(f"(?<=[A-Za-z])[{letters}]+|[{letters}]+(?=[A-Za-z])|[{_QUOTES}]")
