"""Counts and clocks of a run: what the metrics rows are made of."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import Tensor

from dwt_ds.distill.objective import Losses
from dwt_ds.engine import ranks

Fourth = Literal["shared_hard", "labelled_soft"]


class Meter:
    """Adds up losses, tokens and seconds; only `row` and `tokens` wait for the device.

    Args:
        tokens: real tokens of all ranks before this start.
        elapsed_seconds: training time before this start.
        divisor: what DeepSpeed divides a micro-batch's loss by (`gradient_divisor`).
        fourth: the fourth number that losses have while the teacher takes part; None: they have three.
    """

    def __init__(self, tokens: int, elapsed_seconds: float, divisor: int, *, fourth: Fourth | None = None) -> None:
        device = ranks.device()
        self._divisor = divisor
        self._fourth = fourth
        self._loss_parts = torch.zeros(3 if fourth is None else 4, device=device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens_before = tokens
        self._tokens_at_log = tokens
        self._seconds_before = elapsed_seconds
        self._started = self._log_started = time.perf_counter()
        self._waited_seconds = self._paused_seconds = 0.0

    def begin_step(self, tokens: Tensor) -> None:
        """Start a step of `tokens` real tokens, 0-d fp64, all ranks together."""
        self._tokens += tokens
        self._loss_parts.zero_()

    def add(self, loss: Losses) -> None:
        """Add one of this rank's micro-batches."""
        parts = [loss.loss.detach(), loss.hard, loss.soft]
        fourth = None if self._fourth is None else getattr(loss, self._fourth)
        if fourth is not None:
            parts.append(fourth)
        self._loss_parts[: len(parts)] += torch.stack(parts)

    def add_wait(self, seconds: float) -> None:
        """Time spent waiting for data."""
        self._waited_seconds += seconds

    def add_pause(self, seconds: float) -> None:
        """Time spent on evaluation, checkpoints and exports, which rates leave out."""
        self._paused_seconds += seconds

    @property
    def tokens(self) -> int:
        """Real tokens so far, all ranks, all starts."""
        return self._tokens_before + int(self._tokens)

    @property
    def elapsed_seconds(self) -> float:
        """Training time so far, all starts."""
        return self._seconds_before + self.seconds_since_start

    @property
    def seconds_since_start(self) -> float:
        """Training time of this start."""
        return time.perf_counter() - self._started

    def losses(self) -> Tensor:
        """Loss, hard loss and soft loss of the step, and the `fourth`: (3,) or (4,) means over the global batch; every
        rank must call it."""
        return ranks.reduce_sum(self._loss_parts.clone()) / self._divisor

    def row(self, *, with_teacher: bool = True) -> dict[str, Any]:
        """`losses` of the step, the fourth only `with_teacher`, and rates since the last row."""
        loss, hard, soft, *fourth = self.losses().tolist()
        now, tokens = time.perf_counter(), self.tokens
        seconds = max(now - self._log_started - self._paused_seconds, 1e-9)
        row = {
            "loss": loss,
            "hard_loss": hard,
            "soft_loss": soft,
            **({f"{self._fourth}_loss": fourth[0]} if fourth and with_teacher else {}),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens_at_log) / seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "data_wait_share": self._waited_seconds / seconds,
        }
        self._log_started, self._tokens_at_log = now, tokens
        self._waited_seconds = self._paused_seconds = 0.0
        return row
