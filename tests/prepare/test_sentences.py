"""Sentence splitting against hand-labelled text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_ds.prepare.sentences import split_sentences


def labelled_paragraphs() -> list[list[str]]:
    text = Path(__file__).with_name("labelled_sentences.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    return [paragraph.split("\n") for paragraph in "\n".join(lines).strip().split("\n\n")]


def boundaries(sentences: list[str]) -> set[int]:
    """Where sentences meet inside a paragraph, counted in characters that are no spaces."""
    ends, total = set(), 0
    for sentence in sentences[:-1]:
        total += len(sentence.replace(" ", ""))
        ends.add(total)
    return ends


def test_precision_and_recall_on_labelled_text() -> None:
    found = right = wanted = 0
    for sentences in labelled_paragraphs():
        truth = boundaries(sentences)
        guess = boundaries(split_sentences(" ".join(sentences)))
        found, right, wanted = found + len(guess), right + len(guess & truth), wanted + len(truth)
    assert wanted >= 75
    assert right / found >= 0.97
    assert right / wanted >= 0.97


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("Dr. Vance met J. R. Moss in the U.S. in May. They talked.", 2),
        ('"Is it far?" asked the boy. "No."', 2),
        ("Early life", 1),
        ("He waited... and waited.", 1),
        ("A plain sentence without a stop", 1),
        ("", 0),
    ],
)
def test_number_of_sentences(line: str, sentences: int) -> None:
    assert len(split_sentences(line)) == sentences


def test_semicolon_ends_no_sentence() -> None:
    assert split_sentences('He was tired; "I am tired," he said. Then he slept.') == [
        'He was tired; "I am tired," he said.',
        "Then he slept.",
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("abAB .!?;:\"'()[]…\u201c\u201d\u3000\u200b19-Mr"), max_size=60))
def test_no_character_is_lost(line: str) -> None:
    line = line.strip()
    assert "".join("".join(split_sentences(line)).split()) == "".join(line.split())
