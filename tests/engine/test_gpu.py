"""What only a GPU can show: the Triton kernel inside a run under ZeRO-2, beside a teacher with injected kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_triton_and_torch_back_ends_train_alike(
    launch: Callable[..., tuple[int, str]], tiny_recipe: Path, tmp_path: Path
) -> None:
    on_gpu = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    losses = {}
    for backend in ("triton", "torch"):
        output = tmp_path / backend
        settings = [f"output_dir={output}", "train.max_steps=20", "student.dropout=0", f"distill.backend={backend}"]
        code, text = launch(1, [str(tiny_recipe), *settings], environment=on_gpu, timeout_seconds=300)
        assert code == 0, text
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        # Whether or not the kernels fit the family, the probe ran and says what it found.
        assert "kernels injected, which moved the logits by" in text or "kernels not injected (" in text
        losses[backend] = [(row["hard_loss"], row["soft_loss"]) for row in rows if "loss" in row]
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=1e-4, atol=1e-4)
