"""Evaluations of a student, on its data folder's held-out rows and on further sets; one rank, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.corpus import Make
from harness.errors import error_of
from torch import Tensor

from dwt_ds.config.recipe import load_recipe
from dwt_ds.data.batches import Batch
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import PreparedData
from dwt_ds.distill.objective import Losses
from dwt_ds.engine import ranks
from dwt_ds.run.evaluation import Evaluation, check_eval_sets, open_eval_sets
from dwt_ds.run.resolve import Corpus, Resolved, resolve


class Student:
    """Its loss of a row is the number of its labels; it keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Batch, Any]] = []
        self.training = True

    def __call__(self, batch: Batch, teacher: Any, scale: Any) -> Losses:
        assert not self.training
        self.seen.append((batch, teacher))
        self.temperature = float(scale.temperature)
        labels = torch.tensor(float(len(batch.labels)))
        return Losses(labels, 2 * labels, labels if teacher else 0 * labels)

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True


def teacher(batch: Batch) -> str:
    return "its view"


@pytest.fixture
def books(tiny_data: Path, tiny_text: Path, tmp_path: Path, make: Make) -> PreparedData:
    """Made with the tokenizer of `tiny_data`, as the error message says; a sentence a row."""
    options = {
        "tokenizer": str(tiny_data),
        "seq_len": 16,
        "one_sentence_per_row": True,
        "validation": 0.4,
        "workers": 1,
    }
    return make(tmp_path / "books", tiny_text, **options)


@pytest.fixture
def settings(tiny_recipe: Path, tiny_data: Path) -> Callable[..., Resolved]:
    def resolved(*overrides: str, data: Path = tiny_data) -> Resolved:
        recipe = load_recipe(str(tiny_recipe), [*overrides, f"data.dir={data}"])
        corpora = {
            name: Corpus.of(each.manifest, str(each.folder))
            for name, each in open_eval_sets(recipe.config.train).items()
        }
        return resolve(recipe, None, 1, Corpus.of(PreparedData.open(data).manifest, str(data)), corpora)

    return resolved


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "reduce_sum", lambda values: values)
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))


def evaluated(resolved: Resolved, *, alone: bool = False, most: int | None = None) -> tuple[dict[str, float], Student]:
    """At most `most` micro-batches, as if the ranks were asked to stop then."""
    data, student = PreparedData.open(resolved.config.data.dir), Student()
    sets = open_eval_sets(resolved.config.train)
    check_eval_sets(resolved, sets, data.facts)
    evaluation = Evaluation(resolved, data, sets)

    def until_stopped(batches: Iterator[Batch]) -> Iterator[Batch]:
        return islice(batches, None if most is None else most - len(student.seen))

    losses = evaluation.student_losses(student, None if alone else teacher, until_stopped, 2)  # type: ignore[arg-type]
    assert student.training
    return losses, student


def test_further_sets_are_measured_without_the_teacher(
    settings: Callable[..., Resolved], tiny_data: Path, books: PreparedData
) -> None:
    resolved = settings(
        f"train.eval_sets.books={books.folder}", f"train.eval_sets.same={tiny_data}", "train.eval_rows=10"
    )
    losses, student = evaluated(resolved)
    assert losses == {
        "eval_hard_loss": 2.0,
        "eval_soft_loss": 1.0,
        "eval_hard_loss.books": 2.0,
        "eval_hard_loss.same": 2.0,
    }
    views = [view for _, view in student.seen]
    assert views == ["its view"] * 3 + [None] * 6, "10 rows in micro-batches of 4, of each"
    of_books = [batch for batch, _ in student.seen[3:6]]
    assert sum(len(batch.rows) for batch in of_books) == 10
    lengths = [int(books.validation.lengths[row]) for batch in of_books for row in batch.rows]
    assert lengths == sorted(lengths), "rows of many lengths are grouped"
    # The same rows and masks each time, and for every seed of the run.
    again = evaluated(settings(f"train.eval_sets.other={books.folder}", "train.eval_rows=10", "seed=9"))[1]
    for before, now in zip(of_books, (batch for batch, _ in again.seen[3:])):
        assert torch.equal(before.input_ids, now.input_ids)
        assert torch.equal(before.labels, now.labels)


