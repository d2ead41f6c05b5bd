from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from harness.errors import Refusal
from harness.runs import change_rows, flops_per_token, write_run
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.base.files import read_json_lines
from dwt_ds.cli.main import main
from dwt_ds.config.recipe import load_recipe, parse_run_config
from dwt_ds.config.schema import RunConfig
from dwt_ds.models.build import student_model_config
from dwt_ds.study.final_tables import final_tables
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import load_grid
from dwt_ds.study.grid_section import runs_of_grid
from dwt_ds.study.overview import overview
from dwt_ds.study.page import Page
from dwt_ds.study.records import RunRecord, named_runs
from dwt_ds.study.report import write_report
from dwt_ds.study.tables import Compared


@pytest.fixture
def study(tmp_path: Path, tiny_data: Path) -> Path:
    """The grid of teacher quality over two seeds, as if it had been run."""
    folder, grid = StudyFolder(tmp_path / "study"), load_grid("teacher_quality", "smoke", [1, 2])
    ends = {"teacher4": 5.2, "teacher2": 5.4, "teacher1": 5.8}
    for run in grid.runs:
        recipe = folder.write_recipe(run, folder.recipe(run.name))
        config = load_recipe(str(recipe), [f"data.dir={tiny_data}"]).config.to_dict()
        end = ends[run.labels["makes"]] if "makes" in run.labels else 5.0 + 0.02 * run.seed
        if run.teacher_run:
            end += ends[run.labels["teacher"]] - 5.4
        write_run(folder.path / run.name, {4: 7.0, 8: 6.0, 12: end}, config)
    folder.write_grid(grid, {run.name: "finished" for run in grid.runs})
    return folder.path


def add_losses(run: Path, losses: dict[str, float]) -> None:
    """Those of a further set at each evaluation of a run: `losses` by name."""
    named = {f"eval_hard_loss.{name}": loss for name, loss in losses.items()}
    change_rows(run, lambda row: row | named if "eval_hard_loss" in row else row)


def test_a_study_compares_losses_on_other_text(study: Path) -> None:
    """Where only some runs of a series have them, the table says how many."""
    for seed in (1, 2):
        add_losses(study / f"alone-s{seed}", {"books": 7.0 + seed})
        add_losses(study / f"with_teacher4-s{seed}", {"books": 6.5 + seed, "wiki": 5.0})
    add_losses(study / "with_teacher2-s1", {"books": 6.0})
    [grid] = StudyFolder(study).grids()
    own, books, wiki = final_tables(Compared(runs_of_grid(study, grid), "alone"))
    assert (own.title, books.title, wiki.title) == ("Held-out loss", "Held-out loss, books", "Held-out loss, wiki")
    assert books.head[1:3] == ("held-out loss, books", "minus alone")
    assert books.rows == [
        ("alone", "8.5000 ± 0.7071", "", "", "", "", "2"),
        ("with teacher4", "8.0000 ± 0.7071", "-0.5000 ± 0.0000", "0.0000", "better", "2", "2"),
        ("with teacher2", "6.0000", "-2.0000", "", "cannot be told", "1", "1"),
    ]
    assert wiki.rows == [("with teacher4", "5.0000 ± 0.0000", "", "", "", "", "2")]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_evaluated_on_other_text_alone(tmp_path: Path, tiny_data: Path) -> None:
    """Its data folder holds nothing out."""
    path = Path(compared(tmp_path, tiny_data, None)[0])
    change_rows(path, lambda row: {key: value for key, value in row.items() if key != "eval_hard_loss"})
    assert main(["report", str(path)]) == 0
    table = table_of((path / "report" / "results.md").read_text(encoding="utf-8"))
    assert table["held-out loss, books"] == ["3.0000"]
    assert "held-out loss" not in table
    assert [file.name for file in (path / "report" / "figures").glob("*eval*")] == ["eval_hard_loss.books.png"]
    assert not named_runs([path])[0].is_evaluated, "there is no loss to compare it with others by"


