"""Tokens, operations and seconds of a training, and what another one saves of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness.runs import change_rows, flops_per_token, write_run
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from dwt_ds.config.recipe import parse_run_config
from dwt_ds.data.overlap import Overlap
from dwt_ds.plan.vocabulary import measure_overlap
from dwt_ds.study.costs import UNITS, saved_share, spent_until
from dwt_ds.study.records import RunRecord
from dwt_ds.study.savings import first_reached, saving


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
    for name, teacher, losses, positions in (
        ("alone", None, {10: 6.0, 20: 5.0}, 0.3),
        ("helped", str(tiny_teacher), {10: 5.5, 20: 4.5}, "labelled"),
        ("denser", str(tiny_teacher), {10: 5.5, 20: 4.5}, 0.3),
    ):
        config = {
            "seed": 1,
            "data": {"dir": str(tiny_data)},
            "teacher": {"path": teacher},
            "distill": {"soft_positions": positions},
        }
        write_run(tmp_path / name, losses, config)  # type: ignore[arg-type]
        BertForMaskedLM(student).save_pretrained(tmp_path / name / "export")
        runs[name] = RunRecord(name, tmp_path / name)
    found = saving(runs["helped"], runs["alone"])
    # 5.0 is half-way between step 10 and step 20.
    assert found is not None
    assert found.spent.tokens == 1500.0
    tokens, flops, seconds = (saved_share(found.spent, found.other, unit) for unit in UNITS)
    assert tokens == seconds == pytest.approx(0.25)
    assert found.spent_with_teacher is None, "nobody knows what made it"
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
    assert flops == pytest.approx(1 - 0.75 * ours / theirs)
    # 8 tokens more for the soft loss (round(0.3 x 27)) take part of the last layer, and the head, of both models.
    denser = flops_per_token(runs["denser"])
    assert denser is not None
    of_student, of_teacher = (2 * h * h + 2 * h * wide + h * len(tokenizer) for h, wide in ((32, 128), (16, 32)))
    assert denser - ours == pytest.approx(8 / 32 * (6 * of_student + 2 * of_teacher) / 0.9963, rel=0.01)
    # The tokens without the teacher cost what the lone student's do: after its release at step 10 or, in a run that was
    # made longer and has it again, before step 10.
    for name, with_teacher in (("helped", ours), ("denser", denser)):
        for active_at, taught in ((10, 1000), (20, 500)):
            change_rows(tmp_path / name, lambda row, step=active_at: row | {"teacher_active": row["step"] == step})
            released = saving(RunRecord(name, tmp_path / name), runs["alone"])
            assert released is not None
            assert released.spent.tokens == 1500.0
            assert released.spent.flops == pytest.approx(taught * with_teacher + (1500 - taught) * theirs)


def test_operations_are_not_known_where_the_data_was_prepared_again(tmp_path: Path, tiny_data: Path) -> None:
    """Rows of another length would cost something else."""
    known = json.loads((tiny_data / "manifest.json").read_text())["fingerprint"]
    for name, fingerprint in (("same", known), ("other", "0" * 64)):
        write_run(tmp_path / name, {10: 6.0}, {"seed": 1, "data": {"dir": str(tiny_data)}, "teacher": {"path": None}})
        (tmp_path / name / "run.json").write_text(json.dumps({"data": fingerprint}))
    same, other = (spent_until(RunRecord(name, tmp_path / name), 1000.0) for name in ("same", "other"))
    assert same.flops is not None
    assert other.flops is None


def test_what_a_teacher_with_another_vocabulary_shares_is_read_from_the_run(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    """Archives of metrics come without the data's rows."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    config = {
        "seed": 1,
        "data": {"dir": str(folder)},
        "student": {"family": "bert", "layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32},
        "teacher": {"path": str(tiny_teacher), "vocabulary": "shared"},
    }
    run = tmp_path / "run"
    write_run(run, {10: 6.0, 20: 5.0}, config)  # type: ignore[arg-type]
    measured = flops_per_token(RunRecord("run", run))
    overlap = measure_overlap(parse_run_config(config), BertConfig.from_pretrained(tiny_teacher))
    for part in ("train", "validation", "tokenizer"):
        shutil.rmtree(folder / part)
    assert flops_per_token(RunRecord("run", run)) is None
    found = []
    for each in (overlap, Overlap(100, 0.5, 2.0)):
        change_rows(run, lambda row, each=each: row | each.to_row() if "eval_hard_loss" in row else row)
        found.append(flops_per_token(RunRecord("run", run)))
    assert found[0] == measured
    assert found[1] not in (None, measured)
