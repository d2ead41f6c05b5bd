"""The teacher in DeepSpeed's inference engine says what the model itself says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.ranks import Run
from torch import nn

from dwt_ds.engine import teacher
from dwt_ds.engine.teacher import TeacherEngine

# In a process of its own: DeepSpeed starts a process group.
CHECK = """
import sys
import torch
from dwt_ds.data.batches import Batch
from dwt_ds.engine.ranks import start_ranks, stop_ranks
from dwt_ds.engine.teacher import TeacherEngine
from transformers import AutoModelForMaskedLM
start_ranks()
sharded = sys.argv[2] == "sharded"
settings = {"dtype": "bf16", "kernel_inject": False, "device": torch.device("cpu"), "seq_len": 24, "sharded": sharded}
teacher = TeacherEngine(sys.argv[1], **settings)
teacher.start()
assert teacher.parameters == sum(p.numel() for p in AutoModelForMaskedLM.from_pretrained(sys.argv[1]).parameters())
assert (sum(p.numel() for p in teacher.model.parameters()) < teacher.parameters) == sharded
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
tokens = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
positions = torch.randperm(48, generator=torch.Generator().manual_seed(1))  # enough of them to average rounding out
view = teacher(Batch(tokens, None, positions, positions, tokens.numel(), torch.arange(2)))
logits = (view.hidden.float() @ view.weight.float().T + (0 if view.bias is None else view.bias.float()))
expected = model(input_ids=tokens).logits.flatten(0, 1)[positions].float()
exact = AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()(input_ids=tokens).logits.flatten(0, 1)[positions]
ours, plain = (logits - exact).square().mean().sqrt().item(), (expected - exact).square().mean().sqrt().item()
kept = [b.dtype for b in teacher.model.buffers() if b.is_floating_point()]
print("rms error", ours, "of plain bf16", plain)
assert ours < 1.2 * plain, (ours, plain)
assert not any(p.requires_grad for p in teacher.model.parameters())
assert not view.hidden.requires_grad and not teacher.model.training
assert all(p.dtype == torch.bfloat16 for p in teacher.model.parameters())
assert kept == [b.dtype for b in model.buffers() if b.is_floating_point()], kept
print("buffers", kept)
stop_ranks()
"""


@pytest.mark.parametrize("cut", ["whole", "sharded"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_engine_answers_as_the_model_and_keeps_its_buffers(
    family: str, cut: str, run_ranks: Run, tmp_path: Path
) -> None:
    import torch

    from dwt_ds.config.schema import StudentConfig
    from dwt_ds.models.build import build_student

    torch.manual_seed(0)
    student = StudentConfig(family=family, layers=2, hidden_size=32, num_heads=4, max_positions=32)
    model = build_student(student, vocab_size=97, seq_len=24, pad_token_id=0, cls_token_id=2, sep_token_id=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    [done] = run_ranks([["-c", CHECK, str(tmp_path), cut]])
    assert done.code == 0, done.err
    # Rotary frequencies are the buffers of a ModernBERT.
    assert ("float32" in done.out) == (family == "modernbert"), done.out


def test_a_sharded_teacher_loads_without_the_other_ranks(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded: list[nn.Module] = []

    def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        sharded.append(model)
        return model

    monkeypatch.setattr(teacher, "shard_over_ranks", shard)
    settings: dict[str, Any] = {"dtype": "fp32", "kernel_inject": False, "device": torch.device("cpu"), "seq_len": 32}
    made = TeacherEngine(str(tiny_teacher), **settings, sharded=True)
    assert made.vocabulary_rows == 298
    assert not sharded, "it communicated"
    tokens = torch.arange(5, 21).reshape(1, 16)
    batch = SimpleNamespace(input_ids=tokens, attention_mask=None, positions=torch.arange(16))
    views = [made(batch) for _ in range(2)]  # type: ignore[arg-type]
    assert len(sharded) == 1
    assert torch.equal(views[0].hidden, views[1].hidden)
