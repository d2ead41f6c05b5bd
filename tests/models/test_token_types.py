"""The embedding of token types where all rows are of type 0."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from dwt_ds.models.token_types import OneTokenType, use_one_token_type

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_logits_gradients_and_names_are_the_same(family: str) -> None:
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    swapped = copy.deepcopy(model)
    use_one_token_type(swapped)
    assert [type(each) for each in swapped.modules()].count(OneTokenType) == 1
    assert list(swapped.state_dict()) == list(model.state_dict())
    tokens = torch.randint(5, 50, (3, 7))
    logits = [each(input_ids=tokens).logits for each in (model, swapped)]
    torch.testing.assert_close(*logits)
    for each in logits:
        each.square().sum().backward()
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (model, swapped)]
    torch.testing.assert_close(*gradients)


def test_a_model_without_token_types_stays_as_it_is() -> None:
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    model = DistilBertForMaskedLM(DistilBertConfig(**sizes))
    before = [type(each) for each in model.modules()]
    use_one_token_type(model)
    assert [type(each) for each in model.modules()] == before
