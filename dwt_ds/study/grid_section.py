"""The section of a grid on the page of its study: tables, the paper's figures, curves, settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwt_ds.distill.metrics_keys import EVAL_LOSS
from dwt_ds.study import figures
from dwt_ds.study.figures import Styles
from dwt_ds.study.final_tables import study_tables
from dwt_ds.study.page import Page, Shown
from dwt_ds.study.page_curves import compared_curves, first_step
from dwt_ds.study.pairs import add_differences, lone_series
from dwt_ds.study.records import RunRecord, by_series, common_tasks, settings_unlike
from dwt_ds.study.scores import tasks_in_words
from dwt_ds.study.tables import Compared


def runs_of_grid(path: Path, grid: dict[str, Any]) -> list[RunRecord]:
    """All runs of a grid in the study's folder `path`, also those that have not begun."""
    return [
        RunRecord(run["name"], path / run["name"], run["labels"], run["teacher_run"], run["status"])
        for run in grid["runs"]
    ]


def grid_section(
    page: Page, path: Path, grid: dict[str, Any], folder: Path, against: Sequence[RunRecord] | None = None
) -> str:
    """Add a grid's section; returns its tables in Markdown, "" if none of its runs has been evaluated yet.

    Args:
        path: the study's folder.
        grid: as `StudyFolder.write_grid` recorded it.
        folder: for the figures.
        against: a series of the study, from this grid or another, to compare with; None: the lone student.
    """
    everything = runs_of_grid(path, grid)
    runs = [run for run in everything if run.held_out]
    if not runs:
        return ""
    done = sum(run.finished for run in everything)
    page.heading(grid["title"])
    if grid.get("question"):  # earlier versions recorded none
        page.note(grid["question"])
    for run in against or ():
        if run.finished and run.name not in [each.name for each in runs]:
            runs.append(run)
    finished = [run for run in runs if run.finished]
    reference, why = _reference(finished or runs, against)
    page.note(f"Grid {grid['name']} at scale {grid['scale']}: {done} of {len(everything)} runs are finished. {why}")
    add_differences(runs, reference)
    students = [run for run in runs if not run.is_teacher]
    styles = Styles(list(by_series(students)) + [run.series for run in runs if run not in students])
    tables = study_tables(Compared(finished, reference))
    for table in tables:
        table.add_to(page)
    done_students = [run for run in finished if run in students]
    if grid["figure"] == 2:
        _figure_2(page, finished, folder / grid["name"])
    elif grid["figure"] is not None:
        _figures_3_and_4(page, grid, done_students, styles, folder / grid["name"])
    facets = _facets(students)
    for teacher, facet in facets.items():
        page.heading(f"With {teacher}" if len(facets) > 1 else "Curves", 3)
        of_facet = Styles(list(by_series(facet)))
        compared_curves(page, facet, of_facet, folder / grid["name"], teacher, folded=True, reference=reference)
    head = ("series", f"settings unlike those of {reference}")
    page.table(head, settings_unlike(runs, reference), folded="Settings that differ", kind="words")
    rows = [_run_row(run) for run in everything]
    page.table(("run", "status", "steps", "tokens", "seconds"), rows, folded="All runs")
    return "\n".join([f"## {grid['title']}\n", *(table.markdown() for table in tables)])


def _reference(runs: Sequence[RunRecord], against: Sequence[RunRecord] | None) -> tuple[str, str]:
    """The series that the others are compared with, and a sentence about the choice."""
    if against is not None:
        return against[0].series, f'The others are compared with "{against[0].series}".'
    lone = lone_series(runs)
    if lone is None:
        return runs[0].series, "There is no lone student to compare with."
    several = len({run.series for run in runs if run.is_alone}) > 1
    best = ", of the lone students with the most seeds the one that ends with the lowest mean loss" if several else ""
    return lone, f'The others are compared with "{lone}"{best}.'


def _facets(students: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs to draw together: those of one teacher with the lone students; all runs if each teacher has one series."""
    lone = [run for run in students if run.teacher_run is None]
    teachers = list(dict.fromkeys(run.labels["teacher"] for run in students if run.teacher_run))
    if len(by_series(students)) <= len(teachers) + 1:
        return {"all": list(students)}
    return {each: [*lone, *(run for run in students if run.labels["teacher"] == each)] for each in teachers}


def _figure_2(page: Page, runs: Sequence[RunRecord], folder: Path) -> None:
    by_name = {run.name: run for run in runs}
    best = lone_series(runs)
    lone = [run for run in runs if run.is_alone and run.series == best]
    points = {}
    scores: dict[str, dict[str, Any]] = {}
    tasks = common_tasks(runs)
    for name, group in by_series([run for run in runs if run.teacher_run in by_name]).items():
        teacher = by_name[str(group[0].teacher_run)]
        points[name] = {"teacher": teacher.final_loss, "students": [run.final_loss for run in group]}
        last = [run.final_score(tasks) for run in (teacher, *group)]
        if None not in last:
            scores[name] = {"teacher": last[0], "students": last[1:]}
    papers = figures.paper_teacher_quality(folder / "figure_2_paper.png")
    shown = [Shown(papers, "The paper's figure 2: GLUE means of teachers and students.")]
    if points and lone:
        ours = figures.teacher_quality(points, [run.final_loss for run in lone], "loss", folder / "figure_2.png")
        text = "The same from our runs, by held-out MLM loss; both axes are reversed, so up and right is better."
        shown.append(Shown(ours, text))
    alone = [score for run in lone if (score := run.final_score(tasks)) is not None]
    if scores and alone and len(alone) == len(lone):
        text = f"The same by fine-tuned score ({tasks_in_words(tasks)})."
        shown.append(Shown(figures.teacher_quality(scores, alone, "score", folder / "figure_2_scores.png"), text))
    page.figures(shown)


def _figures_3_and_4(
    page: Page, grid: dict[str, Any], students: Sequence[RunRecord], styles: Styles, folder: Path
) -> None:
    number = grid["figure"]
    tasks = common_tasks(students)
    if tasks:
        path = figures.scores_along(students, styles, tasks, folder / f"figure_{number}.png")
        text = f"The paper's figure {number} from our runs: fine-tuned scores along the pre-training; the bars are a "
        page.figures([Shown(path, f"{text}standard deviation over the seeds of pre-training and fine-tuning.")])
        return
    if not students:
        return
    path_or_none = figures.curves(
        students, "step", EVAL_LOSS, styles, folder / f"figure_{number}.png", first_step=first_step(students)
    )
    text = f"In place of the paper's figure {number}, which shows fine-tuned scores: held-out MLM loss along the way."
    page.figures([Shown(path_or_none, text)])


def _run_row(run: RunRecord) -> tuple[str, ...]:
    if not run.training:
        return (run.name, run.status, "", "", "")
    last = run.training[-1]
    return (run.name, run.status, f"{last['step']:,}", f"{last['tokens']:,}", f"{last['elapsed_seconds']:,.0f}")
