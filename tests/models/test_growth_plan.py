from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.errors import error_of
from transformers import AutoConfig

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import student_model_config
from dwt_ds.models.growth.layout import GROWABLE_FAMILIES
from dwt_ds.models.growth.plan import DEPTH_MAPS, WIDTH_METHODS, check_growth, layer_sources, parse_method

DATA = {"vocab_size": 31, "seq_len": 8, "pad_token_id": 0}
TEACHER = {"layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "max_positions": 8}
WIDER = {"hidden_size": 32, "num_heads": 8, "intermediate_size": 48}
MODERN = {"family": "modernbert"}
SLOW_ROTATION = {kind: {"rope_type": "default", "rope_theta": 5000} for kind in ("full_attention", "sliding_attention")}


def config(**changes: Any) -> Any:
    return student_model_config(StudentConfig(**{**TEACHER, **changes}), **DATA)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("remap", [0, 1, 2, 3, 3, 3]),
        ("bert2bert", [0, 1, 2, 3, 2, 3]),
        ("stack", [0, 1, 2, 3, 0, 1]),
        ("interlace", [0, 0, 1, 1, 2, 2]),
        ("fna", [0, 1, 2, 3, 3, 3]),
        ("fpi", [0, 1, 2, 3, 3, 3]),
        ("stack+fpi", [0, 1, 2, 3, 0, 1]),
        ("interlace+net2net", [0, 0, 1, 1, 2, 2]),
    ],
)
def test_the_published_maps_from_four_to_six_layers(method: str, expected: list[int]) -> None:
    assert layer_sources(method, 4, 6) == expected


@pytest.mark.parametrize("method", DEPTH_MAPS)
def test_maps_at_other_depths_stay_inside_the_teacher(method: str) -> None:
    assert layer_sources(method, 5, 5) == [0, 1, 2, 3, 4]
    for teacher in range(1, 7):
        for student in range(teacher, 15):
            sources = layer_sources(method, teacher, student)
            assert len(sources) == student
            assert sources[0] == 0
            assert set(sources) <= set(range(teacher))


def test_bert2bert_takes_the_remainder_from_the_top() -> None:
    assert layer_sources("bert2bert", 3, 8) == [0, 1, 2, 0, 1, 2, 1, 2]
    assert layer_sources("interlace", 2, 6) == [0, 0, 0, 1, 1, 1]


def test_every_documented_method_parses() -> None:
    for depth in DEPTH_MAPS:
        assert parse_method(depth) == (depth, None)
        for width in WIDTH_METHODS:
            assert parse_method(width) == ("remap", width)
            assert parse_method(f"{depth}+{width}") == (depth, width)


@pytest.mark.parametrize(
    ("method", "near"),
    [
        ("remapp", "remap"),
        ("stack+fp", "stack+fpi"),
        ("FPI", "fpi"),
        ("fpi+stack", "stack"),
        ("stack+", "stack"),
        ("", ""),
    ],
)
def test_unknown_methods_name_the_nearest(method: str, near: str) -> None:
    error = error_of(layer_sources, method, 4, 6)
    assert error.startswith(f"student.init={method!r} is unknown; ")
    assert near in error


def test_a_plan_says_where_each_layer_comes_from() -> None:
    plan = check_growth(config(), config(layers=3), "stack")
    assert plan.layer_sources == [0, 1, 0]
    assert plan.lines()[2] == "student layer 2 <- teacher layer 0"
    assert (plan.depth, plan.width) == ("stack", None)
    assert (plan.teacher.layers, plan.student.layers) == (2, 3)


