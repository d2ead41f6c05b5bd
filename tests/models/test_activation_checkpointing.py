"""`train.activation_checkpointing` computes the layers anew in the backward pass, with the same dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student
from dwt_ds.models.dropout import use_cpu_dropout
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

INPUT_IDS = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([1, 7, 13, 30])


def gradients(family: str, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step with dropout, and the number of bytes kept for its backward pass."""
    torch.manual_seed(3)
    student = StudentConfig(family=family, layers=3, hidden_size=32, num_heads=4, max_positions=16, dropout=0.2)
    model = build_student(student, vocab_size=97, seq_len=12, pad_token_id=0, cls_token_id=2, sep_token_id=3)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_cpu_dropout(model)
    gathered = GatheredMaskedLM(model).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = gathered(INPUT_IDS, None, POSITIONS).square().sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in gathered.named_parameters() if p.grad is not None}
    return found, sum(kept.values())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_the_gradients_are_the_same_and_less_is_kept(family: str) -> None:
    plain, plain_bytes = gradients(family, checkpointing=False)
    anew, anew_bytes = gradients(family, checkpointing=True)
    assert plain.keys() == anew.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(anew[name], gradient, rtol=1e-5, atol=1e-6)
    assert anew_bytes < plain_bytes
