"""Overrides on the command line, `key=value`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.base.trees import flatten
from dwt_ds.config.objective import Schedule
from dwt_ds.config.overrides import override_of
from dwt_ds.config.recipe import load_recipe

Write = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "written_as", "value"),
    [
        ("seed=7", "seed", 7),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.max_steps=", "train.max_steps", None),
        ("teacher.path=a b/$(c);d", "teacher.path", "a b/$(c);d"),
        ("teacher.path=x=y", "teacher.path", "x=y"),
        ("teacher.path='5e-4'", "teacher.path", "5e-4"),
        ("output_dir=exp #2", "output_dir", "exp #2"),
        ("output_dir=true", "output_dir", "true"),
        ("output_dir=null", "output_dir", "null"),
        ("output_dir=[a]: {", "output_dir", "[a]: {"),
        ("output_dir= a ", "output_dir", " a "),
        ('output_dir="b[12]"', "output_dir", "b[12]"),
        ("output_dir='a' and 'b'", "output_dir", "'a' and 'b'"),
        ("output_dir='a' #2", "output_dir", "'a' #2"),
        ("output_dir='a': b", "output_dir", "'a': b"),
        ("output_dir={a}", "output_dir", "{a}"),
        ("data.dir=2024", "data.dir", "2024"),
        ("data.dir=2024-01-02", "data.dir", "2024-01-02"),
        ("deepspeed_config=1e5", "deepspeed_config", "1e5"),
        ("teacher.path=null", "teacher.path", None),
        ("teacher.path=", "teacher.path", None),
        ("teacher.path=~", "teacher.path", None),
        ("teacher.path=Null", "teacher.path", None),
        ("teacher.path=NULL", "teacher.path", None),
        ("teacher.path='null'", "teacher.path", "null"),
        ("student.quantization=w8a8", "student.quantization", "w8a8"),
        ("student.quantization={weight_bits: 8}", "student.quantization", {"weight_bits": 8}),
        ("teacher.kernel_inject=auto", "teacher.kernel_inject", "auto"),
        ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
        ("teacher.kernel_inject=false", "teacher.kernel_inject", False),
        ("student.config={layer_norm_eps: 1e-6}", "student.config", {"layer_norm_eps": 1e-6}),
        ("student.config.hidden_act=relu", "student.config", {"hidden_act": "relu", "kept": 1}),
        ("train.eval_sets.books=a: b #1", "train.eval_sets", {"kept": "k", "books": "a: b #1"}),
        ("train.eval_sets.kept=2024", "train.eval_sets", {"kept": "2024"}),
        ("train.eval_sets={books: data/books}", "train.eval_sets", {"books": "data/books"}),
        ("train.eval_sets=null", "train.eval_sets", None),
        ("deepspeed.zero_optimization.stage=1", "deepspeed", {"zero_optimization": {"stage": 1}}),
        ("deepspeed.csv_monitor.job_name=exp #2", "deepspeed", {"csv_monitor": {"job_name": "exp #2"}}),
        ("deepspeed.csv_monitor.job_name='exp #2'", "deepspeed", {"csv_monitor": {"job_name": "exp #2"}}),
        ("deepspeed.gradient_clipping=0.5 # low", "deepspeed", {"gradient_clipping": 0.5}),
        ("distill.soft_weight=4", "distill.soft_weight", Schedule("constant", 4.0)),
        ("distill.soft_weight={schedule: linear, start: 4, end: 1}", "distill.soft_weight", Schedule("linear", 4, 1)),
    ],
)
def test_an_override_replaces_what_the_recipe_says(override: str, written_as: str, value: Any, write: Write) -> None:
    path = write("seed: 1\ntrain: {max_steps: 5, epochs: 2, eval_sets: {kept: k}}\nstudent: {config: {kept: 1}}\n")
    recipe = load_recipe(path, [override])
    found: Any = recipe.config
    for part in written_as.split("."):
        found = getattr(found, part)
    assert found == value
    assert any(name == written_as or name.startswith(f"{written_as}.") for name in recipe.written)


@pytest.mark.parametrize(("key", "other"), [("soft_weight", "temperature"), ("temperature", "soft_weight")])
@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        ("3.0", ["start=4"], Schedule("constant", 4.0)),
        ("3.0", ["schedule=linear", "end=0.5"], Schedule("linear", 3.0, 0.5)),
        ("3.0", ["end=0.5", "schedule=linear"], Schedule("linear", 3.0, 0.5)),
        ("{schedule: linear, start: 2, end: 1}", ["start=4"], Schedule("linear", 4.0, 1.0)),
        ("{schedule: linear, start: 2, end: 1}", ["span_steps=10"], Schedule("linear", 2.0, 1.0, 1.0, 10)),
        (None, ["start=4"], Schedule("constant", 4.0)),
    ],
)
def test_an_override_reaches_into_a_schedule_however_the_recipe_wrote_it(
    written: str | None, overrides: list[str], expected: Schedule, key: str, other: str, write: Write
) -> None:
    path = write("{}\n" if written is None else f"distill: {{{key}: {written}}}\n")
    distill = load_recipe(path, [f"distill.{key}.{override}" for override in overrides]).config.distill
    assert getattr(distill, key) == expected
    assert getattr(distill, other) == Schedule()


def test_an_override_of_one_alias_leaves_the_other(write: Write) -> None:
    path = write(
        "distill:\n  soft_weight: &both {schedule: linear, start: 2, end: 1}\n  temperature: *both\n",
    )
    distill = load_recipe(path, ["distill.soft_weight.start=4"]).config.distill
    assert (distill.soft_weight.start, distill.temperature.start) == (4.0, 2.0)


def test_an_override_adds_to_a_section_that_is_null(write: Write) -> None:
    config = load_recipe(
        write("train: {eval_sets: null}\nteacher:\n"), ["train.eval_sets.a=b", "teacher.path=t"]
    ).config
    assert (config.train.eval_sets, config.teacher.path) == ({"a": "b"}, "t")


def test_an_override_of_a_whole_section_leaves_its_other_settings(write: Write) -> None:
    path = write("train: {max_steps: 5, learning_rate: 2e-3}\ndeepspeed: {optimizer: {type: Muon}}\nteacher:\n")
    overrides = ["train={max_steps: 9}", "deepspeed={zero_optimization: {stage: 1}}", "teacher={path: t}"]
    recipe = load_recipe(path, overrides)
    assert (recipe.config.train.max_steps, recipe.config.train.learning_rate) == (9, 2e-3)
    assert recipe.config.deepspeed == {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}}
    assert recipe.config.teacher.path == "t"


def test_epochs_over_a_length_in_steps_are_refused_since_the_steps_would_win(write: Write) -> None:
    """As an override, and in a recipe over its base."""
    message = "train.epochs=2: train.max_steps=550 comes first; set train.max_steps=null as well"
    assert error_of(load_recipe, "quickstart", ["train.epochs=2"]) == message
    assert error_of(load_recipe, write("base: quickstart\ntrain: {epochs: 2}\n"), []) == message
    for overrides in (["train.max_steps=null", "train.epochs=2"], ["train={max_steps: null, epochs: 2}"]):
        train = load_recipe("quickstart", overrides).config.train
        assert (train.max_steps, train.epochs) == (None, 2)
    assert load_recipe("paper_weak", ["train.max_steps=9"]).config.train.max_steps == 9
    assert load_recipe("quickstart", ["train.epochs=2", "train.max_steps=9"]).config.train.max_steps == 9


def test_the_last_override_wins() -> None:
    assert load_recipe("quickstart", ["seed=1", "seed=2"]).config.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': write it as key=value, for instance train.max_steps=1000"),
        ("=3", "override '=3': write it as key=value, for instance train.max_steps=1000"),
        (
            "train..max_steps=3",
            "override 'train..max_steps=3': write it as key=value, for instance train.max_steps=1000",
        ),
        ("seed=[", "override 'seed=[': the value is not valid YAML; quote it"),
        ("student.layers.x=3", "override 'student.layers.x=3': student.layers is 2, not a section"),
        ("base=quickstart", "base: unknown key; did you mean 'seed'?"),
    ],
)
def test_an_impossible_override_is_refused(override: str, message: str, write: Write) -> None:
    assert error_of(load_recipe, write("student: {layers: 2}\n"), [override]) == message


@pytest.mark.parametrize(
    "text", ["data #1", "2024", "null", "", "'x'", '"x"', "it's", "'it's'", "a: b", " a", "[1]", "~"]
)
@pytest.mark.parametrize("key", ["data.dir", "teacher.path"])
def test_an_override_made_of_an_options_text_is_that_text(key: str, text: str) -> None:
    """Also of a field that may be null, such as the teacher's."""
    override = override_of(key, text)
    if text:
        assert flatten(load_recipe("quickstart", [override]).config.to_dict())[key] == text
    else:
        with pytest.raises(ValueError, match=f"{key}='': is empty; name a file or folder"):
            load_recipe("quickstart", [override])


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\0b", "a\udcffb", "a\u2028b"])
@pytest.mark.parametrize("key", ["output_dir", "data.dir", "teacher.path", "deepspeed_config"])
def test_a_name_that_no_message_could_show_is_refused(key: str, name: str) -> None:
    error = error_of(load_recipe, "quickstart", [f"{key}={name}"])
    assert error.startswith(f"{key}={name!r}: has a line break, a control character or a byte that is not UTF-8")
