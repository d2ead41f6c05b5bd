"""Recipe, JSON and data as one value, for runs and plans alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.config.recipe import load_recipe
from dwt_ds.data.prepared import PreparedData
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.run.resolve import Corpus, Resolved, resolve


@pytest.fixture
def corpus(tiny_data: Path) -> Corpus:
    return Corpus.of(PreparedData.open(tiny_data).manifest, str(tiny_data))


@pytest.fixture
def resolved(tiny_recipe: Path, corpus: Corpus) -> Callable[..., Resolved]:
    def of(*overrides: str, json: str | None = None) -> Resolved:
        return resolve(load_recipe(str(tiny_recipe), overrides), json, 2, corpus)

    return of


def test_the_corpus_is_what_training_reads(corpus: Corpus, tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    assert (corpus.rows, corpus.validation_rows) == (len(data.train), len(data.validation))
    assert (corpus.vocab_size, corpus.pad_token_id) == (len(data.tokenizer()), data.tokenizer().pad_token_id)


def test_a_plan_resolves_as_its_run_does(resolved: Callable[..., Resolved], tiny_recipe: Path) -> None:
    overrides = ["train.max_steps=null", "train.epochs=1.5", "student.quantization=w8a8"]
    plan = resolve_plan(str(tiny_recipe), overrides, "zero1", 2)
    run = resolved(*overrides, json="zero1")
    assert plan == run
    assert run.config.deepspeed_config == "zero1"
    assert run.ds.zero_stage == 1


def test_epochs_give_whole_steps(resolved: Callable[..., Resolved], corpus: Corpus) -> None:
    run = resolved("train.max_steps=null", "train.epochs=1.5", "train.gradient_accumulation_steps=3")
    assert run.rows_per_step == 4 * 3 * 2
    assert (run.total_steps - 1) * 24 < 1.5 * corpus.rows <= run.total_steps * 24
    assert run.ds_values["scheduler"]["params"]["total_num_steps"] == run.total_steps
    with pytest.raises(ValueError, match="^train.max_steps: not set, nor is train.epochs; set one of them$"):
        resolved("train.max_steps=null")


def test_positions_of_a_row_are_its_labels_and_what_the_soft_loss_sees(resolved: Callable[..., Resolved]) -> None:
    assert resolved().positions_per_row == 5  # round(0.15 x 30)
    assert resolved("distill.soft_positions=all").positions_per_row == 32
    assert resolved("distill.soft_positions=0.3").positions_per_row == 5 + 8  # round(0.3 x 27)
    assert resolved("distill.soft_positions=all", "teacher.path=null").positions_per_row == 5


def test_an_adaptive_weight_needs_held_out_rows_where_they_are_known(tiny_recipe: Path, corpus: Corpus) -> None:
    adaptive, none = "distill.soft_weight={schedule: adaptive, start: 2}", replace(corpus, validation_rows=0)
    recipe = load_recipe(str(tiny_recipe), [adaptive])
    assert resolve(recipe, None, 2, replace(corpus, validation_rows=None)).total_steps == 4
    with pytest.raises(ValueError, match="has no held-out rows for the teacher"):
        resolve(recipe, None, 2, none)
    resolve(load_recipe(str(tiny_recipe), [adaptive, "teacher.path=null"]), None, 2, none)


def test_a_weight_that_follows_the_learning_rate_needs_its_highest(resolved: Callable[..., Resolved]) -> None:
    weight = "distill.soft_weight={schedule: learning_rate}"
    for name in ("WarmupLR", "WarmupCosineLR", "WarmupStableDecayLR"):
        resolved(weight, f"deepspeed.scheduler.type={name}")
    with pytest.raises(ValueError, match="soft_weight.schedule='learning_rate' and deepspeed.scheduler.type=LRRange"):
        resolved(weight, "deepspeed.scheduler.type=LRRangeTest")


@pytest.mark.parametrize(
    ("overrides", "json", "message"),
    [
        (
            ["train.micro_batch_size=1000"],
            "zero2_bf16",
            "data.dir='{data}': {rows} rows are less than one global batch of 2000; prepare more text or lower "
            "train.micro_batch_size",
        ),
        (
            ["student.init=remap", "teacher.path=null"],
            "zero2_bf16",
            "student.init='remap': there is no teacher to start from; set teacher.path or init=random",
        ),
        (
            ["student.attention=flash_attention_2"],
            "zero2_fp32",
            "student.attention='flash_attention_2': it computes in bf16 and fp16, the DeepSpeed JSON says fp32; use "
            "sdpa, or a JSON such as zero2_bf16",
        ),
        (
            ["deepspeed.optimizer.type=Lamb"],
            "zero1",
            "deepspeed.optimizer.type='Lamb' with zero_optimization.stage=1: LAMB scales each layer's step by its "
            "norm, and ZeRO splits the layers over the ranks; set the stage to 0, or use AdamW",
        ),
    ],
)
def test_a_plan_refuses_what_its_run_refuses(
    overrides: list[str],
    json: str,
    message: str,
    resolved: Callable[..., Resolved],
    tiny_recipe: Path,
    tiny_data: Path,
    corpus: Corpus,
) -> None:
    for resolve_one in (resolved, lambda *words, json: resolve_plan(str(tiny_recipe), list(words), json, 2)):
        error = error_of(resolve_one, *overrides, json=json)
        assert error == message.format(data=tiny_data, rows=corpus.rows)


def test_what_another_json_allows_is_not_refused(resolved: Callable[..., Resolved]) -> None:
    resolved("student.attention=flash_attention_2", "train.compile=layers", json="zero2_bf16")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        (
            {"tokenizer_sha256": "other"},
            "its tokenizer is not that of data.dir='{data}'; prepare it with --tokenizer {data}",
        ),
        ({"validation_rows": 0}, "has no held-out rows; prepare it with --validation above 0"),
        (
            {"seq_len": 33},
            "the rows have 33 tokens, the model has positions for 32; prepare shorter rows, or set "
            "student.max_positions to 33 or more",
        ),
    ],
)
def test_a_further_held_out_set_must_fit_tokenizer_and_student(
    changed: dict[str, Any], message: str, tiny_recipe: Path, tiny_data: Path, corpus: Corpus
) -> None:
    recipe = load_recipe(str(tiny_recipe), ["train.eval_sets.books=some/books"])
    sets = {"books": replace(corpus, **changed)}
    if not message:
        assert resolve(recipe, None, 2, corpus, sets).config.train.eval_sets == {"books": "some/books"}
        return
    error = error_of(resolve, recipe, None, 2, corpus, sets)
    assert error == f"train.eval_sets.books='some/books': {message.format(data=tiny_data)}"


def test_a_plan_checks_the_held_out_sets_that_are_there(
    tiny_recipe: Path, tiny_data: Path, sentence_data: Path, tmp_path: Path
) -> None:
    def plan(books: Path, data: Path = tiny_data) -> Resolved:
        return resolve_plan(str(tiny_recipe), [f"train.eval_sets.books={books}", f"data.dir={data}"], None, 2)

    assert plan(tmp_path / "missing").config.train.eval_sets == {"books": str(tmp_path / "missing")}
    plan(tiny_data, data=tmp_path / "missing")
    with pytest.raises(ValueError, match=f"^train.eval_sets.books='{sentence_data}': has no held-out rows; "):
        plan(sentence_data)
    with pytest.raises(FileNotFoundError, match=f"^train.eval_sets.books: data folder {tmp_path} is empty"):
        plan(tmp_path)
