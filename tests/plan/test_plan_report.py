"""What `dwt-ds plan` prints about settings, memory and speed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from harness.plans import plan

from dwt_ds.cli.main import main
from dwt_ds.plan.settings import resolve_plan

OFFLOAD = "offload: transfers and the optimizer on the CPU are not counted"


pytestmark = pytest.mark.usefixtures("empty_folder")


def test_all_settings_as_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.max_steps=30"]
    _, _, after = plan(capsys, "paper_weak", "--config", *overrides).partition("\nrecipe, resolved\n")
    recipe, _, values = after.partition("\nDeepSpeed JSON, resolved (zero2_bf16.json)\n")
    settings = resolve_plan("paper_weak", overrides, None, 8)
    assert yaml.safe_load(recipe) == settings.config.to_dict()
    assert json.loads(values) == settings.ds_values
    assert "auto" not in values
    assert "resolved" not in plan(capsys, "paper_weak", *overrides)


def test_every_part_is_shown_at_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "paper_weak")
    for part in ("activations", "gradients", "temporaries", "loss: logits, head gradients"):
        assert re.search(rf"\n  {part}( +[\d.,]+){{4}}\n", text), part
    assert re.search(r"\n  peak( +[\d.,]+){4}\n", text)
    assert "the parts do not all peak at once" in text


@pytest.mark.parametrize(
    ("steps", "every", "keep_last", "keep_every", "export_every", "kept", "on_the_way"),
    [
        (1000, 100, 2, 0, 0, 0, 0),
        # Of 300 and 600, both older than 800 and 900; the last one is being written.
        (1000, 100, 2, 300, 400, 2, 2),
        (1000, 100, 1, 300, 500, 2, 1),
        (950, 100, 1, 100, 475, 8, 1),
        (1000, 0, 2, 100, 0, 0, 0),
    ],
)
def test_disk_space_is_that_of_all_that_is_kept(
    steps: int,
    every: int,
    keep_last: int,
    keep_every: int,
    export_every: int,
    kept: int,
    on_the_way: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"checkpoint_every": every, "keep_last": keep_last, "keep_every": keep_every, "export_every": export_every}
    overrides = [f"train.{name}={value}" for name, value in {"max_steps": steps, **given}.items()]
    found = re.search(
        r"checkpoint ([\d.]+) GiB, export ([\d.]+) GiB; ([\d.]+) GiB are enough to keep (.*)\n",
        plan(capsys, "paper_weak", *overrides),
    )
    assert found
    one, export, most = map(float, found.groups()[:3])
    assert most == pytest.approx((keep_last + 1 + kept) * one + (1 + on_the_way) * export, rel=0.01)
    older = f", {kept} older ones (train.keep_every)" if kept else ""
    exports = f", {on_the_way} exports on the way (train.export_every)" if on_the_way else ""
    assert found[4] == f"{keep_last} checkpoints while the next is written{older}{exports}"


def test_the_plan_says_what_its_time_counts(capsys: pytest.CaptureFixture[str]) -> None:
    plain = plan(capsys, "paper_weak")
    assert OFFLOAD not in plain
    assert "release" not in plain, "a constant weight keeps its teacher"
    assert "recomputed" not in plain
    graph = "operations a step, the student's and the teacher's passes as CUDA graphs, at 41.5 us"
    assert graph in plain
    unknown = "the adaptive weight may release the teacher; it is counted to the end (--release-at SHARE: until then)"
    assert unknown not in plain
    others = ["train.activation_checkpointing=true", "distill.soft_weight={schedule: adaptive, start: 4}"]
    others.append("train.cuda_graphs=off")
    text = plan(capsys, "paper_weak", *others, "--deepspeed_config", "zero2_offload")
    assert "operations a step, at 41.5 us" in text
    assert unknown in text
    assert OFFLOAD in text
    assert re.search(r"[\d.]+ GFLOP per row recomputed \(activation checkpointing\): time only", text)


def test_rows_from_which_the_device_needs_longer_than_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """More rows take the device longer, and the host as long as before."""
    rows = r"more than the device needs; from about ([\d,]+) rows per micro-batch the device needs longer"
    for settings in ([], ["train.cuda_graphs=off"]):
        found = re.search(rows, plan(capsys, "paper_weak", *settings))
        assert found
        needed = int(found[1])
        assert needed > 16
        assert re.search(rows, plan(capsys, "paper_weak", *settings, f"train.micro_batch_size={needed - 1}"))
        assert not re.search(rows, plan(capsys, "paper_weak", *settings, f"train.micro_batch_size={needed}"))
    assert not re.search(rows, plan(capsys, "paper_weak_h100"))


def test_autocast_computes_at_the_rate_of_16_bits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deepspeed_config=zero2_fp32", "teacher.path=null"]
    for further, peak in (([], 67), (["deepspeed.torch_autocast={enabled: true, dtype: bfloat16}"], 989)):
        assert f" of {peak} TFLOP/s per rank" in plan(capsys, "paper_weak", "--gpu", "h100", *words, *further)


def test_an_attention_that_this_machine_lacks_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "student.attention=flash_attention_2"
    assert " per rank" in plan(capsys, "paper_weak", "--gpu", "h100", "teacher.path=null", asked)
    words = ["plan", "paper_weak", "--gpu", "h100", "teacher.path=null", "student.family=deberta-v2", asked]
    assert main(words) == 2, "this family has it on no machine"
    assert "student.attention='flash_attention_2': DebertaV2ForMaskedLM does not" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["megatron-bert", "nystromformer", "rembert", "roformer"])
def test_a_family_that_asks_whether_its_mask_is_all_ones_is_planned(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["student.layers=1", "student.hidden_size=32", "student.num_heads=2", "student.max_positions=128"]
    output = plan(capsys, "paper_alone", f"student.family={family}", *small)
    assert re.search(rf"student  {family}, 1 x 32, [\d,]+ parameters", output)


def test_a_teacher_that_is_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of it would end at once; one that is not there yet may still be trained."""
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for path in (str(tmp_path), f"~/{tmp_path.name}"):
        assert main(["plan", "paper_weak", f"teacher.path={path}"]) == 2
        assert f"model path '{tmp_path}' has no config.json" in capsys.readouterr().err
    assert "assumed, since" in plan(capsys, "paper_weak", f"teacher.path={tmp_path}/export")


