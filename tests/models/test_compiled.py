"""Encoder layers compiled one by one, by a back end that counts instead of compiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.models.compiled import compile_layers

LAYERS = 2


@pytest.mark.slow  # traces a layer 12 times
@torch._dynamo.config.patch(recompile_limit=8)  # torch's own
def test_layers_stay_compiled_for_all_shapes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation and a teacher of another width, with padding and without, and an uneven last batch."""
    compiled_calls = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            compiled_calls.append(1)
            return graph(*values)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))

    def model(width: int) -> BertForMaskedLM:
        sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 16}
        made = BertForMaskedLM(BertConfig(vocab_size=50, num_hidden_layers=LAYERS, **sizes))
        assert len(compile_layers(made)) == LAYERS - 1  # not the last one
        return made

    def compiled_layers(model: BertForMaskedLM, rows: int, padded: bool, *, training: bool) -> int:
        mask = torch.ones(rows, 16, dtype=torch.int64)
        mask[0, 8:] = 0
        compiled_calls.clear()
        with torch.set_grad_enabled(training):
            model.train(training)(torch.ones_like(mask), attention_mask=mask if padded else None)
        return len(compiled_calls)

    student, teacher = model(8), model(12)
    for rows in (4, 3):
        for padded in (False, True):
            assert compiled_layers(student, rows, padded, training=True) == LAYERS - 1
            assert compiled_layers(student, rows, padded, training=False) == LAYERS - 1
            assert compiled_layers(teacher, rows, padded, training=False) == LAYERS - 1
    torch._dynamo.reset()
