"""Settings of the objective: weights, temperature, positions and kernel of the loss, and their schedules."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dwt_ds.config.validate import STRICT

SoftPositions = Literal["labelled", "all"] | Annotated[float, Field(gt=0, lt=1)]
FOLLOW_THE_RUN = ("learning_rate", "adaptive")
"""Schedules without a span: they follow something else of the run."""


@dataclass(config=STRICT)
class Schedule:
    """A value that changes from `start` to `end` over the span, which begins with the first step, and stays there."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "step", "learning_rate", "adaptive"] = "constant"
    """constant: always `start`. step: `start` until the span ends, then `end`. linear, cosine, exponential: a smooth
    change over the span. learning_rate (soft weight only): in proportion to the learning rate, `start` at its highest.
    adaptive (soft weight only): falls from `start` to `end` as the student catches up with the teacher."""
    start: float = 1.0
    """Value in the first step; of `learning_rate`, at the highest rate."""
    end: float | None = None
    """Value from the first step after the span on. constant has none; adaptive never goes below it (null: 0);
    learning_rate: value at rate 0 (null: 0)."""
    span: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Length of the span as a share of all training steps."""
    span_steps: PositiveInt | None = None
    """Length of the span in optimizer steps; overrides `span`."""
    signal: Literal["gap", "projection"] = "projection"
    """adaptive: what the weight is computed from; see dwt_ds/distill/adaptive.py."""
    width: PositiveFloat = 0.5
    """adaptive with signal `gap`: the weight reaches `start` where the student's loss is this much (nats) higher than
    the teacher's."""
    average_steps: PositiveInt = 50
    """adaptive: optimizer steps over which the student's losses are averaged."""

    def __post_init__(self) -> None:
        if self.schedule == "constant":
            if self.end not in (None, self.start):
                raise ValueError(f"end={self.end}: a constant has no end; set schedule to linear, say")
        elif self.end is None and self.schedule not in FOLLOW_THE_RUN:
            raise ValueError(f"end: missing; schedule {self.schedule!r} needs the value at the end of the span")
        if self.schedule == "exponential" and not (self.start > 0 and self.end and self.end > 0):
            raise ValueError(f"start={self.start}, end={self.end}: exponential needs both above 0; use linear")

    def length(self, total_steps: int) -> int:
        """Optimizer steps of the span, in a run of `total_steps`."""
        return self.span_steps or max(1, round(self.span * total_steps))


def _number_is_a_constant(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    return {"schedule": "constant", "start": value}


Scheduled = Annotated[Schedule, BeforeValidator(_number_is_a_constant)]


@dataclass(config=STRICT)
class DistillConfig:
    """The objective: hard_weight x cross-entropy + soft_weight x (KL(teacher || student) + hidden_weight x distance of
    hidden states)."""

    hard_weight: NonNegativeFloat = 1.0
    """Weight of the masked-token cross-entropy."""
    soft_weight: Scheduled = field(default_factory=Schedule)
    """Weight of the KL divergence: a number, or a mapping with schedule, start, end, span, ... (`Schedule`)."""
    temperature: Scheduled = field(default_factory=Schedule)
    """Softmax temperature of the soft loss: a number, or a mapping like soft_weight's."""
    soft_positions: SoftPositions = "labelled"
    """Tokens of the soft loss: the labelled ones; all real ones; or a number in between, such as 0.3: the labelled ones
    and this share of the others, the same number of them in every full row."""
    hidden_weight: NonNegativeFloat = 0.0
    """Weight of the hidden loss, times soft_weight: 1 - cosine between the teacher's last hidden state and a projection
    of the student's after `hidden_layer`, mean over all real tokens. 0: none."""
    hidden_layer: PositiveInt | None = None
    """The student's layer whose output the hidden loss sees, counted from 1, below the last; null: a third of the way
    up."""
    temperature_squared: bool = False
    """Multiply the soft loss by the squared temperature, as Hinton et al. (2015) do; the paper does not."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Loss kernel; auto: Triton on a GPU, torch elsewhere."""
    memory: Literal["auto", "chunked", "logit_free"] = "auto"
    """How the head and the loss share memory; logit_free needs Triton. See kernels/README.md."""

    def __post_init__(self) -> None:
        if self.temperature.schedule in FOLLOW_THE_RUN:
            raise ValueError(
                f"temperature.schedule={self.temperature.schedule!r}: only soft_weight can have it; use linear, say"
            )
        if self.soft_weight.schedule == "adaptive" and self.soft_weight.start < (self.soft_weight.end or 0.0):
            raise ValueError(f"soft_weight.start={self.soft_weight.start} is below its end; swap them")
        for end in ("start", "end"):
            weight, temperature = getattr(self.soft_weight, end), getattr(self.temperature, end)
            if weight is not None and weight < 0:
                raise ValueError(f"soft_weight.{end}={weight}: must be at least 0")
            if temperature is not None and temperature <= 0:
                raise ValueError(f"temperature.{end}={temperature}: must be above 0")
