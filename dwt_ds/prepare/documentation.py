"""Text that needs no network: prose from the docstrings and pydoc topics of the installed Python packages.

Sources are parsed with `ast`, never imported. A module is one document with a paragraph per line, and no paragraph
occurs twice in the whole text. Modules are sorted by their path inside the package, so that two machines with the same
versions make the same text.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from dwt_ds.base.files import atomic_file
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.sources import DocumentTally, SourceCounts
from dwt_ds.prepare.workers import ordered_map

# Import names of the packages that are read besides the standard library.
PACKAGES = (
    *("torch", "transformers", "numpy", "datasets", "deepspeed", "scipy", "sklearn"),
    *("pandas", "sympy", "networkx", "matplotlib", "pyarrow", "huggingface_hub", "fsspec", "tokenizers"),
)
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
# Folders of modules without prose for readers, or with copies of other projects.
_LEFT_OUT = {"tests", "test", "testing", "idlelib", "lib2to3", "_vendor", "site-packages", "dist-packages"}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FILES_A_TASK = 32
# Longer strings are documentation even if they are not docstrings: pydoc's topics, templates of docstrings.
_LONG_STRING_CHARS = 300
_MIN_CHARS, _MIN_WORDS, _MIN_LETTER_SHARE = 40, 6, 0.66

# Characters that may precede the first letter of a sentence.
_OPENING = "\"'(\u201c\u2018"

_ROLE = re.compile(r":[a-zA-Z:.-]+:`~?!?([^`<]*?)\s*(?:<[^`>]*>)?`_{0,2}")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")
_MARKUP = re.compile(r"`{1,2}|\*\*|(?<!\w)[*_](?=\w)|(?<=\w)\*(?!\w)|`_{1,2}")
_ITEM = re.compile(r"^(?:[-*+\u2022] |\(?\d{1,2}[.)] |\.\. \[[^\]]*\] )")
_PARAMETER = re.compile(r"^[*`]{0,2}[\w.]+[*`]{0,2} ?\([^()]*(?:\([^()]*\)[^()]*)*\) ?: +(?=\S)")
_CODE = re.compile(r"^(?:>>>|\.\.\.|\.\. |[@$#%|+]|:\w+|=+|-+|~+)|>>>|[{}\\|<>=$]{2}|-{4}|\w+\(\w+=|[\u2500-\u257f]")
_WORD = re.compile(r"(?<![\w.])[A-Za-z][a-z']*(?![\w(])")


@dataclass(frozen=True)
class InstalledDocumentation:
    """The documentation of the installed packages, as a source of documents."""

    packages: tuple[str, ...] = PACKAGES
    workers: int = 1
    name: ClassVar[str] = "documentation of the installed packages"
    size: ClassVar[int] = 0
    unit: ClassVar[str] = "B"

    def identity(self) -> dict[str, object]:
        versions = {name: metadata.version(_DISTRIBUTIONS.get(name, name)) for name in self.packages if find_spec(name)}
        return {"documentation": versions, "python": sysconfig.get_python_version()}

    def documents(self, counts: SourceCounts) -> Iterator[str]:
        tally = DocumentTally(counts)
        seen: set[str] = set()
        files = list(source_files(self.packages))
        groups = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
        for modules in ordered_map(_paragraphs_of_modules, groups, self.workers):
            for paragraphs in modules:
                new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
                seen.update(new)
                if new:
                    yield tally.document(new)

    def stored(self, path: Path) -> LocalFile:
        """The documents as a text file at `path`, written unless it exists (a minute on one core)."""
        if not path.is_file():
            with atomic_file(path) as file:
                for document in self.documents(SourceCounts()):
                    file.write(document.encode() + b"\n\n")
        return LocalFile(path)


def source_files(packages: tuple[str, ...]) -> Iterator[Path]:
    """Python files of the standard library, then of each package, sorted by path within each."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in packages:
        spec = find_spec(package)
        roots += [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not _LEFT_OUT.intersection(path.relative_to(root).parts[:-1]):
                yield path


def _paragraphs_of_modules(paths: list[Path]) -> list[list[str]]:
    return [module_paragraphs(path) for path in paths]


def module_paragraphs(path: Path) -> list[str]:
    """Prose paragraphs of a module, in source order; [] if it does not parse."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree has many objects and no cycles: collecting would add half to the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        return [paragraph for text in _documentation(tree.body) for paragraph in prose_paragraphs(text)]
    except (SyntaxError, ValueError):
        return []
    finally:
        if collecting:
            gc.enable()


def _documentation(body: list[ast.stmt]) -> Iterator[str]:
    """Docstrings and long strings of module, classes and functions, in the order of the source."""
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            if statement is body[0] and isinstance(statement.value.value, str):
                yield inspect.cleandoc(statement.value.value)
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Only the docstring and nested definitions: the rest of a body is mostly code.
            definitions = [inner for inner in statement.body[1:] if isinstance(inner, _DEFINITIONS)]
            yield from _documentation([statement.body[0], *definitions])
        elif isinstance(statement, ast.ClassDef):
            yield from _documentation(statement.body)
        elif isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from _documentation([*statement.body, *getattr(statement, "orelse", [])])
        elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
            constants = [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
            for text in constants:
                if isinstance(text, str) and len(text) >= _LONG_STRING_CHARS:
                    yield inspect.cleandoc(text)


def prose_paragraphs(text: str) -> Iterator[str]:
    """The prose of a docstring, a paragraph per line, without markup.

    Code, tables, headings, signatures and short fragments are left out. Of a parameter only the description is kept.
    """
    for lines in _same_indent(text):
        paragraph = " ".join(lines)
        paragraph = _ITEM.sub("", paragraph)
        paragraph = _PARAMETER.sub("", paragraph)
        paragraph = _LINK.sub(r"\1", _ROLE.sub(r"\1", paragraph))
        paragraph = " ".join(_MARKUP.sub("", paragraph).split())
        paragraph = paragraph.removesuffix("::") + "." if paragraph.endswith("::") else paragraph
        if _is_prose(paragraph):
            yield paragraph


def _same_indent(text: str) -> Iterator[list[str]]:
    """Runs of lines with the same indentation; a blank line or a list item also ends a run."""
    run: list[str] = []
    indent = 0
    for line in text.split("\n"):
        stripped = line.strip()
        here = len(line) - len(line.lstrip())
        starts_item = bool(_ITEM.match(stripped) or _PARAMETER.match(stripped))
        continues_item = len(run) == 1 and here > indent and bool(_ITEM.match(run[0]) or _PARAMETER.match(run[0]))
        if run and (not stripped or starts_item or (here != indent and not continues_item)):
            yield run
            run = []
        if stripped:
            run.append(stripped)
            indent = here
    if run:
        yield run


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _MIN_CHARS or not paragraph.lstrip(_OPENING)[:1].isalpha() or _CODE.search(paragraph):
        return False
    words = _WORD.findall(paragraph)
    return len(words) >= _MIN_WORDS and sum(len(word) + 1 for word in words) > _MIN_LETTER_SHARE * len(paragraph)
