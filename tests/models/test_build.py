"""The student from its settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.errors import error_of
from transformers import AutoModelForMaskedLM
from transformers.utils import is_flash_attn_2_available

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student, check_row_length, longest_row, parameter_count, student_model_config
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "electra", "albert"]
DATA = {"vocab_size": 61, "seq_len": 20, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}


def tiny_student(**changes: Any) -> StudentConfig:
    return StudentConfig(**{"layers": 2, "hidden_size": 16, "num_heads": 4, "max_positions": 20, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_reaches_the_model(family: str) -> None:
    torch.manual_seed(0)
    model = build_student(tiny_student(family=family, dropout=0.25, intermediate_size=40), **DATA)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 4)
    assert 40 in [parameter.shape[0] // (2 if family == "modernbert" else 1) for parameter in model.parameters()]
    dropouts = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.25}
    assert model.training
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape[0] == 61
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    longest = torch.randint(4, 61, (2, 20))
    assert model(input_ids=longest).logits.shape == (2, 20, 61)
    assert longest_row(config) == 20
    if family not in ("modernbert",):  # its positions are rotary
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.randint(4, 61, (2, 21)))


def test_the_feed_forward_width_defaults_to_four_times_the_hidden_size() -> None:
    assert student_model_config(tiny_student(), **DATA).intermediate_size == 64
    assert student_model_config(tiny_student(family="distilbert"), **DATA).hidden_dim == 64


def test_the_seed_decides_the_weights() -> None:
    sums = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sums.append(
            sum(parameter.double().sum().item() for parameter in build_student(tiny_student(), **DATA).parameters())
        )
    assert sums[0] == sums[1] != sums[2]


def test_extra_fields_reach_the_configuration() -> None:
    config = student_model_config(tiny_student(config={"hidden_act": "relu", "layer_norm_eps": 1e-5}), **DATA)
    assert (config.hidden_act, config.layer_norm_eps) == ("relu", 1e-5)


def test_fields_that_only_the_models_code_names_reach_the_model() -> None:
    """Those that make a DeBERTa-v2 a DeBERTa-v3; its configuration class does not list them all."""
    fields = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 6,
    }
    model = build_student(tiny_student(family="deberta-v2", config=fields), **DATA)
    names = {name for name, _ in model.named_parameters()}
    assert not [name for name in names if "pos_key_proj" in name]
    assert "deberta.encoder.LayerNorm.weight" in names
    assert model.get_parameter("deberta.encoder.rel_embeddings.weight").shape[0] == 12
    with pytest.raises(
        ValueError, match="share_att_keys is not a field of DebertaV2Config; did you mean 'share_att_key'"
    ):
        student_model_config(tiny_student(family="deberta-v2", config={"share_att_keys": True}), **DATA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "robertta"}, "student.family='robertta': .*did you mean 'roberta'"),
        ({"family": "gpt2"}, "student.family='gpt2': transformers has no masked-LM class"),
        ({"num_heads": 3}, "student.num_heads=3 does not divide student.hidden_size=16; choose"),
        ({"max_positions": 19}, "student.max_positions=19: .* rows have 20 tokens, .* for 19; .* or set it to 20"),
        ({"family": "roberta", "max_positions": 19}, "student.max_positions=19"),
        (
            {"config": {"hiden_act": "relu"}},
            "student.config.hiden_act is not a field of BertConfig; did you mean 'hidden_act'",
        ),
        ({"config": {"num_attention_heads": 2}}, "student.config.num_attention_heads is set by student.num_heads"),
        ({"family": "distilbert", "config": {"dim": 2}}, "student.config.dim is set by student.hidden_size"),
        ({"config": {"vocab_size": 2}}, "student.config.vocab_size is set by the data folder"),
        ({"config": {"layer_norm_eps": "tiny"}}, "student.config=.*layer_norm_eps.*expected float, got str"),
        (
            {"config": {"hidden_act": "geluu"}},
            "^student.config.hidden_act='geluu' is not an activation of transformers; did you mean 'gelu'",
        ),
        ({"family": "distilbert", "config": {"activation": "no_such"}}, "^student.config.activation='no_such' is no"),
        (
            {"family": "big_bird", "config": {"attention_type": "no_such"}},
            r"^student.config=\{'attention_type': 'no_such'\}: ",
        ),
        (
            {"family": "big_bird", "config": {"attention_type": "block_sparse"}},
            "^student.config.attention_type='block_sparse': .*; use original_full$",
        ),
        ({"family": "fnet", "attention": "sdpa"}, "^student.attention='sdpa': .*; use eager or auto$"),
        ({"family": "modernbert", "hidden_size": 30, "num_heads": 6}, "^student.num_heads=6 makes heads of 5 channels"),
        ({"family": "roformer", "hidden_size": 30, "num_heads": 6}, "positions of 'roformer' need an even width"),
        (
            {"family": "esm", "hidden_size": 30, "num_heads": 6, "config": {"position_embedding_type": "rotary"}},
            "rotary positions of 'esm' need an even width per head; choose another",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, error_of(build_student, tiny_student(**changes), **DATA))


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_without_its_package_is_an_error_of_the_attention() -> None:
    error = error_of(build_student, tiny_student(attention="flash_attention_2"), **DATA)
    assert re.search("^student.attention='flash_attention_2': .*; use eager or auto$", error)


def test_a_short_row_leaves_the_attention_that_an_export_has(tmp_path: Path) -> None:
    """A BigBird with the default of transformers has another attention from the first short row on."""
    few = {"block_size": 2, "num_random_blocks": 1}
    model = build_student(tiny_student(family="big_bird", config=few), **DATA).eval()
    long = torch.randint(4, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=long[:, :8])
        logits = model(input_ids=long).logits
        model.save_pretrained(tmp_path)
        exported = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(exported(input_ids=long).logits, logits)


def test_odd_heads_are_fine_without_rotary_positions() -> None:
    for family in ("bert", "esm"):
        assert student_model_config(tiny_student(family=family, hidden_size=30, num_heads=6), **DATA).hidden_size == 30


def test_roberta_gets_the_rows_its_offset_needs() -> None:
    config = student_model_config(tiny_student(family="roberta"), **{**DATA, "pad_token_id": 5})
    assert config.max_position_embeddings == 26
    assert longest_row(config) == 20


def test_rows_longer_than_a_models_positions_are_refused() -> None:
    for family in ("bert", "roberta"):
        config = student_model_config(tiny_student(family=family), **DATA)
        check_row_length("teacher.path", 20, longest_row(config), "use another model")
        with pytest.raises(ValueError, match="^teacher.path: the rows have 21 tokens, .* positions for 20; "):
            check_row_length("teacher.path", 21, longest_row(config), "use another model")


def test_tied_parameters_count_once() -> None:
    model = build_student(tiny_student(), **DATA)
    embeddings = 61 * 16 + 20 * 16 + 2 * 16 + 2 * 16
    layer = 4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16
    head = (16 * 16 + 16) + 2 * 16 + 61
    assert parameter_count(model) == embeddings + 2 * layer + head
    assert parameter_count(GatheredMaskedLM(model)) == parameter_count(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"family": "funnel"},
            "student.family='funnel': its configuration has no num_hidden_layers, so that student.layers would change "
            "nothing; choose another family",
        ),
        (
            {"family": "bart"},
            "student.family='bart': it has a decoder beside the encoder, and the recipe has the sizes of one of them "
            "only; choose a family of encoders",
        ),
        (
            {"family": "xlm", "intermediate_size": 40},
            "student.intermediate_size=40: the family 'xlm' has no such size; remove it",
        ),
    ],
)
def test_a_family_that_the_sizes_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert error_of(student_model_config, tiny_student(**changes), **DATA) == message
