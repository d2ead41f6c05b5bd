"""The report of runs or of a study: index.html, its figures as PNG files and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwt_ds.base.files import check_no_file
from dwt_ds.base.locks import FolderLock
from dwt_ds.base.run_files import METRICS
from dwt_ds.base.words import nearest, shorten
from dwt_ds.config.recipe import parse_run_config
from dwt_ds.plan.report import changes
from dwt_ds.study.figures import Styles
from dwt_ds.study.final_tables import study_tables
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid_section import grid_section, runs_of_grid
from dwt_ds.study.overview import OVERVIEW_NOTE, against_note, overview
from dwt_ds.study.page import Page, is_a_page, markdown_table
from dwt_ds.study.page_curves import compared_curves, curves_of_one
from dwt_ds.study.pairs import find_series, series_by_settings
from dwt_ds.study.records import RunRecord, by_series, differing_settings, named_runs
from dwt_ds.study.tables import Compared, Table

HTML = "index.html"
MARKDOWN = "results.md"
# Letters; longer lists of names are only in the head of the table.
_LONG_TITLE = 60


def write_report(paths: Sequence[Path], out: Path | None = None, against: str | None = None) -> Path:
    """Write the report of one or more runs, or of a study; returns the HTML file.

    Args:
        paths: folders of runs, or the folder of one study.
        out: folder to write; None: `report` in the folder of the run or study; for several runs, `report` in the
            nearest folder that holds them all.
        against: name or path of one of the runs, or a series of the study, with which the others are compared.

    Raises:
        ValueError: there is neither a run nor a study with an evaluation, `against` is not one of the runs or series or
            has no evaluation, or another process writes to `out`.
    """
    paths = [path.expanduser() for path in paths]
    for path in paths:
        check_no_file(path, f"report {path}")
    runs = _runs(paths)
    study = paths[0] if len(paths) == 1 and not runs else None
    other = None if against is None or study is not None else _find(against, runs)
    folder = out.expanduser() if out else _nearest_folder(paths) / "report"
    if (folder / HTML).is_file() and not is_a_page(folder / HTML):
        raise ValueError(f"--out {folder}: {folder / HTML} is not a report; rename it, or choose another --out")
    with FolderLock(folder, f"--out {folder}"):
        return _runs_report(runs, other, folder) if study is None else _study_report(study, folder, against)


def _runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in `paths`; [] if there is one path and it is not a run."""
    missing = [path for path in paths if not (path / METRICS).is_file()]
    if missing and len(paths) > 1:
        raise ValueError(f"{missing[0]}: holds no run (metrics.jsonl); give folders of runs, or a study alone")
    return [] if missing else named_runs(paths)


def _find(against: str, runs: Sequence[RunRecord]) -> RunRecord:
    names = [run.name for run in runs]
    folder = Path(against).expanduser().resolve()
    found = [run for run in runs if against == run.name] or [run for run in runs if folder == run.path]
    if not found:
        raise ValueError(f"--against {against}: is not one of the runs ({', '.join(names)}){nearest(against, names)}")
    if not found[0].is_evaluated:
        raise ValueError(f"--against {against}: has not been evaluated yet; try again later")
    return found[0]


def _nearest_folder(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0]
    folders = [path.resolve() for path in paths]
    return next(above for above in folders[0].parents if all(above in each.parents for each in folders))


def _runs_report(runs: Sequence[RunRecord], against: RunRecord | None, out: Path) -> Path:
    names = [run.name for run in runs]
    page = Page(_title(names))
    head, rows = overview(runs, against)
    page.table(head, rows)
    page.note(OVERVIEW_NOTE if against is None else f"{OVERVIEW_NOTE} {against_note(against)}")
    if len({run.data_fingerprint for run in runs} - {None}) > 1:
        page.note("These runs read different data folders: their held-out losses are of different texts or tokens.")
    seeds = [] if against is None else _seed_tables(runs, against)
    for table in seeds:
        table.add_to(page)
    if len(runs) == 1:
        curves_of_one(page, runs[0], out / "figures")
        page.heading("Settings that are not the defaults")
        changed = changes(parse_run_config(runs[0].config))
        rows_of_settings = [(name, _cell_text(now), _cell_text(old)) for name, old, now in changed]
        page.table(("setting", "here", "default"), rows_of_settings, kind="words")
    else:
        styles = Styles(list(dict.fromkeys(run.series for run in runs)))
        compared_curves(page, runs, styles, out / "figures", "runs", folded=False)
        page.heading("Settings that differ")
        differing = [(name, *map(_cell_text, values)) for name, *values in differing_settings(runs)]
        page.table(("setting", *names), differing, kind="words")
    page.write(out / HTML)
    texts = [markdown_table(head, rows), *(table.markdown() for table in seeds)]
    (out / MARKDOWN).write_text("\n".join(texts), encoding="utf-8")
    return out / HTML


def _seed_tables(runs: Sequence[RunRecord], against: RunRecord) -> list[Table]:
    """Tables of series (complete runs that differ in their seed alone), compared seed by seed; [] if all are single."""
    series = series_by_settings([run for run in runs if run.finished and run.is_evaluated])
    reference = next((run.series for run in series if run.name == against.name), "")
    compared = Compared(series, reference)
    return study_tables(compared) if any(len(pairs) > 1 for pairs in compared.pairs.values()) else []


def _title(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"Run: {names[0]}"
    all_names = ", ".join(names)
    return f"Runs: {all_names}" if len(all_names) <= _LONG_TITLE else f"{len(names)} runs"


def _study_report(path: Path, out: Path, against: str | None) -> Path:
    grids = StudyFolder(path).grids() if path.is_dir() else []
    if not grids:
        raise ValueError(f"{path}: holds neither a run (metrics.jsonl) nor a study; give the folder of one")
    runs = {run.name: run for grid in grids for run in runs_of_grid(path, grid)}
    other = None if against is None else _find_series(against, list(runs.values()))
    page = Page(f"Study: {path.resolve().name}")
    tables = [grid_section(page, path, grid, out / "figures", other) for grid in grids]
    if not any(tables):
        raise ValueError(f"{path}: no run of the study has been evaluated yet; try again later")
    page.write(out / HTML)
    (out / MARKDOWN).write_text("\n".join(filter(None, tables)), encoding="utf-8")
    return out / HTML


def _find_series(against: str, runs: Sequence[RunRecord]) -> list[RunRecord]:
    series = find_series(against, runs)
    if not series:
        names = list(by_series(runs))
        raise ValueError(f"--against {against}: is not one of the series ({'; '.join(names)}){nearest(against, names)}")
    if not any(run.finished and run.held_out for run in series):
        raise ValueError(f"--against {against}: none of its runs is complete yet; try again later")
    return series


def _cell_text(value: Any) -> str:
    return shorten(str(value), 80)
