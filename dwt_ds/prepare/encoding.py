"""Decoding: UTF-8 unless the user names another encoding; text in any other encoding is refused."""

from __future__ import annotations

import codecs

from dwt_ds.base.words import shorten
from dwt_ds.prepare.encoding_guess import guess_encoding, in_encoding
from dwt_ds.prepare.sources import UTF_8, SourceCounts

REPLACEMENT = "\ufffd"
# At the start of a file or of a value it is not text.
_BYTE_ORDER_MARK = "\ufeff"
# A larger share of replaced characters means another encoding, unless it is a stray byte in a short text.
_MOST_REPLACED = 0.01
_STRAY = 2
_EXCERPT_CHARS = 40


def known_encoding(name: str) -> str:
    """Python's name of an encoding of text, so that `UTF8` and `utf-8` are the same; ValueError if it is unknown."""
    try:
        codec = codecs.lookup(name)
        "".encode(name)  # refuses codecs that do not encode text, such as base64
    except LookupError:
        raise ValueError(
            f"--encoding {name}: Python knows no such encoding of text; gb18030, cp1252, shift_jis, utf-16 are some"
        ) from None
    return codec.name


class TextDecoder:
    """Decodes the source `name`, block by block or value by value.

    Invalid sequences of bytes become U+FFFD, and are added to `counts.invalid_utf8`.
    """

    def __init__(self, encoding: str, name: str, counts: SourceCounts) -> None:
        decoder = codecs.getincrementaldecoder(encoding)
        self._replacing, self._ignoring = decoder("replace"), decoder("ignore")
        self._encoding, self._name, self._counts = encoding, name, counts
        self._characters = self._replaced = 0
        self._sample = b""

    def decode(self, raw: bytes, *, final: bool = False) -> str:
        """Decode the next block of bytes; `final`: there are no more."""
        before = self._replacing.getstate()
        text = self._replacing.decode(raw, final)
        if not self._characters:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        self._characters += len(text)
        if REPLACEMENT in text:
            # The source's own U+FFFD remain when invalid bytes are ignored.
            self._ignoring.setstate(before)
            invalid = text.count(REPLACEMENT) - self._ignoring.decode(raw, final).count(REPLACEMENT)
            self._replaced += invalid
            self._counts.invalid_utf8 += invalid
            if invalid and not self._sample:
                self._sample = raw
        return text

    def value(self, raw: bytes, *, is_string: bool = False) -> str:
        """Decode a whole cell of a column of bytes or, if `is_string`, of strings, which should be UTF-8."""
        try:
            text = raw.decode(UTF_8 if is_string else self._encoding)
            self._characters += len(text)
        except UnicodeError:
            self._replacing.reset()
            text = self.decode(raw, final=True)
        return text.removeprefix(_BYTE_ORDER_MARK)

    def check(self, characters: int = 0) -> None:
        """Refuse a source with more than 1% of its characters replaced: it is in another encoding (ValueError).

        While the source is being read, `characters` is the most that it may hold.
        """
        total = max(characters, self._characters)
        if self._replaced <= max(_STRAY, _MOST_REPLACED * total):
            return
        share = self._replaced / self._characters
        raise ValueError(
            f"{self._name}: {share:.0%} of its characters cannot be decoded: {advice(self._sample, self._encoding)}"
        )


def advice(sample: bytes, encoding: str = UTF_8) -> str:
    """What a sample that is not in `encoding` looks like, and what to do about it."""
    guess = guess_encoding(sample)
    if guess is None or guess == encoding:
        return "it looks like no encoding that is known here; convert it to UTF-8, name its --encoding, or leave it out"
    excerpt = shorten(" ".join(filter(str.isprintable, in_encoding(sample, guess).split())), _EXCERPT_CHARS)
    return (
        f'this looks like {guess} ("{excerpt}"), not {encoding.upper()}; if that reads well, give --encoding {guess}, '
        "else convert the file"
    )
