"""Steps, tokens, operations and hours of a study's runs, estimated before they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dwt_ds.base.words import table
from dwt_ds.plan.hardware import Device
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.run.resolve import Resolved
from dwt_ds.study.grid import StudyRun


@dataclass(frozen=True)
class Cost:
    """Cost of a run."""

    steps: int
    tokens: float
    """Real tokens, all ranks."""
    flops: float
    """Operations of training, evaluations not counted."""
    hours: float


def estimate(runs: Sequence[StudyRun], settings: Mapping[str, Resolved], device: Device) -> dict[str, Cost]:
    """Cost of each run of a grid on one machine, by name, as `dwt-ds plan` computes it; `settings` are by name, too.

    Raises:
        ValueError: a model that cannot be built; one line.
    """
    known: dict[str, Cost] = {}  # many runs differ only in settings without a cost
    costs = {}
    for run in runs:
        trainer = settings[run.teacher_run] if run.teacher_run else None
        key = _what_costs(settings[run.name], trainer)
        if key not in known:
            known[key] = _cost(settings[run.name], trainer, device)
        costs[run.name] = known[key]
    return costs


def cost_table(costs: Mapping[str, Cost], finished: Sequence[str]) -> list[str]:
    """Lines for people: the cost of each run by its name, and the sum of those that are not `finished`."""
    due = [cost for name, cost in costs.items() if name not in finished]
    total = Cost(*(sum(getattr(cost, key) for cost in due) for key in ("steps", "tokens", "flops", "hours")))
    rows: list[tuple[str, ...]] = [("run", "steps", "tokens", "PFLOP", "hours")]
    rows += [(name, *_cells(cost), "finished" if name in finished else "") for name, cost in costs.items()]
    rows.append((f"{len(due)} to run", *_cells(total)))
    return table(rows, "<>>>><")


def _cost(settings: Resolved, trainer: Resolved | None, device: Device) -> Cost:
    plan = Plan(settings, build_shapes(settings, trainer), device, nodes=1)
    return Cost(settings.total_steps, plan.tokens, plan.flops, plan.hours)


def _what_costs(settings: Resolved, trainer: Resolved | None) -> str:
    """Equal for runs that differ only in their seed, their teacher's weights and their initial weights."""
    config = settings.config
    teacher = None if trainer is None else (trainer.config.student, trainer.corpus)  # its vocabulary may be its own
    config = replace(
        config,
        output_dir="any",
        seed=0,
        student=replace(config.student, init="random"),
        teacher=replace(config.teacher, path=None if trainer is None else "any"),
    )
    return repr((config, teacher, settings.ds_values, settings.corpus))


def _cells(cost: Cost) -> tuple[str, ...]:
    return f"{cost.steps:,}", _with_unit(cost.tokens), f"{cost.flops / 1e15:,.3g}", f"{cost.hours:,.2f}"


def _with_unit(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:.0f}"
