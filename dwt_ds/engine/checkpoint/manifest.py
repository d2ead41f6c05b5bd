"""Which checkpoints there are, and what a manifest says besides its files: which run it is of, where that stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dwt_ds.base.files import problems, read_manifest


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides what DeepSpeed saves."""

    step: int = 0
    """Optimizer steps taken, skipped ones among them."""
    rows: int = 0
    """Rows of the data stream consumed by all ranks."""
    tokens: int = 0
    """Real tokens seen by all ranks."""
    elapsed_seconds: float = 0.0
    """Training time so far, over all starts."""
    adaptive: dict[str, float] = field(default_factory=dict)
    """State of an adaptive soft weight."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Skipped steps and loss history (guard.py)."""
    teacher_loss: float | None = None
    """The teacher's held-out loss, measured once a run; None if it was not."""
    teacher_mass: float | None = None
    """What a teacher with another vocabulary gives to the shared entries, measured with its loss; None for others."""
    teacher_released: int | None = None
    """Optimizer steps after which the teacher was released; None while it takes part."""
    teacher_hidden_size: int | None = None
    """Columns of the teacher's hidden states, where a projection to them is trained (distill/hidden.py); else None."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """One entry a start of the run: step, ranks, time, versions."""

    def to_dict(self) -> dict[str, Any]:
        """As manifests have it: without `teacher_mass` and `teacher_hidden_size` where there is none."""
        return _without_missing(asdict(self), "teacher_mass", "teacher_hidden_size")


@dataclass(frozen=True)
class RunFacts:
    """What a run is: read again when it resumes, and shown on the card of its export."""

    data: str
    """Fingerprint of the data folder's rows."""
    tokenizer: str
    """sha256 of the tokenizer."""
    vocab_size: int
    seq_len: int
    student: dict[str, Any]
    """The fields of the student's section that decide its shape."""
    teacher: str | None
    """Where the teacher's weights come from; None without a teacher, and on all ranks but the first."""
    versions: dict[str, str]
    """Of Python, the libraries and this package."""
    settings: dict[str, Any]
    """The recipe as resolved; the DeepSpeed JSON under `deepspeed`."""
    settings_sha256: str
    quantization: dict[str, Any] | None = None
    teacher_tokenizer: str | None = None
    """sha256 of the teacher's tokenizer where it is not the data's."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between two starts of one run."""
        return {"data": self.data, "tokenizer": self.tokenizer, "student": self.student}

    def to_dict(self) -> dict[str, Any]:
        """As manifests have it: without `quantization` and `teacher_tokenizer` where there is none."""
        return _without_missing(asdict(self), "quantization", "teacher_tokenizer")

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> RunFacts:
        """Out of a checkpoint's manifest."""
        return cls(**{each.name: manifest[each.name] for each in fields(cls) if each.name in manifest})


class NewestCheckpoint(NamedTuple):
    """Where a run resumes."""

    path: Path | None
    """The newest complete checkpoint whose files match its manifest; None if there is none."""
    damaged: list[str]
    """What is wrong with newer ones, one line each."""
    manifest: dict[str, Any]
    """What its manifest says; empty if there is none."""

    @property
    def state(self) -> RunState:
        """Where its run stands: at the beginning if there is none."""
        return RunState(**self.manifest.get("state", {}))


def newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """The newest good checkpoint in a run's `checkpoints/`; reads and verifies all files of those it looks at."""
    damaged: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        wrong = problems(path)
        if not wrong:
            return NewestCheckpoint(path, damaged, read_manifest(path))
        damaged.append(f"{path.name}/{wrong[0]}")
    return NewestCheckpoint(None, damaged, {})


def complete_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; their files are not verified."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and p.name[len("step_") :].isdigit())


def _without_missing(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without those of `names` that are None: earlier versions know nothing of them."""
    return {name: value for name, value in values.items() if value is not None or name not in names}
