from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.masked_lms import tiny
from torch import nn

from dwt_ds.models.dropout import CpuDropout, keep_mask, use_cpu_dropout


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


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"dropout": 0.1, "attention_dropout": 0.1}),
        *(("eurobert", {"num_key_value_heads": heads}) for heads in (1, 2, 4)),  # heads of queries share them
    ],
)
def test_every_dropout_of_a_model_is_swapped_and_its_function_is_not(family: str, fields: dict[str, Any]) -> None:
    model = tiny(family, **fields).eval()
    tokens, mask = torch.randint(4, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        use_cpu_dropout(model)
        found = model(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert not [module for module in model.modules() if type(module) is nn.Dropout]
    assert any(isinstance(module, CpuDropout) for module in model.modules()) == (family == "bert")  # the other has none


def test_attention_weights_are_dropped_in_training() -> None:
    model = tiny("distilbert", layers=1, attention_dropout=0.5)
    use_cpu_dropout(model)
    tokens = torch.randint(4, 50, (2, 8))
    with torch.no_grad():
        assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
        model.eval()
        assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
