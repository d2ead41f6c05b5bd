"""The edges of a run: ends that only one rank comes to, resumes at the very end, and what is left over elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from dwt_ds import assemble, export, pretrain, settle
from dwt_ds.config import RunConfig, StudentConfig, TrainConfig
from dwt_ds.data.prepared import PreparedData
from dwt_ds.engine import ranks
from dwt_ds.engine.student import leave_overflows_to_the_guard
from dwt_ds.export import write_export
from dwt_ds.guard import Guard, TooManySkipsError
from dwt_ds.manifest_files import problems, write_manifest
from dwt_ds.models.build import build_student
from dwt_ds.run import Run
from dwt_ds.run_folder import RunFolder

Launch = Callable[..., tuple[int, str]]

# The launcher's module: `dwt_ds.pretrain`, in which rank 1 fails as EDGE says.
FAILING = """
import os, sys, time
from dwt_ds import run
from dwt_ds.engine import ranks
from dwt_ds.pretrain import main

def fail(*arguments, **keywords):
    if os.environ["RANK"] == "1":
        raise ValueError("made up")
    return plain(*arguments, **keywords)

edge = os.environ["EDGE"]
owner = run.Run if edge == "begin_step" else run
plain = getattr(owner, edge)
setattr(owner, edge, fail)
# As NCCL does, which waits for ranks that do not come.
ranks.dist.destroy_process_group = lambda: time.sleep(3600)
sys.exit(main())
"""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How main() ended: "left" for the process group left, a number for an exit without that."""
    ends: list[Any] = []

    def leave_at_once(code: int) -> None:
        ends.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave_at_once)
    monkeypatch.setattr(ranks, "stop_ranks", lambda: ends.append("left"))
    monkeypatch.setattr("dwt_ds.stop.StopRequest.listen", lambda self: None)
    monkeypatch.setattr("faulthandler.enable", lambda file: None)
    return ends


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("a: b; c"), 2), (OSError("a"), 2), (ranks.OtherRankError("a"), 2)]
)
def test_a_mistake_before_the_first_step_is_no_crash(
    error: Exception, code: int, ends: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "assemble", failing(error))
    assert pretrain.main(["quickstart"]) == code
    assert ends == ["left"]


def test_too_many_skips_are_an_end_of_all_ranks(ends: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "assemble", lambda *_: object())
    monkeypatch.setattr(pretrain, "train", failing(TooManySkipsError("many")))
    assert pretrain.main(["quickstart"]) == 3
    assert ends == ["left"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("in a batch"), OSError("a file is gone")])
def test_an_error_in_training_ends_the_process_without_waiting(
    error: Exception, ends: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assemble, "assemble", lambda *_: object())
    monkeypatch.setattr(pretrain, "train", failing(error))
    with pytest.raises(SystemExit):
        pretrain.main(["quickstart"])
    assert ends == [1]
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert str(error) in told


@pytest.fixture
def launch_failing(launch: Launch, tmp_path: Path) -> Launch:
    (tmp_path / "failing_pretrain.py").write_text(FAILING, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def launch_failing(edge: str, arguments: list[str]) -> tuple[int, str]:
        return launch(2, arguments, module="failing_pretrain", environment={"EDGE": edge, "PYTHONPATH": path})

    return launch_failing


def test_one_rank_that_fails_in_a_step_ends_all(launch_failing: Launch, tiny_recipe: Path, tmp_path: Path) -> None:
    code, output = launch_failing("begin_step", [str(tiny_recipe), f"output_dir={tmp_path / 'run'}"])
    assert code != 0
    assert "ValueError: made up" in output


def test_a_crash_in_the_last_evaluation_costs_only_that(
    launch_failing: Launch, launch: Launch, tiny_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _ = launch_failing("held_out_loss", [str(tiny_recipe), f"output_dir={run}"])
    assert code != 0
    assert (run / "checkpoints" / "step_00000004" / "manifest.json").is_file()
    code, output = launch(2, [str(tiny_recipe), f"output_dir={run}"])
    assert code == 0, output
    assert "at step 4" in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "eval_hard_loss" in row) for row in rows] == [
        *((step, False) for step in (1, 2, 3, 4)),
        (4, True),
    ]
    assert (run / "export" / "model.safetensors").is_file()
    assert RunFolder(str(run)).finished_steps() == 4


