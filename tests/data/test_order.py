"""The row stream: epochs, windows of like lengths."""

from __future__ import annotations

import numpy as np
import pytest

from dwt_ds.data.rows import BLOCK_ROWS, WINDOW_ROWS, RowStream


def test_each_epoch_visits_each_row_once_in_another_order() -> None:
    stream = RowStream(1000, seed=3)
    rows, epochs = stream.at(np.arange(3000))
    assert epochs.tolist() == [0] * 1000 + [1] * 1000 + [2] * 1000
    orders = rows.reshape(3, 1000)
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert (orders[0] != orders[1]).mean() > 0.99
    assert (orders[0] != np.arange(1000)).mean() > 0.99
    assert (RowStream(1000, seed=4).at(np.arange(1000))[0] != orders[0]).mean() > 0.99


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_at_a_position_do_not_depend_on_what_else_is_asked(grouped: bool) -> None:
    size = WINDOW_ROWS + 1000
    lengths = np.random.default_rng(0).integers(4, 60, size, dtype=np.int32) if grouped else None
    whole = RowStream(size, seed=1, lengths=lengths).at(np.arange(2 * size))[0]
    again = RowStream(size, seed=1, lengths=lengths)
    for position in (2 * size - 1, 0, size, size - 1, WINDOW_ROWS, WINDOW_ROWS - 1):
        assert again.at(np.array([position]))[0][0] == whole[position]


def test_grouped_windows_cover_the_epoch_and_have_blocks_of_like_lengths() -> None:
    size = 2 * WINDOW_ROWS + 777
    lengths = np.random.default_rng(0).integers(4, 128, size, dtype=np.int32)
    stream = RowStream(size, seed=1, lengths=lengths)
    rows, after = stream.at(np.arange(2 * size))[0].reshape(2, size)
    assert sorted(rows.tolist()) == list(range(size))
    assert len(stream._windows) == 2, "memory does not grow with the rows"
    spread = [np.ptp(lengths[rows[start : start + BLOCK_ROWS]]) for start in range(0, 2 * WINDOW_ROWS, BLOCK_ROWS)]
    assert max(spread) <= 6
    # Blocks do not come in order of length: no run of steps sees short rows only.
    means = lengths[[rows[:WINDOW_ROWS], rows[WINDOW_ROWS : 2 * WINDOW_ROWS], after[:WINDOW_ROWS]]]
    means = means.reshape(3, -1, BLOCK_ROWS).mean(axis=2)
    orders = np.corrcoef([np.arange(means.shape[1]), *means])  # nor as in another window or epoch
    assert np.abs(orders - np.eye(4)).max() < 0.5


def test_rows_of_one_length_are_in_the_order_of_the_epoch() -> None:
    """On any machine: a sort that is not stable depends on the processor."""
    size = 5 * BLOCK_ROWS
    lengths = np.random.default_rng(0).integers(4, 6, size, dtype=np.int32)
    plain, rows = (RowStream(size, 1, each).at(np.arange(size))[0] for each in (None, lengths))
    expected = np.concatenate([plain[lengths[plain] == length] for length in (4, 5)])
    assert sorted(rows.reshape(5, -1).tolist()) == sorted(expected.reshape(5, -1).tolist())
