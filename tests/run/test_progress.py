from __future__ import annotations

from typing import Any

import pytest

from dwt_ds.run.progress import Progress, clock, evaluation_words

ROW = {
    "step": 20,
    "loss": 6.5,
    "hard_loss": 5.25,
    "soft_weight": 2.5,
    "soft_loss": 0.5,
    "learning_rate": 5e-4,
    "grad_norm": 1.234,
    "tokens_per_second": 12345.6,
    "data_wait_share": 0.031,
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (9.4, "9s"),
        (59.6, "1m00s"),
        (125, "2m05s"),
        (3599.7, "1h00m"),
        (3720, "1h02m"),
        (90_000, "25h00m"),
    ],
)
def test_a_span_of_time_in_two_units_at_most(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_logged_step_is_one_plain_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 100, shown=True)
    progress.advance()
    progress.line(ROW, peak_memory_bytes=3 * 2**29, seconds_left=125)
    progress.close()
    out, err = capsys.readouterr()
    assert out == (
        "step 20/100  loss 6.5000 = hard 5.2500 + 2.5 x soft 0.5000  lr 5.00e-04  grad 1.23  12,346 tokens/s"
        "  data wait 3%  mem 1.5 GiB  ETA 2m05s\n"
    )
    assert err == ""


@pytest.mark.parametrize(
    ("hard_weight", "changed", "text"),
    [
        (1.0, {"loss": 5.25, "soft_loss": 0.0}, "  loss 5.2500 = hard 5.2500  lr 5.00e-04"),  # without a teacher
        (0.5, {}, "  loss 6.5000 = 0.5 x hard 5.2500 + 2.5 x soft 0.5000"),
        (1.0, {"mfu": 0.48, "mfu_student": 0.39}, "  MFU 48% (39% student)  data wait"),
        (1.0, {"mfu": 0.4, "mfu_student": 0.4}, "  MFU 40%  data wait"),
    ],
)
def test_a_line_says_what_is_not_as_usual(
    hard_weight: float, changed: dict[str, float], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(0, 100, hard_weight=hard_weight, shown=True)
    progress.line(ROW | changed, peak_memory_bytes=1, seconds_left=1)
    progress.close()
    assert text in capsys.readouterr().out


def test_an_evaluation_in_words() -> None:
    row: dict[str, Any] = {"step": 4, "eval_hard_loss": 2.0, "eval_soft_loss": 0.0}
    assert evaluation_words(row) == "held-out: hard 2.0000"
    row |= {"eval_soft_loss": 0.5, "eval_hard_loss.books": 3.0, "eval_hard_loss.wiki": None}
    assert evaluation_words(row) == "held-out: hard 2.0000, soft 0.5000; books 3.0000, wiki nan"
    row |= {"eval_shared_hard_loss": 1.5, "teacher_shared_hard_loss": 1.25, "teacher_shared_mass": 0.5}
    assert evaluation_words(row) == (
        "held-out: hard 2.0000, soft 0.5000; on shared entries 1.5000, the teacher's 1.2500; books 3.0000, wiki nan"
    )
    assert evaluation_words({"step": 4, "eval_hard_loss.books": 3.0}) == "held-out: books 3.0000"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 100, shown=False)
    progress.advance()
    progress.line(ROW, peak_memory_bytes=1, seconds_left=1)
    progress.say("a word")
    progress.close()
    assert capsys.readouterr() == ("", "")