def test_memory_and_time_before_and_after_the_teachers_release(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["paper_weak", "student.layers=1", "student.hidden_size=64", "student.num_heads=1", "--gpu", "cpu"]
    adaptive = [*small, "distill.soft_weight={schedule: adaptive, start: 4}"]
    unknown, half = plan(capsys, *adaptive), plan(capsys, *adaptive, "--release-at", "0.5")
    assert "the adaptive weight may release the teacher" in unknown
    assert "the adaptive weight may" not in half
    assert re.search(r"teacher released after 50% of the steps: [\d.]+ ms per step from there on", half)
    assert hours(half) < hours(unknown)
    alone = plan(capsys, *small, "teacher.path=null")
    before, after, lone = peaks(half, "peak"), peaks(half, "peak after the teacher's release"), peaks(alone, "peak")
    assert after == lone
    assert all(less < more for less, more in zip(after, before))
    assert "release" not in alone
    never_loaded = plan(capsys, *small, "distill.soft_weight=0")
    assert peaks(never_loaded, "peak") == lone
    assert peaks(never_loaded, "largest micro-batch") == peaks(alone, "largest micro-batch")


def test_the_time_of_a_step_after_the_release_is_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """So few rows that the host limits."""
    few = [
        "paper_weak",
        "student.layers=2",
        "train.micro_batch_size=2",
        "train.cuda_graphs=off",
        "train.max_steps=3600000",
    ]
    text, alone = plan(capsys, *few, "--release-at", "0.5"), plan(capsys, *few, "teacher.path=null")
    found = re.search(
        r"teacher released .*: ([\d.]+) ms per step from there on, ([\d.]+) before, waiting included", text
    )
    assert found
    after, before = map(float, found.groups())
    assert after == pytest.approx(hours(alone), abs=0.06)  # of so many steps, as many hours as milliseconds of one
    assert (before + after) / 2 == pytest.approx(hours(text), abs=0.06)
    # Never there, it takes no time and sends nothing.
    sections = "\nspeed\n.*(?=\ndisk)"
    never, alone_again = (
        re.search(sections, plan(capsys, *few, each), re.DOTALL)
        for each in ("distill.soft_weight=0", "teacher.path=null")
    )
    assert never
    assert alone_again
    assert never[0] == alone_again[0]


def hours(text: str) -> float:
    found = re.search(r"([\d.,]+) hours", text)
    assert found is not None
    return float(found[1].replace(",", ""))


def peaks(text: str, name: str) -> list[float]:
    found = re.search(rf"\n  {name}((?: +[\d.,]+){{4}})\n", text)
    assert found is not None
    return [float(cell.replace(",", "")) for cell in found[1].split()]
