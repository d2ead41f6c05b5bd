"""The teacher in DeepSpeed's inference engine says what the model itself says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.ranks import Run
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.data.batches import Batch
from dwt_ds.engine import inference, teacher
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.models.masked_lm import wrapper

# In a process of its own: DeepSpeed starts a process group.
CHECK = """
import sys
import weakref
import torch
from dwt_ds.data.batches import Batch
from dwt_ds.engine.ranks import start_ranks, stop_ranks
from dwt_ds.engine.teacher import TeacherEngine
from transformers import AutoModelForMaskedLM
start_ranks()
linear = torch.nn.functional.linear
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
assert torch.nn.functional.linear is linear, "the student's linear layers would be others"
parameters = list(teacher.gathered.parameters())
held = [*parameters, *teacher.gathered.buffers(), *(p.ds_tensor for p in parameters if sharded)]
assert sum(each.numel() for each in held) >= teacher.parameters
engine = weakref.ref(teacher._engine)
del view
teacher.release()
assert not any(each.numel() for each in held)
del held, parameters
# Of a sharded one, DeepSpeed keeps the shell, without a weight in it.
assert sharded or engine() is None, "the engine is still there"
stop_ranks()
"""


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        ("bert", "whole"),
        ("modernbert", "sharded"),
        pytest.param("bert", "sharded", marks=pytest.mark.slow),
        pytest.param("modernbert", "whole", marks=pytest.mark.slow),
    ],
)
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


def batch_of(tokens: torch.Tensor, positions: torch.Tensor) -> Batch:
    """tokens (B, S), positions (N,); what a teacher does not read is left empty."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(tokens, None, positions, none, tokens.numel(), none)


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
    batch = batch_of(tokens, torch.arange(16))
    views = [made(batch) for _ in range(2)]
    assert len(sharded) == 1
    assert torch.equal(views[0].hidden, views[1].hidden)


class ReplacedLayer(nn.Module):
    """As DeepSpeed's: in place of a layer, and returns a tuple."""

    __module__ = "deepspeed.model_implementations.transformers.ds_bert"
    _should_allocate_workspace = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Any]:
        return (self.layer(*arguments, **keywords),)


