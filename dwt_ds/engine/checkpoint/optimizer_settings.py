"""Keeps the optimizer settings of this start when a checkpoint with older ones is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OF_THE_OPTIMIZER = ("clip_grad", "dynamic_loss_scale", "loss_scaler", "loss_scale_config")
# Where a dynamic loss scale stands. All else in a scaler are settings, and so is a static scale.
_PROGRESS_OF_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@contextmanager
def keep_optimizer_settings(engine: Any) -> Iterator[None]:
    """Restore the optimizer settings of this start's JSON after the block has loaded a checkpoint.

    DeepSpeed 0.19.8 takes them from the checkpoint: all settings of the parameter groups, fp16's loss scaler as a
    whole, and under some ZeRO stages the norm to clip to. The schedule has to set the rate of the next step again.
    """
    optimizer = engine.optimizer
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in engine.basic_optimizer.param_groups
    ]
    ours = {name: copy.copy(getattr(optimizer, name)) for name in _OF_THE_OPTIMIZER if hasattr(optimizer, name)}
    yield
    for group, settings in zip(engine.basic_optimizer.param_groups, groups):
        group.update(settings)
    for name, value in ours.items():
        loaded = getattr(optimizer, name)
        if _is_dynamic(value) and _is_dynamic(loaded):
            vars(value).update({key: vars(loaded)[key] for key in _PROGRESS_OF_SCALE if key in vars(loaded)})
        setattr(optimizer, name, value)


def _is_dynamic(scaler: Any) -> bool:
    """Of ZeRO's scaler, or of the one without ZeRO."""
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))