def bare_run(train: TrainConfig, total_steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[str]]:
    """A run without models, and what it does after a step."""
    done: list[str] = []
    for name in ("_note_skip", "_log", "_save", "_evaluate"):
        monkeypatch.setattr(Run, name, lambda self, step, name=name: done.append(f"{name} {step}"))
    run = Run.__new__(Run)
    run.config, run.total_steps, run.first_step = RunConfig(train=train), total_steps, 0
    run._parts = SimpleNamespace(adaptive=None, quantization=None)  # type: ignore[assignment]
    nothing = SimpleNamespace(beat=lambda step: None, advance=lambda: None, paused=lambda seconds: None)
    run._stuck = run._progress = run._meter = nothing  # type: ignore[assignment]
    run._ranks_asked_to_stop = torch.tensor(0)
    run.stopped = False
    return run, done


def test_a_checkpoint_is_saved_before_the_evaluation_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = bare_run(TrainConfig(log_every=10, eval_every=2, checkpoint_every=2), 5, monkeypatch)
    for step in range(1, 5):
        run.end_step(step)
    assert done == [
        *("_note_skip 2", "_save 2", "_evaluate 2"),
        "_note_skip 3",
        *("_note_skip 4", "_save 4", "_evaluate 4"),
        *("_note_skip 5", "_log 5", "_save 5", "_evaluate 5"),
    ]


@pytest.mark.parametrize(("first", "every", "expected"), [(5, 0, [5]), (4, 2, [4]), (4, 0, []), (3, 2, []), (0, 1, [])])
@pytest.mark.parametrize("there", [False, True])
def test_a_resume_evaluates_what_the_last_start_did_not(
    first: int, every: int, expected: list[int], there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = bare_run(TrainConfig(eval_every=every), 5, monkeypatch)
    run.first_step = first
    run._folder = SimpleNamespace(has_held_out_loss=lambda step: there)  # type: ignore[assignment]
    run._catch_up()
    assert done == ([] if there else [f"_evaluate {step}" for step in expected])


def guard(state: dict[str, Any]) -> Guard:
    return Guard(TrainConfig(), lambda total: total, torch.device("cpu"), state)


def skip(times: int, a_guard: Guard) -> None:
    for _ in range(times):
        a_guard.end_step(True)


def test_a_run_that_ended_by_skips_goes_on_at_a_good_step() -> None:
    ended = guard({})
    with pytest.raises(TooManySkipsError, match="31 of the last 31 steps"):
        skip(40, ended)
    again = guard(json.loads(json.dumps(ended.state_dict())))
    for _ in range(3):
        again.end_step(False)
    with pytest.raises(TooManySkipsError, match="32 of the last 35 steps"):
        again.end_step(True)


def test_overflows_of_fp16_at_the_lowest_scale_are_left_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own scaler, with the numbers of zero2_fp16.json: of itself it raises at the 18th skip."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)

    def scaler() -> Any:
        return loss_scaler.DynamicLossScaler(2**16, 1000, 1, delayed_shift=2, consecutive_hysteresis=False)

    alone = scaler()
    for _ in range(17):
        alone.update_scale(True)
    with pytest.raises(Exception, match="already at minimum"):
        alone.update_scale(True)

    student = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler()))
    leave_overflows_to_the_guard(student)  # type: ignore[arg-type]
    leave_overflows_to_the_guard(SimpleNamespace(optimizer=object()))  # type: ignore[arg-type]
    watched = guard({})
    for _ in range(30):
        student.optimizer.loss_scaler.update_scale(True)
        watched.end_step(True)
    with pytest.raises(TooManySkipsError):
        watched.end_step(True)
    assert student.optimizer.loss_scaler.cur_scale == 1


