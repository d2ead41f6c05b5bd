from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import masked_lms
from harness.masked_lms import V
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

from dwt_ds.models.dropout import use_cpu_dropout
from dwt_ds.models.masked_lm.checks import check_against_own_logits
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM, encode_at, encoder_mask, finished_mask

SHORTENED = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"]
B, S = 4, 10
tiny = partial(masked_lms.tiny, layers=3)
RAGGED = [31, 2, 38, 0, 9, 30, 15]  # no order; 3, 1, 0 and 3 a row


def batch(masked: bool = True) -> tuple[Tensor, Tensor | None]:
    input_ids = torch.randint(4, V, (B, S), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones(B, S, dtype=torch.int64)
    if not masked:
        return input_ids, None
    input_ids[1, 7:], attention_mask[1, 7:] = 1, 0
    input_ids[2, 3:], attention_mask[2, 3:] = 1, 0
    return input_ids, attention_mask


def full_rows(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask)[0].flatten(0, 1)[positions]


def last_layer_of(model: PreTrainedModel) -> Any:
    base = model.base_model
    return (base.transformer if hasattr(base, "transformer") else base.encoder).layer[-1]


@pytest.mark.parametrize("mask", ["none", "padding", "finished"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SHORTENED)
def test_rows_and_gradients_are_those_of_the_whole_layer(family: str, attention: str, mask: str) -> None:
    full, short = tiny(family, attention=attention), tiny(family, attention=attention)
    input_ids, attention_mask = batch(masked=mask != "none")
    positions = torch.tensor(RAGGED)
    weights = torch.randn(len(RAGGED), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prepare = finished_mask if mask == "finished" else encoder_mask
    handed = None if attention_mask is None else prepare(short, attention_mask)

    expected = full_rows(full, input_ids, attention_mask, positions)
    rows = encode_at(short, input_ids, handed, positions)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    (expected * weights).sum().backward()
    (rows * weights).sum().backward()
    for (name, theirs), ours in zip(full.base_model.named_parameters(), short.base_model.parameters(), strict=True):
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("count", [0, 1, len(RAGGED)])
@pytest.mark.parametrize("family", SHORTENED)
def test_only_keys_queries_values_and_what_shares_their_module_see_every_token(family: str, count: int) -> None:
    model = tiny(family, dropout=0.1)
    rows: dict[str, int] = {}
    for name, module in last_layer_of(model).named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _i, output, name=name: rows.update({name: output.numel()}))
    GatheredMaskedLM(model)(*batch(), torch.tensor(RAGGED[:count], dtype=torch.int64))

    everywhere = {name for name in rows if name.endswith((".query", ".key", ".value", "_lin"))}
    width = {name: 24 if name.startswith(("intermediate", "ffn.lin1", "ffn.activation")) else 16 for name in rows}
    assert rows == {name: width[name] * (B * S if name in everywhere else count) for name in rows}
    assert len(everywhere) == (4 if family == "distilbert" else 3)
    assert len(rows) - len(everywhere) == (6 if family == "distilbert" else 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "cpu"])
@pytest.mark.parametrize("family", SHORTENED)
def test_attention_dropout_is_the_models_own(family: str, attention: str) -> None:
    """The last layer's attention is whole, so it draws the same numbers."""
    model = tiny(family, attention="eager" if attention == "cpu" else attention, attention_dropout=0.4)
    if attention == "cpu":
        use_cpu_dropout(model)
    input_ids, attention_mask = batch()
    positions = torch.tensor(RAGGED)
    torch.manual_seed(3)
    expected = full_rows(model, input_ids, attention_mask, positions)
    torch.manual_seed(3)
    rows = encode_at(model, input_ids, attention_mask, positions)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    torch.manual_seed(4)
    assert not torch.allclose(encode_at(model, input_ids, attention_mask, positions), expected)


@pytest.mark.parametrize("cpu_dropout", [False, True])
@pytest.mark.parametrize("family", SHORTENED)
def test_hidden_dropout_keeps_its_share(family: str, cpu_dropout: bool) -> None:
    model = tiny(family, dropout=0.25)
    if cpu_dropout:
        use_cpu_dropout(model)
    layer = last_layer_of(model)
    zeros: list[float] = []
    dropouts = [layer.ffn.dropout] if family == "distilbert" else [layer.attention.output.dropout, layer.output.dropout]
    for dropout in dropouts:
        dropout.register_forward_hook(lambda _m, _i, output: zeros.append((output == 0).double().mean().item()))
    input_ids, attention_mask = batch()
    encode_at(model, input_ids, attention_mask, torch.arange(B * S).repeat(25))  # 16000 elements
    assert zeros == [pytest.approx(0.25, abs=0.02)] * len(dropouts)
    model.eval()
    zeros.clear()
    encode_at(model, input_ids, attention_mask, torch.tensor(RAGGED))
    assert zeros == [0.0] * len(dropouts)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", SHORTENED)
def test_gradient_checkpointing_covers_the_other_layers(family: str, reentrant: bool) -> None:
    plain, checkpointed = tiny(family), tiny(family)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    positions = torch.tensor(RAGGED)
    base = checkpointed.base_model
    *others, last = (base.transformer if family == "distilbert" else base.encoder).layer
    runs: list[nn.Module] = []
    for layer in (*others, last):
        layer.attention.register_forward_hook(lambda module, _i, _o: runs.append(module))
        if family != "distilbert":
            layer.attention.self.register_forward_hook(lambda module, _i, _o: runs.append(module))

    encode_at(plain, *batch(), positions).square().sum().backward()
    encode_at(checkpointed, *batch(), positions).square().sum().backward()
    for (name, expected), ours in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0, atol=1e-10, msg=name)
    for layer in others:
        assert runs.count(layer.attention) == 2
    assert runs.count(last.attention if family == "distilbert" else last.attention.self) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SHORTENED)
def test_no_value_is_asked_of_the_device(family: str, attention: str) -> None:
    """Tensors without values, of which any question about a value raises."""
    model = tiny(family, attention=attention, dropout=0.1, attention_dropout=0.1).to("meta")
    input_ids, attention_mask = (each.to("meta") for each in batch())
    for mask in (None, attention_mask):
        hidden = GatheredMaskedLM(model)(input_ids, mask, torch.tensor(RAGGED).to("meta"))
        assert hidden.shape == (len(RAGGED), 16)
        hidden.sum().backward()


def test_a_decoder_keeps_its_causal_attention() -> None:
    model = tiny("bert", is_decoder=True)
    positions = torch.tensor(RAGGED)
    expected = full_rows(model, *batch(), positions)
    torch.testing.assert_close(encode_at(model, *batch(), positions), expected, rtol=0, atol=1e-12)


class DoublingLayer(BertLayer):
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_a_last_layer_of_another_class_runs_whole() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[-1] = DoublingLayer(model.config, layer_idx=2).double()
    positions = torch.tensor(RAGGED)
    expected = full_rows(model, *batch(), positions)
    torch.testing.assert_close(encode_at(model, *batch(), positions), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["xlm-roberta", "camembert"])
def test_robertas_clones_have_its_head(family: str) -> None:
    check_against_own_logits(GatheredMaskedLM(tiny(family)), tolerance=1e-12)
