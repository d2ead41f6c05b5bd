"""Bad numbers: a step whose loss or gradient is not finite, or whose hard loss jumps, is skipped on all ranks alike.

A bad loss is multiplied by NaN before its backward pass. The gradient then is NaN on this rank and, after the
reduction, on every rank, and the optimizer's own check of the global norm skips the step. So all ranks agree before
the optimizer sees it, and the host does not wait for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwt_ds.config.schema import TrainConfig
from dwt_ds.engine import ranks


class TooManySkipsError(RuntimeError):
    """More of the recent steps were skipped than the recipe allows."""


class Guard:
    """Watches losses and skipped steps.

    Args:
        config: `spike_sigma`, `spike_window`, `skip_window` and `max_skipped_share` are used.
        state: from `state_dict`, or empty.
        divisor: what DeepSpeed divides a micro-batch's loss by (`gradient_divisor`). A resume may have another.
    """

    def __init__(self, config: TrainConfig, state: Mapping[str, Any], divisor: int) -> None:
        self._config, self._divisor, device = config, divisor, ranks.device()
        self._recent: deque[bool] = deque(state.get("recent_skips", []), maxlen=config.skip_window)
        # Versions before 0.4 stored the sums of a step's losses, not yet divided.
        losses = state.get("step_losses") or [loss / divisor for loss in state.get("losses", [])]
        self._losses = torch.tensor(losses[-config.spike_window :], dtype=torch.float32, device=device)
        self._step_loss = torch.zeros((), device=device)  # hard loss of this rank, growing with each micro-batch
        self._global_loss = torch.zeros((), device=device)  # of all ranks, once the step is complete

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint's manifest."""
        return {"recent_skips": list(self._recent), "step_losses": self._losses.tolist()}

    def poison(self, loss: Tensor, hard: Tensor, *, last: bool) -> Tensor:
        """A micro-batch's `loss`, multiplied by NaN if it is bad.

        Args:
            loss: 0-d, with its graph.
            hard: the hard loss, in which a jump is seen, since `loss` jumps with its weights as well. Summed over ranks
                and micro-batches it is the step's times the divisor.
            last: whether it is the step's last micro-batch on this rank; a jump of the step's loss is seen there.
        """
        finite = torch.isfinite(loss.detach())
        if self._config.spike_sigma is not None:
            self._step_loss = self._step_loss + hard.detach()
            if last:
                finite = finite & ~self._is_spike(self._config.spike_sigma)
        return loss * torch.where(finite, 1.0, torch.nan)

    def end_step(self, skipped: bool) -> None:
        """Note whether the optimizer skipped the step.

        Raises:
            TooManySkipsError: this step was skipped, and with it more than `max_skipped_share` of the last
                `skip_window`. A good step never raises: a run that ended this way could not be resumed otherwise.
        """
        self._recent.append(skipped)
        if self._config.spike_sigma is not None:
            if not skipped:
                self._losses = torch.cat([self._losses, self._global_loss[None]])[-self._config.spike_window :]
            self._step_loss = torch.zeros_like(self._step_loss)
        count, most = sum(self._recent), self._config.max_skipped_share * self._config.skip_window
        if skipped and count > most:
            raise TooManySkipsError(
                f"{count} of the last {len(self._recent)} steps were skipped, train.max_skipped_share="
                f"{self._config.max_skipped_share} allows {most:g} of {self._config.skip_window}; "
                "skipped.jsonl in the run's folder names their rows; lower train.learning_rate or raise "
                "train.max_skipped_share"
            )

    def _is_spike(self, sigma: float) -> Tensor:
        """0-d bool: whether the step's hard loss is above the mean of the window by `sigma` standard deviations."""
        self._global_loss = ranks.reduce_sum(self._step_loss.clone()) / self._divisor
        if len(self._losses) < self._config.spike_window:
            return torch.zeros((), dtype=torch.bool, device=self._global_loss.device)
        return self._global_loss > self._losses.mean() + sigma * self._losses.std()
