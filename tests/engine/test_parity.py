"""Several ranks under ZeRO-2 train as one plain process on the whole global batch would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.runs import rows_of
from harness.tiny import TinyRun, prepare_tiny
from transformers import AutoModelForMaskedLM

from dwt_ds.config.objective import SoftPositions
from dwt_ds.config.schema import DataConfig, StudentConfig
from dwt_ds.data.batches import Batch, StepBatches, validation_batches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.engine.student import with_monitors_in
from dwt_ds.models.build import build_student

STEPS, SEED, LEARNING_RATE, CLIP, SOFT_WEIGHT, TEMPERATURE = 20, 3, 2e-3, 0.5, 2.0, 1.7
# Few labels, drawn one by one: counts differ over ranks and micro-batches, and some ranks have none at all.
MASKING = DataConfig(mask_probability=0.02, label_draw="bernoulli")
SETTINGS = [
    f"seed={SEED}",
    "student.dropout=0",
    f"distill.soft_weight={SOFT_WEIGHT}",
    f"distill.temperature={TEMPERATURE}",
    f"data.mask_probability={MASKING.mask_probability}",
    f"data.label_draw={MASKING.label_draw}",
    f"train.max_steps={STEPS}",
    f"train.learning_rate={LEARNING_RATE}",
    f"train.max_grad_norm={CLIP}",
    "train.weight_decay=0.01",
    "train.warmup_ratio=0.25",
]


def losses(rows: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [row[key] for row in rows if "loss" in row]


def global_batches(
    data: PreparedData,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    soft_positions: SoftPositions = "labelled",
) -> list[list[Batch]]:
    """By step, the micro-batches of all ranks."""
    of_rank = [
        StepBatches(
            data.train,
            data.facts,
            MASKING,
            seed=SEED,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            soft_positions=soft_positions,
        )
        for rank in range(world_size)
    ]
    return [[batch for batches in of_rank for batch in batches[step]] for step in range(STEPS)]


@pytest.fixture(scope="module")
def padded_data(tiny_text: Path, tiny_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_data`, but with the end of every document padded."""
    options = ("--keep-documents-apart", "--validation", "0.1")
    return prepare_tiny(tmp_path_factory.mktemp("padded") / "data", tiny_text, tiny_vocabulary, *options)


@pytest.mark.parametrize(
    ("positions", "folder"),
    [("labelled", "tiny_data"), pytest.param(0.3, "tiny_data", marks=pytest.mark.slow), ("all", "padded_data")],
)
def test_two_ranks_equal_plain_adamw(
    positions: SoftPositions,
    folder: str,
    tiny_run: TinyRun,
    tiny_teacher: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    data = PreparedData.open(request.getfixturevalue(folder))
    overrides = ["train.micro_batch_size=1", "train.gradient_accumulation_steps=2", f"data.dir={data.folder}"]
    tiny_run(tmp_path / "run", *SETTINGS, *overrides, f"distill.soft_positions={positions}", ranks=2)
    rows = rows_of(tmp_path / "run")
    trained = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "export")

    # The rows of "all" are found here.
    drawn: SoftPositions = "labelled" if positions == "all" else positions
    steps = global_batches(data, micro_batch_size=1, accumulation=2, world_size=2, soft_positions=drawn)
    padded = sum(batch.token_count < 31 for step in steps for batch in step)
    assert padded > 20 if folder == "padded_data" else padded < 2
    per_rank = [[sum(len(b.labels) for b in step[:2]), sum(len(b.labels) for b in step[2:])] for step in steps]
    assert any(0 in counts and sum(counts) > 0 for counts in per_rank), "the test wants a rank without labels"
    assert any(counts[0] != counts[1] for counts in per_rank)

    torch.manual_seed(SEED)
    shape = StudentConfig(layers=2, hidden_size=32, num_heads=2, max_positions=32, dropout=0.0)
    tokenizer = data.tokenizer()
    plain = build_student(shape, vocab_size=len(tokenizer), seq_len=32, pad_token_id=tokenizer.pad_token_id)
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher).eval()
    expected_losses = train_plainly(plain, teacher, steps, losses(rows, "learning_rate"), positions)

    torch.testing.assert_close(losses(rows), expected_losses, rtol=0, atol=1e-5)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    ours = trained.state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def train_plainly(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    steps: list[list[Batch]],
    learning_rates: list[float],
    positions: SoftPositions,
) -> list[float]:
    """AdamW on the mean over each step's whole global batch, by the formula and full logits; the losses."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=0.01)
    losses = []
    for step, learning_rate in zip(steps, learning_rates):
        hard_count = sum(len(batch.labels) for batch in step)
        soft_count = sum(batch.token_count if positions == "all" else len(batch.positions) for batch in step)
        loss = torch.zeros(())
        for batch in step:
            logits = all_logits(student, batch)
            with torch.no_grad():
                teacher_logits = all_logits(teacher, batch)
            hard = F.cross_entropy(logits[batch.positions[: len(batch.labels)]], batch.labels, reduction="sum")
            rows = real_tokens(batch) if positions == "all" else batch.positions
            soft = divergence(teacher_logits[rows], logits[rows])
            loss = loss + hard / max(hard_count, 1) + SOFT_WEIGHT * soft / max(soft_count, 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def all_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(B x S, V)."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)


def real_tokens(batch: Batch) -> torch.Tensor:
    """(B x S,) bool."""
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return mask.flatten().bool()


def divergence(teacher_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) at the temperature, summed over the rows."""
    teacher_log, student_log = (F.log_softmax(each / TEMPERATURE, -1) for each in (teacher_logits, logits))
    return (teacher_log.exp() * (teacher_log - student_log)).sum()


