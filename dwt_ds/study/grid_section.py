"""A grid's section in the page of its study: table of results, the paper's figures, curves, settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.other_text import other_text_columns
from dwt_ds.study.page import Page, Shown, markdown_table
from dwt_ds.study.records import RunRecord, by_series, compare_with_alone, settings_unlike
from dwt_ds.study.results import RESULTS_HEAD, RESULTS_NOTE, results_table
from dwt_ds.study.sections import compared_curves, first_step


def grid_section(page: Page, path: Path, grid: dict[str, Any], folder: Path) -> str:
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
    if grid.get("question"):  # earlier versions recorded none
        page.note(grid["question"])
    page.note(f"Grid {grid['name']} at scale {grid['scale']}: {done} of {len(everything)} runs are finished.")
    compare_with_alone(runs)
    finished = [run for run in runs if run.finished]
    students = [run for run in runs if "teacher" in run.labels]
    styles = Styles(list(by_series(students)) + [run.series for run in runs if run not in students])
    further, cells = other_text_columns(finished)
    head = (*RESULTS_HEAD, *further)
    results = [(*row, *more) for row, more in zip(results_table(finished), cells)]
    page.table(head, results, kind="numbers")
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
        compared_curves(page, facet, Styles(list(by_series(facet))), folder / grid["name"], teacher, folded=True)
    base = next((run for run in runs if run.is_alone), runs[0]).series
    differing = ("series", f"settings unlike those of {base}")
    page.table(differing, settings_unlike(runs, base), folded="Settings that differ", kind="words")
    rows = [_run_row(run) for run in everything]
    page.table(("run", "status", "steps", "tokens", "seconds"), rows, folded="All runs")
    return f"## {grid['title']}\n\n{markdown_table(head, results)}"


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
    shown = [
        Shown(
            figures.paper_teacher_quality(folder / "figure_2_paper.png"),
            "The paper's figure 2: GLUE means of teachers and students.",
        )
    ]
    if points and lone:
        ours = figures.teacher_quality(points, [run.final_loss for run in lone], "loss", folder / "figure_2.png")
        shown.append(
            Shown(
                ours, "The same from our runs, by held-out MLM loss; both axes are reversed, so up and right is better."
            )
        )
    if scores and lone and all(run.scores for run in lone):
        alone = [fmean(run.final_scores) for run in lone]
        text = f"The same by fine-tuned score ({_tasks(lone)})."
        shown.append(Shown(figures.teacher_quality(scores, alone, "score", folder / "figure_2_scores.png"), text))
    page.figures(shown)


def _figures_3_and_4(
    page: Page, grid: dict[str, Any], students: Sequence[RunRecord], styles: Styles, folder: Path
) -> None:
    number = grid["figure"]
    scored = [run for run in students if run.scores]
    if scored:
        path = figures.scores_along(scored, styles, _tasks(scored), folder / f"figure_{number}.png")
        text = f"The paper's figure {number} from our runs: fine-tuned scores along the pre-training; the bars are a "
        page.figures([Shown(path, f"{text}standard deviation over the seeds of pre-training and fine-tuning.")])
        return
    if not students:
        return
    path_or_none = figures.curves(
        students, "step", "eval_hard_loss", styles, folder / f"figure_{number}.png", first_step=first_step(students)
    )
    text = f"In place of the paper's figure {number}, which shows fine-tuned scores: held-out MLM loss along the way."
    page.figures([Shown(path_or_none, text)])


def _tasks(runs: Sequence[RunRecord]) -> str:
    tasks = runs[0].scored_tasks
    return "mean of 7 tasks" if len(tasks) == 7 else ", ".join(tasks)


def _run_row(run: RunRecord) -> tuple[str, ...]:
    if not run.training:
        return (run.name, run.status, "", "", "")
    last = run.training[-1]
    return (run.name, run.status, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['elapsed_seconds']:,.0f}")
