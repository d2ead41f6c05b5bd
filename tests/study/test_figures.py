"""Figures and tables of the pages as they are drawn: sizes, units, places."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness.runs import write_run
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from dwt_ds.base.files import read_json_lines
from dwt_ds.config.schema import RunConfig
from dwt_ds.study.canvas import save
from dwt_ds.study.figures import Styles, curves, run_curve
from dwt_ds.study.page import Page
from dwt_ds.study.records import RunRecord


def long_run(folder: Path, tiny_data: Path, rows: int = 1000) -> RunRecord:
    """A run of `rows` rows, whose loss jumps between 4 and 6, with one peak of its gradient norm, and a tenth as many
    evaluations."""
    config = RunConfig().to_dict()
    config["data"]["dir"], config["teacher"]["path"] = str(tiny_data), None
    write_run(folder, dict.fromkeys(range(1, rows + 1), 5.0), config)
    lines = read_json_lines(folder / "metrics.jsonl")
    lines = [row for row in lines if "loss" in row or row["step"] % 10 == 0]
    for row in lines:
        if "loss" in row:
            step = row["step"]
            row |= {"hard_loss": 4.0 + 2 * (step % 2), "grad_norm": 100.0 if step == rows // 2 else 1.0}
            row |= {"tokens": 4 * 10**6 * step, "elapsed_seconds": 8.0 * step}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return RunRecord(folder.name, folder, series_name=folder.name)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures as they are written, by the names of their files."""
    kept: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> Path:
        kept[path.stem] = figure
        return save(figure, path)

    monkeypatch.setattr("dwt_ds.study.figures.save", keep)
    return kept


def labels(axis: Axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_long_run_can_be_read(tmp_path: Path, tiny_data: Path, drawn: dict[str, Figure]) -> None:
    run = long_run(tmp_path / "run", tiny_data)
    for y in ("eval_hard_loss", "grad_norm"):
        assert run_curve(run, y, tmp_path / f"{y}.png") is not None
    figure = drawn["eval_hard_loss"]
    (axes,) = figure.axes
    every_row, mean, held_out = axes.get_lines()
    assert len(every_row.get_xdata()) == 10 * len(held_out.get_xdata()) == 1000  # type: ignore[arg-type]
    assert mean.get_ydata() == pytest.approx([5.0] * 100), "noise is averaged out"
    assert "1,000" in labels(axes.xaxis)
    rulers = axes.child_axes
    assert [ruler.get_xlabel() for ruler in rulers] == ["billions of tokens", "hours"]
    # Every number is at its place, and nothing is cut or drawn over.
    assert dict(zip(labels(rulers[0].xaxis), rulers[0].get_xticks())) == pytest.approx(
        {str(n): 250 * n for n in range(1, 5)}
    )
    boxes = [part.get_tightbbox() for part in (axes.xaxis, *(ruler.xaxis for ruler in rulers))]
    assert all(above.y0 >= below.y1 for above, below in zip(boxes, boxes[1:]))
    assert boxes[-1].y0 >= 0
    assert axes.get_tightbbox().x0 >= 0
    assert drawn["grad_norm"].axes[0].get_yscale() == "log"


def test_runs_are_compared_by_means_with_a_legend_that_is_not_cut(
    tmp_path: Path, tiny_data: Path, drawn: dict[str, Figure]
) -> None:
    runs = [long_run(tmp_path / name, tiny_data, 300) for name in ("short", "a_name_of_very_many_words_" * 4)]
    for y in ("hard_loss", "eval_hard_loss"):
        assert curves(runs, "elapsed_seconds", y, Styles([run.name for run in runs]), tmp_path / f"{y}.png") is not None
    for figure in drawn.values():
        assert figure.axes[0].get_xlabel() == "minutes"
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert box.y0 >= 0
        assert figure.get_figwidth() == drawn["hard_loss"].get_figwidth()
    assert [len(line.get_xdata()) for line in drawn["hard_loss"].axes[0].get_lines()] == [100, 100]  # type: ignore[arg-type]


def test_seeds_are_averaged_at_the_steps_that_all_have(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    runs = []
    for seed, every in ((1, 4), (2, 2)):
        write_run(tmp_path / f"a-s{seed}", {step: 9.0 - step for step in range(every, 9, every)}, {"seed": seed})
        runs.append(RunRecord(f"a-s{seed}", tmp_path / f"a-s{seed}"))
    for x, places in (("step", [4, 8]), ("elapsed_seconds", [4.0, 8.0])):
        assert curves(runs, x, "eval_hard_loss", Styles(["a"]), tmp_path / f"{x}.png") is not None
        (line,) = drawn[x].axes[0].get_lines()
        assert line.get_xdata() == pytest.approx(places)
        assert line.get_ydata() == pytest.approx([5.0, 1.0])


def test_tables_fit_a_phone(tmp_path: Path) -> None:
    page = Page("Runs")
    page.table(("", "alone", "with_a_teacher_of_four_layers"), [("state", "complete", "not complete")])
    page.table(("series", "loss"), [("alone", "5.0 ± 0.1")], kind="numbers")
    page.write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<th scope="col">alone</th>' in html
    assert '<th scope="col" class="long">with_<wbr>a_<wbr>teacher_<wbr>of_<wbr>four_<wbr>layers</th>' in html
    assert '<table class="numbers">' in html
    # Nothing else is kept from breaking its lines.
    assert re.findall(r"([^{}]*){[^{}]*white-space: nowrap", html.replace("\n", " ")) == [
        " .numbers td:not(:first-child) ",
        " .rulers label ",
    ]
