"""A soft weight that follows the student's progress: large while the teacher has something to teach, then smaller.

A weak teacher's predictions are a less noisy target than the label, but a biased one. Once the student knows more than
the teacher, only the bias is left. Lee et al. (2023), section 4, find just that: the help of a weak teacher fades, and
an extremely weak one harms. Knowledge Inheritance (Qin et al., 2022) stops weaker teachers earlier, by hand. Here the
student's own running loss decides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dwt_ds.config.objective import Schedule
from dwt_ds.config.schema import RunConfig

# The state: two averages, and the number of steps that they cover.
_HARD, _SOFT, _COUNT = range(3)


class AdaptiveWeight:
    """The weight of schedule `adaptive`, between `start` and `end` (0 if not given).

    weight = end + (start - end) x share, and the share lies in [0, 1]:

    * signal "gap": (student - teacher) / width, both masked-token cross-entropies, the student's a running average
      over its training batches, the teacher's from the held-out text.
    * signal "projection": 1/2 + (student - teacher) / (2 x soft), with the running average of the soft loss. If KL
      divergences were squared distances, this would be the point nearest to the truth on the line from student (0) to
      teacher (1): 1/2 when both are equally good, 0 once the student is better by as much as the two differ.

    Ranks that observe the same losses have the same weight.

    Args:
        teacher_loss: the teacher's own masked-token cross-entropy.
        device: of the state; only `state_dict` waits for it.
        low_share: a weight below this share of `start` is low.
    """

    idle_steps: Tensor
    """0-d: for how many steps in a row the weight has been low."""

    def __init__(
        self, schedule: Schedule, teacher_loss: float, device: torch.device, *, low_share: float = 0.01
    ) -> None:
        self._start, self._end, self._low = schedule.start, schedule.end or 0.0, low_share * schedule.start
        self._signal, self._width = schedule.signal, schedule.width
        self._steps = schedule.average_steps
        self._teacher_loss = torch.tensor(teacher_loss, dtype=torch.float32, device=device)
        self._seen = torch.zeros(3, device=device)
        self.idle_steps = torch.zeros((), device=device)

    def value(self) -> Tensor:
        """The next step's weight, 0-d fp32; `start` until a step was observed."""
        gap = self._seen[_HARD] - self._teacher_loss
        share = gap / self._width if self._signal == "gap" else 0.5 + 0.5 * gap / self._seen[_SOFT]
        # A student that is the teacher has 0 / 0.
        share = torch.where((self._seen[_COUNT] > 0) & ~share.isnan(), share.clamp(0.0, 1.0), 1.0)
        return self._end + (self._start - self._end) * share

    def observe(self, hard_loss: Tensor, soft_loss: Tensor, temperature: float = 1.0) -> None:
        """Take in the losses of a step, 0-d means over the global batch.

        The soft loss falls roughly with the square of its temperature (Hinton et al., 2015, section 2); it is scaled
        to what it would be at 1.
        """
        self.idle_steps = torch.where(self.value() < self._low, self.idle_steps + 1, 0.0)
        count = (self._seen[_COUNT] + 1).clamp(max=self._steps)
        losses = torch.stack([hard_loss.float(), soft_loss.float() * temperature**2])
        average = self._seen[:_COUNT] + (losses - self._seen[:_COUNT]) / count
        # A step that overflowed is left out.
        self._seen = torch.where(losses.isfinite().all(), torch.cat([average, count[None]]), self._seen)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers that `load_state_dict` restores to the bit."""
        hard, soft, count = self._seen.tolist()
        teacher_loss, idle = float(self._teacher_loss), float(self.idle_steps)
        return {"hard": hard, "soft": soft, "count": count, "teacher_loss": teacher_loss, "idle_steps": idle}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from a `state_dict`, with the teacher's loss as it was measured then."""
        self._seen.copy_(torch.tensor([state["hard"], state["soft"], state["count"]]))
        self._teacher_loss.fill_(state["teacher_loss"])
        self.idle_steps.fill_(state.get("idle_steps", 0.0))  # earlier versions did not count them


def check_measured(config: RunConfig, teacher_loss: float | None) -> None:
    """Refuse an adaptive soft weight where a teacher that takes part has no held-out loss (ValueError)."""
    if config.distill.soft_weight.schedule == "adaptive" and teacher_loss is None:
        raise ValueError(
            "distill.soft_weight.schedule='adaptive': the teacher's loss cannot be measured: the held-out "
            f"rows have no label (train.eval_rows={config.train.eval_rows}); raise it or choose another schedule"
        )


def check_adaptive(config: RunConfig, validation_rows: int | None) -> None:
    """Refuse an adaptive soft weight without held-out rows, on which the teacher's loss is measured (ValueError).

    `validation_rows` is None if their number is not known.
    """
    if config.distill.soft_weight.schedule == "adaptive" and config.teacher.path is not None and validation_rows == 0:
        raise ValueError(
            f"distill.soft_weight.schedule='adaptive': {config.data.dir} has no held-out rows for the teacher; "
            "prepare it with --validation above 0, or choose another schedule"
        )