def test_a_studys_report_stands_alone(study: Path) -> None:
    assert main(["report", str(study)]) == 0
    html = (study / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html)
    assert "http" not in html
    assert html.count("<img alt=") == html.count("data:image/png;base64,")
    assert 'name="viewport"' in html
    row = re.search(r"<tr><td>with teacher4</td>(.*?)</tr>", html)
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row[1])
    # Alone 5.02 and 5.04; with the 4-layer teacher 0.2 less.
    assert cells[0] == "4.8300 ± 0.0141"
    assert cells[1] == "-0.2000 ± 0.0000"
    assert cells[-1] == "2"
    assert re.findall(r"<td>with teacher1</td>.*?<td>(never)</td>", html) == ["never"]
    for name in ("figure_2.png", "figure_2_paper.png", "all_eval_hard_loss_tokens.png", "all_difference_step.png"):
        assert (study / "report" / "figures" / "teacher_quality" / name).stat().st_size > 5000
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td(?: class=\"long\")?>([^<]*)</td></tr>", html))
    assert rows["alone"] == "student.layers=6, teacher.path=None"
    assert rows["teacher4"] == "student.layers=4"
    assert rows["with teacher4"] == f"teacher.path={study}/teacher4-s42/export"
    # What is folded is one click away, and on paper it is open.
    assert html.count("<details><summary>") == 3
    assert "details::details-content { content-visibility: visible" in html
    table = (study / "report" / "results.md").read_text(encoding="utf-8")
    assert "| with teacher4 | 4.8300 ± 0.0141 | -0.2000 ± 0.0000 |" in table


@pytest.mark.usefixtures("undrawn")
def test_the_saving_is_given_in_tokens_and_operations(study: Path) -> None:
    for config in study.glob("*/config.yaml"):
        student = parse_run_config(yaml.safe_load(config.read_text())).student
        sizes = {"vocab_size": 298, "seq_len": 32, "pad_token_id": 0}
        student_model_config(student, **sizes).save_pretrained(config.parent / "export")
    assert main(["report", str(study)]) == 0
    table = table_with("tokens saved", study)
    runs = {name: RunRecord(name, study / name) for name in ("alone-s1", "with_teacher4-s1", "teacher4-s42")}
    alone, helped, teacher = (flops_per_token(run) for run in runs.values())
    assert alone is not None
    assert helped is not None
    assert teacher is not None
    # 1,200 tokens; from 6.0 at step 8 to 4.82 at step 12, or 4.84: the lone student's 5.02, or 5.04, after 11.3 steps.
    tokens = 100 * (8 + 4 * 0.98 / 1.18), 100 * (8 + 4 * 0.96 / 1.16)
    mean = sum(tokens) / 2
    assert table["alone"] == {
        "tokens": "0.00 M",
        "FLOPs": f"{1200 * alone:.2e}",
        "seconds": "12",
        "pairs": "2",
        **{name: "" for name in table["alone"] if "saved" in name},
    }
    assert "teacher4" not in table, "its training is counted with its students'"

    def saved(*ratios: float) -> str:
        return f"{100 - 50 * sum(ratios):.0f} ± {100 * abs(ratios[0] - ratios[1]) / 2**0.5:.0f}%"

    # The teacher took 1,200 tokens, and as every run here 1 s for 100 of them.
    in_tokens, with_teacher = ([(each + more) / 1200 for each in tokens] for more in (0, 1200))
    assert table["with teacher4"] == {
        "tokens": "0.00 M",
        "tokens saved": saved(*in_tokens),
        "FLOPs": f"{mean * helped:.2e}",
        "FLOPs saved": saved(*(each * helped / (1200 * alone) for each in tokens)),
        "seconds": f"{mean / 100:.0f}",
        "seconds saved": saved(*in_tokens),
        "tokens saved, the teacher's training counted": saved(*with_teacher),
        "FLOPs saved, the teacher's training counted": saved(
            *((each * helped + 1200 * teacher) / (1200 * alone) for each in tokens)
        ),
        "seconds saved, the teacher's training counted": saved(*with_teacher),
        "pairs": "2",
    }


def table_with(column: str, study: Path) -> dict[str, dict[str, str]]:
    """Series -> column -> cell, of the table in results.md that has this column."""
    text = (study / "report" / "results.md").read_text(encoding="utf-8")
    lines = next(part for part in text.split("\n\n") if f"| {column} |" in part.splitlines()[0]).splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


def test_a_study_in_progress_can_be_drawn(study: Path) -> None:
    grid = load_grid("teacher_quality", "smoke", [1, 2])
    for run in grid.runs[1:]:
        (study / run.name / "complete.json").unlink()
        if run.teacher_run:
            (study / run.name / "metrics.jsonl").unlink()
    add_losses(study / "alone-s1", {"books": 6.0})
    add_losses(study / grid.runs[0].name, {"books": 5.0})
    (study / "notes.json").write_text("not a grid's record")
    assert main(["report", str(study), "--out", str(study / "now")]) == 0
    html = (study / "now" / "index.html").read_text(encoding="utf-8")
    assert "1 of 11 runs are finished" in html
    assert '<th scope="col">held-out loss, books</th>' in html
    assert f"<td>5.0000</td>{'<td></td>' * 4}<td>1</td></tr>" in html
    assert html.index("Held-out cross-entropy, books by time") < html.index("<summary>Training losses"), "not folded"