def test_runs_that_mask_differently_can_be_evaluated_alike(
    settings: Callable[..., Resolved], books: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's own loss keeps the masks of training, whose loss the adaptive weight compares it with."""

    def labels(*overrides: str) -> tuple[list[Any], int]:
        resolved = settings(f"train.eval_sets.books={books.folder}", *overrides)
        of_student = [batch.labels.tolist() for batch, _ in evaluated(resolved)[1].seen]
        of_teacher: list[Batch] = []
        monkeypatch.setattr(
            "dwt_ds.run.evaluation.teacher_held_out_loss", lambda _, batches, *__: of_teacher.extend(batches)
        )
        Evaluation(resolved, PreparedData.open(resolved.config.data.dir), {}).teacher_loss(None)  # type: ignore[arg-type]
        return of_student, sum(len(batch.labels) for batch in of_teacher)

    few, at_15 = labels()
    more, at_40 = labels("data.mask_probability=0.4")
    alike, still_at_40 = labels("data.mask_probability=0.4", "train.eval_mask_probability=0.15")
    assert few == alike != more
    assert at_15 < at_40 == still_at_40


def test_once_the_teacher_is_released_there_is_no_soft_loss(settings: Callable[..., Resolved]) -> None:
    assert evaluated(settings(), alone=True)[0] == {"eval_hard_loss": 2.0}
    assert evaluated(settings("teacher.path=null"), alone=True)[0] == {"eval_hard_loss": 2.0, "eval_soft_loss": 0.0}


def test_an_evaluation_can_be_stopped_within_a_set(settings: Callable[..., Resolved], tiny_data: Path) -> None:
    sets = [f"train.eval_sets.{name}={tiny_data}" for name in ("first", "second")]
    losses, student = evaluated(settings(*sets), most=6)
    assert len(student.seen) == 6, "four of the data folder, two of the first set"
    assert "eval_hard_loss.second" not in losses


def test_the_temperature_is_that_of_the_last_step(settings: Callable[..., Resolved]) -> None:
    resolved = settings("distill.temperature={schedule: step, start: 3, end: 1, span_steps: 2}")
    assert evaluated(resolved)[1].temperature == 3.0


def test_without_a_token_to_predict_there_is_no_row_of_the_vocabularies_either(
    settings: Callable[..., Resolved], sentence_data: Path
) -> None:
    data, overlap = PreparedData.open(sentence_data), Overlap(9, 0.5, 1.0)
    evaluation = Evaluation(settings("teacher.path=null", data=sentence_data), data, {}, overlap=overlap)
    assert evaluation.student_losses(Student(), None, iter, 2) == {}  # type: ignore[arg-type]


def test_a_data_folder_that_holds_nothing_out_is_evaluated_on_the_sets(
    settings: Callable[..., Resolved], sentence_data: Path, tiny_data: Path
) -> None:
    resolved = settings(f"train.eval_sets.books={tiny_data}", "teacher.path=null", data=sentence_data)
    assert evaluated(resolved, alone=True)[0] == {"eval_hard_loss.books": 2.0}


def test_a_set_without_a_token_to_predict_is_refused(settings: Callable[..., Resolved], tiny_data: Path) -> None:
    resolved = settings(f"train.eval_sets.books={tiny_data}", "data.label_draw=bernoulli", "data.mask_probability=1e-9")
    assert error_of(evaluated, resolved) == (
        f"train.eval_sets.books: {tiny_data}: its held-out rows have no token to predict; prepare more text"
    )


def test_a_set_that_is_not_there_is_named(settings: Callable[..., Resolved], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^train.eval_sets.a: data folder {tmp_path}/no does not exist: run "):
        settings(f"train.eval_sets.a={tmp_path}/no")


def test_every_rank_has_as_many_micro_batches_of_a_set(
    settings: Callable[..., Resolved], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows in micro-batches of 4 are three: of two ranks, the second has none in its second turn."""
    resolved, sums = settings(f"train.eval_sets.same={tiny_data}", "train.eval_rows=10"), list[Tensor]()

    def reduce_sum(values: Tensor) -> Tensor:
        sums.append(values.clone())
        return values

    monkeypatch.setattr(ranks, "reduce_sum", reduce_sum)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        seen.append(evaluated(resolved)[1].seen)
    assert [len(each) for each in seen] == [4, 4]
    assert [len(batch.labels) for batch, _ in seen[1][1::2]] == [0, 0]
    assert (sums[1] + sums[3])[3] == 50, "5 labels of each of 10 rows"
