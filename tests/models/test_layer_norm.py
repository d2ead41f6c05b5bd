"""apex's layer norm: the probe and the swap on modules made here, and on the real one where there is a GPU with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.apex import install_apex
from harness.errors import error_of
from torch import nn
from torch.nn import functional

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student
from dwt_ds.models.layer_norm import check_layer_norm, fuse_layer_norms, why_not_apex
from dwt_ds.models.masked_lm.checks import check_against_own_logits
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_the_probe() -> Iterator[None]:
    why_not_apex.cache_clear()
    yield
    why_not_apex.cache_clear()


class FakeFusedLayerNorm(nn.Module):
    """Is made and named like apex's; no nn.LayerNorm, as apex's is none."""

    def __init__(self, normalized_shape: Any, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps = shape, eps
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(hidden, self.normalized_shape, self.weight, self.bias, self.eps)


class WrongBackward(FakeFusedLayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.detach()) + 0 * hidden


class WithoutExtension:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'fused_layer_norm_cuda'")


def install(monkeypatch: pytest.MonkeyPatch, layer_norm: Any) -> None:
    """None: none is in this package."""
    install_apex(monkeypatch, "normalization", **({"FusedLayerNorm": layer_norm} if layer_norm else {}))


def student(family: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    config = StudentConfig(family=family, layers=2, hidden_size=16, num_heads=2, max_positions=16, dropout=0)
    model = build_student(config, vocab_size=61, seq_len=16, pad_token_id=0, cls_token_id=2, sep_token_id=3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1, 0.1)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 36).view(2, 16)).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
@pytest.mark.parametrize("choice", ["auto", "apex"])
def test_layer_norms_are_swapped_and_nothing_else_changes(
    family: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeFusedLayerNorm)
    model = student(family)
    before = dict(model.named_parameters(remove_duplicate=False))
    expected, names = logits(model), list(model.state_dict())
    there = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert fuse_layer_norms(model, choice, CPU) == there > 0
    assert sum(isinstance(module, FakeFusedLayerNorm) for module in model.modules()) == there
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), expected)
    check_against_own_logits(GatheredMaskedLM(model))  # type: ignore[arg-type]


def test_the_epsilon_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeFusedLayerNorm)
    model = nn.Sequential(nn.LayerNorm(4, eps=0.5))
    fuse_layer_norms(model, "auto", CPU)
    assert model[0].eps == 0.5


def test_layer_norms_without_a_bias_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeFusedLayerNorm)
    model = student("modernbert")
    assert fuse_layer_norms(model, "auto", CPU) == 0
    with pytest.raises(ValueError, match="no layer norm with a bias to swap"):
        fuse_layer_norms(model, "apex", CPU)


@pytest.mark.parametrize(
    ("layer_norm", "reason"),
    [
        (None, "ModuleNotFoundError"),
        (WithoutExtension, "ModuleNotFoundError: No module named 'fused_layer_norm_cuda'"),
        (WrongBackward, "its results differ from torch's"),
    ],
)
def test_an_apex_that_does_not_work_is_skipped_or_refused(
    layer_norm: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, layer_norm)
    model = student()
    assert fuse_layer_norms(model, "auto", CPU) == 0
    assert any(isinstance(module, nn.LayerNorm) for module in model.modules())
    message = error_of(check_layer_norm, "apex", CPU)
    assert "build NVIDIA's apex from source" in message
    assert message.startswith(f"fused.layer_norm='apex' is not usable here ({reason}")
    assert "the package called apex on the Python index is another project" in message


def test_torch_means_torch_even_if_apex_works(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeFusedLayerNorm)
    assert fuse_layer_norms(student(), "torch", CPU) == 0


@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(why_not_apex(torch.device("cuda"))),
    reason="needs NVIDIA's apex with its CUDA extensions, and a GPU",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_real_apex_gives_the_same_logits(dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    model = student().to(gpu, dtype).eval()
    tokens = torch.arange(4, 36, device=gpu).view(2, 16)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert fuse_layer_norms(model, "apex", gpu) == 6
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=tolerance, atol=tolerance)


class RefusesNoRows(FakeFusedLayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.numel() == 0:
            raise RuntimeError("CUDA error: invalid configuration argument")
        return super().forward(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_a_label_does_not_reach_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RefusesNoRows)
    model = student()
    assert fuse_layer_norms(model, "apex", CPU) > 0
    gathered = GatheredMaskedLM(model.to(dtype))  # type: ignore[arg-type]
    tokens, nowhere = torch.arange(4, 36).view(2, 16), torch.zeros(0, dtype=torch.int64)
    hidden = gathered(tokens, None, nowhere)
    assert (hidden.shape, hidden.dtype) == ((0, 16), dtype)
    hidden.sum().backward()
    norms = [module for module in model.modules() if isinstance(module, RefusesNoRows)]
    assert all(norm.weight.grad is not None and not norm.weight.grad.any() for norm in norms)
    assert gathered(tokens, None, torch.tensor([1])).shape == (1, 16)


def test_the_probe_tries_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongForNoRows(FakeFusedLayerNorm):
        seen: list[int] = []

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.seen.append(len(hidden))
            return super().forward(hidden)

    install(monkeypatch, WrongForNoRows)
    monkeypatch.setattr("dwt_ds.models.layer_norm._taking_no_rows", lambda fused: fused)
    assert why_not_apex(CPU) == ""
    assert WrongForNoRows.seen == [4, 0]
