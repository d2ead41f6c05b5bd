"""Prose harvested from Python sources without importing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwt_ds.prepare import documentation
from dwt_ds.prepare.documentation import InstalledDocumentation, module_paragraphs, prose_paragraphs, source_files
from dwt_ds.prepare.sources import SourceCounts

SOURCE = '''
"""Tools for drawing maps of places that nobody has seen yet.

They are slow. Use them with patience, and never on a Friday afternoon.
"""
raise SystemExit("this module must not be imported")

TOPICS = {"maps": """
Maps of the unseen
******************

A map of an unseen place is drawn from hearsay. Its scale is left to the draughtsman, who should
be sober. The **border** of such a map is customarily decorated with animals, and with a rose that tells the winds;
where the animals are real, the winds are not, as a rule.

   >>> draw("terra incognita")
   <Map>
"""}


class Chart:
    """A chart, which is a map for those who travel by water and fear the shore.

    Args:
        depth (`int`, *optional*, defaults to 3): How many fathoms of water the ship needs below her keel.
        name (`str`): Short.

    Parameters
    ----------
    winds : list of str
        Names of the winds in the order in which they are expected to blow.

    Example::

        chart = Chart(depth=4)
    """

    def sail(self):
        """Sail along the :class:`~maps.Chart` until the ``wind`` turns or the water ends."""
        def inner():
            """Nested definitions explain themselves here as well as any others."""
'''


def test_paragraphs_of_a_module(tmp_path: Path) -> None:
    path = tmp_path / "maps.py"
    path.write_text(SOURCE)
    assert module_paragraphs(path) == [
        "Tools for drawing maps of places that nobody has seen yet.",
        "They are slow. Use them with patience, and never on a Friday afternoon.",
        "A map of an unseen place is drawn from hearsay. Its scale is left to the draughtsman, who should be sober. "
        "The border of such a map is customarily decorated with animals, and with a rose that tells the winds; "
        "where the animals are real, the winds are not, as a rule.",
        "A chart, which is a map for those who travel by water and fear the shore.",
        "How many fathoms of water the ship needs below her keel.",
        "Names of the winds in the order in which they are expected to blow.",
        "Sail along the maps.Chart until the wind turns or the water ends.",
        "Nested definitions explain themselves here as well as any others.",
    ]


def test_modules_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        '"""A docstring that is long enough to be taken for prose by anyone."""\nprint "2"'
    )
    assert module_paragraphs(tmp_path / "bad.py") == []


@pytest.mark.parametrize(
    "text",
    [
        "x = torch.zeros(3, 4); y = x + 1; print(y.shape, y.dtype, y.device)",
        ">>> model.fit(X, y) and then some more of the words that look like prose",
        "Too short.",
        "| a | b | c | d | e | table of things that are not prose |",
        "arg0, arg1, arg2=None, **kwargs) -> Tuple[int, int, Dict[str, Any]]",
    ],
)
def test_what_is_no_prose(text: str) -> None:
    assert list(prose_paragraphs(text)) == []


@pytest.mark.slow
def test_distinct_documents_in_a_fixed_order_whatever_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_files(packages: tuple[str, ...]) -> list[Path]:
        files = enumerate(source_files(packages))
        return [path for number, path in files if number % 8 == 0 or path.name == "topics.py"]

    monkeypatch.setattr(documentation, "source_files", some_files)
    alone = list(InstalledDocumentation(packages=("tqdm", "xxhash", "nonexistent_package")).documents(SourceCounts()))
    counts = SourceCounts()
    stored = InstalledDocumentation(packages=("tqdm", "xxhash", "nonexistent_package"), workers=2).stored(
        tmp_path / "documentation.txt"
    )
    assert list(stored.documents(counts)) == alone
    paragraphs = [paragraph for document in alone for paragraph in document.split("\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert counts.characters > 300_000
    assert any("list comprehension" in paragraph.lower() for paragraph in paragraphs)  # from pydoc's topics
