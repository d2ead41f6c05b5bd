"""Sentence splitting against hand-labelled text, in many scripts; long sentences cut."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
from harness.corpus import split_sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_ds.prepare.sentences import _OWN_END, _between_own_ends, _goes_on, _has_inner_end, cut_span, sentence_spans


def labelled_paragraphs() -> list[list[str]]:
    text = Path(__file__).with_name("labelled_sentences.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    return [paragraph.split("\n") for paragraph in "\n".join(lines).strip().split("\n\n")]


def boundaries(sentences: list[str]) -> set[int]:
    """Where sentences meet inside a paragraph, counted in characters that are no spaces."""
    ends, total = set(), 0
    for sentence in sentences[:-1]:
        total += len("".join(sentence.split()))
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


def labelled_scripts() -> dict[str, list[tuple[str, list[str]]]]:
    """Of each language its paragraphs, as (what stands between sentences, the sentences)."""
    text = Path(__file__).with_name("labelled_sentences_of_scripts.txt").read_text(encoding="utf-8")
    languages: dict[str, list[tuple[str, list[str]]]] = {}
    for section in text.split("\n== ")[1:]:
        title, _, body = section.partition("\n")
        language, *unspaced = title.split()
        between = "" if unspaced else " "
        languages[language] = [(between, paragraph.split("\n")) for paragraph in body.strip().split("\n\n")]
    return languages


@pytest.mark.parametrize("language", ["de", "fr", "ru", "hi", "ar", "ur", "zh", "ja", "am", "el", "hy", "my"])
def test_recall_and_precision_in_each_language(language: str) -> None:
    found = right = wanted = 0
    for between, sentences in labelled_scripts()[language]:
        truth, guess = boundaries(sentences), boundaries(split_sentences(between.join(sentences)))
        found, right, wanted = found + len(guess), right + len(guess & truth), wanted + len(truth)
    assert right >= wanted - 1
    assert found - right <= wanted // 4


def test_thai_is_cut_at_its_spaces() -> None:
    phrases = ["เขาเดินทางไปเชียงใหม่"] * 40
    line = " ".join(phrases)
    sentences = split_sentences(line)
    assert len(sentences) >= 3
    assert max(map(len, sentences)) <= 200
    assert all(set(sentence.split()) == set(phrases) for sentence in sentences)
    assert " ".join(sentences) == line


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("他买了３．５公斤。好。", 2),  # a full-width point between digits ends nothing
        ("। १ । राम आया। १ ॥", 1),  # numbers of verses stay with a sentence
        ("「どこ？」と母が聞いた。川。", 2),  # a word that follows a quotation at once goes on with the sentence
        ("“去吗？”他问。“我走了。”他走了。", 3),
        ("Das Wort 中文。 Dr. Weber kam. Er ging.", 3),  # syntok's rules hold between the marks
    ],
)
def test_own_marks(line: str, ends: int) -> None:
    assert len(split_sentences(line)) == ends


@pytest.mark.parametrize(
    ("text", "ends_with"),
    [
        ("这是一个很长的句子，" * 50, "，"),
        ("a clause of some words, " * 50, ","),
        ("words without any mark " * 50, None),
        ("เขาไปเชียงใหม่ " * 50, "่"),
    ],
)
def test_a_long_sentence_is_cut_at_its_own_marks_then_spaces(text: str, ends_with: str | None) -> None:
    line = f"Before. {text.strip()}"
    pieces = [line[start:end] for start, end in cut_span(line, 8, len(line), 100)]
    assert all(100 / 6 <= len(piece) <= 100 for piece in pieces)
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert all(piece.endswith(ends_with) if ends_with else piece.split()[-1] in text.split() for piece in pieces[:-1])


def test_a_cut_never_parts_a_character_from_its_marks() -> None:
    line = ("क" * 10 + "ि" * 5) * 30
    assert not any(line[start] == "ि" for start, _ in cut_span(line, 0, len(line), 100))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab .!,。，।กิ中」"), max_size=300), st.integers(3, 60))
def test_pieces_follow_one_another_and_hold_everything(line: str, most: int) -> None:
    spans = [piece for start, end in sentence_spans(line) for piece in cut_span(line, start, end, most)]
    assert "".join("".join(line[start:end].split()) for start, end in spans) == "".join(line.split())
    assert all(line[start:end] == line[start:end].strip() != "" and end - start <= most for start, end in spans)
    assert spans == sorted(spans)


TERMINALS = ".!?;\u2026\u203c\u203d\u2047-\u2049\u3002\ufe52\ufe57\uff01\uff0e\uff1f\uff61"
LETTER = regex.compile(r"\p{Letter}")


def plain_own_ends(line: str) -> Iterator[tuple[int, int]]:
    """What `_between_own_ends` does, with a search of all the text before and after each mark."""
    start = 0
    for match in _OWN_END.finditer(line):
        end = match.end()
        if not _goes_on(line, match) and LETTER.search(line, start, end) and LETTER.search(line, end):
            yield start, end
            start = end
    yield start, len(line)


def test_marks_end_sentences_as_by_the_plain_formulas() -> None:
    draw = random.Random(0)
    inner_end = regex.compile(rf"[{TERMINALS}](?!\W*$)")
    has_inner_end, pieces = 0, 0
    for _ in range(5000):
        marks = draw.choices(
            " .!?;\u2026\u3002\uff0e\uff1f\u300c\u300d\u0964\u061f\u037e\"')_9\u0663\u0301", k=draw.randint(1, 9)
        )
        line = "".join(draw.choices([*marks, *"aé字の"], k=draw.randint(0, 30)))
        assert _has_inner_end(line) == bool(inner_end.search(line)), line
        assert list(_between_own_ends(line)) == list(plain_own_ends(line)), line
        has_inner_end += _has_inner_end(line)
        pieces += len(list(_between_own_ends(line)))
    assert 1000 < has_inner_end < 4000
    assert pieces > 8000


@pytest.mark.timeout(60)  # each took minutes when it cost the square of its length
@pytest.mark.parametrize(
    ("before", "run", "after"),
    [("Broken page ", "?", ""), ("字", "。 ", ""), ("", "。 ", "字"), ("字", "。」", ""), ("字1", "。1", "")],
)
def test_a_long_run_of_marks_is_split_at_once(before: str, run: str, after: str) -> None:
    line = before + run * 200_000 + after
    assert sentence_spans(line) == [(0, len(line.strip()))]


@pytest.mark.timeout(60)
def test_a_long_run_of_combining_marks_is_cut_at_once() -> None:
    line = "e" + "\u0301" * 200_000
    pieces = cut_span(line, 0, len(line), 2000)
    assert len(pieces) <= 120
    assert "".join(line[start:end] for start, end in pieces) == line


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
