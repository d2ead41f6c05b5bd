"""How a run ends: on a mistake, by too many skips, and where one rank fails alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.ranks import OUTLIVED
from harness.runs import logged_rows, rows_of
from harness.tiny import TinyRun

from dwt_ds import pretrain
from dwt_ds.engine import ranks
from dwt_ds.run import assemble
from dwt_ds.run.folder import RunFolder
from dwt_ds.run.guard import TooManySkipsError

# `dwt_ds.pretrain`, in which rank 1 fails as EDGE says.
FAILING = """
import os, sys, time
from dwt_ds.engine import ranks
from dwt_ds.pretrain import main
from dwt_ds.run import evaluation, session

def fail(*arguments, **keywords):
    if os.environ["RANK"] == "1":
        raise ValueError("made up")
    return plain(*arguments, **keywords)

edge = os.environ["EDGE"]
owner = session.Session if edge == "begin_step" else evaluation
plain = getattr(owner, edge)
setattr(owner, edge, fail)
# As NCCL does, which waits for ranks that do not come.
ranks.dist.destroy_process_group = lambda: time.sleep(3600)
sys.exit(main())
"""


# `dwt_ds.pretrain` whose files may not grow beyond 64 KiB at the end, or that of its tokenizer not beyond 1 KiB, or
# whose weights are not finite then.
LIMITED = """
import os, resource, signal, sys
from dwt_ds.export import writer
from dwt_ds.pretrain import main
from dwt_ds.run import exports, session

export, save_tokenizer = exports.Exporter.export, writer.save_tokenizer

HARD = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, HARD))

def save_too_much(*arguments):
    limit(1 << 10)
    try:
        save_tokenizer(*arguments)
    finally:
        limit(HARD)  # for what is printed

def spoiled(self, *arguments, **keywords):
    if os.environ["SPOILED"] == "disk":
        limit(1 << 16)
    elif os.environ["SPOILED"] == "tokenizer":
        writer.save_tokenizer = save_too_much
    else:
        weights = exports.full_fp32_weights
        exports.full_fp32_weights = lambda *a, **k: {name: t / 0 for name, t in weights(*a, **k).items()}
    export(self, *arguments, **keywords)

exports.Exporter.export = spoiled
sys.exit(main())
"""


# `dwt_ds.pretrain` whose log is on a full disk.
WITHOUT_A_LOG = """
import os, sys
from dwt_ds.pretrain import main
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
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
    monkeypatch.setattr("dwt_ds.run.stop.StopRequest.listen", lambda self: None)
    monkeypatch.setattr("faulthandler.enable", lambda file: None)
    return ends


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "said"), [(ranks.AllRanksError("a: b; c"), "error: a: b; c\n"), (ranks.OtherRankError("a"), "")]
)
def test_a_mistake_of_which_all_ranks_know_is_no_crash(
    error: Exception, said: str, ends: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assemble, "assemble", failing(error))
    assert pretrain.main(["quickstart"]) == 2
    assert ends == ["left"]
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("a: b; c"), OSError("a: b; c")])
def test_a_mistake_that_one_rank_found_alone_waits_for_nobody(
    error: Exception, ends: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assemble, "assemble", failing(error))
    with pytest.raises(SystemExit):
        pretrain.main(["quickstart"])
    assert ends == [2]
    assert capsys.readouterr().err == "error: a: b; c\n"


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


def fail(edge: str, tiny_run: TinyRun, run: Path) -> None:
    """Two ranks of which one fails; both must end by themselves."""
    output = tiny_run(run, ranks=2, code=1, program=["-c", FAILING], environment={"EDGE": edge})
    assert OUTLIVED not in output
    assert "ValueError: made up" in output


def test_one_rank_that_fails_in_a_step_ends_all(tiny_run: TinyRun, tmp_path: Path) -> None:
    fail("begin_step", tiny_run, tmp_path / "run")


def test_a_crash_in_the_last_evaluation_costs_only_that(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fail("held_out_loss", tiny_run, run)
    assert (run / "checkpoints" / "step_00000004" / "manifest.json").is_file()
    assert "at step 4" in tiny_run(run, ranks=2)
    evaluated = [(row["step"], "eval_hard_loss" in row) for row in rows_of(run)]
    assert evaluated == [*((step, False) for step in (1, 2, 3, 4)), (4, True)]
    assert (run / "export" / "model.safetensors").is_file()
    assert RunFolder(run).finished_steps() == 4


@pytest.mark.parametrize(
    ("spoiled", "told"),
    [
        ("disk", r"error: NOT EXPORTED: .*[Ff]ile too large.*; the same command repeats the export"),
        ("tokenizer", r"error: NOT EXPORTED: .*[Ff]ile too large.*; the same command repeats the export"),
        ("weights", r"error: NOT EXPORTED: export: \d+ of \d+ weights have values that are not finite .* such as bert"),
    ],
)
def test_a_last_export_that_fails_is_reported_in_one_line(
    spoiled: str, told: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    # Large enough for its file to be over the limit.
    settings = ["train.max_steps=2", "train.eval_rows=8", "student.hidden_size=64", "student.layers=1"]
    output = tiny_run(tmp_path, *settings, code=1, program=["-c", LIMITED], environment={"SPOILED": spoiled})
    assert re.search(told, output), output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("export*"))
    if spoiled == "disk":
        tiny_run(tmp_path, *settings)
        assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_finished_run_needs_its_data_no_longer(tiny_run: TinyRun, tiny_data: Path, tmp_path: Path) -> None:
    """A run that is not finished does, and so does one that is asked for more steps."""
    data, settings = tmp_path / "data", [f"data.dir={tmp_path}/data", "teacher.path=null"]
    shutil.copytree(tiny_data, data)
    tiny_run(tmp_path / "run", *settings, "train.max_steps=1")
    assert logged_rows(tmp_path / "run")[1]["teacher_active"] is False
    shutil.rmtree(data)
    again = tiny_run(tmp_path / "run", *settings, "train.max_steps=1", ranks=2)
    assert "already finished at step 1; nothing to do (data.dir " in again
    assert "does not exist" in tiny_run(tmp_path / "run", *settings, "train.max_steps=2", code=2)
    others = [f"data.dir={tmp_path}/others", *settings[1:]]
    assert "does not exist" in tiny_run(tmp_path / "run", *others, "train.max_steps=1", code=2)


def test_a_run_whose_log_does_not_fit_on_the_disk_goes_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    assert tiny_run(tmp_path, "teacher.path=null", program=["-c", WITHOUT_A_LOG]) == ""
    assert logged_rows(tmp_path).keys() == {1, 2, 3, 4}
    assert (tmp_path / "complete.json").is_file()