def test_a_runs_report(study: Path, tmp_path: Path) -> None:
    assert main(["report", str(study / "with_teacher2-s1"), "--out", str(tmp_path / "report")]) == 0
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<td>held-out loss</td><td>5.0200</td>" in html
    assert html.count("<img") == 2, "held-out and soft loss, once each; the constant weight is not drawn"
    assert "student.family" in html
    assert "by-tokens" not in html, "rulers below each figure take the switch's place"


@pytest.mark.usefixtures("undrawn")
def test_a_run_before_its_first_evaluation_has_its_training_loss(study: Path) -> None:
    path = study / "with_teacher2-s1"
    rows = [row for row in read_json_lines(path / "metrics.jsonl") if "eval_hard_loss" not in row]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(path)]) == 0
    assert sorted(file.name for file in (path / "report" / "figures").iterdir()) == ["hard_loss.png", "soft_loss.png"]
    html = (path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Training cross-entropy (hard) by steps, tokens and time, from step 1." in html


def compared(folder: Path, tiny_data: Path, teacher: Path | None) -> list[str]:
    """Two runs at 100 tokens and 1 s a step, of which half is not training, and 200 tokens/s in the other half."""
    paths = []
    for name, path, losses in (
        ("alone", None, {10: 6.0, 20: 5.0}),
        ("helped", teacher and str(teacher), {10: 5.5, 20: 4.5}),
    ):
        config = RunConfig().to_dict()
        config["data"]["dir"], config["teacher"]["path"], config["seed"] = str(tiny_data), path, 7
        config["student"] |= {"layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32}
        run = folder / name
        write_run(run, losses, config, finished=name == "alone")
        rows = read_json_lines(run / "metrics.jsonl")
        for row in rows:
            if "loss" in row:
                share = 0.1 if row["step"] == 10 else 0.3
                row |= {"tokens_per_second": 200.0, "mfu": 2 * share, "mfu_student": share, "soft_weight": row["step"]}
            else:
                row["eval_hard_loss.books"] = 3.0
                if row["step"] == 20:
                    row.pop("eval_soft_loss", None)  # as after the teacher's release
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(run))
    return paths


def table_of(markdown: str) -> dict[str, list[str]]:
    """First cell -> the others, of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in markdown.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_runs_are_drawn_beside_one_another(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    paths = compared(tmp_path / "runs", tiny_data, tiny_teacher)
    assert main(["report", *paths, "--against", "alone"]) == 0
    out = tmp_path / "runs" / "report"
    table = table_of((out / "results.md").read_text(encoding="utf-8"))
    alone, helped = (RunRecord(Path(path).name, Path(path)) for path in paths)
    flops = [flops_per_token(run) for run in (alone, helped)]
    assert table["state"] == ["complete", "not complete"]
    weights = BertForMaskedLM(BertConfig.from_pretrained(tiny_teacher)).num_parameters()
    assert table["teacher"] == ["none", f"1 x 16, {weights / 1e6:.2f} M parameters"]
    assert table["student"][0] == table["student"][1]
    assert re.fullmatch(r"2 x 32, 0\.0\d M parameters", table["student"][0])
    assert (table["steps"], table["tokens"], table["time"]) == (["20", "20"], ["2,000", "2,000"], ["20s", "20s"])
    assert table["tokens/s"] == ["200", "200"]
    # Both logged rows took 5 seconds of training.
    assert table["MFU"] == ["40.0%", "40.0% (student's 20.0%)"]
    assert table["held-out loss"] == ["5.0000", "4.5000"]
    assert table["held-out KL from the teacher"] == ["", "0.2000 (step 10)"]
    assert table["held-out loss, books"] == ["3.0000", "3.0000"]
    assert table["held-out loss minus alone's"] == ["", "-0.5000"]
    # 5.0 is half-way between steps 10 and 20.
    assert table["as good as alone after: tokens"] == ["2,000", "1,500 (25% saved)"]
    assert table["as good as alone after: time"] == ["20s", "15s (25% saved)"]
    assert flops[0] is not None
    assert flops[1] is not None
    saved = 1 - 0.75 * flops[1] / flops[0]
    assert table["as good as alone after: FLOPs"] == [
        f"{2000 * flops[0]:.2e}",
        f"{1500 * flops[1]:.2e} ({saved:.0%} saved)",
    ]
    html = (out / "index.html").read_text(encoding="utf-8")
    assert html.index("<table") < html.index("<img")
    assert "<script" not in html
    for ruler in ("step", "tokens", "elapsed_seconds"):
        assert f'<input type="radio" name="ruler" id="by-{ruler}"' in html
        # Both held-out losses, hard and soft ones, and the weight, which changes here.
        assert html.count(f'<figure class="ruled by-{ruler}"><img') == 5
    assert html.count('<div class="figures">') == 1, "in one grid, beside one another on a desk"
    assert "<td>teacher.path</td>" in html
    assert "different data folders" not in html


@pytest.mark.usefixtures("undrawn")
def test_runs_on_different_data_are_marked(tmp_path: Path, tiny_data: Path) -> None:
    paths = compared(tmp_path, tiny_data, None)
    for number, path in enumerate(paths):
        (Path(path) / "run.json").write_text(json.dumps({"data": f"fingerprint {number}"}))
    assert main(["report", *paths]) == 0
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "These runs read different data folders" in html


def test_a_run_that_is_never_as_good_says_so(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    runs = named_runs([Path(path) for path in compared(tmp_path, tiny_data, tiny_teacher)])
    _, rows = overview(runs, runs[1])
    table = {name: cells for name, *cells in rows}
    assert table["as good as helped after: tokens"] == ["never", "2,000"]
    # What is drawn while the run has not taken a step.
    (tmp_path / "alone" / "metrics.jsonl").write_text("")
    _, rows = overview(named_runs([tmp_path / "alone"]), None)
    assert [row[0] for row in rows] == ["state", "student", "teacher"]


def test_runs_of_equal_names_get_names_of_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / place / "run" for place in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert [run.name for run in named_runs([*folders, tmp_path / "a"])] == ["a/run", "b/run", "a"]
    assert [run.series for run in named_runs([tmp_path / "exp-s1", tmp_path / "exp-s2"])] == ["exp-s1", "exp-s2"]
    with pytest.raises(ValueError, match="is given twice; name each run once"):
        named_runs([folders[0], tmp_path / "a" / "." / "run"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "alon"], "--against alon: is not one of the runs (alone, helped); did you mean 'alone'?"),
        (["nothing"], "nothing: holds no run (metrics.jsonl); give folders of runs, or a study alone"),
    ],
)
def test_what_cannot_be_compared(
    words: list[str], message: str, tmp_path: Path, tiny_data: Path, refusal: Refusal
) -> None:
    assert refusal("report", *compared(tmp_path, tiny_data, None), *words) == f"error: {message}\n"
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("undrawn")
def test_constants_are_not_plotted(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    _, path = compared(tmp_path, tiny_data, tiny_teacher)
    assert main(["report", path]) == 0
    drawn = {file.stem for file in (Path(path) / "report" / "figures").iterdir()}
    assert drawn == {"eval_hard_loss", "eval_hard_loss.books", "soft_loss", "soft_weight"}


def test_folders_below_home(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = load_recipe("quickstart_teacher", [f"data.dir={tiny_data}"]).config.to_dict()
    write_run(tmp_path / "runs" / "a", {4: 7.0, 8: 6.0}, config)
    assert write_report([Path("~/runs/a")]) == tmp_path / "runs" / "a" / "report" / "index.html"
    assert write_report([Path("~/runs/a")], Path("~/page")) == tmp_path / "page" / "index.html"
    assert not (tmp_path / "~").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_somebody_elses_is_not_written_over(tmp_path: Path, tiny_data: Path, refusal: Refusal) -> None:
    run, _ = compared(tmp_path, tiny_data, None)
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("<html>my site</html>")
    assert "index.html is not a report; rename it" in refusal("report", run, "--out", page.parent)
    assert page.read_text() == "<html>my site</html>"
    Page("Run: a").write(page)
    assert main(["report", run, "--out", str(page.parent)]) == 0


def test_a_folder_without_runs_is_an_error(tmp_path: Path, refusal: Refusal) -> None:
    assert "holds neither a run" in refusal("report", tmp_path / "nothing")
