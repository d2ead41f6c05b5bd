from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedModel

from dwt_ds.config.quantization import Quantization
from dwt_ds.config.schema import StudentConfig
from dwt_ds.models import quantized_export
from dwt_ds.models.build import build_student
from dwt_ds.models.growth.grow import grow
from dwt_ds.models.load import load_masked_lm
from dwt_ds.models.masked_lm.checks import check_against_own_logits, check_rounded_weights
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.quantization import (
    add_fake_quantizers,
    check_quantization,
    quantized_layers,
    round_weights,
    switch_fake_quantizers,
)
from dwt_ds.models.quantized_export import load_quantized, quantize_checkpoint, save_quantized
from dwt_ds.models.token_types import use_one_token_type

V, S = 61, 12
FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "electra", "albert"]


def model(family: str = "bert", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": S, "dropout": 0, "intermediate_size": 64}
    student = StudentConfig(family=family, **{**sizes, **changes})
    return build_student(student, vocab_size=V, seq_len=S, pad_token_id=1, cls_token_id=2, sep_token_id=3)


def batch() -> torch.Tensor:
    return torch.randint(4, V, (3, S), generator=torch.Generator().manual_seed(1))


def logits(of: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=batch()).logits


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="needs torchao, which is not installed; pip install torchao"):
        add_fake_quantizers(model(), Quantization())


