"""The report of a run or of a study: index.html, and beside it its figures as PNG files and its table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dwt_ds.base.words import shorten
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.plan.settings import changes
from dwt_ds.study import figures
from dwt_ds.study.differences import differing_settings
from dwt_ds.study.figures import Styles
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.page import Page
from dwt_ds.study.read_run import X_AXES, RunRecord, by_series, compare_with_alone, mean_and_deviation
from dwt_ds.study.saving import Saving, saving, whole_training

HTML = "index.html"
MARKDOWN = "results.md"
_LOSSES = ("eval_hard_loss", "hard_loss", "soft_loss", "soft_weight")
_LOSS_TITLES = {
    "hard_loss": "Training: hard loss",
    "soft_loss": "Training: soft loss",
    "soft_weight": "Weight of the soft loss",
}
_RESULT_HEAD = (
    "series",
    "held-out MLM loss",
    "less the lone student's",
    "tokens to its final loss",
    "tokens saved",
    "FLOPs to its final loss",
    "FLOPs saved",
    "seeds",
)
_RESULT_NOTE = (
    "Losses in nats a masked token, lower is better; ± one standard deviation over seeds (n - 1). Differences are "
    "taken seed by seed: equal seeds have equal data in equal order. The lone student's tokens and FLOPs are those of "
    "its whole training, of which the others save a share. FLOPs count the teacher's forward passes, not its own "
    "training."
)
# The first tenth of a run is a steep fall that would flatten the rest of a curve.
_LEFT_OUT = 0.1


def write_report(path: Path, out: Path) -> Path:
    """Write the report of the run or study in `path` to `out`; the HTML file.

    Raises:
        ValueError: there is neither a run nor a study with a finished run.
    """
    if (path / "metrics.jsonl").is_file():
        return _run_report(RunRecord(path.resolve().name, path), out)
    grids = StudyFolder(path).grids() if path.is_dir() else []
    if not grids:
        raise ValueError(f"{path}: holds neither a run (metrics.jsonl) nor a study; name the folder of one")
    page = Page(f"Study: {path.resolve().name}")
    tables = [_grid_section(page, path, grid, out / "figures") for grid in grids]
    if not any(tables):
        raise ValueError(f"{path}: no run of the study has looked at its held-out text yet; try again later")
    page.write(out / HTML)
    (out / MARKDOWN).write_text("\n".join(filter(None, tables)), encoding="utf-8")
    return out / HTML


def _run_report(run: RunRecord, out: Path) -> Path:
    page = Page(f"Run: {run.name}")
    state = "complete" if run.finished else "not complete"
    last = f"; held-out MLM loss {run.final_loss:.4f} at step {run.held_out[-1]['step']:,}" if run.held_out else ""
    page.note(f"{state}{last}")
    _curves(page, [run], Styles([run.series]), out / "figures", "run", folded=False)
    page.heading("Settings that are not the defaults")
    rows = [(name, _short(now), _short(default)) for name, default, now in changes(parse_run_config(run.config))]
    page.table(("setting", "here", "default"), rows)
    page.write(out / HTML)
    return out / HTML


def _grid_section(page: Page, path: Path, grid: dict[str, Any], folder: Path) -> str:
    """Add a grid's section; its results as a Markdown table, empty where nothing of it has run yet."""
    everything = [
        RunRecord(run["name"], path / run["name"], run["labels"], run["teacher_run"], run["status"])
        for run in grid["runs"]
    ]
    runs = [run for run in everything if run.held_out]
    if not runs:
        return ""
    done = sum(run.finished for run in everything)
    page.heading(f"{grid['title']}")
    page.note(f"Grid {grid['name']} at scale {grid['scale']}: {done} of {len(everything)} runs are finished.")
    compare_with_alone(runs)
    finished = [run for run in runs if run.finished]
    students = [run for run in runs if "teacher" in run.labels]
    styles = Styles(list(by_series(students)) + [run.series for run in runs if run not in students])
    results = _results(finished)
    page.table(_RESULT_HEAD, results)
    page.note(_RESULT_NOTE)
    done_students = [run for run in finished if run in students]
    if grid["figure"] == 2:
        _figure_2(page, finished, folder / grid["name"])
    elif grid["figure"] is not None:
        _figures_3_and_4(page, grid, done_students, styles, folder / grid["name"])
    for teacher, facet in _facets(students).items():
        if len(_facets(students)) > 1:
            page.heading(f"With {teacher}", 3)
        _curves(page, facet, Styles(list(by_series(facet))), folder / grid["name"], teacher, folded=True)
    page.table(("setting", *(run.name for run in runs)), differing_settings(runs), folded="Settings that differ")
    rows = [_run_row(run) for run in everything]
    page.table(("run", "status", "steps", "tokens", "seconds"), rows, folded="All runs")
    lines = [_RESULT_HEAD, ["---", *["---:"] * (len(_RESULT_HEAD) - 1)], *results]
    return f"## {grid['title']}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _facets(students: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """By teacher, the lone students in each; one facet where there is one teacher or a line each."""
    lone = [run for run in students if run.teacher_run is None]
    teachers = list(dict.fromkeys(run.labels["teacher"] for run in students if run.teacher_run))
    if len(by_series(students)) <= len(teachers) + 1:
        return {"all": list(students)}
    return {each: [*lone, *(run for run in students if run.labels["teacher"] == each)] for each in teachers}


def _results(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    lone = {run.seed: run for run in runs if run.is_alone}
    rows: list[tuple[str, ...]] = []
    for name, group in by_series(runs).items():
        mean, deviation = mean_and_deviation([run.final_loss for run in group])
        cells, seeds = (name, _with_deviation(mean, deviation, 4)), str(len(group))
        pairs = [(run, lone[run.seed]) for run in group if run.teacher_run is not None and run.seed in lone]
        if not pairs:
            costs = [whole_training(run) for run in group if run.is_alone]
            tokens, flops = [each[0] for each in costs], [each[1] for each in costs]
            rows.append((*cells, "", _tokens(tokens), "", _flops(flops), "", seeds))
            continue
        difference = mean_and_deviation([run.final_loss - other.final_loss for run, other in pairs])
        savings = [saving(run, other) for run, other in pairs]
        rows.append((*cells, _with_deviation(*difference, 4, sign=True), *_saving_cells(savings), seeds))
    return rows


def _saving_cells(savings: Sequence[Saving]) -> tuple[str, str, str, str]:
    tokens = [each.tokens for each in savings if each.tokens is not None]
    if len(tokens) < len(savings):
        return ("never" if not tokens else f"{len(tokens)} of {len(savings)} seeds", "", "", "")
    shares = _share([each.tokens_saved for each in savings]), _share([each.flops_saved for each in savings])
    return _tokens(tokens), shares[0], _flops([each.flops for each in savings]), shares[1]


def _tokens(values: Sequence[float]) -> str:
    return f"{mean_and_deviation(values)[0] / 1e6:,.2f} M" if values else ""


def _flops(values: Sequence[float | None]) -> str:
    known = [each for each in values if each is not None]
    if len(known) < len(values):
        return "not known"
    return f"{mean_and_deviation(known)[0]:.2e}" if known else ""


def _share(values: Sequence[float | None]) -> str:
    known = [100 * each for each in values if each is not None]
    return _with_deviation(*mean_and_deviation(known), 0, "%") if len(known) == len(values) else "not known"


def _figure_2(page: Page, runs: Sequence[RunRecord], folder: Path) -> None:
    by_name = {run.name: run for run in runs}
    lone = [run for run in runs if run.is_alone]
    points = {}
    scores: dict[str, dict[str, Any]] = {}
    for name, group in by_series([run for run in runs if run.teacher_run in by_name]).items():
        teacher = by_name[str(group[0].teacher_run)]
        points[name] = {"teacher": teacher.final_loss, "students": [run.final_loss for run in group]}
        if teacher.scores and all(run.scores for run in group):
            last = [fmean(run.final_scores) for run in group]
            scores[name] = {"teacher": fmean(teacher.final_scores), "students": last}
    shown: list[tuple[Path | None, str]] = [
        (
            figures.paper_teacher_quality(folder / "figure_2_paper.png"),
            "The paper's figure 2: GLUE means of teachers and students.",
        )
    ]
    if points and lone:
        ours = figures.teacher_quality(points, [run.final_loss for run in lone], "loss", folder / "figure_2.png")
        shown.append(
            (ours, "The same from our runs, by held-out MLM loss; both axes are turned, so up and right is better.")
        )
    if scores and lone and all(run.scores for run in lone):
        alone = [fmean(run.final_scores) for run in lone]
        text = f"The same by fine-tuned score ({_tasks(lone)})."
        shown.append((figures.teacher_quality(scores, alone, "score", folder / "figure_2_scores.png"), text))
    page.figures(shown)


def _figures_3_and_4(
    page: Page, grid: dict[str, Any], students: Sequence[RunRecord], styles: Styles, folder: Path
) -> None:
    number = grid["figure"]
    scored = [run for run in students if run.scores]
    if scored:
        path = figures.scores_along(scored, styles, _tasks(scored), folder / f"figure_{number}.png")
        text = f"The paper's figure {number} from our runs: fine-tuned scores along the pre-training, "
        page.figures([(path, text + "with a standard deviation over the seeds of both.")])
        return
    if not students:
        return
    path_or_none = figures.curves(
        students, "step", "eval_hard_loss", styles, folder / f"figure_{number}.png", first_step=_first_step(students)
    )
    text = (
        f"In place of the paper's figure {number}, whose checkpoints are fine-tuned: held-out MLM loss along the way."
    )
    page.figures([(path_or_none, text)])


def _tasks(runs: Sequence[RunRecord]) -> str:
    tasks = runs[0].scored_tasks
    return "mean of 7 tasks" if len(tasks) == 7 else ", ".join(tasks)


def _curves(page: Page, runs: Sequence[RunRecord], styles: Styles, folder: Path, name: str, *, folded: bool) -> None:
    start = _first_step(runs)
    path = folder / f"{name}_less_alone_step.png"
    with_teacher = [run for run in runs if run.held_out and "less_alone" in run.held_out[-1]]
    compared = figures.curves(with_teacher, "step", "less_alone", styles, path) if with_teacher else None
    text = "Held-out cross-entropy, less the lone student's of the same seed; below 0 is better."
    for y in _LOSSES:
        shown: list[tuple[Path | None, str]] = [(compared, text)] if y == "eval_hard_loss" else []
        for x in X_AXES:
            if y == "soft_weight" and x != "step":
                continue
            path = folder / f"{name}_{y}_{x}.png"
            first = 0 if y == "soft_weight" else start
            drawn = figures.curves(runs, x, y, styles, path, first_step=first)
            what = figures.Y_NAMES[y]
            shown.append((drawn, f"{what[0].upper()}{what[1:]} by {figures.X_NAMES[x]}, from step {first:,} on."))
        page.figures(shown, folded=_LOSS_TITLES.get(y, "") if folded else "")


def _first_step(runs: Sequence[RunRecord]) -> int:
    longest = max((run.training[-1]["step"] for run in runs if run.training), default=0)
    return int(longest * _LEFT_OUT)


def _run_row(run: RunRecord) -> tuple[str, ...]:
    if not run.training:
        return (run.name, run.status, "", "", "")
    last = run.training[-1]
    return (run.name, run.status, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['elapsed_seconds']:,.0f}")


def _with_deviation(mean: float, deviation: float | None, digits: int, unit: str = "", *, sign: bool = False) -> str:
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{'+' if sign else ''}.{digits}f}{spread}{unit}"


def _short(value: Any) -> str:
    return shorten(str(value), 80)
