"""The tables of a study: final losses and scores, savings, step times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dwt_ds.study.pairs import PAIRS_NOTE, difference
from dwt_ds.study.records import RunRecord, common_tasks, mean_and_deviation
from dwt_ds.study.savings import savings_table
from dwt_ds.study.scores import tasks_in_words
from dwt_ds.study.step_time import step_time_table
from dwt_ds.study.tables import Compared, Table, with_deviation

_NATS = "Nats per masked token, lower is better"


def study_tables(compared: Compared) -> list[Table]:
    return [*final_tables(compared), savings_table(compared), step_time_table(compared)]


def final_tables(compared: Compared) -> list[Table]:
    """Final held-out losses, also on `train.eval_sets`, and fine-tuned scores; runs that have none are left out."""
    runs = [run for group in compared.series.values() for run in group]
    tables = [_final_table("Held-out loss", compared, lambda run: run.final_loss, _NATS, digits=4)]
    for name in dict.fromkeys(name for run in runs for name in run.final_set_losses):
        tables.append(_final_table(f"Held-out loss, {name}", compared, partial(_loss_on, name), _NATS, digits=4))
    if tasks := common_tasks(runs):
        unit = f"Points, higher is better ({tasks_in_words(tasks)})"
        score = partial(RunRecord.final_score, tasks=tasks)
        tables.append(_final_table("Fine-tuned score", compared, score, unit, digits=1, less_is_better=False))
    return tables


def _loss_on(name: str, run: RunRecord) -> float | None:
    return run.final_set_losses.get(name)


def _final_table(
    title: str,
    compared: Compared,
    value: Callable[[RunRecord], float | None],
    unit: str,
    *,
    digits: int,
    less_is_better: bool = True,
) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, group in compared.series.items():
        known = [each for each in map(value, group) if each is not None]
        found = difference(compared.pairs.get(name, []), value)
        if not known:
            continue
        cells = ("", "", "", "")
        if found is not None:
            mean = with_deviation(found.mean, found.deviation, digits, sign=True)
            error = "" if found.error is None else f"{found.error:.{digits}f}"
            cells = (mean, error, found.verdict(less_is_better=less_is_better), str(found.pairs))
        rows.append((name, with_deviation(*mean_and_deviation(known), digits), *cells, str(len(known))))
    minus = f"minus {compared.reference}"
    head = ("series", title[0].lower() + title[1:], minus, "standard error", "by two standard errors", "pairs", "seeds")
    return Table(title, head, rows, f"{unit}; ± one standard deviation over seeds (n - 1). {PAIRS_NOTE}")
