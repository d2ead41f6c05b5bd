"""A step of families whose code the rest of the tests does not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.ranks import Train
from harness.runs import completed, rows_of

pytestmark = pytest.mark.slow
# Longformer's operations cannot be counted without values.
FAMILIES = ["big_bird", "convbert", "longformer", "megatron-bert", "nystromformer", "rembert", "roformer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_every_kind_train(family: str, train: Train, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"student.family={family}", "train.max_steps=2", "train.log_every=1", f"output_dir={tmp_path}/run"]
    said = completed(train(1, [str(tiny_recipe), *settings]))
    steps = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert ("MFU is not known" in said) == ("mfu" not in steps[0]) == (family == "longformer")
