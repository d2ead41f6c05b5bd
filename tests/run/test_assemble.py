"""A run put together, its models built and its settings agreed with each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dwt_ds.config.schema import RunConfig, StudentConfig
from dwt_ds.models.build import build_student
from dwt_ds.run import models as run_models


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_student_with_flash_attention_is_checked_with_another(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention is not to be had here: whatever runs the model with it fails, as on a GPU in fp32."""
    shape = StudentConfig(family=family, layers=1, hidden_size=16, num_heads=2, max_positions=32)
    tokens = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    model = build_student(shape, vocab_size=40, seq_len=32, **tokens)
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(run_models, "build_student", lambda *_, **__: model)
    monkeypatch.setattr(run_models, "_data_sizes", lambda *_: {})
    resolved = SimpleNamespace(config=RunConfig(), quantization=None, corpus=SimpleNamespace(vocab_size=40))
    run_models.build_objective(resolved, None)  # type: ignore[arg-type]
    assert model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(Exception, match=r"."):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
