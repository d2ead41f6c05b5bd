"""How a checkpoint is fine-tuned; the defaults are those of Lee et al. (2023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dwt_ds.glue.tasks import Task

# The paper's; a model with fewer positions gets rows as long as it can take.
PAPER_MAX_LENGTH = 128


@dataclass(frozen=True)
class FineTuning:
    """Settings of the fine-tuning, the same for all tasks. AdamW without weight decay; the learning rate falls
    linearly to zero, without warm-up; no choice among epochs: the last weights are scored."""

    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int | None = None
    """None: the task's own (3; MRPC 5)."""
    max_length: int | None = None
    """Tokens a row; None: 128, or what the model has positions for."""
    max_train_rows: int | None = None
    """Train on a sample of at most so many rows, the same for all seeds."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, with the learning rate falling to zero by then."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision, weights in fp32."""
    quantize: Literal["w8a8", "w4a8"] | None = None
    """Round the fine-tuned model so, and score that."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"--{each.name.replace('_', '-')} is {value}: it must be above 0")

    def steps(self, task: Task, rows: int) -> int:
        """Optimizer steps over `rows` training rows."""
        whole = -(-rows // self.batch_size) * (self.epochs or task.epochs)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def as_dict(self) -> dict[str, Any]:
        """For results.json; without `quantize` where it is not used, so that older results still count."""
        return {name: value for name, value in asdict(self).items() if name != "quantize" or value is not None}
