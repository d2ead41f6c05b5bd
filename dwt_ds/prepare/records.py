"""Texts of records: from JSON lines, recognized by their content, and from columns of Arrow tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from dwt_ds.prepare.encoding import TextDecoder
from dwt_ds.prepare.sources import SourceCounts, TextForm

# Longest line of JSON, which is held in memory; pieces of a cut line would not be records.
RECORD_CHARS = 100_000_000
# Number of first lines with text that tell JSON lines from prose.
HEAD_LINES = 5
# Does not match "[[": pages of a wiki begin with it.
_JSON_START = re.compile(r'(?:\[\s*)?\{\s*"[^"\n]*"\s*:|\[\s*"[^"\n]*"\s*[,\]]')


def looks_like_json_lines(head: Sequence[str], source: str, *, called_json: bool) -> bool:
    """Whether a file is JSON lines: the first, or most, of its first lines with text (stripped) are JSON objects.

    Raises ValueError if it is JSON in another layout, which would be trained on as prose; any list is JSON if the
    file's name ends in .json (`called_json`).
    """
    are_records = [isinstance(_parsed(line), dict) for line in head]
    if any(are_records[:1]) or 2 * sum(are_records) > len(head):
        return True
    text = "\n".join(head)
    if _JSON_START.match(text) if not called_json else text[:1] in ("{", "["):
        raise ValueError(
            f"{source} is JSON, but not one record a line: convert it to JSON lines, or name it with --dataset, "
            "which also reads lists of records"
        )
    return False


def json_texts(lines: Iterable[str], form: TextForm, source: str, counts: SourceCounts) -> Iterator[str | None]:
    """The text of each record; None for a broken line and for a record without text.

    Raises ValueError, with the columns of the last record, if none has the column.
    """
    columns: list[str] | None = None
    for line in filter(None, lines):
        record = _parsed(line)
        columns = list(record) if isinstance(record, dict) else columns
        text = record.get(form.column) if isinstance(record, dict) else None
        if isinstance(text, str):
            whole = text.encode(errors="replace").decode()  # without halves of escaped surrogate pairs
            counts.invalid_utf8 += whole != text
            text = whole
        yield text
    if columns is not None and counts.documents == 0:
        form.check_column(source, columns)


def _parsed(line: str) -> Any:
    """The JSON value of a line; None if it is not JSON, or nested too deeply for Python."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def column_texts(
    batches: Iterable[pa.Array | pa.ChunkedArray], form: TextForm, source: str, counts: SourceCounts
) -> Iterator[str | None]:
    """The text of each record of a column of bytes or strings; None for a null.

    Raises ValueError if the column is of another type, or in another encoding.
    """
    decoder: TextDecoder | None = None
    for values in batches:
        kind = values.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
            values = values.cast(kind)
        are_strings = kind in (pa.string(), pa.large_string(), pa.string_view())
        are_bytes = kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or pa.types.is_fixed_size_binary(kind)
        if not (are_strings or are_bytes or pa.types.is_null(kind)):
            raise ValueError(
                f'{source}: column "{form.column}" holds {kind}, not text: name another with --text-column'
            )
        if are_strings:
            values = values.cast(pa.large_binary())  # Arrow strings may be invalid UTF-8, which Python refuses
        decoder = decoder or TextDecoder(form.encoding, source, counts)
        for raw in values.to_pylist():
            yield None if raw is None else decoder.value(raw, is_string=are_strings)
    if decoder:
        decoder.check()
