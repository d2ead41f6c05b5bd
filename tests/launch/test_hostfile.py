from __future__ import annotations

from pathlib import Path

import pytest
from harness.errors import error_of

from dwt_ds.launch.hostfile import Host, deepspeed_env_paths, read_deepspeed_env, read_hostfile


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_hosts_come_in_their_order_without_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\n\nnode-2 slots=8\r\n  10.0.0.1\tslots=4   # the old one\n")
    assert read_hostfile(path) == [Host("node-2", 8), Host("10.0.0.1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host; write a line for each host: HOST slots=N"),
        ("# nobody\n\n", "names no host; write a line for each host: HOST slots=N"),
        ("a slots=8\nb\n", 'line 2 is "b"; write it as: HOST slots=N'),
        ("\n# x\nnode-1 slot=8\n", 'line 3 is "node-1 slot=8"; write it as: HOST slots=N'),
        ("a:8\n", 'line 1 is "a:8"; write it as: HOST slots=N'),
        ("slots=8\n", 'line 1 is "slots=8"; write it as: HOST slots=N'),
        ("a slots=two\n", 'line 1 is "a slots=two"; write it as: HOST slots=N'),
        ("a slots=0\n", 'line 1 is "a slots=0"; write it as: HOST slots=N'),
        ("a slots=8 slots=8\n", 'line 1 is "a slots=8 slots=8"; write it as: HOST slots=N'),
        ("a slots=8\n#\na slots=4\n", "line 3 names a again; keep one line and add up its slots"),
        ("node[1-4] slots=8\n", 'line 1 names "node[1-4]"; a host name has only letters, digits and . - _ ,'),
        ("-oProxyCommand=x slots=8\n", 'line 1 names "-oProxyCommand=x"; a host name has only letters'),
        ("a;reboot slots=8\n", 'line 1 names "a;reboot"; a host name has only letters'),
        ("me@a slots=8\n", "(put user and port into ~/.ssh/config)"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_the_fix(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    said = error_of(read_hostfile, path)
    assert said.startswith(f"hostfile {path}: ")
    assert message in said


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such hosts: no such file; write one with a line for each host"):
        read_hostfile(tmp_path / "no such hosts")


def test_variables_of_a_later_file_override_those_of_an_earlier(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("A=1\nB=x=y\n", encoding="utf-8")
    (tmp_path / "here").write_text("A=2\n", encoding="utf-8")
    assert read_deepspeed_env([tmp_path / "home", tmp_path / "here"]) == {"A": "2", "B": "x=y"}


@pytest.mark.parametrize("line", ["", "NCCL_DEBUG", "# comment", "NCCL_DEBUG=", "export A=1"])
def test_a_line_that_the_launcher_cannot_read_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text(f"A=1\n{line}\nB=2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"env: line 2 is .*write NAME=VALUE"):
        read_deepspeed_env([path])


def test_a_file_of_variables_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b"A=caf\xe9\n")
    with pytest.raises(ValueError, match=r"env: 'utf-8' codec can't decode"):
        read_deepspeed_env([path])


def test_the_file_of_variables_may_have_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher reads the one that DS_ENV_FILE names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (".deepspeed_env", "mine"):
        (tmp_path / name).touch()
    assert deepspeed_env_paths() == [Path(".deepspeed_env")]
    monkeypatch.setenv("DS_ENV_FILE", "mine")
    assert deepspeed_env_paths() == [Path("mine")]
