"""Every kind of tokenizer as the student's and as the teacher's, on nine languages."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from harness.languages import KINDS, PARAGRAPHS, tokenizer_of, with_roles

from dwt_ds.data.row_texts import RowReader
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.data.text_tokenizer import all_is_text, load_form
from dwt_ds.data.token_texts import TokenTexts
from dwt_ds.prepare.tokens import SentenceEncoder, SentenceInText


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """rows_of(kind): (input_ids, lengths, starts_word) of a row for each language."""

    @lru_cache
    def rows_of(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokenizer = with_roles(tokenizer_of(kind))
        path = tmp_path_factory.mktemp("kind") / "tokenizer.json"
        tokenizer.backend_tokenizer.save(str(path))
        tokens = SentenceEncoder(str(path), len(tokenizer)).encode(
            [SentenceInText(None, t) for t in PARAGRAPHS.values()]
        )
        lengths = tokens.lengths + 2
        ids = np.full((len(lengths), int(lengths.max())), tokenizer.pad_token_id)
        starts = np.ones(ids.shape, dtype=bool)
        ends = np.cumsum(tokens.lengths)
        for row, (first, end) in enumerate(zip(ends - tokens.lengths, ends, strict=True)):
            ids[row, : lengths[row]] = [tokenizer.cls_token_id, *tokens.ids[first:end], tokenizer.sep_token_id]
            starts[row, 1 : lengths[row] - 1] = tokens.starts_word[first:end]
        return ids, lengths, starts

    return rows_of


@pytest.mark.parametrize("teacher_kind", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_seen_as_the_student_sees_the_word_that_they_touch(kind: str, teacher_kind: str, rows_of) -> None:  # type: ignore[no-untyped-def]
    student, teacher = (with_roles(tokenizer_of(each)) for each in (kind, teacher_kind))
    ids, lengths, starts = rows_of(kind)
    tokens = TeacherTokens.of(student, teacher, None)
    reader = RowReader(TokenTexts.of(student, "the data folder's"), student.unk_token_id)
    plain = load_form(all_is_text(teacher.backend_tokenizer))
    labelled = np.zeros(ids.shape, dtype=bool)
    for row, length in enumerate(lengths.tolist()):
        labelled[row, 1 + row : length - 1 : 7] = True
    labelled &= ids != student.unk_token_id
    labels = np.flatnonzero(labelled)
    # In turn masked, as it is, and a random token.
    shown = np.full(ids.shape, -1)
    shown.reshape(-1)[labels[0::3]] = student.mask_token_id
    shown.reshape(-1)[labels[1::3]] = ids.reshape(-1)[labels[1::3]]
    shown.reshape(-1)[labels[2::3]] = tokens.shared.student_ids[len(tokens.shared.student_ids) // 2]
    random = tokens.shared.teacher_ids[len(tokens.shared.student_ids) // 2]
    rows = tokens.rows(ids, lengths, labels, shown.reshape(-1)[labels], starts)
    for row, length in enumerate(lengths.tolist()):
        texts = reader.read(ids[row, :length])
        word = np.cumsum(starts[row, :length])
        seen = shown[row, :length]

        def characters(of: np.ndarray) -> set[int]:
            """Of the words of these tokens."""
            tokens_of = np.isin(word, word[of])  # noqa: B023
            spans = zip(texts.start[tokens_of], texts.end[tokens_of], strict=True)  # noqa: B023
            return {character for start, end in spans for character in range(start, end)}

        hidden = characters(seen == student.mask_token_id)
        replaced = characters((seen >= 0) & (seen != student.mask_token_id) & (seen != ids[row, :length]))
        expected: list[int] = []
        place = 0
        for first, end in texts.segments.tolist():
            expected += [teacher.unk_token_id] * (first - place - 1)
            begin, place = int(texts.start[first]), end
            encoding = plain.encode(texts.text[begin : texts.end[end - 1]])
            for index, (start, last) in zip(encoding.ids, encoding.offsets, strict=True):
                touched = set(range(begin + start, begin + last))
                of_random = random if touched & replaced else index
                expected.append(teacher.mask_token_id if touched & hidden else of_random)
        expected += [teacher.unk_token_id] * (length - 1 - place)
        there = rows.input_ids[row]
        assert (there if rows.attention_mask is None else there[rows.attention_mask[row].bool()]).tolist() == expected
    assert len(rows.aligned) == len(rows.positions)
