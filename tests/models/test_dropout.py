from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from dwt_ds.models.dropout import CpuDropout, keep_mask, use_cpu_dropout

SIZES = {"vocab_size": 50, "intermediate_size": 32}


def bert(dropout: float) -> BertForMaskedLM:
    config = BertConfig(
        **SIZES,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return BertForMaskedLM(config)


@pytest.mark.parametrize("probability", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_and_scale(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mask = keep_mask(torch.empty(1000, 1001, dtype=dtype), probability)
    dropped = (mask == 0).double().mean().item()
    # 5 standard deviations of a million draws
    assert dropped == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 1e6) ** 0.5)
    kept = mask[mask != 0].unique()
    assert kept.tolist() == [torch.tensor(1 / (1 - probability), dtype=dtype).item()] or dtype == torch.float32
    assert kept.item() == pytest.approx(1 / (1 - probability), rel=1e-4 if dtype == torch.float32 else 4e-3)


def test_lanes_of_a_word_are_independent() -> None:
    torch.manual_seed(2)
    dropped = (keep_mask(torch.empty(4 * 250_000), 0.5) == 0).view(-1, 4).double()
    correlation = torch.corrcoef(dropped.T)
    assert (correlation - torch.eye(4)).abs().max() < 5 / 250_000**0.5


def test_follows_the_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = keep_mask(torch.empty(99), 0.3), keep_mask(torch.empty(99), 0.3)
    torch.set_rng_state(state)
    assert torch.equal(first, keep_mask(torch.empty(99), 0.3))
    assert not torch.equal(first, second)


def test_every_dropout_of_a_model_is_swapped_and_its_function_is_not() -> None:
    plain, swapped = bert(0.1), bert(0.1)
    use_cpu_dropout(swapped)
    assert not [module for module in swapped.modules() if type(module) is nn.Dropout]
    assert [module for module in swapped.modules() if isinstance(module, CpuDropout)]
    tokens, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = plain.eval()(input_ids=tokens, attention_mask=mask).logits
        found = swapped.eval()(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fewer_heads_of_keys_and_values_are_shared(heads: int) -> None:
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(
            "eurobert",
            **SIZES,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=heads,
            pad_token_id=0,
        ),
        attn_implementation="eager",
    ).eval()
    tokens, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        use_cpu_dropout(model)
        found = model(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_attention_weights_are_dropped_in_training() -> None:
    model = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=50,
            dim=16,
            n_layers=1,
            n_heads=2,
            hidden_dim=32,
            dropout=0.0,
            attention_dropout=0.5,
            attn_implementation="eager",
        )
    )
    use_cpu_dropout(model)
    tokens = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
        model.eval()
        assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
