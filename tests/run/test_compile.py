"""`train.compile=layers`: the same losses and exports as without, whatever else a run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.ranks import Python
from harness.runs import assert_same_run, back_to, rows_of
from harness.tiny import TinyRun
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # each case compiles

SETTINGS = ["train.max_steps=6", "train.checkpoint_every=3", "student.dropout=0"]
# Its step is proportional to the gradient. Adam's is not: it makes a full step of the rounding of a gradient near 0.
SETTINGS += ["deepspeed.optimizer={type: SGD, params: {lr: auto}}", "deepspeed.zero_allow_untested_optimizer=true"]
SETTINGS += ["train.learning_rate=0.1"]
CASES = {
    "accumulation and uneven batches": ["train.gradient_accumulation_steps=2", "data.label_draw=bernoulli"],
    "activation checkpointing": ["train.activation_checkpointing=true"],
    "modernbert": ["student.family=modernbert", "student.config={local_attention: 8}"],
    "roberta and uneven batches": ["student.family=roberta", "data.label_draw=bernoulli"],
    "distilbert and a hidden loss": ["student.family=distilbert", "distill.hidden_weight=0.5"],
    "electra and a teacher with its own vocabulary": ["student.family=electra", "teacher.vocabulary=shared"],
    "growth": ["student.init=stack", "student.hidden_size=16", "student.intermediate_size=32"],
    "ZeRO-3": ["deepspeed_config=zero3", "deepspeed.bf16.enabled=false", "train.gradient_accumulation_steps=2"],
    "quantization": ["student.quantization={weight_bits: 8, activation_bits: 8, start_step: 2}"],
}
# Each rank keeps its shard of each weight, and no gathered weight for longer than it is needed.
CASES["ZeRO-3"] += [
    f"deepspeed.zero_optimization.stage3_{name}=0"
    for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
]
# Where a hook runs within a layer, torch would compile the parts before and after it, or here end with an error.
WHOLE_LAYERS = """
import sys
from functools import partial
import torch
compile_whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
layers = []
def compile(forward):
    layers.append(forward)
    return compile_whole(forward)
torch.compile = compile
from dwt_ds.pretrain import main
code = main(sys.argv[1:])
print("COMPILED", len(layers))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
sys.exit(code)
"""


def test_the_hooks_of_zero_3_run_outside_of_a_compiled_layer(
    python: Python, tiny_recipe: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Compiled are one of the student's two layers and two of the teacher's three; not the last one of each."""
    tiny_run(tmp_path / "teacher", "teacher.path=null", "student.layers=3", "train.max_steps=1")
    settings = [f"output_dir={tmp_path}/run", f"teacher.path={tmp_path}/teacher/export", "train.compile=layers"]
    ended = python("-c", WHOLE_LAYERS, str(tiny_recipe), *settings, *SETTINGS, *CASES["ZeRO-3"])
    assert ended.code == 0, ended.err
    assert "COMPILED 3\n" in ended.out


@pytest.mark.parametrize("case", CASES)
def test_losses_and_exports_are_those_without(case: str, tiny_run: TinyRun, bpe_teacher: Path, tmp_path: Path) -> None:
    teacher = [f"teacher.path={bpe_teacher}"] if "teacher.vocabulary=shared" in CASES[case] else []
    for name in ("off", "layers"):
        settings = [f"train.compile={name}", *SETTINGS, *CASES[case], *teacher]
        tiny_run(tmp_path / name, *settings, ranks=2 if case == "ZeRO-3" else 1, seconds=300)
    plain, compiled = rows_of(tmp_path / "off"), rows_of(tmp_path / "layers")
    assert len(plain) == len(compiled)
    for one, other in zip(plain, compiled):
        for key in ("loss", "hard_loss", "soft_loss", "hidden_loss", "eval_hard_loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    exported = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("off", "layers")]
    assert exported[0].keys() == exported[1].keys()
    # Rounding moves a value over a step of its 8 bits here and there.
    close = {"rtol": 1e-3, "atol": 1e-4} if case == "quantization" else {"rtol": 1e-4, "atol": 1e-6}
    for key, value in exported[0].items():
        torch.testing.assert_close(exported[1][key], value, **close)


def test_a_resume_repeats_to_the_bit_with_dropout(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = ["train.compile=layers", "train.checkpoint_every=3", "train.keep_last=9"]
    settings += ["student.dropout=0.1", "train.max_steps=6"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    tiny_run(straight, *settings, seconds=300)
    back_to(3, straight, resumed)
    assert "at step 3" in tiny_run(resumed, *settings, seconds=300)
    assert_same_run(resumed, straight)
