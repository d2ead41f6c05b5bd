"""Whether a run can continue a checkpoint, and what a start from one leaves out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness.errors import error_of
from harness.runs import assert_same_run, back_to
from harness.tiny import TinyRun
from safetensors.torch import load_file, save_file

from dwt_ds.base.locks import LOCK_NAME
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint
from dwt_ds.run.resume import adaptive_before, check_can_resume

WITHOUT_GROWTH = """
import sys
from dwt_ds.pretrain import main
from dwt_ds.run import models
models.grow = models.load_masked_lm = None
sys.exit(main())
"""


def values(stage: int = 2, optimizer: str = "AdamW", zero: Any = None, **precision: Any) -> dict[str, Any]:
    """A DeepSpeed JSON."""
    return {"zero_optimization": {"stage": stage, **(zero or {})}, "optimizer": {"type": optimizer}, **precision}


def at_80(written: dict[str, Any]) -> NewestCheckpoint:
    """A checkpoint that two ranks wrote."""
    manifest = {"world_size": 2, "state": {"step": 80, "rows": 320}, "settings": {"deepspeed": written}}
    return NewestCheckpoint(Path("step_00000080"), [], manifest)


def check(
    checkpoint: NewestCheckpoint | None = None,
    *,
    ranks: int = 2,
    rows_per_step: int = 4,
    ds_values: dict[str, Any] | None = None,
    **length: Any,
) -> None:
    """Of two ranks under ZeRO-2 and steps of 4 rows before and now, unless it says otherwise; an epoch has 480 rows."""
    train, ds_values = TrainConfig(**length), ds_values or values()
    steps = train.max_steps or math.ceil((train.epochs or 0) * 480 / rows_per_step)
    settings = {"config": RunConfig(train=train), "total_steps": steps, "rows_per_step": rows_per_step}
    settings["corpus"] = SimpleNamespace(rows=480)
    ds = SimpleNamespace(zero_stage=ds_values["zero_optimization"]["stage"])
    resolved = SimpleNamespace(**settings, world_size=ranks, ds=ds, ds_values=ds_values)
    check_can_resume(checkpoint or at_80(ds_values), resolved)  # type: ignore[arg-type]


def test_a_run_shorter_than_its_checkpoint_is_refused() -> None:
    check(max_steps=80)
    check(NewestCheckpoint(None, [], {}), max_steps=50)
    assert error_of(check, max_steps=50) == (
        "train.max_steps=50: step_00000080 is at step 80 of a longer run, this one would have 50; "
        "set train.max_steps=80 or more, or choose another output_dir"
    )
    with pytest.raises(ValueError, match=r"^train.epochs=0.5: .* this one would have 60; set train.max_steps=80 or"):
        check(epochs=0.5)


def test_epochs_are_refused_where_steps_had_another_number_of_rows() -> None:
    """320 rows are taken: of the 960 of two epochs, 640 are left, which are 80 steps of 8 rows, or 214 of 3."""
    check(epochs=2)
    for rows_per_step, steps, length in ((8, 120, 160), (3, 320, 294)):
        check(rows_per_step=rows_per_step, max_steps=length)
        assert error_of(check, rows_per_step=rows_per_step, epochs=2) == (
            f"train.epochs=2: the 80 steps of step_00000080 took 320 rows, and a step has {rows_per_step} now, so that "
            f"{steps} steps are not 2 epochs; keep micro-batch x accumulation x ranks, or set "
            f"train.max_steps={length}, which comes to 2 epochs"
        )


@pytest.mark.parametrize(
    ("optimizer", "params", "may"),
    [
        ("AdamW", {"torch_adam": True}, True),
        ("Adam", {}, True),
        ("apex.FusedAdam", {}, True),
        ("AdamW", {"torch_adam": True, "amsgrad": True}, False),
        ("Muon", {}, False),
        ("Lion", {}, False),
    ],
)
def test_only_adams_state_moves_to_another_number_of_ranks(optimizer: str, params: dict[str, Any], may: bool) -> None:
    now = values(optimizer=optimizer)
    now["optimizer"]["params"] = params
    check(max_steps=80, ds_values=now)
    if may:
        check(max_steps=80, ds_values=now, ranks=4)
        return
    with pytest.raises(ValueError, match=f"this run has 4: .* not {optimizer}'s here; start it with 2$"):
        check(max_steps=80, ds_values=now, ranks=4)


@pytest.mark.parametrize(("share", "idle"), [(0.25, 60.0), (0.01, 0.0)])
def test_how_long_a_weight_was_low_counts_under_the_same_rule_only(share: float, idle: float) -> None:
    state = {"hard": 3.0, "soft": 1.0, "count": 50.0, "teacher_loss": 3.0, "idle_steps": 60.0}
    manifest = {
        "settings": {"teacher": {"release_below_share": 0.25}},
        "state": {"step": 1999, "rows": 9, "adaptive": state},
    }
    checkpoint = NewestCheckpoint(Path("step_00001999"), [], manifest)
    facts = SimpleNamespace(settings={"teacher": {"release_below_share": share}})
    assert adaptive_before(checkpoint, facts) == {**state, "idle_steps": idle}  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_1_and_2_alone_resume_on_another_number_of_ranks(stage: int) -> None:
    check(max_steps=80, ds_values=values(stage))
    if stage in (1, 2):
        check(max_steps=80, ds_values=values(stage), ranks=4)
        return
    said = f"ZeRO-{stage} cannot resume on a different number of ranks; start it with 2"
    with pytest.raises(ValueError, match=f"^step_00000080 was written by 2 ranks, this run has 4: {said}$"):
        check(max_steps=80, ds_values=values(stage), ranks=4)


BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True}}


@pytest.mark.parametrize(
    ("written", "now"),
    [
        (values(1), values(2)),
        (values(2), values(1)),
        (values(3), values(3, "Adam")),
        (values(2, "adamw", bfloat16={"enabled": True}), values(2, "AdamW", **BF16)),
        (values(2), values(2, zero={"sub_group_size": 40, "parameter_alignment": False})),
        (values(3), values(3, zero={"sub_group_size": 1_000_000_000, "parameter_alignment": True})),
    ],
)
def test_checkpoints_that_deepspeed_reads_alike_are_continued(written: dict[str, Any], now: dict[str, Any]) -> None:
    check(at_80(written), ds_values=now, max_steps=80)


@pytest.mark.parametrize(
    ("written", "now", "said"),
    [
        (values(2), values(3), "ZeRO-3, fp32 and AdamW, and step_00000080 was written with ZeRO-2, fp32 and AdamW"),
        (values(2), values(0), "ZeRO-0, fp32 and AdamW, and step_00000080 was written with ZeRO-2, fp32 and AdamW"),
        (values(), values(**BF16), "ZeRO-2, bf16 and AdamW, and step_00000080 was written with ZeRO-2, fp32 and AdamW"),
        (values(**FP16), values(), "ZeRO-2, fp32 and AdamW, and step_00000080 was written with ZeRO-2, fp16 and AdamW"),
        (values(2, "Muon"), values(), "fp32 and AdamW, and step_00000080 was written with ZeRO-2, fp32 and Muon"),
    ],
)
def test_another_stage_precision_or_optimizer_is_refused(
    written: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^deepspeed_config='.*': .*{said}; resume with the DeepSpeed settings that"):
        check(at_80(written), ds_values=now, max_steps=80)


@pytest.mark.parametrize(
    ("stage", "key", "value", "default"),
    [
        (1, "parameter_alignment", True, "false"),
        (2, "parameter_alignment", True, "false"),
        (3, "sub_group_size", 40, "1000000000"),
    ],
)
def test_another_cut_of_the_state_is_refused(stage: int, key: str, value: Any, default: str) -> None:
    """DeepSpeed would raise while it loads, with the folder's settings already replaced."""
    cut = values(stage, zero={key: value})
    check(at_80(cut), ds_values=cut, max_steps=80)
    said = f"zero_optimization.{key}={json.dumps(value)}: step_00000080 was written with {default}, .* to {default},"
    with pytest.raises(ValueError, match=f"^{said} or choose"):
        check(at_80(values(stage)), ds_values=cut, max_steps=80)
    with pytest.raises(ValueError, match=f"{key}={default}: .* set it to {json.dumps(value)}, or"):
        check(at_80(cut), ds_values=values(stage), max_steps=80)


