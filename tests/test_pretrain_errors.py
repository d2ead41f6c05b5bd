"""What `dwt_ds.pretrain` says to bad input, and that every rank stops.

Two ranks go through all mistakes one after another; one of them is made once more under the launcher.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness.launcher import Launch
from harness.ranks import Run

from dwt_ds.base.files import write_manifest
from dwt_ds.base.ports import reserve_port

# Each rank calls main() for every mistake in turn, and notes what it returned and printed.
DRIVER = """
import contextlib, io, json, os, sys
from deepspeed.accelerator import get_accelerator
from dwt_ds.pretrain import main
type(get_accelerator()).is_fp16_supported = lambda self: False  # as on most CPUs
rank = int(os.environ["RANK"])
for name, port, arguments in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments[rank])
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]), flush=True)
"""

# One for each place where a run is checked, since each of these places has tests of its own. Name -> overrides of the
# tiny recipe, and what the line says. {...} are the folders of `places`.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "data folder missing": (
        ["data.dir={tmp}/no such"],
        ["data.dir", "{tmp}/no such", "does not exist", "dwt-ds prepare"],
    ),
    "data folder half-written": (["data.dir={half}"], ["{half}", "half-written", "dwt-ds prepare"]),
    "less data than a batch": (
        ["train.micro_batch_size=1000"],
        ["data.dir='{data}'", "rows are less than one global batch of 2000", "lower train.micro_batch_size"],
    ),
    "unknown key": (["train.max_stepz=3"], ["train.max_stepz: unknown key; did you mean 'max_steps'?"]),
    "json and recipe differ": (
        ["deepspeed.gradient_clipping=0.5", "train.max_grad_norm=1.0"],
        ["train.max_grad_norm=1.0 (recipe) and deepspeed.gradient_clipping=0.5 differ"],
    ),
    "other number of ranks": (["train.expected_world_size=4"], ["train.expected_world_size=4", "there are 2 ranks"]),
    "teacher missing": (
        ["teacher.path={tmp}/none"],
        ["teacher.path", "{tmp}/none", "does not exist; train that model first"],
    ),
    "teacher of another vocabulary": (
        ["teacher.path={swapped}"],
        ["teacher.path", "its vocabulary of 298 tokens is not the 298 of the data folder; first at id "],
    ),
    "teacher's kernels do not inject": (
        ["teacher.kernel_inject=true"],
        ["teacher.kernel_inject=true", "set it to auto or false"],
    ),
    "family unknown": (["student.family=brt"], ["student.family='brt'", "did you mean 'bert'?"]),
    "nothing to grow from": (
        ["student.init=remap", "teacher.path=null"],
        ["student.init='remap'", "set teacher.path or init=random"],
    ),
    "folder of another shape": (
        ["output_dir={run}", "student.layers=1"],
        ["output_dir='{run}': holds another run (student there", "choose another output_dir or delete it"],
    ),
    "no fp16 here": (
        ["deepspeed_config=zero2_fp16"],
        ["zero2_fp16.json: fp16.enabled=true: DeepSpeed has no fp16 on this device (cpu); choose bf16 or fp32"],
    ),
    "no Triton here": (["distill.backend=triton"], ["distill.backend='triton': it needs a GPU", "auto or torch"]),
    "loss without logits is Triton's": (
        ["distill.memory=logit_free", "teacher.path=null"],
        ["distill.memory='logit_free': only Triton's kernel has it", "runs on torch here; set it to auto or chunked"],
    ),
    "no held-out text to follow": (
        ["data.dir={unheld}", "distill.soft_weight={{schedule: adaptive, start: 4}}"],
        ["distill.soft_weight.schedule='adaptive': {unheld} has no held-out rows"],
    ),
    "checkpoint of other ranks": (
        ["output_dir={three}", "deepspeed.zero_optimization.stage=0"],
        [
            "step_00000001 was written by 3 ranks, this run has 2: ZeRO-0 cannot resume on a different number",
            "start it with 3",
        ],
    ),
}


class Said(NamedTuple):
    """What main() returned and printed on one rank."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_data: Path,
    sentence_data: Path,
    tiny_teacher: Path,
    tiny_recipe: Path,
) -> dict[str, str]:
    tmp = tmp_path_factory.mktemp("places")
    folders = {name: tmp / name for name in ("half", "unheld", "three", "swapped")}
    (folders["half"] / "unfinished").mkdir(parents=True)
    shutil.copytree(sentence_data, folders["unheld"])
    (folders["three"] / "checkpoints" / "step_00000001").mkdir(parents=True)
    settings = {"deepspeed": {"zero_optimization": {"stage": 0}, "optimizer": {"type": "AdamW"}}}
    written = {"files": {}, "world_size": 3, "settings": settings}
    write_manifest(folders["three"] / "checkpoints" / "step_00000001", written)

    shutil.copytree(tiny_teacher, folders["swapped"])
    rewrite(folders["swapped"] / "tokenizer.json", swap_two_words)
    paths = {"data": tiny_data, "teacher": tiny_teacher, "recipe": tiny_recipe, "tmp": tmp, "run": tmp / "run"}
    return {name: str(path) for name, path in {**paths, **folders}.items()}


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_two_words(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if len(word) > 3 and word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def output_of(name: str, places: dict[str, str]) -> Path:
    return Path(places["tmp"]) / "outputs" / name.replace(" ", "_").replace("'", "")


def filled(words: list[str], places: dict[str, str]) -> list[str]:
    return [word.format(**places) for word in words]


@pytest.fixture(scope="module")
def said(run_ranks: Run, places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Said]]:
    """What both ranks said to each mistake, by name; and to a run that is well, before and after them."""
    tmp = tmp_path_factory.mktemp("said")
    recipe = places["recipe"]
    (tmp / "broken.yaml").write_text("train: [", encoding="utf-8")
    well = [recipe, f"output_dir={places['run']}", "train.max_steps=2"]
    calls: list[tuple[str, list[list[str]]]] = [("well", [well, well])]
    for name, (overrides, _) in MISTAKES.items():
        arguments = [recipe, f"output_dir={output_of(name, places)}", *filled(overrides, places)]
        calls.append((name, [arguments, arguments]))
    calls.append(("recipe missing", [["quickstrat"]] * 2))
    calls.append(("recipe unreadable", [[str(tmp / "broken.yaml")]] * 2))
    calls.append(("no arguments", [[], []]))
    calls.append(("--deepspeed", [["quickstart", "--deepspeed", "teacher.path=null"]] * 2))
    bad = [recipe, f"output_dir={tmp}/never", f"data.dir={tmp}/none"]
    calls.append(("only rank 1 is wrong", [[recipe, f"output_dir={tmp}/never"], bad]))
    calls.append(("only rank 0 is wrong", [bad, [recipe, f"output_dir={tmp}/never"]]))
    calls.append(("well again", [well, well]))

    with_ports = [(name, reserve_port(), arguments) for name, arguments in calls]
    (tmp / "calls.json").write_text(json.dumps(with_ports), encoding="utf-8")
    pair = run_ranks([["-c", DRIVER, str(tmp / "calls.json")]] * 2, seconds=500)
    rows = [[json.loads(line) for line in rank.out.splitlines() if line.startswith('["')] for rank in pair]
    for rank, done in zip(pair, rows):
        assert [row[0] for row in done] == [name for name, _ in calls], rank
    return {name: [Said(*done[i][1:]) for done in rows] for i, (name, _) in enumerate(calls)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_printed_once_in_one_line_and_stops_both_ranks(
    name: str, said: dict[str, list[Said]], places: dict[str, str]
) -> None:
    first, second = said[name]
    assert (first.code, second.code) == (2, 2)
    assert len(first.errors + second.errors) == 1, (first, second)
    for words in filled(MISTAKES[name][1], places):
        assert words in (first.errors + second.errors)[0]
    for rank in (first, second):
        assert "Traceback" not in rank.out + rank.err
        assert len(rank.err.splitlines()) == len(rank.errors), rank.err


@pytest.mark.parametrize("name", [name for name, (words, _) in MISTAKES.items() if "output_dir" not in " ".join(words)])
def test_a_mistake_in_the_settings_leaves_no_folder_behind(
    name: str, said: dict[str, list[Said]], places: dict[str, str]
) -> None:
    assert name in said
    assert not output_of(name, places).exists()


def test_so_is_a_recipe_that_is_missing_or_unreadable(said: dict[str, list[Said]]) -> None:
    for name, words in (
        ("recipe missing", "recipe 'quickstrat': no such file and no packaged recipe of that name; did you mean"),
        ("recipe unreadable", "broken.yaml: cannot be read as YAML"),
    ):
        first, second = said[name]
        assert (first.code, second.code) == (2, 2)
        assert len(first.errors + second.errors) == 1
        assert words in (first.errors + second.errors)[0]


def test_no_arguments_give_the_usage(said: dict[str, list[Said]]) -> None:
    for rank in said["no arguments"]:
        assert rank.code == 2
        assert rank.err.startswith("usage: dwt_ds.pretrain")


def test_an_option_of_other_programs_is_not_taken_for_one_of_ours(said: dict[str, list[Said]]) -> None:
    """`--deepspeed` is the beginning of `--deepspeed_config`, and the next word would be a JSON."""
    for rank in said["--deepspeed"]:
        assert rank.code == 2
        assert "error: unrecognized arguments: --deepspeed" in rank.err


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_on_one_rank_alone_stops_the_other(wrong: int, said: dict[str, list[Said]]) -> None:
    ranks = said[f"only rank {wrong} is wrong"]
    assert [rank.code for rank in ranks] == [2, 2]
    assert len(ranks[wrong].errors) == 1
    assert "does not exist" in ranks[wrong].errors[0]
    assert ranks[1 - wrong].errors == []


def test_a_finished_run_started_again_says_so_and_is_no_mistake(
    said: dict[str, list[Said]], places: dict[str, str]
) -> None:
    assert [rank.code for rank in said["well"]] == [0, 0]
    assert "step 2/2" in said["well"][0].out
    again = said["well again"]
    assert [rank.code for rank in again] == [0, 0]
    assert f"{places['run']}: already finished at step 2; nothing to do" in again[0].out
    assert "other settings" not in again[0].out
    # The mistakes in between, some of them on this folder, have not touched it.
    rows = (Path(places["run"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 2]


@pytest.mark.slow
def test_the_launcher_ends_with_an_error_and_one_line(launch: Launch, places: dict[str, str], tmp_path: Path) -> None:
    code, output = launch(2, [places["recipe"], f"output_dir={tmp_path}/run", "teacher.path=/none"])
    assert code != 0
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert "does not exist; train that model first" in lines[0]
    assert "Traceback" not in output
