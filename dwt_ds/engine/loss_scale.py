"""DeepSpeed's loss scale of fp16, corrected where version 0.19.8 gets a step wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwt_ds.engine.checkpoint.weights import WITHOUT_ZERO


def correct_loss_scaling(engine: Any) -> None:
    """For an engine whose precision is fp16, under any ZeRO stage."""
    if isinstance(engine.optimizer, WITHOUT_ZERO):
        _begin_with_loss_scale(engine)
    _grow_after_the_step(engine.optimizer)
    skip_at_the_smallest_scale(engine.optimizer)


def skip_at_the_smallest_scale(optimizer: Any) -> None:
    """Keep ZeRO's fp16 loss scaler from raising in the middle of a step once its scale can fall no further.

    The guard counts such a step as skipped and ends the run after saving.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def _begin_with_loss_scale(engine: Any) -> None:
    """Start each backward pass of fp16 without ZeRO from the loss scale.

    DeepSpeed 0.19.8 scales the loss under ZeRO only, but divides the gradients by the scale without ZeRO as well: they
    would vanish. The hook sets the first gradient and does not multiply it, so it does no harm if DeepSpeed does scale.
    """
    backward, steps = engine.backward, engine.gradient_accumulation_steps()

    def scaled_backward(loss: Tensor) -> None:
        loss.register_hook(lambda gradient: torch.full_like(gradient, float(engine.optimizer.loss_scale) / steps))
        backward(loss)

    engine.backward = scaled_backward


def _grow_after_the_step(optimizer: Any) -> None:
    """Divide the gradients by the scale that they were computed with.

    DeepSpeed first updates the scale: in a step after which it doubles (one in `loss_scale_window`), the gradients
    would be halved, and without ZeRO and under ZeRO-3 their norm as well.
    """
    update, step = optimizer._update_scale, optimizer.step
    good: list[bool] = []

    def update_if_skipped(skipped: bool = False) -> None:
        if skipped:
            update(skipped)
        else:
            good.append(True)

    def step_and_update(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        if good:
            good.clear()
            update(False)
        return result

    optimizer._update_scale, optimizer.step = update_if_skipped, step_and_update