def test_a_refused_resume_leaves_the_folder_as_it_was(tiny_run: TinyRun, tmp_path: Path) -> None:
    """On all ranks alike; then it goes on under ZeRO-1, whose files are those of ZeRO-2."""
    settings = ["deepspeed.zero_optimization.overlap_comm=false"]
    tiny_run(tmp_path, *settings, ranks=2)
    longer = [*settings, "train.max_steps=6", "train.checkpoint_every=2"]
    before = contents(tmp_path)
    for change in (
        "deepspeed.zero_optimization.stage=3",
        "deepspeed.bf16.enabled=true",
        "deepspeed.optimizer.type=Muon",
    ):
        output = tiny_run(tmp_path, *longer, change, ranks=2, code=2)
        assert "Traceback" not in output
        assert output.count("error: ") == 1
        assert "was written with ZeRO-2, fp32 and AdamW; resume with" in output
        assert contents(tmp_path) == before
    assert "at step 4" in tiny_run(tmp_path, *longer, "deepspeed.zero_optimization.stage=1", ranks=2)


def test_other_weights_at_the_teachers_path_are_reported(tiny_run: TinyRun, tiny_teacher: Path, tmp_path: Path) -> None:
    """No setting tells of them."""
    teacher, run = shutil.copytree(tiny_teacher, tmp_path / "teacher"), tmp_path / "run"
    changed = f"changed since that checkpoint: the weights in {teacher}"
    for steps, told in ((2, False), (3, False), (4, True)):
        if told:
            weights = {name: 0.5 * weight for name, weight in load_file(teacher / "model.safetensors").items()}
            save_file(weights, teacher / "model.safetensors", {"format": "pt"})
        output = tiny_run(run, f"teacher.path={teacher}", f"train.max_steps={steps}")
        assert (changed in output) == told, output


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the lock."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK_NAME}


def test_a_student_is_grown_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A checkpoint replaces all that a resume would grow, from weights of the teacher that it would load once more."""
    settings = ["train.max_steps=4", "train.log_every=1", "train.checkpoint_every=2", "train.keep_last=9"]
    settings += ["student.init=stack", "student.hidden_size=16", "student.intermediate_size=32"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    tiny_run(run, *settings)
    back_to(2, run, resumed)
    program = ("-c", WITHOUT_GROWTH)
    assert "at step 2" in tiny_run(resumed, *settings, program=program)
    assert_same_run(resumed, run)
    assert "'NoneType' object is not callable" in tiny_run(tmp_path / "new", *settings, program=program, code=1)
