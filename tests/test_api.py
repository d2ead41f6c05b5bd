"""`from dwt_ds import prepare, pretrain, report`."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
from harness.ranks import Python
from harness.runs import write_run

import dwt_ds.cli.main
from dwt_ds import api, prepare, pretrain, report
from dwt_ds.config.schema import RunConfig
from dwt_ds.data.prepared import PreparedData

# In a process that has loaded dwt_ds for others, and forgets it.
IN_EVERY_ORDER = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "dwt_ds"]:
    del sys.modules[name]
import dwt_ds.prepare.options, dwt_ds.cli.prepare
from dwt_ds import prepare, pretrain, report
import dwt_ds.pretrain
from dwt_ds import pretrain as again
assert callable(prepare) and callable(pretrain) and callable(report) and again is pretrain is dwt_ds.pretrain
assert dwt_ds.prepare.options.PrepareOptions and dwt_ds.pretrain.main
"""


def test_the_names_are_functions_whatever_was_imported_before(python: Python) -> None:
    ended = python("-c", IN_EVERY_ORDER)
    assert ended.code == 0, ended.err
    assert inspect.signature(prepare) == inspect.signature(api.prepare)
    assert inspect.signature(pretrain) == inspect.signature(api.pretrain)
    assert report is api.report


def test_prepare_is_the_command(tmp_path: Path, tiny_data: Path, tiny_text: Path, tiny_vocabulary: Path) -> None:
    words = {"tokenizer": tiny_vocabulary, "seq_len": 32, "validation": 0.1, "workers": 1}
    manifest = prepare(tmp_path / "data", text=tiny_text, **words)
    assert manifest.fingerprint == json.loads((tiny_data / "manifest.json").read_text())["fingerprint"]
    with pytest.raises(ValueError, match=r"^--seq-len=4: must be "):
        prepare(tmp_path / "other", text=tiny_text, **{**words, "seq_len": 4})
    with pytest.raises(TypeError, match="has no option 'seqlen'; did you mean 'seq_len'"):
        prepare(tmp_path / "other", text=tiny_text, seqlen=4)
    assert not (tmp_path / "other").exists()


def test_prepare_has_every_option_of_the_command(tmp_path: Path, tiny_text: Path) -> None:
    words = {"text": tiny_text, "train_tokenizer": 400, "workers": 1}
    for number, (options, treatment) in enumerate(
        (
            ({"uncased": True, "strip_accents": True}, (True, True)),
            ({"uncased": False, "strip_accents": False}, (False, False)),
            ({"cased": True, "keep_accents": True}, (False, False)),
        )
    ):
        prepare(tmp_path / str(number), **words, **options)
        normalizer = PreparedData.open(tmp_path / str(number)).tokenizer().backend_tokenizer.normalizer
        assert (normalizer.lowercase, normalizer.strip_accents) == treatment, options
    with pytest.raises(TypeError, match=r"has no option 'show'$"):
        prepare(tmp_path / "other", text=tiny_text, show=3)


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, tiny_text: Path, tiny_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(tiny_text, tmp_path / "text.txt")
    shutil.copy(tiny_vocabulary, tmp_path / "vocab.txt")
    manifest = prepare("~/data", text="~/*.txt", tokenizer="~/vocab.txt", seq_len=32, workers=1)
    assert manifest.rows == len(PreparedData.open(tmp_path / "data").train)
    from_command_line = dwt_ds.cli.main.main(["verify", "--", "~/data"])
    assert from_command_line == 0


def test_overrides_may_be_words_or_a_mapping() -> None:
    assert api._words(["train.max_steps=5"]) == ["train.max_steps=5"]
    values = {"output_dir": Path("exp #2"), "teacher.path": None, "student.init": "null", "seed": 7}
    assert api._words({"train.eval_sets": {"books": Path("data/books")}}) == ['train.eval_sets={"books": "data/books"}']
    assert api._words({**values, "distill.soft_weight": {"schedule": "linear", "start": 4}}) == [
        "output_dir=exp #2",
        "teacher.path=null",
        "student.init='null'",
        "seed=7",
        'distill.soft_weight={"schedule": "linear", "start": 4}',
    ]


def test_mistakes_are_raised_before_anything_starts(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.max_step"):
        pretrain(tiny_recipe, {"train.max_step": 5})
    with pytest.raises(FileNotFoundError, match="did you mean 'quickstart'"):
        pretrain("quikstart")
    with pytest.raises(ValueError, match="ranks and hostfile: give one"):
        pretrain(tiny_recipe, ranks=1, hostfile=tmp_path)


def test_report_takes_runs_one_by_one_or_in_a_list(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        write_run(path, {2: 5.0}, RunConfig().to_dict())
    assert report(paths, against="a") == tmp_path / "report" / "index.html"
    assert report(str(paths[0]), paths[1], out=tmp_path / "page") == tmp_path / "page" / "index.html"
    with pytest.raises(ValueError, match="against c: is not one of the runs"):
        report(paths, against="c")


def test_report_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwt_ds.cli.report.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'dwt-ds\[study\]'"):
        report(tmp_path)


@pytest.mark.slow
def test_pretrain_prints_the_runs_lines_and_returns_it(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tiny_recipe, {"output_dir": tmp_path / "run"}, ranks=1)
    assert run.finished
    assert run.path == tmp_path / "run"
    assert [row["step"] for row in run.training] == [1, 2, 3, 4]
    assert "step 4/4  loss " in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another run"):
        pretrain(tiny_recipe, {"output_dir": tmp_path / "run", "student.layers": 1}, ranks=1)
