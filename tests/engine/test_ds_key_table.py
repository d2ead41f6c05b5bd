"""docs/deepspeed_keys.md against the keys that are accepted, and against plain AdamW on two ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from harness.key_cases import cases, on_nvme
from harness.rank_cases import problems_of
from harness.ranks import Train
from harness.runs import completed, rows_of
from pydantic import BaseModel

from dwt_ds.engine.ds_json import keys as ds_keys
from dwt_ds.engine.ds_json.combinations import check_combinations
from dwt_ds.engine.ds_json.keys import check_ds_keys
from dwt_ds.engine.ds_json.origin import Origin

TABLE = Path(__file__).parents[2] / "docs" / "deepspeed_keys.md"
CASES = cases()
TRIED = "equal to plain AdamW"
IN_FP16 = """
import sys
from deepspeed.accelerator import get_accelerator
from dwt_ds.pretrain import main
type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on most CPUs, and enough for these
sys.exit(main())
"""


def rows() -> dict[str, str]:
    """Key -> evidence."""
    found: dict[str, str] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names, evidence = line.strip("| ").split(" | ")
            for name in re.findall(r"`([^`]+)`", names):
                assert name not in found, f"{name} stands twice"
                found[name] = evidence
    return found


def accepted() -> set[str]:
    """Dotted names of all keys that the check lets through; the settings of optimizers and schedules are elsewhere."""
    found = set(ds_keys._SCALARS)
    for place, kind in ds_keys._SECTIONS.items():
        found |= set(inside(place, kind))
    return {key for key in found if key not in ds_keys._INSTEAD and not key.endswith(".params")}


def inside(place: str, kind: Any) -> Iterator[str]:
    names = list(kind) if isinstance(kind, dict) else [each.alias or name for name, each in kind.model_fields.items()]
    for name in names:
        key = f"{place}.{name}"
        if key in ds_keys._INSTEAD:
            continue
        section = ds_keys._section_inside(kind, name, key)
        if section is None:
            yield key
        elif isinstance(section, type) and issubclass(section, BaseModel):
            yield from inside(key, section)


def written(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from written(value, f"{above}{key}.")


def test_the_table_has_every_accepted_key_and_no_other() -> None:
    assert rows().keys() - accepted() == set()
    assert accepted() - rows().keys() == set()


def test_the_keys_that_the_table_calls_equal_have_been_tried() -> None:
    tried = {key for settings in CASES.values() for key in written(settings)}
    assert {key for key, evidence in rows().items() if TRIED in evidence and key not in tried} == set()


@pytest.mark.parametrize("name", CASES)
def test_what_is_tried_is_accepted(name: str) -> None:
    check_ds_keys(CASES[name], Origin("my.json"))
    check_combinations(CASES[name] | {"train_micro_batch_size_per_gpu": 1}, Origin("my.json"))


def test_a_run_under_auto_cast_is_that_without(train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    """DeepSpeed would cast the micro-batch, which is more than a tensor; what the student takes has its dtypes."""
    losses = []
    for value in ("true", "false"):
        settings = [str(tiny_recipe), f"output_dir={tmp_path / value}", f"deepspeed.fp16.auto_cast={value}"]
        completed(train(1, [*settings, "deepspeed_config=zero2_fp16"], program=["-c", IN_FP16]))
        rows = rows_of(tmp_path / value)
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("nvme", [False, True])
def test_two_ranks_train_save_skip_and_resume_as_plain_adamw_would(nvme: bool, train: Train, tmp_path: Path) -> None:
    """All cases in one test: two workers of pytest would each run every case for a half of the tests."""
    if nvme and not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's operator for NVMe needs libaio (Debian: libaio-dev)")
    tried = {name: case for name, case in CASES.items() if on_nvme(case) == nvme}
    (tmp_path / "cases.json").write_text(json.dumps(tried), encoding="utf-8")
    program = [str(Path(__file__).with_name("key_ranks.py"))]
    output = completed(train(2, [str(tmp_path / "cases.json"), str(tmp_path)], program=program, seconds=1200))
    problems = problems_of(output)
    assert problems.keys() == tried.keys()
    failed = {name: found for name, found in problems.items() if found}
    assert not failed, "\n\n".join(f"{name}: {problem}" for name, found in failed.items() for problem in found)