def test_a_run_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"files": {}, "state": {"step": 80}})

    def check(**length: Any) -> None:
        train = TrainConfig(**length)
        settled = SimpleNamespace(config=RunConfig(train=train), total_steps=train.max_steps or 60)
        assemble._check_length(tmp_path, settled)  # type: ignore[arg-type]

    check(max_steps=80)
    with pytest.raises(ValueError, match="stands at step 80") as caught:
        check(max_steps=50)
    assert str(caught.value) == (
        f"train.max_steps=50: {tmp_path} stands at step 80 of a longer run, this one would have 50; "
        "set train.max_steps=80 or more, or choose another output_dir"
    )
    with pytest.raises(ValueError, match=r"^train.epochs=0.5: .* this one would have 60; set train.max_steps=80 or"):
        check(epochs=0.5)


def tiny_student(vocab_size: int, **changes: Any) -> PreTrainedModel:
    shape = {"layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32, **changes}
    tokens = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    return build_student(StudentConfig(**shape), vocab_size=vocab_size, seq_len=32, **tokens)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_a_student_with_flash_attention_is_checked_with_another(
    family: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention is not to be had here: whatever runs the model with it fails, as on a GPU in fp32."""
    model = tiny_student(40, family=family)
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(assemble, "build_student", lambda *_, **__: model)
    monkeypatch.setattr(assemble, "sizes", lambda *_: {})
    data = SimpleNamespace(manifest=SimpleNamespace(vocab_size=40))
    settled = SimpleNamespace(config=RunConfig(), quantization=None, data=data)
    assemble._build_objective(settled, None)  # type: ignore[arg-type]
    assert model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(Exception, match=r"."):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_flash_attention_in_fp32_is_a_mistake() -> None:
    def check(attention: Any, precision: str) -> None:
        config = RunConfig(student=StudentConfig(attention=attention))
        settle._check_attention(SimpleNamespace(config=config, ds=SimpleNamespace(precision=precision)))  # type: ignore[arg-type]

    check("flash_attention_2", "bf16")
    check("sdpa", "fp32")
    with pytest.raises(ValueError, match="student.attention='flash_attention_2': it computes in bf16 and fp16"):
        check("flash_attention_2", "fp32")


def test_the_export_of_a_student_with_flash_attention_is_for_every_machine(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    model = tiny_student(len(tokenizer))
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    model.config._attn_implementation = "flash_attention_2"
    write_export(model, weights, tokenizer, "", tmp_path / "export")
    assert "flash" not in (tmp_path / "export" / "config.json").read_text()
    assert model.config._attn_implementation == "flash_attention_2"


def test_an_export_killed_at_its_very_end_is_whole_or_not_there(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    model, folder = tiny_student(len(tokenizer)), tmp_path / "export"
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    write_export(model, weights, tokenizer, "first", folder)
    plain = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if (Path(path) / "config.json").is_file():
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt
        plain(path, **options)

    monkeypatch.setattr(export.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_export(model, weights, tokenizer, "second", folder)
    assert problems(folder) == []
    monkeypatch.undo()
    write_export(model, weights, tokenizer, "third", folder)
    assert (folder / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_resume_cuts_the_skipped_steps_back_too(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    for step in (3, 5, 8):
        folder.add_skip({"step": step, "rows": 4})
    with open(tmp_path / "skipped.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9')
    folder.cut_metrics_back(5)
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [3, 5]


def test_a_tilde_is_the_home_folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/a").path == tmp_path / "runs" / "a"
    (tmp_path / "data").symlink_to(tiny_data)
    assert PreparedData.open("~/data").folder == tmp_path / "data"


def test_instances_of_a_gpu_are_no_gpus(tmp_path: Path) -> None:
    listed = "GPU 0: H100 (UUID: GPU-1)\\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\\n  MIG 3g.40gb Device 1: (UUID: MIG-2)"
    for name, text in (("nvidia-smi", f"printf '{listed}\\n'"), ("python", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANKS", "CUDA_VISIBLE_DEVICES")}
    script = Path(__file__).parents[1] / "launchers" / "run_local.sh"
    environment = {**kept, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MASTER_PORT": "29511"}
    done = subprocess.run([str(script), "quickstart"], env=environment, capture_output=True, text=True)
    assert "--num_gpus 1 --master_port" in done.stdout, done
