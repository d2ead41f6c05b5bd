from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import yaml
from harness.ds_values import nested
from harness.errors import error_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dwt_ds.base.trees import flatten
from dwt_ds.config.objective import DistillConfig, Schedule
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.config.schema import (
    DataConfig,
    FusedConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

SECTIONS = [RunConfig, DataConfig, StudentConfig, FusedConfig, TeacherConfig, DistillConfig, TrainConfig, Schedule]
# Every leaf of the tree by its dotted name, but for the two mappings that other rooms check.
LEAVES = sorted(
    f"{prefix}{field.name}"
    for prefix, owner in [
        ("", RunConfig),
        ("data.", DataConfig),
        ("student.", StudentConfig),
        ("fused.", FusedConfig),
        ("teacher.", TeacherConfig),
        ("distill.", DistillConfig),
        ("distill.soft_weight.", Schedule),
        ("train.", TrainConfig),
    ]
    for field in fields(owner)
    if not is_dataclass(getattr(owner(), field.name)) and f"{prefix}{field.name}" not in ("deepspeed", "student.config")
)


def parse_error(dotted: str, value: Any) -> str:
    return error_of(parse_run_config, nested({dotted: value}))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_is(section: type) -> None:
    schema = TypeAdapter(section).json_schema()
    for name, described in schema["properties"].items():
        if "$ref" not in described:  # a section, whose own docstring says it
            assert len(described.get("description", "")) > 10, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "constant", "end": 2.0}, "end=2.0: a constant has no end"),
        ({"schedule": "linear"}, "end: missing; schedule 'linear'"),
        ({"schedule": "step"}, "end: missing; schedule 'step'"),
        ({"schedule": "exponential", "start": 1.0, "end": 0.0}, "needs both above 0; use linear"),
        ({"schedule": "exponential", "start": 0.0, "end": 1.0}, "needs both above 0; use linear"),
        ({"schedule": "exponential", "start": -2.0, "end": -1.0}, "needs both above 0; use linear"),
        ({"span": 0.0}, "greater than 0"),
        ({"span": 1.5}, "less than or equal to 1"),
        ({"span_steps": 0}, "greater than 0"),
        ({"start": float("nan")}, "finite"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Schedule(**arguments)


def test_a_constant_may_name_its_end_if_it_is_the_start() -> None:
    assert Schedule(start=2.0, end=2.0).schedule == "constant"


@pytest.mark.parametrize(
    ("fields", "steps"),
    [({"span": 0.29}, 29), ({"span": 0.334}, 33), ({"span": 0.001}, 1), ({}, 100), ({"span_steps": 400}, 400)],
)
def test_a_span_is_the_nearest_number_of_steps(fields: dict[str, Any], steps: int) -> None:
    assert Schedule("linear", 4.0, 1.0, **fields).length(100) == steps


def test_a_number_is_a_constant_schedule() -> None:
    distill = parse_run_config({"distill": {"soft_weight": 3, "temperature": "2.5"}}).distill
    assert distill.soft_weight == Schedule("constant", 3.0)
    assert distill.temperature == Schedule("constant", 2.5)


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("distill.soft_weight", -1, "distill.soft_weight.start=-1.0: must be at least 0"),
        (
            "distill.soft_weight",
            {"schedule": "linear", "start": 1, "end": -0.5},
            "distill.soft_weight.end=-0.5: must be at least 0",
        ),
        ("distill.temperature", 0, "distill.temperature.start=0.0: must be above 0"),
        (
            "distill.temperature",
            {"schedule": "linear", "start": 2, "end": 0},
            "distill.temperature.end=0.0: must be above 0",
        ),
        ("data.mask_share", 0.95, "data.mask_share=0.95 + random_share=0.1 is above 1; lower one"),
        (
            "distill.soft_weight",
            {"schedule": "cosine"},
            "distill.soft_weight.end: missing; schedule 'cosine' needs the value at the end of the span",
        ),
    ],
)
def test_rules_between_fields_name_the_field(dotted: str, value: Any, message: str) -> None:
    assert parse_error(dotted, value) == message


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"my set": "d"},
            "train.eval_sets.'my set'='d': call a set by 1 to 64 of the letters a-z and A-Z, digits, _ and",
        ),
        ({"": "d"}, "train.eval_sets.''='d': call a set by"),
        ({"a.b": "d"}, "train.eval_sets.'a.b'='d': call a set by"),
        ({"../a": "d"}, "train.eval_sets.'../a'='d': call a set by"),
        ({"n" * 65: "d"}, f"train.eval_sets.'{'n' * 65}'='d': call a set by"),
        ({"a\n": "d"}, "train.eval_sets.'a\\n'='d': call a set by"),
        ({"a": {"b": "d"}}, "train.eval_sets.a={'b': 'd'}: must be text"),
        ({"a": None}, "train.eval_sets.a=None: must be text"),
        ({2024: "d"}, "train.eval_sets.2024=2024: must be text, in quotes if it looks like a number"),
        ({"a": ""}, "train.eval_sets.a='': is empty; name a file or folder"),
        ({"a": "${NO_SUCH}/d"}, "train.eval_sets.a='${NO_SUCH}/d': NO_SUCH is not set; export it"),
        ("d", "train.eval_sets='d': must be a mapping of settings"),
    ],
)
def test_a_mistake_in_a_mapping_of_folders_names_its_key(sets: Any, message: str) -> None:
    assert parse_error("train.eval_sets", sets).startswith(message)


