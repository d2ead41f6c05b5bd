"""Models from a folder, and what tells two versions of their weights apart."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.errors import error_of
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student, parameter_count
from dwt_ds.models.load import load_masked_lm, load_model_config, weights_origin
from dwt_ds.models.masked_lm.checks import check_against_own_logits
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.models.quantized_export import quantize_checkpoint

DATA = {"vocab_size": 61, "seq_len": 20, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
STUDENT = StudentConfig(layers=2, hidden_size=16, num_heads=4, max_positions=20)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "electra", "albert"])
def test_a_saved_model_loads_the_same(family: str, tmp_path: Path) -> None:
    model = build_student(replace(STUDENT, family=family), **DATA).eval()
    model.save_pretrained(tmp_path)
    loaded = load_masked_lm(tmp_path)
    assert not loaded.training
    input_ids = torch.randint(4, 61, (2, 20))
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits, rtol=0, atol=0)
    assert load_masked_lm(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    check_against_own_logits(GatheredMaskedLM(loaded))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    build_student(STUDENT, **DATA).save_pretrained(tmp_path / "runs" / "teacher")
    assert load_masked_lm("~/runs/teacher").config.hidden_size == 16
    assert load_masked_lm(Path("~/runs/teacher")).config.hidden_size == 16
    assert load_model_config("~/runs/teacher").hidden_size == 16
    assert weights_origin("~/runs/teacher") == weights_origin(str(tmp_path / "runs" / "teacher"))
    with pytest.raises(FileNotFoundError, match=f"^model path '{tmp_path}/runs/nothing' does not exist"):
        load_model_config("~/runs/nothing")


def test_missing_paths_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (str(tmp_path / "nothing"), "runs/nothing", "./nothing", "runs/a/export"):
        with pytest.raises(FileNotFoundError, match=f"^model path '{path}' does not exist; train that model first"):
            load_masked_lm(path)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_masked_lm(tmp_path)

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("dwt_ds.models.load.model_info", no_network)
    with pytest.raises(FileNotFoundError, match="is not a folder here, and Hugging Face gave no model of that name"):
        load_masked_lm("no-such-model-of-anyone")


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    build_student(STUDENT, **DATA).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    quantize = partial(quantize_checkpoint, settings="w8a8", out=tmp_path / "out")
    for load in (load_masked_lm, load_model_config, quantize):
        assert error_of(load, tmp_path) == (
            f"model path {str(tmp_path)!r} holds an adapter (adapter_config.json); merge it into the weights first"
        )


def test_a_folder_without_weights_is_one_line(tmp_path: Path) -> None:
    build_student(STUDENT, **DATA).config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="model path") as caught:
        load_masked_lm(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_weight_file_is_one_line(tmp_path: Path) -> None:
    build_student(STUDENT, **DATA).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model path" in error_of(load_masked_lm, tmp_path)


def test_missing_weights_are_refused_not_invented(tmp_path: Path) -> None:
    build_student(STUDENT, **DATA).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .* bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load_masked_lm(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    """A student would learn nothing from it: every step would be skipped."""
    build_student(STUDENT, **DATA).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 2] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    named = r"1 of its weights have values that are not finite .* bert\.encoder\.layer\.1\.output\.dense\.weight"
    with pytest.raises(ValueError, match=named):
        load_masked_lm(tmp_path)


def test_weights_of_another_size_than_the_configuration_says_are_named(tmp_path: Path) -> None:
    build_student(STUDENT, **DATA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 5}))
    name = r"bert\.embeddings\.word_embeddings\.weight"
    with pytest.raises(ValueError, match=rf"{name} is \(\d+, \d+\) in its weights and \(\d+, \d+\) by its config"):
        load_masked_lm(tmp_path)


def test_other_kinds_of_model_are_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=11, **small)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="lacks .* give a checkpoint with its masked-LM head"):
        load_masked_lm(tmp_path / "classifier")
    decoder = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(decoder).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="is a 'gpt2', which has no masked-LM class"):
        load_masked_lm(tmp_path / "decoder")


def test_pickled_weights_load_as_tensors_only(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForMaskedLM(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert parameter_count(load_masked_lm(tmp_path)) == parameter_count(model)

    flag = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (flag.touch, ())

    torch.save({**model.state_dict(), "cls.predictions.bias": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model path"):
        load_masked_lm(tmp_path)
    assert not flag.exists()


def test_code_in_the_folder_does_not_run_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    flag = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(flag)!r}).touch()\n"
        "from transformers import BertConfig, BertForMaskedLM\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own-kind'\n"
        "class OwnForMaskedLM(BertForMaskedLM):\n    config_class = OwnConfig\n"
    )
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {
        "model_type": "own-kind",
        "architectures": ["OwnForMaskedLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnForMaskedLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "trust_remote_code=true" in error_of(load_masked_lm, tmp_path)
    assert not flag.exists()
    assert type(load_masked_lm(tmp_path, trust_remote_code=True)).__name__ == "OwnForMaskedLM"
    assert flag.exists()


def test_the_origin_changes_with_the_weights_alone(tmp_path: Path) -> None:
    assert weights_origin(None) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = weights_origin(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert weights_origin(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert weights_origin(str(tmp_path)) != before


@pytest.mark.parametrize("trusted", [False, True])
def test_the_code_of_a_named_model_runs_only_if_trusted(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def config(path: str, *, trust_remote_code: bool = False) -> Any:
        asked.append((path, trust_remote_code))
        return SimpleNamespace(_commit_hash="abc")

    monkeypatch.setattr("dwt_ds.models.load.load_model_config", config)
    assert weights_origin("someone/own-kind", trust_remote_code=trusted) == "revision abc"
    assert asked == [("someone/own-kind", trusted)]