class TestWithTorchao:
    @pytest.fixture(autouse=True)
    def _torchao(self) -> None:
        pytest.importorskip("torchao")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_only_the_encoder_is_touched_and_parameters_stay_the_same_objects(self, family: str) -> None:
        student = model(family)
        before = dict(student.named_parameters(remove_duplicate=False))
        names = add_fake_quantizers(student, Quantization())
        after = dict(student.named_parameters(remove_duplicate=False))
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert set(student.state_dict()) == set(model(family).state_dict())
        encoder = "albert_layers" if family == "albert" else "layer"
        assert sum(encoder in name for name in names) == {"modernbert": 8, "albert": 6}.get(family, 12)
        assert all("embeddings." not in name and "head" not in name and "predictions" not in name for name in names)
        check_against_own_logits(GatheredMaskedLM(student))

    def test_nothing_is_rounded_until_enabled(self) -> None:
        plain, student = model(), model()
        add_fake_quantizers(student, Quantization(weight_bits=4))
        assert (logits(student) - logits(plain)).abs().max() > 1e-4
        switch_fake_quantizers(student, False)
        assert torch.equal(logits(student), logits(plain))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_converted_channels_hold_at_most_two_to_the_bits_values(self, family: str, bits: int) -> None:
        student = model(family, intermediate_size=512).eval()  # more inputs than there are 8-bit values
        names = add_fake_quantizers(student, Quantization(weight_bits=bits))
        trained_with = logits(student)
        original = {name: student.get_parameter(f"{name}.weight").clone() for name in names}
        switch_fake_quantizers(student, False)  # as before their first step
        weights = round_weights(student)
        assert set(weights) == {f"{name}.weight" for name in names}
        for name in names:
            rounded = student.get_parameter(f"{name}.weight")
            assert max(len(row.unique()) for row in rounded) <= 2**bits
            assert not torch.equal(rounded, original[name])
            stored = weights[f"{name}.weight"]
            assert stored.codes.dtype == torch.int8
            assert set(stored.codes.flatten().tolist()) <= set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
            assert torch.equal(stored.dequantized(torch.float32), rounded)
        assert torch.equal(logits(student), trained_with)

    def test_groups_have_scales_of_their_own(self) -> None:
        student = model()
        names = add_fake_quantizers(student, Quantization(weight_bits=3, group_size=16))
        weights = round_weights(student)
        for name in names:
            rounded = student.get_parameter(f"{name}.weight")
            assert weights[f"{name}.weight"].scales.shape == (rounded.shape[0], rounded.shape[1] // 16)
            for group in rounded.split(16, dim=1):
                assert max(len(row.unique()) for row in group) <= 8

    def test_groups_that_do_not_divide_are_refused_before_anything_changes(self) -> None:
        student = model()
        with pytest.raises(ValueError, match="group_size=24 does not divide the 32 inputs of bert.encoder.layer.0"):
            add_fake_quantizers(student, Quantization(group_size=24))
        assert not any(hasattr(module, "weight_fake_quantizer") for module in student.modules())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_all_zero_channels_and_tokens_never_give_nan(self, dtype: torch.dtype) -> None:
        small = model()
        student = model(hidden_size=64, num_heads=8, intermediate_size=128)
        grow(small, student, "fna", seed=0)  # zeros around the teacher's corner
        student = student.to(dtype)
        assert not student.bert.encoder.layer[0].output.dense.weight[32:].any()
        add_fake_quantizers(student, Quantization(weight_bits=4, group_size=32))
        layer = student.bert.encoder.layer[0].intermediate.dense
        zeros = torch.zeros(1, 2, 64, dtype=dtype, requires_grad=True)
        out = layer(zeros)
        out.float().sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(zeros.grad).all()
        loss = functional.cross_entropy(student(input_ids=batch()).logits.flatten(0, 1).float(), batch().flatten())
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(each.grad).all() for each in student.parameters() if each.grad is not None)
        round_weights(student)
        assert torch.isfinite(logits(student)).all()
        assert not student.bert.encoder.layer[0].output.dense.weight[32:].any()

    def test_a_micro_batch_without_labels_has_no_rows_for_the_head(self) -> None:
        student = model()
        add_fake_quantizers(student, Quantization(modules=("encoder", "head")))
        copied = copy.deepcopy(student)
        for each in (student, copied):
            hidden = GatheredMaskedLM(each)(batch(), None, torch.zeros(0, dtype=torch.int64))
            assert hidden.shape == (0, 32)
            hidden.sum().backward()
        switch_fake_quantizers(copied, False)
        assert logits(copied).equal(logits(model()))
        assert not logits(student).equal(logits(model()))

    @pytest.mark.parametrize("family", ["bert", "modernbert", "electra"])
    def test_embeddings_and_head_when_asked_for(self, family: str) -> None:
        student = model(family).eval()
        use_one_token_type(student)  # as on a GPU
        decoder = student.get_output_embeddings().weight
        names = add_fake_quantizers(student, Quantization(4, 8, ("embeddings", "head")))
        assert not any(".layer" in name for name in names)
        gathered = GatheredMaskedLM(student)
        seen = gathered.decoder_weight
        assert seen.shape == decoder.shape
        assert max(len(row.unique()) for row in seen) <= 16
        check_against_own_logits(gathered)
        seen.sum().backward()
        assert decoder.grad is not None
        trained_with = logits(student)
        round_weights(student)
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight is decoder
        assert max(len(row.unique()) for row in decoder) <= 16
        assert torch.equal(logits(student), trained_with)

    def test_a_table_with_a_look_up_of_its_own_is_refused(self) -> None:
        student = model("roformer")
        message = r"embed_positions is a RoFormerSinusoidalPositionalEmbedding, .*; leave embeddings out$"
        with pytest.raises(ValueError, match=message):
            quantized_layers(student, Quantization(modules=("encoder", "embeddings")))
        assert not any("embed_positions" in name for name in quantized_layers(student, Quantization()))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_rounding_that_the_export_repeats_is_accepted(self, family: str) -> None:
        student = model(family).eval()
        add_fake_quantizers(student, Quantization(modules=("encoder", "embeddings", "head")))
        before = logits(student)
        check_rounded_weights(GatheredMaskedLM(student), ["encoder", "embeddings", "head"])
        assert torch.equal(logits(student), before), "activations and weights are rounded as before"
        assert not student.training

    def test_a_weight_that_is_read_without_its_quantizer_is_refused(self) -> None:
        """I-BERT's decoder has a quantizer, its table of the same weight is a module of its own and has none."""
        student = model("ibert")
        add_fake_quantizers(student, Quantization(modules=("embeddings", "head")))
        message = r"modules=\['embeddings', 'head'\]: the model also reads the weight of lm_head.decoder without "
        with pytest.raises(ValueError, match=message):
            check_rounded_weights(GatheredMaskedLM(student), ["embeddings", "head"])

    def test_layers_that_share_a_weight_count_as_embeddings(self) -> None:
        student = model("neomme", config={"num_key_value_heads": 4})
        both = {"model.embed_tokens.embedding_projection", "unembedding_projection"}
        assert both <= set(quantized_layers(student, Quantization(modules=("embeddings",))))
        assert not both & set(quantized_layers(student, Quantization(modules=("encoder",))))

    def test_nothing_to_quantize_is_an_error(self) -> None:
        bare = BertForSequenceClassification(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
        assert "classifier" in quantized_layers(bare, Quantization(modules=("head",)))
        student = model("distilbert")
        student.vocab_transform = torch.nn.Identity()
        with pytest.raises(ValueError, match="chooses no layer of this model; choose from encoder, embeddings, head"):
            quantized_layers(student, Quantization(modules=("head",)))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_exported_model_reloads_the_same(self, family: str, tmp_path: Path) -> None:
        student = model(family).eval()
        quantization = Quantization(weight_bits=4, start_step=3)
        names = add_fake_quantizers(student, quantization)
        weights = round_weights(student)
        save_quantized(student, weights, quantization, tmp_path / "int8")
        student.save_pretrained(tmp_path / "plain")
        reloaded = load_quantized(tmp_path / "int8")
        assert torch.equal(logits(reloaded), logits(student))
        assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
        plain = load_masked_lm(tmp_path / "plain")
        for name in names:
            assert torch.equal(plain.get_parameter(f"{name}.weight"), student.get_parameter(f"{name}.weight"))
        sizes = [
            (tmp_path / folder).stat().st_size for folder in ("int8/quantized.safetensors", "plain/model.safetensors")
        ]
        assert sizes[0] < sizes[1]

    def test_a_fine_tuned_classifier_is_quantized_the_same_way(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
        classifier = BertForSequenceClassification(config).eval()
        names = add_fake_quantizers(classifier, Quantization())
        assert all(name.startswith("bert.encoder") for name in names)
        save_quantized(classifier, round_weights(classifier), Quantization(), tmp_path)
        reloaded = load_quantized(tmp_path)
        assert isinstance(reloaded, BertForSequenceClassification)
        assert torch.equal(logits(reloaded), logits(classifier))

    def test_broken_exports_are_refused_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="has no quantization.json"):
            load_quantized(tmp_path)
        student = model()
        add_fake_quantizers(student, Quantization())
        save_quantized(student, round_weights(student), Quantization(), tmp_path)
        weights = tmp_path / "quantized.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        with pytest.raises(ValueError, match="is damaged"):
            load_quantized(tmp_path)
        settings = tmp_path / "quantization.json"
        settings.write_text(settings.read_text().replace("float32", "float33"))
        with pytest.raises(ValueError, match="dtype='float33' is not one of torch's; export the model again"):
            load_quantized(tmp_path)

    def test_settings_are_checked_against_the_model_before_it_is_built(self) -> None:
        config = model().config
        config.hidden_size, config.intermediate_size = 2**20, 2**22  # far more than this machine's memory
        check_quantization(config, Quantization(group_size=64))
        with pytest.raises(ValueError, match="group_size=24 does not divide the 1048576 inputs"):
            check_quantization(config, Quantization(group_size=24))

    def test_a_trained_checkpoint_is_quantized_with_its_tokenizer(self, tmp_path: Path, tiny_data: Path) -> None:
        torch.manual_seed(0)
        config = BertConfig(vocab_size=298, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
        classifier = BertForSequenceClassification(config).eval()
        classifier.save_pretrained(tmp_path / "tuned")
        AutoTokenizer.from_pretrained(tiny_data / "tokenizer").save_pretrained(tmp_path / "tuned")
        (tmp_path / "int8").mkdir()
        (tmp_path / "int8" / "old").touch()

        names = quantize_checkpoint(tmp_path / "tuned", "w4a8", tmp_path / "int8")
        assert len(names) == 6
        assert not (tmp_path / "int8" / "old").exists()
        assert not (tmp_path / "int8.tmp").exists()
        add_fake_quantizers(classifier, Quantization(weight_bits=4))
        round_weights(classifier)
        assert torch.equal(logits(load_quantized(tmp_path / "int8")), logits(classifier))
        assert len(AutoTokenizer.from_pretrained(tmp_path / "int8")) == 298

    def test_an_export_that_reads_back_differently_is_refused_and_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def damaged(folder: Path) -> PreTrainedModel:
            loaded = load_quantized(folder)
            with torch.no_grad():
                loaded.bert.encoder.layer[0].output.dense.weight[0, 0] += 0.01
            return loaded

        monkeypatch.setattr(quantized_export, "load_quantized", damaged)
        with pytest.raises(RuntimeError, match="read back, 1 tensors differ"):
            quantized_export.write_quantized(model(), Quantization(), tmp_path / "int8")
        assert not (tmp_path / "int8").exists()

    def test_what_cannot_be_quantized_is_refused_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="has no config.json"):
            quantize_checkpoint(tmp_path, "w8a8", tmp_path / "out")
        with pytest.raises(ValueError, match="quantization='none' does not change the model"):
            quantize_checkpoint(tmp_path, "none", tmp_path / "out")
        student = model()
        student.save_pretrained(tmp_path)
        settings = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(settings.replace("BertForMaskedLM", "BertForSomethingElse"))
        with pytest.raises(ValueError, match="names BertForSomethingElse, which transformers lacks"):
            quantize_checkpoint(tmp_path, "w8a8", tmp_path / "out")
        assert not (tmp_path / "out").exists()