@pytest.mark.parametrize(
    ("teacher", "student", "method", "message"),
    [
        ({}, {"family": "roberta"}, "remap", "one family, not 'bert' and 'roberta'; set student.family=bert"),
        ({"family": "fnet"}, {"family": "fnet"}, "remap", "does not know the weights of family 'fnet'"),
        ({}, {"layers": 1}, "remap", "student.layers=1 is smaller than the teacher's 2"),
        ({}, {"hidden_size": 8, "num_heads": 2}, "fpi", "student.hidden_size=8 is smaller than the teacher's 16"),
        ({}, {"intermediate_size": 16}, "fpi", "student.intermediate_size=16 is smaller than the teacher's 24"),
        ({}, {"hidden_size": 32}, "fpi", "heads of 8 channels, the teacher's have 4: .* set student.num_heads to 8"),
        ({}, {"num_heads": 2}, "remap", "heads of 8 channels, the teacher's have 4: .* set student.num_heads to 4"),
        ({}, {"hidden_size": 18, "num_heads": 3}, "aki", "heads of 6 .* with a hidden_size that is a multiple of 4"),
        ({}, WIDER, "remap", "grows the depth only, but student.hidden_size=32 .* such as remap\\+fpi"),
        ({}, {**WIDER, "hidden_size": 24, "num_heads": 6}, "fpi", "hidden_size=24 is not a multiple .*; set it to 32"),
        ({}, {**WIDER, "intermediate_size": 36}, "stack+fpi", "intermediate_size=36 is not a .*; set it to 48"),
        ({}, {"config": {"hidden_act": "relu"}}, "remap", "hidden_act is 'relu', the teacher's 'gelu'; set"),
        (
            {"config": {"layer_norm_eps": 1e-5}},
            {"config": {"layer_norm_eps": 1e-12}},
            "fpi",
            "layer_norm_eps is 1e-12, the teacher's 1e-05; set student.config.layer_norm_eps=1e-05",
        ),
        ({**MODERN, "config": {"norm_eps": 1e-6}}, MODERN, "fpi", "set student.config.norm_eps=1e-06"),
        ({**MODERN, "config": {"local_attention": 4}}, MODERN, "fpi", "set student.config.local_attention=4"),
        (
            {**MODERN, "config": {"classifier_activation": "relu"}},
            MODERN,
            "fpi",
            "set student.config.classifier_activation=relu",
        ),
        (
            {**MODERN, "config": {"rope_parameters": SLOW_ROTATION}},
            MODERN,
            "remap",
            "the student's rope_parameters is .*; set student.config.rope_parameters=.*'rope_theta': 5000",
        ),
        (
            {**MODERN, "config": {"layer_types": ["full_attention", "full_attention"]}},
            {**MODERN, "layers": 3},
            "stack",
            r"set student.config.layer_types=\['full_attention', 'full_attention', 'sliding_attention'\]",
        ),
        (
            {"config": {"tie_word_embeddings": False}},
            {},
            "remap",
            "is not tied .*student.config.tie_word_embeddings=false",
        ),
        (
            {"family": "electra", "config": {"embedding_size": 16}},
            {"family": "electra", "config": {"embedding_size": 16}, **WIDER},
            "fpi",
            "the student has electra.embeddings_project.weight, and the teacher no",
        ),
        (
            {"family": "modernbert"},
            {"family": "modernbert", "config": {"attention_bias": True}},
            "remap",
            "the student has .*Wqkv.bias, and the teacher no",
        ),
        (
            {"family": "modernbert", "config": {"attention_bias": True}},
            {"family": "modernbert"},
            "stack",
            "the teacher has .*bias, and the student nothing to copy it to; give student.config",
        ),
        (
            {"family": "electra", "config": {"embedding_size": 32}},
            {"family": "electra", "config": {"embedding_size": 32}, **WIDER},
            "fpi",
            "the teacher has electra.embeddings_project.bias, and the student nothing",
        ),
    ],
)
def test_impossible_growth_is_refused_before_anything_is_allocated(
    teacher: dict[str, Any], student: dict[str, Any], method: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[torch.Size] = []
    original = torch.nn.Parameter.__new__

    def spy(cls: type, data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.nn.Parameter:
        if data.device.type != "meta":
            allocated.append(data.shape)
        return original(cls, data, *args, **kwargs)

    configs = config(**teacher), config(**student)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", spy)
    assert re.search(message, error_of(check_growth, *configs, method))
    assert allocated == []


@pytest.mark.parametrize("family", GROWABLE_FAMILIES)
def test_a_teacher_read_from_its_folder_computes_as_a_student_of_the_same_settings(family: str, tmp_path: Path) -> None:
    config(family=family).save_pretrained(tmp_path)
    for method in ("remap", "fpi"):
        check_growth(AutoConfig.from_pretrained(tmp_path), config(family=family), method)


def test_a_field_that_only_one_configuration_has_is_no_difference() -> None:
    """Configurations on the hub carry fields of older classes."""
    teacher = config(family="modernbert")
    teacher.layer_norm_eps = 1e-3
    assert not hasattr(config(family="modernbert"), "layer_norm_eps")
    check_growth(teacher, config(family="modernbert"), "fpi")