def test_one_rank_equals_two_at_the_same_global_batch(
    tiny_run: TinyRun, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """And both look at the held-out text as plain models do; the second of two ranks has the fewer rows of it."""
    settings = [*SETTINGS, "train.micro_batch_size=2", "train.eval_rows=13"]
    said = {"two": tiny_run(tmp_path / "two", *settings, ranks=2)}
    said["one"] = tiny_run(tmp_path / "one", *settings, "train.gradient_accumulation_steps=2")
    two, one = (rows_of(tmp_path / name) for name in said)
    assert losses(one, "tokens") == losses(two, "tokens")
    torch.testing.assert_close(losses(one), losses(two), rtol=0, atol=1e-5)

    data = PreparedData.open(tiny_data)
    whole = {"micro_batch_size": 13, "max_rows": 13, "rank": 0, "world_size": 1}
    [batch] = validation_batches(data.validation, data.facts, MASKING, **whole)
    with torch.no_grad():
        teacher_logits = all_logits(AutoModelForMaskedLM.from_pretrained(tiny_teacher).eval(), batch)[batch.positions]
        for name, rows in (("one", one), ("two", two)):
            exported = AutoModelForMaskedLM.from_pretrained(tmp_path / name / "export").eval()
            logits = all_logits(exported, batch)[batch.positions]
            [held_out] = [row for row in rows if "eval_hard_loss" in row]
            assert held_out["eval_hard_loss"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), abs=1e-5)
            soft = divergence(teacher_logits, logits).item() / len(batch.labels)
            assert held_out["eval_soft_loss"] == pytest.approx(soft, abs=1e-5)
            of_teacher = re.search(r"teacher: .*held-out MLM loss ([\d.]+)", said[name])
            assert of_teacher is not None
            expected = F.cross_entropy(teacher_logits, batch.labels).item()
            assert float(of_teacher[1]) == pytest.approx(expected, abs=6e-5)


@pytest.fixture(scope="module")
def monitored_run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("monitored")
    monitors = [
        f"deepspeed.{name}={{enabled: true, output_path: {folder / name}, job_name: job}}"
        for name in ("csv_monitor", "tensorboard")
    ]
    tiny_run(folder / "run", *SETTINGS, *monitors)
    return folder, rows_of(folder / "run")


def test_learning_rate_rises_and_falls_linearly(monitored_run: tuple[Path, list[dict[str, Any]]]) -> None:
    rates = losses(monitored_run[1], "learning_rate")
    rising = [k / 5 for k in range(1, 6)]
    falling = [(STEPS + 1 - k) / (STEPS + 1 - 5) for k in range(6, STEPS + 1)]
    assert rates == pytest.approx([LEARNING_RATE * share for share in rising + falling])


def test_files_of_monitors_are_in_the_runs_folder_unless_the_json_says_where(tmp_path: Path) -> None:
    """Two runs would append to one file."""
    written = {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True, "output_path": "logs"}, "bf16": {}}
    placed = with_monitors_in(tmp_path, written)
    assert placed == {**written, "csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    assert with_monitors_in(tmp_path, {"tensorboard": {"output_path": ""}})["tensorboard"]["output_path"] == str(
        tmp_path
    )
    assert written["csv_monitor"] == {"enabled": True}, "ds_config.json names no folder, and serves another run"


def test_monitor_sections_of_the_json_get_the_metrics(monitored_run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = monitored_run
    written = (folder / "csv_monitor" / "job" / "Train_Samples_soft_loss.csv").read_text().split()[1:]
    assert [float(line.split(",")[1]) for line in written] == pytest.approx(losses(rows, "soft_loss"))
    assert list((folder / "csv_monitor" / "job").glob("*eval_hard_loss.csv"))
    yes_or_no = (folder / "csv_monitor" / "job" / "Train_Samples_teacher_active.csv").read_text().split()[1:]
    assert {line.split(",")[1] for line in yes_or_no} == {"1"}
    assert list((folder / "tensorboard" / "job").glob("events.out.tfevents.*"))
