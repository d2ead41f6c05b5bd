"""What a teacher with a tokenizer of its own does not see: the words that the student's masks hide."""

from __future__ import annotations

import numpy as np
import torch
from harness.teacher_rows import NONE, Pair, row_of, spans


def test_aligned_tokens_are_whole_words_and_one_shared_entry(pair: Pair) -> None:
    masked = pair.masked()
    plain, rows = pair.teacher_rows(NONE), pair.teacher_rows(masked.positions)
    shared = pair.tokens.shared
    assert torch.equal(rows.aligned, rows.aligned.sort().values)
    assert torch.equal(rows.positions, rows.positions.sort().values)
    assert 0.2 < len(rows.aligned) / len(masked.labels) <= 1
    true, shown = plain.input_ids.reshape(-1), rows.input_ids.reshape(-1)
    found = {}
    for aligned, position in zip(rows.aligned.tolist(), rows.positions.tolist(), strict=True):
        index = shared.shared_index_of_student[masked.labels[aligned]]
        assert index >= 0
        assert shared.student_ids[index] == masked.labels[aligned]
        assert true[position] == shared.teacher_ids[index]
        assert shown[position] == pair.teacher.mask_token_id
        found[masked.positions[aligned]] = position
    width, width_there = pair.ids.shape[1], plain.input_ids.shape[1]
    for row, (ids, length) in enumerate(zip(pair.ids.tolist(), pair.lengths.tolist(), strict=True)):
        theirs = row_of(plain, row)
        at = {span: column for column, span in enumerate(spans(pair.teacher, tuple(theirs))) if span[0] < span[1]}
        ours = spans(pair.student, tuple(ids[:length]))
        starts = [*pair.starts[row, :length].tolist(), True]
        for column in range(length):
            place = row * width + column
            there = at.get(ours[column])
            is_word = starts[column] and starts[column + 1] and ours[column][0] < ours[column][1]
            index = shared.shared_index_of_student[ids[column]]
            expected = is_word and index >= 0 and there is not None and theirs[there] == shared.teacher_ids[index]
            if place in masked.positions:
                assert found.get(place) == (row * width_there + there if expected else None)


def test_a_random_token_that_is_not_shared_is_some_entry_of_the_teacher(one: Pair) -> None:
    shared = one.tokens.shared
    words = np.flatnonzero(one.starts[:, :-1] & one.starts[:, 1:] & (one.ids[:, :-1] >= 5))
    positions = words[:3] // 63 * 64 + words[:3] % 63
    plain = one.teacher_rows(NONE)
    for token in (int(shared.student_ids[-1]), int(np.flatnonzero(shared.shared_index_of_student < 0)[-1])):
        rows = one.teacher_rows(positions, np.full(3, token))
        changed = rows.input_ids[plain.input_ids != rows.input_ids]
        assert len(set(changed.tolist())) == 1
        assert changed[0] in shared.teacher_ids
        index = shared.shared_index_of_student[token]
        assert index < 0 or changed[0] == shared.teacher_ids[index]


def test_a_word_with_a_masked_token_is_masked_whatever_the_student_sees_of_the_rest(one: Pair) -> None:
    flat, starts = one.ids.reshape(-1), one.starts.reshape(-1)
    first = int(np.flatnonzero(starts[:-1] & ~starts[1:])[0])
    positions, mask = np.array([first, first + 1]), one.student.mask_token_id
    masked = one.teacher_rows(positions)
    for shown in ([mask, flat[first + 1]], [flat[first], mask], [mask, flat[5]], [flat[5], mask]):
        assert torch.equal(one.teacher_rows(positions, np.array(shown)).input_ids, masked.input_ids)


def test_a_row_is_the_same_in_any_batch(pair: Pair) -> None:
    masked = pair.masked()
    together = pair.teacher_rows(masked.positions)
    width, width_there = 64, together.input_ids.shape[1]
    for row in range(0, len(pair.rows), 3):
        here = masked.positions[masked.positions // width == row] % width
        length = pair.lengths[row : row + 1]
        one_row = pair.ids[row : row + 1], length, here, pair.all_masked(here), pair.starts[row : row + 1]
        alone = pair.tokens.rows(*one_row)
        assert alone.attention_mask is None
        assert alone.input_ids[0].tolist() == row_of(together, row)
        of_row = together.positions // width_there == row
        assert torch.equal(alone.positions, together.positions[of_row] % width_there)