def test_eval_sets_are_named_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPORA", "/corpora")
    sets = {"the-Books_2": "${CORPORA}/books", "wiki": "a b/$x"}
    read = parse_run_config({"train": {"eval_sets": sets}})
    assert read.train.eval_sets == {"the-Books_2": "/corpora/books", "wiki": "a b/$x"}
    assert parse_run_config(read.to_dict()) == read
    assert parse_run_config({"train": {"eval_sets": None}}).train.eval_sets is None


@pytest.mark.parametrize("positions", ["all", 0.3])
def test_further_positions_with_a_teacher_of_another_vocabulary_are_refused(positions: Any) -> None:
    settings = {"distill": {"soft_positions": positions}, "teacher": {"path": "any", "vocabulary": "shared"}}
    with pytest.raises(
        ValueError, match=f"^distill.soft_positions={positions!r}: with teacher.vocabulary=shared .*; use labelled$"
    ):
        parse_run_config(settings)
    settings["teacher"]["path"] = None  # alone there is no soft loss
    assert parse_run_config(settings).distill.soft_positions == positions


@pytest.mark.parametrize("value", ["most", 0, 1, 1.0, 1.5, -0.2, True])
def test_soft_positions_are_a_word_or_a_share(value: Any) -> None:
    message = parse_error("distill.soft_positions", value)
    assert message.startswith(f"distill.soft_positions={value!r}: must be ")


def test_a_soft_weight_of_zero_and_masking_by_mask_and_random_alone_are_allowed() -> None:
    config = parse_run_config({"distill": {"soft_weight": 0}, "data": {"mask_share": 0.9}})
    assert config.distill.soft_weight.start == 0.0


