"""A student trained quantized on two ranks under ZeRO-2: start, resume, export, reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness.runs import assert_same_run, back_to, rows_of, untimed_rows
from harness.tiny import TinyRun
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from dwt_ds.config.quantization import parse_quantization
from dwt_ds.models.quantization import quantized_layers
from dwt_ds.models.quantized_export import load_quantized, quantize_checkpoint

pytest.importorskip("torchao")

BITS, START = 4, 3
QUANTIZATION = {"weight_bits": BITS, "activation_bits": 8, "start_step": START}
SETTINGS = [
    "train.max_steps=8",
    "train.checkpoint_every=5",
    "train.gradient_accumulation_steps=2",
    "train.eval_every=4",
    "student.dropout=0.2",
]
QUANTIZED = f"student.quantization={json.dumps(QUANTIZATION)}"


@pytest.fixture(scope="module")
def straight(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop; dropout on, several micro-batches a step."""
    folder = tmp_path_factory.mktemp("quantized") / "straight"
    assert "4-bit weights" in tiny_run(folder, *SETTINGS, QUANTIZED, ranks=2)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits


def test_ranks_without_labels_take_part(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Two ranks share three held-out micro-batches: the fourth is one without labels."""
    settings = ["train.max_steps=2", "train.eval_every=1", "train.micro_batch_size=2", "train.eval_rows=6"]
    tiny_run(tmp_path, "student.quantization=w8a8", *settings, ranks=2)
    assert len([row for row in rows_of(tmp_path) if "eval_hard_loss" in row]) == 2


def test_a_run_whose_export_would_be_another_model_does_not_start(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = ["student.family=ibert", 'student.quantization={"modules": ["embeddings"]}']
    said = tiny_run(tmp_path, *settings, code=2)
    assert "Traceback" not in said
    assert "modules=['embeddings']: the model also reads the weight of lm_head.decoder" in said


def test_values_are_rounded_from_the_start_step_on(straight: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_run(plain, *SETTINGS, ranks=2)
    ours, theirs = ([row for row in untimed_rows(folder) if "loss" in row] for folder in (straight, plain))
    assert ours[:START] == theirs[:START]
    assert all(mine["loss"] != other["loss"] for mine, other in zip(ours[START:], theirs[START:]))
    assert not (plain / "export" / "quantized").exists()


def test_a_resume_after_the_start_step_continues_bit_identically(
    straight: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    manifest = json.loads((back_to(5, straight, stopped) / "manifest.json").read_text())
    assert parse_quantization(manifest["quantization"]) == parse_quantization(QUANTIZATION)

    assert "step_00000005 at step 5" in tiny_run(stopped, *SETTINGS, QUANTIZED, ranks=2)
    assert_same_run(stopped, straight)
    expected, got = (load_file(each / "export/quantized/quantized.safetensors") for each in (straight, stopped))
    assert expected.keys() == got.keys()
    assert all(got[key].equal(expected[key]) for key in expected)


def test_the_exports_load_and_the_quantized_one_holds_few_values(straight: Path, tmp_path: Path) -> None:
    plain = AutoModelForMaskedLM.from_pretrained(straight / "export")
    rounded = load_quantized(straight / "export" / "quantized")
    activations = [
        each.activation_fake_quantizer for each in rounded.modules() if hasattr(each, "activation_fake_quantizer")
    ]
    assert activations
    assert all(quantizer.enabled for quantizer in activations if quantizer is not None)
    settings = parse_quantization(QUANTIZATION)
    assert settings is not None
    names = quantized_layers(plain, settings)
    assert len(names) == 12
    for name in names:
        before, after = plain.get_parameter(f"{name}.weight"), rounded.get_parameter(f"{name}.weight")
        assert max(len(row.unique()) for row in before) > 2**BITS
        assert max(len(row.unique()) for row in after) <= 2**BITS
        steps = (before - after).abs() / (before.abs().amax(dim=1, keepdim=True) / 2 ** (BITS - 1))
        assert steps.max() < 1.1  # within a step of the scale: the same weights, rounded
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(plain.get_parameter(embeddings), rounded.get_parameter(embeddings))
    assert len(AutoTokenizer.from_pretrained(straight / "export" / "quantized")) == len(
        rounded.get_input_embeddings().weight
    )
    assert "`quantized/` holds the rounded model" in (straight / "export" / "README.md").read_text()

    assert quantize_checkpoint(straight / "export", QUANTIZATION, tmp_path / "again") == names
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(rounded))
