"""Steps, tokens, operations and hours of a study's runs, before they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dwt_ds.plan.hardware import Device
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import Settings
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.study.grid import StudyRun


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    steps: int
    tokens: float
    """Real tokens, all ranks."""
    flops: float
    """Operations of training; looks at the held-out text are not counted."""
    hours: float


def estimate(runs: Sequence[StudyRun], settings: Mapping[str, Settings], device: Device) -> dict[str, Cost]:
    """Cost of each run, by name, as `dwt-ds plan` has it for one machine.

    Args:
        runs: of a grid, the teachers' among them.
        settings: of each run, by name.
        device: of a rank.

    Raises:
        ValueError: a model that cannot be built; one line.
    """
    known: dict[str, Cost] = {}  # many runs differ in what costs nothing
    costs = {}
    for run in runs:
        trainer = settings[run.teacher_run] if run.teacher_run else None
        alike = _what_costs(settings[run.name], trainer)
        if alike not in known:
            known[alike] = _cost(settings[run.name], trainer, device)
        costs[run.name] = known[alike]
    return costs


def _cost(settings: Settings, trainer: Settings | None, device: Device) -> Cost:
    plan = Plan(settings, build_shapes(settings, trainer), device, nodes=1)
    return Cost(settings.total_steps, plan.tokens, plan.flops, plan.hours)


def _what_costs(settings: Settings, trainer: Settings | None) -> str:
    """Equal for runs that differ in nothing but their seed, their teacher's weights and where they start."""
    config = settings.config
    teacher = None if trainer is None else trainer.config.student
    config = replace(
        config,
        output_dir="",
        seed=0,
        student=replace(config.student, init="random"),
        teacher=replace(config.teacher, path=None if trainer is None else ""),
    )
    return repr((config, teacher, settings.ds_values, settings.corpus))
