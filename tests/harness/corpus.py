"""Documents of made-up words and the data folders made of them, for tests of data and prepare."""

from __future__ import annotations

import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dwt_ds.data.prepared import PreparedData
from dwt_ds.prepare import corpus
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.sentences import sentence_spans
from dwt_ds.prepare.sources import SourceCounts, TextForm

_SYLLABLES = ["ka", "lo", "mi", "ren", "tu", "sha", "vel", "do", "pir", "an", "gos", "el"]


def made_up_documents(count: int, seed: int = 0, lines: int = 6) -> list[list[str]]:
    """Documents of paragraphs of sentences of made-up words, all lines distinct."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]

    def sentence() -> str:
        chosen = draw.choices(words, k=draw.randint(4, 16))
        return " ".join([chosen[0].capitalize(), *chosen[1:]]) + draw.choice([".", ".", "!", "?"])

    return [[" ".join(sentence() for _ in range(draw.randint(2, 6))) for _ in range(lines)] for _ in range(count)]


def split_sentences(line: str) -> list[str]:
    return [line[start:end] for start, end in sentence_spans(line)]


def as_text(documents: list[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in documents) + "\n"


def read_file(path: Path, form: TextForm = TextForm()) -> tuple[list[str], SourceCounts]:  # noqa: B008
    """Documents of a file, and what was counted."""
    counts = SourceCounts()
    return list(LocalFile(path, form).documents(counts)), counts


def compressed(raw: bytes, suffix: str) -> bytes:
    """`raw` as a file with that suffix holds it; as it is for no suffix."""
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(raw)
        return sink.getvalue().to_pybytes()
    return {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](raw)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(as_text(made_up_documents(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uncased WordPiece vocabulary that spells everything and has the corpus's syllables."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [*special, *".,!?;:'\"()-", *letters, *["##" + c for c in letters]]
    entries += _SYLLABLES + ["##" + syllable for syllable in _SYLLABLES]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(entries)) + "\n", encoding="utf-8")
    return path


Make = Callable[..., PreparedData]


@pytest.fixture(scope="session")
def make(vocab_file: Path) -> Make:
    """make(out, *files, **options) -> PreparedData, with the small vocabulary unless told otherwise."""

    def make(out: Path, *files: Path, **options: Any) -> PreparedData:
        if "train_tokenizer" not in options:
            options.setdefault("tokenizer", str(vocab_file))
        options.setdefault("validation", 0.1)
        prepare(PrepareOptions(sources=[LocalFile(file) for file in files], out=out, **options))
        return PreparedData.open(out)

    return make


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, make: Make) -> PreparedData:
    """Packed rows of 32 tokens."""
    return make(tmp_path_factory.mktemp("packed") / "data", corpus_file, seq_len=32)


@pytest.fixture(scope="session")
def by_sentence(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, make: Make) -> PreparedData:
    """A row for each sentence."""
    return make(tmp_path_factory.mktemp("by_sentence") / "data", corpus_file, seq_len=48, one_sentence_per_row=True)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small corpus makes a dozen chunks."""
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 5000)
