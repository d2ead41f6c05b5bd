"""The report of a run or of a study: index.html, and beside it its figures as PNG files and its table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dwt_ds.base.locks import FolderLock
from dwt_ds.base.words import shorten
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.plan.report import changes
from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.page import Page, is_a_page, markdown_table
from dwt_ds.study.records import X_AXES, RunRecord, by_series, compare_with_alone, differing_settings
from dwt_ds.study.results import RESULTS_HEAD, RESULTS_NOTE, results_table

HTML = "index.html"
MARKDOWN = "results.md"
_LOSSES = ("eval_hard_loss", "hard_loss", "soft_loss", "soft_weight")
_LOSS_TITLES = {
    "hard_loss": "Training: hard loss",
    "soft_loss": "Training: soft loss",
    "soft_weight": "Weight of the soft loss",
}
# Share of a run left out at the start of a curve: a steep fall that would flatten the rest.
_LEFT_OUT = 0.1


def write_report(path: Path, out: Path) -> Path:
    """Write the report of the run or study in `path` to `out`; returns the HTML file.

    Raises:
        ValueError: there is neither a run nor a study with an evaluation, or another process writes to `out`.
    """
    if (out / HTML).is_file() and not is_a_page(out / HTML):
        raise ValueError(f"--out {out}: {out / HTML} is not a report; rename it, or choose another --out")
    with FolderLock(out, f"--out {out}"):
        return _write(path, out)


def _write(path: Path, out: Path) -> Path:
    if (path / "metrics.jsonl").is_file():
        return _run_report(RunRecord(path.resolve().name, path), out)
    grids = StudyFolder(path).grids() if path.is_dir() else []
    if not grids:
        raise ValueError(f"{path}: holds neither a run (metrics.jsonl) nor a study; give the folder of one")
    page = Page(f"Study: {path.resolve().name}")
    tables = [_grid_section(page, path, grid, out / "figures") for grid in grids]
    if not any(tables):
        raise ValueError(f"{path}: no run of the study has been evaluated yet; try again later")
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
    """Add a grid's section; returns its results in Markdown, "" if none of its runs has been evaluated yet."""
    everything = [
        RunRecord(run["name"], path / run["name"], run["labels"], run["teacher_run"], run["status"])
        for run in grid["runs"]
    ]
    runs = [run for run in everything if run.held_out]
    if not runs:
        return ""
    done = sum(run.finished for run in everything)
    page.heading(grid["title"])
    page.note(f"Grid {grid['name']} at scale {grid['scale']}: {done} of {len(everything)} runs are finished.")
    compare_with_alone(runs)
    finished = [run for run in runs if run.finished]
    students = [run for run in runs if "teacher" in run.labels]
    styles = Styles(list(by_series(students)) + [run.series for run in runs if run not in students])
    results = results_table(finished)
    page.table(RESULTS_HEAD, results)
    page.note(RESULTS_NOTE)
    done_students = [run for run in finished if run in students]
    if grid["figure"] == 2:
        _figure_2(page, finished, folder / grid["name"])
    elif grid["figure"] is not None:
        _figures_3_and_4(page, grid, done_students, styles, folder / grid["name"])
    facets = _facets(students)
    for teacher, facet in facets.items():
        if len(facets) > 1:
            page.heading(f"With {teacher}", 3)
        _curves(page, facet, Styles(list(by_series(facet))), folder / grid["name"], teacher, folded=True)
    page.table(("setting", *(run.name for run in runs)), differing_settings(runs), folded="Settings that differ")
    rows = [_run_row(run) for run in everything]
    page.table(("run", "status", "steps", "tokens", "seconds"), rows, folded="All runs")
    return f"## {grid['title']}\n\n{markdown_table(RESULTS_HEAD, results)}"


def _facets(students: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs to draw together: those with one teacher and the lone students; all of them if each has one line."""
    lone = [run for run in students if run.teacher_run is None]
    teachers = list(dict.fromkeys(run.labels["teacher"] for run in students if run.teacher_run))
    if len(by_series(students)) <= len(teachers) + 1:
        return {"all": list(students)}
    return {each: [*lone, *(run for run in students if run.labels["teacher"] == each)] for each in teachers}


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
            (ours, "The same from our runs, by held-out MLM loss; both axes are reversed, so up and right is better.")
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
        text = f"The paper's figure {number} from our runs: fine-tuned scores along the pre-training; the bars are a "
        page.figures([(path, f"{text}standard deviation over the seeds of pre-training and fine-tuning.")])
        return
    if not students:
        return
    path_or_none = figures.curves(
        students, "step", "eval_hard_loss", styles, folder / f"figure_{number}.png", first_step=_first_step(students)
    )
    text = f"In place of the paper's figure {number}, which shows fine-tuned scores: held-out MLM loss along the way."
    page.figures([(path_or_none, text)])


def _tasks(runs: Sequence[RunRecord]) -> str:
    tasks = runs[0].scored_tasks
    return "mean of 7 tasks" if len(tasks) == 7 else ", ".join(tasks)


def _curves(page: Page, runs: Sequence[RunRecord], styles: Styles, folder: Path, name: str, *, folded: bool) -> None:
    start = _first_step(runs)
    path = folder / f"{name}_less_alone_step.png"
    with_teacher = [run for run in runs if run.held_out and "less_alone" in run.held_out[-1]]
    compared = figures.curves(with_teacher, "step", "less_alone", styles, path) if with_teacher else None
    text = "Held-out cross-entropy minus that of the lone student of the same seed; below 0 is better."
    for y in _LOSSES:
        shown: list[tuple[Path | None, str]] = [(compared, text)] if y == "eval_hard_loss" else []
        for x in X_AXES:
            if y == "soft_weight" and x != "step":
                continue
            path = folder / f"{name}_{y}_{x}.png"
            first = 0 if y == "soft_weight" else start
            drawn = figures.curves(runs, x, y, styles, path, first_step=first)
            what = figures.Y_NAMES[y]
            shown.append((drawn, f"{what[0].upper()}{what[1:]} by {figures.X_NAMES[x]}, from step {first:,}."))
        page.figures(shown, folded=_LOSS_TITLES.get(y, "") if folded else "")


def _first_step(runs: Sequence[RunRecord]) -> int:
    longest = max((run.training[-1]["step"] for run in runs if run.training), default=0)
    return int(longest * _LEFT_OUT)


def _run_row(run: RunRecord) -> tuple[str, ...]:
    if not run.training:
        return (run.name, run.status, "", "", "")
    last = run.training[-1]
    return (run.name, run.status, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['elapsed_seconds']:,.0f}")


def _short(value: Any) -> str:
    return shorten(str(value), 80)