class TestInjection:
    """DeepSpeed's injection by a stand-in, on a device that says that it is CUDA's."""

    @pytest.fixture(autouse=True)
    def _on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replaces, self.scale = True, 1.0
        self.others: list[str] = []
        self.destroyed: list[nn.Module] = []

        def init_inference(gathered: nn.Module, config: dict[str, Any]) -> SimpleNamespace:
            layers = gathered.model.bert.encoder.layer  # type: ignore[union-attr]
            if config["replace_with_kernel_inject"] and self.replaces:
                for at, layer in enumerate(layers):  # type: ignore[arg-type]
                    layers[at] = ReplacedLayer(layer)  # type: ignore[index,operator]
                    with torch.no_grad():
                        layer.output.dense.weight.mul_(self.scale)
            gathered.eval()
            return Engine(gathered)

        class Engine(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *inputs: Any) -> Any:
                return self.module(*inputs)

            def destroy(engine) -> None:
                self.destroyed.append(engine)

        monkeypatch.setattr(inference.deepspeed, "init_inference", init_inference)
        monkeypatch.setattr(inference, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
        monkeypatch.setattr(teacher, "gather_from_ranks", lambda value: [value, *self.others])

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=32)).save_pretrained(tmp_path)
        return str(tmp_path)

    def make(self, folder: str, kernel_inject: bool | str) -> TeacherEngine:
        made = TeacherEngine(folder, dtype="fp32", kernel_inject=kernel_inject, device=torch.device("cpu"), seq_len=16)
        made.start()
        return made

    def hidden(self, made: TeacherEngine) -> torch.Tensor:
        tokens = torch.arange(5, 21).reshape(1, 16)
        return made(batch_of(tokens, torch.arange(0, 16, 3))).hidden

    def test_all_layers_but_the_last_are_replaced_and_their_tuples_unpacked(self, folder: str) -> None:
        made = self.make(folder, "auto")
        assert made.injected
        assert made.injection == "2 layers injected, which moved the logits by 0.0000 of the largest"
        kinds = [type(layer).__name__ for layer in made.model.bert.encoder.layer]
        assert kinds == ["ReplacedLayer", "ReplacedLayer", "BertLayer"]
        torch.testing.assert_close(self.hidden(made), self.hidden(self.make(folder, False)))

    def test_kernels_get_a_mask_of_numbers_to_add(self, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU masks are boolean and expanded, and the kernels read numbers one after another from their address.
        The trial of the kernels has a padded row as well."""
        seen: list[tuple[Any, ...]] = []

        def forward(layer: ReplacedLayer, hidden: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any]:
            if mask is not None:
                seen.append((mask.dtype, tuple(mask.shape), mask.is_contiguous()))
            return (layer.layer(hidden, mask),)

        monkeypatch.setattr(ReplacedLayer, "forward", forward)
        monkeypatch.setattr("dwt_ds.models.load.attention_implementation", lambda *_: "sdpa")
        finished = wrapper.finished_mask
        on_a_gpu = lambda model, mask: None if mask is None else finished(model, mask)  # noqa: E731
        monkeypatch.setattr(wrapper, "encoder_mask", on_a_gpu)
        made = self.make(folder, "auto")
        assert made.injected, made.injection
        assert made.injection.endswith("moved the logits by 0.0000 of the largest")
        assert seen == [(torch.float32, (2, 1, 1, 16), True)] * 2
        rows = batch_of(torch.arange(5, 37).reshape(2, 16), torch.arange(0, 24, 3))
        rows = rows._replace(attention_mask=(torch.arange(32) < 24).long().reshape(2, 16))
        torch.testing.assert_close(made(rows).hidden, self.make(folder, False)(rows).hidden)

    def test_the_workspace_of_the_kernels_grows_with_the_batch(
        self, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DeepSpeed's layer allocates it in its first call, which is the trial's; a larger batch would not fit."""
        rooms: list[int] = []

        def forward(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any]:
            if layer._should_allocate_workspace:
                layer._should_allocate_workspace, layer.room = False, len(hidden)
                rooms.append(len(hidden))
            assert len(hidden) <= layer.room, "written beyond the workspace"
            return (layer.layer(hidden, mask),)

        monkeypatch.setattr(ReplacedLayer, "forward", forward)
        made = self.make(folder, "auto")
        assert made.injected, made.injection
        for rows in (8, 3, 8):
            made(batch_of(torch.arange(5, 13).repeat(rows, 2), torch.arange(0, 16, 3)))
        assert rooms == [2, 2, 8, 8]  # of two layers

    def test_a_family_without_kernels_is_not_injected(self, folder: str) -> None:
        self.replaces = False
        made = self.make(folder, "auto")
        assert not made.injected
        assert made.injection == "kernels not injected (DeepSpeed has no kernels for BertForMaskedLM)"
        with pytest.raises(ValueError, match=r"^teacher.kernel_inject=true: DeepSpeed has no kernels for Bert.*false$"):
            self.make(folder, True)

    def test_kernels_that_compute_something_else_are_not_used(self, folder: str) -> None:
        self.scale = 50.0
        made = self.make(folder, "auto")
        assert "injected kernels moved the logits by" in made.injection
        assert len(self.destroyed) == 1
        torch.testing.assert_close(self.hidden(made), self.hidden(self.make(folder, False)))

    def test_one_rank_that_cannot_keeps_all_from_it(self, folder: str) -> None:
        self.others = ["RuntimeError: no nvcc here"]
        made = self.make(folder, "auto")
        assert not made.injected
        assert made.injection == "kernels not injected (RuntimeError: no nvcc here)"
        assert [type(layer).__name__ for layer in made.model.bert.encoder.layer] == ["BertLayer"] * 3
