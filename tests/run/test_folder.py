from __future__ import annotations

import json
import math
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml
from harness.errors import error_of
from harness.mounts import mounted

from dwt_ds.base.files import write_text
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.prepared import PreparedData
from dwt_ds.plan.settings import corpus_of
from dwt_ds.run.folder import RunFolder

IDENTITY: dict[str, Any] = {"data": "a" * 64, "tokenizer": "b" * 64, "student": {"layers": 2, "hidden_size": 32}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "one")
    run.begin(IDENTITY, {"seed": 1, "data": {"dir": "d"}}, {"train_batch_size": 8})
    return run


def steps(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def test_the_resolved_settings_are_written_in_their_order(folder: RunFolder) -> None:
    text = (folder.path / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"seed": 1, "data": {"dir": "d"}}
    assert text.startswith("seed")
    assert json.loads((folder.path / "ds_config.json").read_text(encoding="utf-8")) == {"train_batch_size": 8}
    assert folder.checkpoints.is_dir()
    assert not list(folder.path.glob("*.tmp"))


def test_the_folder_is_private_to_its_owner(folder: RunFolder) -> None:
    for path in (folder.path, folder.checkpoints):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_same_run_may_begin_again(folder: RunFolder) -> None:
    again = RunFolder(folder.path)
    again.check_identity(IDENTITY)
    again.begin(IDENTITY, {"seed": 2}, {})
    assert yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8")) == {"seed": 2}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "c" * 64}, f"data there {'a' * 57}..., here {'c' * 57}..."),
        ({"tokenizer": "short"}, f"tokenizer there {'b' * 57}..., here short"),
        (
            {"student": {"layers": 4, "hidden_size": 32}},
            'student there {"layers": 2, "hidden_size": 32}, here {"layers": 4, "hidden_size": 32}',
        ),
        ({"more": 1}, "more there null, here 1"),
    ],
)
def test_a_folder_with_another_run_is_refused_by_what_differs(
    folder: RunFolder, changed: dict[str, Any], words: str
) -> None:
    assert error_of(folder.check_identity, {**IDENTITY, **changed}) == (
        f"output_dir={str(folder.path)!r}: holds another run ({words}); choose another output_dir or delete it"
    )


@pytest.mark.parametrize("content", [b"", b'{"data": ', b"[1]", b"3", b"\xff"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("run.json", lambda run: run.check_identity(IDENTITY)), ("complete.json", lambda run: run.finished_steps())],
)
def test_a_damaged_mark_is_reported_with_its_file(folder: RunFolder, content: bytes, name: str, read: Any) -> None:
    (folder.path / name).write_bytes(content)
    expected = f"output_dir={str(folder.path)!r}: {name} is damaged; delete that file"
    assert error_of(read, folder).startswith(expected)


def test_a_folder_that_is_not_there_or_holds_no_run_is_fine(tmp_path: Path) -> None:
    RunFolder(tmp_path / "none").check_identity(IDENTITY)
    RunFolder(tmp_path).check_identity(IDENTITY)


def test_a_file_in_the_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        RunFolder(tmp_path / "file").check_identity(IDENTITY)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        RunFolder(tmp_path / "file" / "below").check_identity(IDENTITY)


def test_a_finished_run_says_how_long_it_was(folder: RunFolder) -> None:
    assert folder.finished_steps() == 0
    folder.finish(12)
    assert folder.finished_steps() == 12
    assert RunFolder(folder.path).finished_steps() == 12
    folder.finish(20)
    assert folder.finished_steps() == 20


def test_metrics_are_one_json_object_a_line(folder: RunFolder) -> None:
    folder.add_metrics({"step": 1, "loss": 2.5})
    folder.add_metrics({"step": 2, "eval_hard_loss": 2.0})
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_hard_loss": 2.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_becomes_null(folder: RunFolder, value: float) -> None:
    folder.add_metrics({"step": 1, "grad_norm": value, "loss": 1.0})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(folder.metrics.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {"step": 1, "grad_norm": None, "loss": 1.0}


def test_a_resume_cuts_the_metrics_back_to_its_checkpoint(folder: RunFolder) -> None:
    for step in (1, 2, 3, 3, 4, 5):
        folder.add_metrics({"step": step})
    folder.cut_metrics_back(3)
    assert steps(folder) == [1, 2, 3, 3]
    folder.add_metrics({"step": 4})
    folder.cut_metrics_back(4)
    assert steps(folder) == [1, 2, 3, 3, 4]
    folder.cut_metrics_back(0)
    assert steps(folder) == []


def test_losses_on_further_sets_alone_are_an_evaluation(folder: RunFolder) -> None:
    """A resume would repeat it otherwise."""
    folder.add_metrics({"step": 1, "loss": 2.0})
    assert not folder.has_held_out_loss(1)
    folder.add_metrics({"step": 1, "eval_hard_loss.books": math.nan})
    assert folder.has_held_out_loss(1)
    assert not folder.has_held_out_loss(2)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "{", '{"step": 3, "a": {"b": 1}'])
