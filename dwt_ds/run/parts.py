"""What a run is put together from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dwt_ds.config.quantization import Quantization
from dwt_ds.config.schema import RunConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.distill.adaptive import AdaptiveWeight
from dwt_ds.engine.checkpoint.save import RunState
from dwt_ds.engine.student import StudentEngine
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.progress import Progress
from dwt_ds.run.stop import StopRequest
from dwt_ds.run.stuck import StuckWatch


@dataclass(frozen=True)
class Parts:
    """What `assemble` puts together."""

    config: RunConfig
    total_steps: int
    student: StudentEngine
    """DeepSpeed's engine around the DistillObjective."""
    teacher: TeacherEngine | None
    adaptive: AdaptiveWeight | None
    """The soft weight, if it follows the run."""
    batches: StepBatches
    """This rank's micro-batches by step."""
    quantization: Quantization | None
    validation: Callable[[], Iterator[Batch]]
    """Makes this rank's validation micro-batches anew."""
    tokenizer: PreTrainedTokenizerBase
    folder: RunFolder
    state: RunState
    """Where the run stands: zero, or from a checkpoint."""
    facts: dict[str, Any]
    """What a checkpoint's manifest and the export's card say of data, tokenizer and model."""
    progress: Progress
    stop: StopRequest
    stuck: StuckWatch
