"""What `dwt-ds glue` is asked for; the defaults of the fine-tuning are those of Lee et al. (2023)."""

from __future__ import annotations

from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dwt_ds.glue.tasks import SEVEN, Task, find_tasks

# The paper's; a model with fewer positions gets shorter rows.
PAPER_MAX_LENGTH = 128
_NEEDS = {"accelerate": "accelerate", "sklearn": "scikit-learn", "scipy": "scipy"}


@dataclass(frozen=True)
class FineTuning:
    """Settings of the fine-tuning, the same for all tasks. AdamW without weight decay or warm-up; the learning rate
    falls linearly to zero; the last weights are scored."""

    learning_rate: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 2e-5
    batch_size: PositiveInt = 32
    epochs: PositiveInt | None = None
    """None: the task's own (3; MRPC 5)."""
    max_length: PositiveInt | None = None
    """Tokens a row; None: 128, or what the model has positions for."""
    max_train_rows: PositiveInt | None = None
    """Train on a sample of at most so many rows, the same for all seeds."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, with the learning rate falling to zero by then."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision, weights in fp32."""
    quantize: Literal["w8a8", "w4a8"] | None = None
    """Round the encoder of the fine-tuned model to so many bits, and score the result."""

    def steps(self, task: Task, rows: int) -> int:
        """Optimizer steps over `rows` training rows."""
        whole = -(-rows // self.batch_size) * (self.epochs or task.epochs)
        return whole if self.max_steps is None else min(whole, self.max_steps)


@dataclass(frozen=True)
class GlueOptions:
    """The whole command."""

    model: str
    """A Hugging Face folder with its tokenizer, or a name on the hub."""
    out: Path
    glue_dir: Path | None = None
    """A folder of TSVs; None: `nyu-mll/glue` on the hub."""
    tasks: tuple[str, ...] = SEVEN
    seeds: PositiveInt = 3
    """Seeds 0 to this - 1."""
    settings: FineTuning = field(default_factory=FineTuning)

    def __post_init__(self) -> None:
        if not find_tasks(self.tasks, "--tasks"):
            raise ValueError("--tasks is empty: name some, such as CoLA,SST-2")


def check_packages() -> None:
    """Raise ValueError if a package that fine-tuning needs is not installed."""
    missing = [package for module, package in _NEEDS.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"dwt-ds glue needs {', '.join(missing)}; pip install 'dwt-ds[study]'")
