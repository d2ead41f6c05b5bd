"""A self-contained HTML page (figures inside, no script, nothing loaded), and tables as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

# Axis of the curves -> its name; the reader chooses one for the whole page.
RULERS = {"step": "steps", "tokens": "tokens", "elapsed_seconds": "time"}

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #444; --page: #fff; --line: #ddd; --strong: #888; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.3rem; margin-top: 2.2rem; }
h3 { font-size: 1.05rem; }
.figures { display: grid; gap: 1.5rem 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 44rem; } img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  min-width: 6.5rem; }
/* Only what has no space to break at, such as a path; a number is never broken. */
.long { overflow-wrap: anywhere; min-width: 6.5rem; } .words :is(th, td) { text-align: left; }
.numbers td:not(:first-child) { white-space: nowrap; }
thead th { border-bottom: 2px solid var(--strong); vertical-align: bottom; min-width: 3rem; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
p.note { color: var(--soft); font-size: .9rem; max-width: 60rem; overflow-wrap: anywhere; }
.rulers { border: 0; padding: .4rem 0; margin: 0; position: sticky; top: 0; background: var(--page); z-index: 1; }
.rulers legend { float: left; margin-right: .8rem; } .rulers label { margin-right: .8rem; white-space: nowrap; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #b8b8b8; --page: #1a1a1a; --line: #3a3a3a; --strong: #777; }
  /* White becomes the page's colour and black white, while colours keep their hue and are light enough. */
  img { filter: invert(.9184) hue-rotate(180deg) brightness(1.25); }
}
@media (max-width: 40rem) {
  table { font-size: .8rem; } th, td { padding: .25rem .35rem; }
  th:first-child, td:first-child, .long { min-width: 5.5rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .figures { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; }
  h1, h2, h3, summary { break-after: avoid; } .rulers { display: none; }
  .scroll { overflow: visible; } table { font-size: 8pt; } th, td { padding: .2rem .4rem; }
  th:first-child, td:first-child { position: static; }
  /* Nobody can scroll on paper. */
  th:first-child, td:first-child, thead th, .long { min-width: 4rem; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
# A browser without :has shows all three.
_CHOICE = "".join(f"body:has(#by-{ruler}:checked) .ruled:not(.by-{ruler}) {{ display: none; }}\n" for ruler in RULERS)


# Letters; a longer word may be broken over lines if a table has no room.
_LONG_WORD = 16

_BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'


def is_a_page(path: Path) -> bool:
    """Whether `Page` may have written this file."""
    return path.read_bytes().startswith(_BEGINNING.encode())


class Shown(NamedTuple):
    """A figure on the page."""

    path: Path | None
    """A PNG file; None: left out."""
    caption: str
    ruler: str = ""
    """Shown while the reader has chosen this key of RULERS; "": always shown."""


class Page:
    """Headings, paragraphs, figures and tables, in the order they are added."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._ruled = False

    def heading(self, text: str, level: int = 2) -> None:
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def note(self, text: str) -> None:
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def figures(self, figures: Sequence[Shown], *, folded: str = "") -> None:
        """PNG files, side by side where there is room, each with its caption.

        Args:
            figures: those with a ruler take turns, as the reader chooses one at the top of the page.
            folded: if given, the figures are hidden under this title until it is clicked.
        """
        shown = [each for each in figures if each.path is not None]
        if not shown:
            return
        self._ruled = self._ruled or any(each.ruler for each in shown)
        block = f'<div class="figures">{"".join(map(_figure, shown))}</div>'
        self._add(block, folded)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        kind: Literal["", "words", "numbers"] = "",
        folded: str = "",
    ) -> None:
        """A table that scrolls where it is too wide; its first column names the row.

        Args:
            kind: "words": its cells begin at the left; "numbers": they are never broken over lines.
            folded: if given, the table is hidden under this title until it is clicked.
        """
        header = "".join(f'<th scope="col"{_long(cell)}>{_breakable(cell)}</th>' for cell in head)
        body = "".join(f"<tr>{''.join(f'<td{_long(cell)}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        opening = f'<table class="{kind}">' if kind else "<table>"
        inner = f"{opening}<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
        block = f'<div class="scroll" tabindex="0">{inner}</div>'
        self._add(block, folded)

    def _add(self, block: str, folded: str) -> None:
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{block}</details>" if folded else block)

    def write(self, path: Path) -> None:
        title = escape(self._title)
        html = (
            f"{_BEGINNING}{title}</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}{_CHOICE if self._ruled else ''}</style></head><body><h1>{title}</h1>\n"
            f"{_rulers() if self._ruled else ''}" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column aligned left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rulers() -> str:
    buttons = "".join(
        f'<input type="radio" name="ruler" id="by-{ruler}"{" checked" if number == 0 else ""}>'
        f'<label for="by-{ruler}"> {name}</label>'
        for number, (ruler, name) in enumerate(RULERS.items())
    )
    return f'<fieldset class="rulers"><legend>Curves by</legend>{buttons}</fieldset>\n'


def _long(cell: str) -> str:
    return ' class="long"' if any(len(word) > _LONG_WORD for word in cell.split()) else ""


def _breakable(name: str) -> str:
    """A long name may be broken after an underscore or a slash."""
    return re.sub("[_/](?=.)", r"\g<0><wbr>", escape(name)) if _long(name) else escape(name)


def _figure(shown: Shown) -> str:
    assert shown.path is not None
    data = base64.b64encode(shown.path.read_bytes()).decode()
    caption = escape(shown.caption)
    kind = f' class="ruled by-{shown.ruler}"' if shown.ruler else ""
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure{kind}>{image}<figcaption>{caption}</figcaption></figure>"
