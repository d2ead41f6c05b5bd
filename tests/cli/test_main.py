"""The command as a whole: its version, `python -m dwt_ds`, completion in the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.errors import Refusal

import dwt_ds
from dwt_ds import pretrain
from dwt_ds.cli.completion import whole_parser
from dwt_ds.cli.main import SUBCOMMANDS, main

HELP = """
import sys
from dwt_ds.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("torch", "yaml", "numpy", "pydantic", "argcomplete") if name in sys.modules])
"""


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dwt_ds", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"dwt-ds {dwt_ds.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "dwt_ds", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "dwt-ds: error: argument COMMAND: invalid choice: 'nothing'" in done.stderr


def test_help_names_every_command_and_imports_no_library(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in SUBCOMMANDS)
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "prepare --text text.txt --tokenizer vocab.txt --out FILE",
        "prepare --text text.txt --tokenizer vocab.txt --out FILE/data",
        "study both --scale smoke --out FILE",
        "report run --out FILE",
        "report FILE",
        "export run --out FILE/export",
        "glue --model export --glue-dir glue --out FILE",
    ],
)
def test_a_file_in_place_of_a_folder(command: str, tmp_path: Path, refusal: Refusal) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refusal(*command.replace("FILE", str(file)).split()).endswith(f"{file} is a file; name a folder\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["export", "run", "--out", "a\nb"], r"out='a\nb'"),
        (["export", "a\tb", "--out", "ok"], r"'a\tb'"),
        (["prepare", "--text", os.fsdecode(b"caf\xe9"), "--out", "ok", "--tokenizer", "x"], r"text='caf\udce9'"),
    ],
)
def test_a_name_that_no_message_could_show_is_refused(words: list[str], named: str, refusal: Refusal) -> None:
    said = "has a line break, a control character or a byte that is not UTF-8; rename it"
    assert f"{named}: {said}" in refusal(*words)


@pytest.mark.parametrize("command", ["launch", "plan", "study", "pretrain"])
def test_settings_are_not_among_what_is_missing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.main([]) if command == "pretrain" else main([command])
    assert "the following arguments are required" in (said := capsys.readouterr().err)
    assert "required: recipe\n" in said or "required: GRID\n" in said


def test_a_launcher_that_is_not_installed_is_refused_in_one_line(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n", encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["launch", "--hostfile", tmp_path / "hosts", "quickstart", f"output_dir={tmp_path / 'run'}"]
    assert "LAUNCHER=pdsh: pdsh is not installed here; apt-get install pdsh, or" in refusal(*words)
    monkeypatch.setenv("LAUNCHER", "openmpi")
    assert "LAUNCHER=openmpi: ompi_info is not installed here; install OpenMPI" in refusal(*words)


def test_completion_knows_the_options_of_the_command_in_the_line() -> None:
    (commands,) = whole_parser(["dwt-ds", "plan", "qui"])._subparsers._group_actions  # type: ignore[union-attr]
    assert set(commands.choices) == set(SUBCOMMANDS)  # type: ignore[arg-type]
    options = {name: parser._option_string_actions for name, parser in commands.choices.items()}  # type: ignore[union-attr]
    assert {"--gpu", "--data", "--config"} < set(options["plan"])
    assert "--every" not in options["prepare"], "imported for nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "among", "not_among"),
    [
        ("dwt-ds pl", "plan ", "prepare"),
        ("dwt-ds plan --net", "--network-gbps ", "--gpu"),
        ("dwt-ds plan paper_al", "paper_alone ", "paper_weak"),
        ("dwt-ds launch quickstart train.max_", "train.max_steps=", "train.eval_every="),
        ("dwt-ds study --scale sm", "smoke", "paper"),
    ],
)
def test_the_shell_is_answered(line: str, among: str, not_among: str, tmp_path: Path) -> None:
    """As argcomplete's shell function asks; it comes with the dev extra."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "0"}
    subprocess.run([sys.executable, "-m", "dwt_ds"], env={**os.environ, **asked}, check=True, cwd=tmp_path)
    found = answer.read_text().splitlines()
    assert among in found or among.strip() in found, found
    assert not any(each.startswith(not_among) for each in found), found
