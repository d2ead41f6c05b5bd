from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.masked_lms import V, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from dwt_ds.models.masked_lm import wrapper
from dwt_ds.models.masked_lm.checks import check_against_own_logits, freeze_unused_parameters
from dwt_ds.models.masked_lm.families import encoder_layers, known_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM, finished_mask

KNOWN = ["bert", "roberta", "distilbert", "modernbert"]
GENERIC = ["electra", "albert", "esm"]
B, S = 3, 12


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, V, (B, S), generator=generator)
    attention_mask = torch.ones(B, S, dtype=torch.int64)
    input_ids[1, 9:], attention_mask[1, 9:] = 1, 0
    input_ids[0, 3] = input_ids[2, :4] = 7
    positions = torch.tensor([30, 2, 2 * S - 5, 0, 13])  # neither sorted nor in one row
    return input_ids, attention_mask, positions


class NoReads(TorchDispatchMode):
    """Fails where a value is read from a tensor."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return operation(*args, **(kwargs or {}))


def logits_of(gathered: GatheredMaskedLM, *inputs: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(gathered(*inputs), gathered.decoder_weight, gathered.decoder_bias)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_gathered_logits_are_the_models_own(family: str, attention: str) -> None:
    model = tiny(family, attention=attention)
    input_ids, attention_mask, positions = batch()
    own = model(input_ids=input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[positions]
    ours = logits_of(GatheredMaskedLM(model), input_ids, attention_mask, positions)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_the_encoders_output_at_all_tokens(family: str) -> None:
    model = tiny(family)
    input_ids, attention_mask, positions = batch()
    gathered = GatheredMaskedLM(model)
    hidden, everywhere = gathered(input_ids, attention_mask, positions, everywhere=True)
    torch.testing.assert_close(hidden, gathered(input_ids, attention_mask, positions), rtol=0, atol=1e-12)
    own = model.base_model(input_ids=input_ids, attention_mask=attention_mask)[0].flatten(0, 1)
    real = attention_mask.flatten().bool()
    torch.testing.assert_close(everywhere[real], own[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_gradients_are_those_of_the_full_path(family: str) -> None:
    input_ids, attention_mask, positions = batch()
    weights = torch.randn(len(positions), V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    full, split = tiny(family), tiny(family)
    own = full(input_ids=input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[positions]
    (own * weights).sum().backward()
    (logits_of(GatheredMaskedLM(split), input_ids, attention_mask, positions) * weights).sum().backward()
    for (name, theirs), ours in zip(full.named_parameters(), split.parameters(), strict=True):
        assert theirs.grad is not None or "contact_head" in name, name  # of ESM: for another use
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_no_labelled_rows_still_reach_every_parameter(family: str) -> None:
    model = tiny(family)
    input_ids, attention_mask, _ = batch()
    gathered = GatheredMaskedLM(model)
    freeze_unused_parameters(gathered)
    logits = logits_of(gathered, input_ids, attention_mask, torch.empty(0, dtype=torch.int64))
    assert logits.shape == (0, V)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_full_rows_need_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    input_ids, _, positions = batch()
    seen = []

    def spy_on(function: Callable[..., object]) -> Callable[..., object]:
        def spy(*args: object, **kwargs: object) -> object:
            seen.append(kwargs["attention_mask"])
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr(model.base_model, "forward", spy_on(model.base_model.forward))
    monkeypatch.setattr(wrapper, "create_bidirectional_mask", spy_on(wrapper.create_bidirectional_mask))
    gathered = GatheredMaskedLM(model)
    with_mask = gathered(input_ids, torch.ones_like(input_ids), positions)
    without = gathered(input_ids, None, positions)
    # Transformers makes a mask of None while a CUDA graph is recorded. Called by layer, it is not
    # asked.
    assert seen == ([None, None] if known_layers(model) is None else [])
    torch.testing.assert_close(with_mask, without, rtol=0, atol=0)


@pytest.mark.parametrize("family", [*KNOWN, *GENERIC, "deberta", "deberta-v2"])
def test_a_pass_over_full_rows_reads_no_value(family: str) -> None:
    """The host would wait for a GPU there."""
    input_ids, _, positions = batch()
    model = GatheredMaskedLM(tiny(family))
    with NoReads():
        model(input_ids, None, positions)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", KNOWN)
def test_finished_masks_for_a_gpu_give_the_same_hidden_states(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, attention=attention)
    input_ids, attention_mask, positions = batch()
    gathered = GatheredMaskedLM(model)
    expected = gathered(input_ids, attention_mask, positions)

    monkeypatch.setattr("dwt_ds.models.masked_lm.wrapper.encoder_mask", finished_mask)
    torch.testing.assert_close(gathered(input_ids, attention_mask, positions), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [KNOWN[0], *(pytest.param(each, marks=pytest.mark.slow) for each in KNOWN[1:])])
def test_compiles_without_graph_breaks(family: str) -> None:
    model = tiny(family).eval()
    input_ids, attention_mask, positions = batch()
    gathered = GatheredMaskedLM(model)
    torch._dynamo.reset()
    compiled = torch.compile(gathered, backend="eager", fullgraph=True)
    for mask in (None, attention_mask):
        expected = gathered(input_ids, mask, positions)
        torch.testing.assert_close(compiled(input_ids, mask, positions), expected, rtol=0, atol=1e-12)


class VocabularyWide(TorchDispatchMode):
    """Notes the rows of every computed tensor that is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == V:
            self.rows.append(0 if "t" in function.__name__.split(".") else result.numel() // V)
        return result


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_no_row_meets_the_vocabulary_before_the_loss(family: str) -> None:
    input_ids, attention_mask, positions = batch()
    model = tiny(family)
    with VocabularyWide() as seen:
        GatheredMaskedLM(model)(input_ids, attention_mask, positions)
    assert sum(seen.rows) == 0
    with VocabularyWide() as seen:
        model(input_ids=input_ids, attention_mask=attention_mask)
    assert max(seen.rows) == B * S  # the detector works


def test_weight_and_bias_are_the_live_tied_parameters() -> None:
    model = tiny("bert")
    gathered = GatheredMaskedLM(model)
    assert gathered.decoder_weight is model.bert.embeddings.word_embeddings.weight
    assert gathered.decoder_bias is model.cls.predictions.bias
    model.double().resize_token_embeddings(V + 5)
    assert gathered.decoder_weight.shape[0] == V + 5


@pytest.mark.parametrize("family", KNOWN + GENERIC)
def test_check_accepts_the_families(family: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gathered = GatheredMaskedLM(tiny(family).to(dtype))
        state = torch.get_rng_state()
        check_against_own_logits(gathered)
        assert gathered.model.training
        assert torch.equal(torch.get_rng_state(), state)
        unused = ["esm.contact_head.regression.weight", "esm.contact_head.regression.bias"] if family == "esm" else []
        assert freeze_unused_parameters(gathered) == unused


def test_check_accepts_them_where_a_gpu_may_round_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA's containers, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1; linear layers round here as such a GPU does."""
    in_fp32 = nn.functional.linear

    def to_tf32(values: torch.Tensor) -> torch.Tensor:
        return (values.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rounds = torch.get_float32_matmul_precision() == "high"
        return in_fp32(to_tf32(rows), to_tf32(weight), bias) if rounds else in_fp32(rows, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    torch.manual_seed(0)
    student = BertForMaskedLM(BertConfig(vocab_size=V, num_hidden_layers=1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check_against_own_logits(GatheredMaskedLM(student))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_bias_beside_the_decoder_is_the_heads() -> None:
    gathered = GatheredMaskedLM(tiny("esm"))
    assert gathered.decoder_bias is gathered.model.lm_head.bias
    assert GatheredMaskedLM(tiny("modernbert")).decoder_bias is not None


def test_no_hook_stays_behind() -> None:
    model = tiny("electra")
    gathered = GatheredMaskedLM(model)
    input_ids, attention_mask, positions = batch()
    before = model(input_ids=input_ids, attention_mask=attention_mask).logits
    gathered(input_ids, attention_mask, positions)
    torch.testing.assert_close(model(input_ids=input_ids, attention_mask=attention_mask).logits, before)
    with pytest.raises(IndexError):
        gathered(input_ids, attention_mask, torch.tensor([B * S]))
    torch.testing.assert_close(model(input_ids=input_ids, attention_mask=attention_mask).logits, before)


class ScaledBert(BertForMaskedLM):
    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output


class BiasedBert(BertForMaskedLM):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.extra_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.extra_bias
        return output


class TwiceBert(BertForMaskedLM):
    def forward(self, *args: object, **kwargs: object) -> object:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )


def test_a_head_that_scales_its_logits_is_refused() -> None:
    gathered = GatheredMaskedLM(ScaledBert(bert_config()))
    with pytest.raises(ValueError, match="^the head of ScaledBert cannot be split off: .* differs .*$"):
        check_against_own_logits(gathered)


def test_a_head_that_adds_a_parameter_is_refused_though_it_is_still_zero() -> None:
    gathered = GatheredMaskedLM(BiasedBert(bert_config()))
    check_against_own_logits(gathered)
    with pytest.raises(ValueError, match="^the head of BiasedBert cannot be split off: .*extra_bias"):
        freeze_unused_parameters(gathered)


def test_a_decoder_that_runs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="TwiceBert .* ran 2 times"):
        check_against_own_logits(GatheredMaskedLM(TwiceBert(bert_config())))


def test_unused_parameters_are_frozen_by_name() -> None:
    config = AutoConfig.for_model(
        "fnet", vocab_size=V, hidden_size=16, num_hidden_layers=1, intermediate_size=16, pad_token_id=0
    )
    gathered = GatheredMaskedLM(AutoModelForMaskedLM.from_config(config))
    check_against_own_logits(gathered)
    frozen = freeze_unused_parameters(gathered)
    assert frozen == ["fnet.pooler.dense.weight", "fnet.pooler.dense.bias"]
    assert [name for name, each in gathered.model.named_parameters() if not each.requires_grad] == frozen


def test_layers_in_pieces_are_not_taken_for_whole_ones() -> None:
    """XLM has a list of attentions, one of norms and one of feed-forward parts."""
    config = AutoConfig.for_model("xlm", vocab_size=V, emb_dim=16, n_layers=2, n_heads=4)
    assert encoder_layers(AutoModelForMaskedLM.from_config(config)) == []
    assert len(encoder_layers(tiny("bert"))) == 2
