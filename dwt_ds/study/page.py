"""One HTML file with everything in it (tables, figures as data, no script, nothing loaded); tables as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 76rem;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
.figures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
figure { margin: 0; } img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; min-width: 3rem; }
td.text { text-align: left; } code { font-size: .9em; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
p.note { color: #444; font-size: .9rem; max-width: 60rem; }
"""


_BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'


def is_a_page(path: Path) -> bool:
    """Whether a file may be one that `Page` wrote."""
    return path.read_bytes().startswith(_BEGINNING.encode())


class Page:
    """Headings, paragraphs, figures and tables, in the order they are added."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading below the page's own."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def note(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def figures(self, figures: Sequence[tuple[Path | None, str]], *, folded: str = "") -> None:
        """PNG files, side by side where there is room, each with its caption.

        Args:
            figures: (file, caption); those without a file are left out.
            folded: if given, the figures are hidden under this title until it is clicked.
        """
        shown = "".join(_figure(path, text) for path, text in figures if path is not None)
        if not shown:
            return
        block = f'<div class="figures">{shown}</div>'
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{block}</details>" if folded else block)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, folded: str = "") -> None:
        """A table that scrolls where it is too wide; its first column names the row."""
        header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        inner = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
        block = f'<div class="scroll" tabindex="0">{inner}</div>'
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{block}</details>" if folded else block)

    def write(self, path: Path) -> None:
        """Write the page."""
        title = escape(self._title)
        html = (
            f"{_BEGINNING}{title}</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figure(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(text)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