def test_an_adaptive_weight_may_end_where_it_starts() -> None:
    assert DistillConfig(soft_weight=Schedule("adaptive", 1.0, 1.0)).soft_weight.end == 1.0


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("data.mask_probability", 0.0, "data.mask_probability=0.0: must be above 0"),
        ("data.mask_probability", 1.5, "data.mask_probability=1.5: must be below 1"),
        ("data.random_share", -0.1, "data.random_share=-0.1: must be at least 0"),
        ("data.label_draw", "poisson", "data.label_draw='poisson': must be 'fixed' or 'bernoulli'"),
        ("train.max_steps", "abc", "train.max_steps='abc': must be a whole number"),
        ("train.learning_rate", "1:30", "train.learning_rate='1:30': must be a number"),
        ("train.learning_rate", "2024-13-45", "train.learning_rate='2024-13-45': must be a number"),
        ("seed", 2**63, "seed=9223372036854775808: must be below 9223372036854775808"),
        ("seed", 10**40, f"seed={10**40}: must be below 9223372036854775808"),
        ("max_steps", 3, "max_steps: unknown key; did you mean 'train.max_steps'?"),
        ("train.soft_weight", 3, "train.soft_weight: unknown key; did you mean 'distill.soft_weight'?"),
        ("dir", "data", "dir: unknown key; did you mean 'data.dir'?"),
        ("path", "x", "path: unknown key; did you mean 'teacher.path'?"),
        ("student.backend", 1, "student.backend: unknown key; did you mean 'distill.backend'?"),
        ("on", 1, "on: unknown key"),
        ("train.max_steps", 1.5, "train.max_steps=1.5: must be a whole number"),
        ("train.max_steps", [3], "train.max_steps=[3]: must be a whole number"),
        ("train.max_steps", 0, "train.max_steps=0: must be above 0"),
        ("train.log_every", True, "train.log_every=True: must be a number"),
        ("train.max_steps", False, "train.max_steps=False: must be a number"),
        ("data.workers", -1, "data.workers=-1: must be at least 0 or 'auto'"),
        ("data.mask_probability", 1, "data.mask_probability=1: must be below 1"),
        ("student.dropout", -0.1, "student.dropout=-0.1: must be at least 0"),
        ("distill.soft_weight.span", 2, "distill.soft_weight.span=2: must be at most 1"),
        ("train.learning_rate", float("inf"), "train.learning_rate=inf: must be a finite number"),
        ("train.learning_rate", None, "train.learning_rate=None: must be a number"),
        ("distill.soft_weight", "abc", "distill.soft_weight.start='abc': must be a number"),
        ("distill.soft_weight", True, "distill.soft_weight=True: must be a mapping of settings"),
        ("teacher.kernel_inject", "maybe", "teacher.kernel_inject='maybe': must be true or false or 'auto'"),
        ("teacher.kernel_inject", 3, "teacher.kernel_inject=3: must be true or false or 'auto'"),
        ("data.whole_word", 3, "data.whole_word=3: must be true or false"),
        ("student.init", [1], "student.init=[1]: must be text, in quotes if it looks like a number"),
        ("output_dir", 2026, "output_dir=2026: must be text, in quotes if it looks like a number"),
        (
            "student.attention",
            "flash",
            "student.attention='flash': must be 'auto', 'eager', 'sdpa' or 'flash_attention_2'",
        ),
        ("train.betas", [0.9], "train.betas=[0.9]: must be a longer list"),
        ("train.betas", [0.9, 0.99, 1], "train.betas=[0.9, 0.99, 1]: must be a list of 2"),
        ("train.betas", 0.9, "train.betas=0.9: must be a list"),
        ("train.betas", ["a", "b"], "train.betas='a': must be a number"),
        ("data", 3, "data=3: must be a mapping of settings"),
        ("teacher", None, "teacher=None: must be a mapping of settings"),
        ("student.config", [1], "student.config=[1]: must be a mapping of settings"),
        ("deepspeed", "x", "deepspeed='x': must be a mapping of settings"),
        ("student.quantization", {"weight_bits": 9}, "student.quantization.weight_bits=9: must be at most 8"),
        (
            "teacher",
            {"sharded": True, "kernel_inject": True},
            "teacher.kernel_inject=true: not for a sharded teacher; set it to auto, or sharded to false",
        ),
    ],
)
def test_a_wrong_type_or_range_is_reported_by_field_value_and_fix(dotted: str, value: Any, message: str) -> None:
    assert parse_error(dotted, value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.max_steps": -1, "train.eval_every": -1}, "train.max_steps=-1: must be above 0"),
        ({"train.log_every": None, "train.eps": None}, "train.eps=None: must be a number"),
        ({"train.betas": [2, "a"]}, "train.betas=2: must be below 1"),
        ({"train.betas": [2, 2]}, "train.betas=2: must be below 1"),
    ],
)
def test_of_several_mistakes_the_first_is_reported(values: dict[str, Any], message: str) -> None:
    assert error_of(parse_run_config, nested(values)) == message