def test_a_torn_last_line_is_removed_before_the_next_row(folder: RunFolder, torn: str) -> None:
    folder.add_metrics({"step": 1})
    folder.add_metrics({"step": 2})
    with open(folder.metrics, "a", encoding="utf-8") as handle:
        handle.write(torn)
    folder.cut_metrics_back(10)
    folder.add_metrics({"step": 3})
    assert steps(folder) == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\xff", b"\0", b""])
@pytest.mark.parametrize("place", [1, -1])
def test_a_damaged_line_is_named(folder: RunFolder, damage: bytes, place: int) -> None:
    """One byte lost or changed; the rows of no step are left out silently."""
    for step in range(4):
        folder.add_metrics({"step": step})
    lines = folder.metrics.read_bytes().split(b"\n")
    lines[1] = lines[1][:place] + damage + lines[1][place:][1:]
    folder.metrics.write_bytes(b"\n".join(lines))
    expected = f"{folder.metrics}: line 2 is damaged; correct it, or remove it and lose its step"
    assert error_of(folder.metrics_rows) == expected
    assert error_of(folder.cut_metrics_back, 2) == expected
    folder.begin(IDENTITY, {}, {})
    assert error_of(folder.check_contents) == expected, "before a start changes anything"
    assert folder.metrics.read_bytes() == b"\n".join(lines)


def test_cutting_back_a_run_without_metrics_is_fine(folder: RunFolder) -> None:
    folder.cut_metrics_back(0)
    assert steps(folder) == []


def test_metrics_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=64k"):
        folder = RunFolder(tmp_path)
        folder.add_metrics({"step": 1})
        filler = tmp_path / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as handle:
            while handle.write(b"x" * 512):
                pass
        for step in range(2, 900):
            folder.add_metrics({"step": step})
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") < 898, "the disk was not full"
        filler.unlink()
        folder.add_metrics({"step": 900})
        assert steps(folder) == list(range(1, 901))


def test_a_resume_cuts_the_skipped_steps_back_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
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
    assert corpus_of(DataConfig(dir="~/data")) == replace(corpus_of(DataConfig(dir=str(tiny_data))), source=ANY)


THEIRS = {
    "config.yaml": "# my recipe\nbase: quickstart\n",
    "ds_config.json": '{"train_batch_size": "auto"}',
    "metrics.jsonl": '{"step": 1}\n',
    "complete.json": "{}",
    "export/model.safetensors": "weights",
    "tokenizer/tokenizer.json": "{}",
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_that_no_run_wrote_is_never_written_over(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text(THEIRS[name], encoding="utf-8")
    error = error_of(RunFolder(tmp_path / "run").check_contents)
    assert f"the run would replace {name.partition('/')[0]}, which no run wrote there" in error


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json"])
def test_a_runs_own_file_is_written_again_unless_somebody_changed_it(folder: RunFolder, name: str) -> None:
    folder.check_contents()
    folder.begin(IDENTITY, {"seed": 2}, {"train_batch_size": 16})
    folder.check_contents()
    file = folder.path / name
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"would replace {name}, which no run wrote there \(or it was changed since\)"
    ):
        folder.check_contents()


def test_a_kill_between_the_files_of_a_start_blocks_no_restart(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at(path: Path, text: str) -> None:
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        write_text(path, text)

    with monkeypatch.context() as patched:
        patched.setattr("dwt_ds.run.folder.write_text", killed_at)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(IDENTITY, {"seed": 2}, {"train_batch_size": 16})
    folder.check_contents()


def test_the_folder_of_an_earlier_version_is_a_runs(folder: RunFolder) -> None:
    (folder.path / "run.json").write_text(json.dumps(IDENTITY), encoding="utf-8")
    folder.check_contents()
    (folder.path / "run.json").unlink()
    (folder.checkpoints / "step_00000002").mkdir()  # all that was brought to another machine
    folder.check_contents()


def test_links_in_the_folder_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "export"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "scratch" / name)
    folder = RunFolder(tmp_path / "link")
    folder.path.symlink_to("run")
    folder.check_contents()
    folder.begin(IDENTITY, {}, {})
    (tmp_path / "kept.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "config.yaml").symlink_to(tmp_path / "kept.yaml")
    folder.begin(IDENTITY, {"seed": 3}, {})
    assert (tmp_path / "kept.yaml").read_text() == "seed: 3\n"
    assert (tmp_path / "scratch" / "checkpoints").is_dir()
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    (tmp_path / "run" / "export").unlink()
    (tmp_path / "run" / "export").symlink_to("run.json")
    with pytest.raises(ValueError, match="is a link to .*, which is not a folder; remove the link"):
        folder.check_contents()
