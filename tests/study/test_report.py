from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from dwt_ds.cli.main import main
from dwt_ds.config.recipe import load_recipe, parse_run_config
from dwt_ds.models.build import student_model_config
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import load_grid
from dwt_ds.study.records import RunRecord, by_series, differing_settings, mean_and_deviation
from dwt_ds.study.results import first_reached, flops_per_token, saving
from dwt_ds.study.scores import glue_scores


def write_run(folder: Path, losses: dict[int, float], config: dict[str, object], *, finished: bool = True) -> None:
    """A run folder with a logged step and an evaluation at each step of `losses`; 100 tokens and 1 s a step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rows = []
    for step, loss in losses.items():
        each = {"loss": loss, "hard_loss": loss + 0.1, "soft_loss": 0.2, "soft_weight": 1.0}
        rows.append({"step": step, **each, "tokens": 100 * step, "elapsed_seconds": float(step)})
        rows.append({"step": step, "eval_hard_loss": loss, "eval_soft_loss": 0.2})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9', encoding="utf-8"
    )
    if finished:
        (folder / "complete.json").write_text('{"steps": 12}', encoding="utf-8")


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
    for name in ("figure_2.png", "figure_2_paper.png", "all_eval_hard_loss_tokens.png", "all_less_alone_step.png"):
        assert (study / "report" / "figures" / "teacher_quality" / name).stat().st_size > 5000
    assert "student.layers" in html
    table = (study / "report" / "results.md").read_text(encoding="utf-8")
    assert "| with teacher4 | 4.8300 ± 0.0141 | -0.2000 ± 0.0000 |" in table


def test_the_saving_is_given_in_tokens_and_operations(study: Path) -> None:
    for config in study.glob("*/config.yaml"):
        student = parse_run_config(yaml.safe_load(config.read_text())).student
        sizes = {"vocab_size": 298, "seq_len": 32, "pad_token_id": 0}
        student_model_config(student, **sizes).save_pretrained(config.parent / "export")
    assert main(["report", str(study)]) == 0
    rows = [line.split(" | ") for line in (study / "report" / "results.md").read_text(encoding="utf-8").splitlines()]
    head, table = rows[2], {row[0].removeprefix("| "): row for row in rows[4:]}
    columns = [head.index(f"{unit} {what}") for what in ("to its final loss", "saved") for unit in ("tokens", "FLOPs")]
    runs = {name: RunRecord(name, study / name) for name in ("alone-s1", "with_teacher4-s1")}
    alone, helped = flops_per_token(runs["alone-s1"]), flops_per_token(runs["with_teacher4-s1"])
    assert alone is not None
    assert helped is not None
    # 1,200 tokens; from 6.0 at step 8 to 4.82 at step 12, or 4.84: the lone student's 5.02, or 5.04, after 11.3 steps.
    tokens = 100 * (8 + 4 * 0.98 / 1.18), 100 * (8 + 4 * 0.96 / 1.16)
    assert [table["alone"][each] for each in columns] == ["0.00 M", f"{1200 * alone:.2e}", "", ""]
    mean, shares = sum(tokens) / 2, [100 * (1 - each / 1200) for each in tokens]
    in_flops = [100 * (1 - each * helped / (1200 * alone)) for each in tokens]
    assert [table["with teacher4"][each] for each in columns] == [
        "0.00 M",
        f"{mean * helped:.2e}",
        f"{sum(shares) / 2:.0f} ± 0%",
        f"{sum(in_flops) / 2:.0f} ± 0%",
    ]


def test_a_study_in_progress_can_be_drawn(study: Path) -> None:
    grid = load_grid("teacher_quality", "smoke", [1, 2])
    for run in grid.runs[1:]:
        (study / run.name / "complete.json").unlink()
        if run.teacher_run:
            (study / run.name / "metrics.jsonl").unlink()
    assert main(["report", str(study), "--out", str(study / "now")]) == 0
    assert "1 of 11 runs are finished" in (study / "now" / "index.html").read_text(encoding="utf-8")


def test_a_runs_report(study: Path, tmp_path: Path) -> None:
    assert main(["report", str(study / "with_teacher2-s1"), "--out", str(tmp_path / "report")]) == 0
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "held-out MLM loss 5.0200 at step 12<" in html
    assert html.count("<img") == 10  # three losses by steps, tokens and seconds; the weight by steps
    assert "student.family" in html


def test_a_folder_without_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "holds neither a run" in capsys.readouterr().err


def test_where_a_loss_is_first_reached() -> None:
    assert first_reached([0, 10, 20], [6.0, 5.0, 4.0], 4.5) == 15.0
    assert first_reached([0, 10, 20], [6.0, 5.0, 5.5], 5.0) == 10.0
    assert first_reached([5, 10], [4.0, 3.0], 4.5) == 5.0
    assert first_reached([0, 10, 20], [6.0, 5.0, 4.0], 3.9) is None


def test_tokens_and_operations_saved(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    student = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    runs = {}
    for name, teacher, losses in (
        ("alone", None, {10: 6.0, 20: 5.0}),
        ("helped", str(tiny_teacher), {10: 5.5, 20: 4.5}),
    ):
        config = {
            "seed": 1,
            "data": {"dir": str(tiny_data)},
            "teacher": {"path": teacher},
            "distill": {"soft_positions": "labelled"},
        }
        write_run(tmp_path / name, losses, config)  # type: ignore[arg-type]
        BertForMaskedLM(student).save_pretrained(tmp_path / name / "export")
        runs[name] = RunRecord(name, tmp_path / name)
    found = saving(runs["helped"], runs["alone"])
    # 5.0 is half-way between step 10 and step 20.
    assert found.tokens == 1500.0
    assert found.tokens_saved == pytest.approx(0.25)
    ours, theirs = flops_per_token(runs["helped"]), flops_per_token(runs["alone"])
    assert ours is not None
    assert theirs is not None
    # By hand, 3 passes x 2 a token: a whole layer; the last one, whose output and feed-forward see only the 5 of 32
    # tokens that reach the head; the head. Rows are filled to 99.6%.
    layer, labelled = 4 * 32 * 32 + 2 * 32 * 128 + 2 * 32 * 32, 5 / 32
    last = 3 * 32 * 32 + 2 * 32 * 32 + labelled * (32 * 32 + 2 * 32 * 128)
    head = labelled * (32 * 32 + 32 * len(tokenizer))
    assert theirs == pytest.approx(6 * (layer + last + head) / 0.9963, rel=0.01)
    assert theirs < ours < 1.2 * theirs
    assert found.flops_saved == pytest.approx(1 - 0.75 * ours / theirs)


def test_settings_that_differ(tmp_path: Path) -> None:
    for name, weight in (("a", 1.0), ("b", 4.0)):
        write_run(
            tmp_path / name, {1: 5.0}, {"seed": 1, "output_dir": name, "distill": {"soft_weight": {"start": weight}}}
        )
    rows = differing_settings([RunRecord("a", tmp_path / "a"), RunRecord("b", tmp_path / "b")])
    assert rows == [("distill.soft_weight.start", "1.0", "4.0")]


def test_seeds_of_a_series_come_together() -> None:
    names = ("with_teacher4-4to1-s42", "with_teacher4-4to1-s43", "alone-s42", "mine")
    groups = by_series([RunRecord(name, Path(name)) for name in names])
    assert {name: len(group) for name, group in groups.items()} == {"with teacher4, 4to1": 2, "alone": 1, "mine": 1}
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)


def test_the_score_of_a_checkpoint_is_the_mean_of_the_tasks_there_are() -> None:
    points = {"CoLA": {"0": 20.0, "1": 24.0, "2": 8.0}, "SST-2": {"0": 80.0, "1": 82.0}, "WNLI": {"0": 0.0, "1": 0.0}}
    tasks = {name: {"score": {"by_seed": by_seed}} for name, by_seed in points.items()}
    assert glue_scores({"mean_of_seven": {"by_seed": {}}, "tasks": tasks}) == [50.0, 53.0]
    assert glue_scores({"mean_of_seven": {"by_seed": {"0": 77.0}}, "tasks": tasks}) == [77.0]
    assert glue_scores({"mean_of_seven": {"by_seed": {}}, "tasks": {"WNLI": tasks["WNLI"]}}) == []