@pytest.mark.parametrize(
    ("names", "refused", "accepted"),
    [
        ("student: layers hidden_size num_heads intermediate_size max_positions", [0], [1]),
        ("train: max_steps micro_batch_size gradient_accumulation_steps log_every eval_rows keep_last", [0], [1]),
        ("train: skip_window expected_world_size", [0], [1]),
        ("teacher: release_after_steps", [0], [1]),
        ("distill: hidden_layer soft_weight.span_steps soft_weight.average_steps", [0], [1]),
        ("train: spike_window", [1], [2]),
        ("train: eval_every checkpoint_every keep_every export_every", [-1], [0]),
        ("train: weight_decay max_grad_norm", [-0.1], [0]),
        ("distill: hard_weight hidden_weight", [-0.1], [0]),
        ("train: epochs learning_rate eps spike_sigma", [0], [1e-9]),
        ("train: collective_timeout_seconds report_stuck_after_seconds", [0], [1e-9]),
        ("distill: soft_weight.width", [0], [1e-9]),
        ("data: mask_probability", [0, 1], [1e-9, 0.999]),
        ("train: eval_mask_probability", [0, 1], [1e-9, 0.999]),
        ("teacher: release_below_share", [0, 1], [1e-9, 0.999]),
        ("student: dropout", [-0.1, 1], [0, 0.999]),
        ("train: warmup_ratio", [-0.1, 1], [0, 0.999]),
        ("train: max_skipped_share", [-0.1, 1.1], [0, 1]),
        ("data: mask_share", [-0.1, 1.1], [0, 0.9]),
        ("data: random_share", [-0.1, 1.1], [0, 0.2]),
        ("train: betas", [[-0.1, 0], [0.9, 1]], [[0, 0.999]]),
    ],
)
def test_a_field_has_its_limits(names: str, refused: list[Any], accepted: list[Any]) -> None:
    section, _, keys = names.partition(": ")
    for dotted in (f"{section}.{key}" for key in keys.split()):
        for value in refused:
            assert re.match(f"{dotted}=.*: must be ", parse_error(dotted, value)), value
        for value in accepted:
            parse_run_config(nested({dotted: value}))


def test_a_seed_is_not_negative() -> None:
    assert parse_error("seed", -1) == "seed=-1: must be at least 0"
    assert parse_run_config({"seed": 0}).seed == 0


def test_a_sharded_teacher_leaves_injected_kernels_to_the_program() -> None:
    assert parse_run_config({"teacher": {"sharded": True, "kernel_inject": "auto"}}).teacher.sharded


@given(
    st.sampled_from(LEAVES),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3)
    ),
)
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line_naming_the_field(dotted: str, value: Any) -> None:
    try:
        parse_run_config(nested({dotted: value}))
    except ValueError as error:
        message = str(error)
        assert message.startswith((f"{dotted}=", f"{dotted}.", f"{dotted} ", dotted.rpartition(".")[0] + "."))
        assert "\n" not in message
        assert "nput should" not in message
        assert "validation error" not in message


def test_the_plain_dict_goes_through_yaml_and_back() -> None:
    config = parse_run_config(
        {
            "distill": {"soft_weight": {"schedule": "exponential", "start": 4, "end": 0.5, "span_steps": 7}},
            "train": {"betas": [0.8, 0.95], "eps": 1e-12, "learning_rate": 3e-4, "max_steps": 9},
            "student": {"config": {"layer_norm_eps": 1e-6, "hidden_act": "relu"}},
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "teacher": {"path": "runs/1e5", "kernel_inject": True},
        }
    )
    plain = config.to_dict()
    assert plain["train"]["betas"] == [0.8, 0.95]
    again = parse_run_config(yaml.safe_load(yaml.safe_dump(plain)))
    assert again == config


@pytest.mark.parametrize("dotted", ["output_dir", "data.dir", "teacher.path", "deepspeed_config"])
def test_a_variable_in_a_path_is_the_environments(dotted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = parse_run_config(nested({dotted: "${SCRATCH}/a $5 b"}))
    assert flatten(config.to_dict())[dotted] == "/scratch/me/a $5 b"
    monkeypatch.delenv("SCRATCH")
    message = f"{dotted}='${{SCRATCH}}/a': SCRATCH is not set; export it, or write the path out"
    assert parse_error(dotted, "${SCRATCH}/a") == message
