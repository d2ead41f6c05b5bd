"""A step of families whose code the rest of the tests does not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.ranks import Train
from harness.runs import logged_rows
from harness.tiny import TinyRun
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

pytestmark = pytest.mark.slow
# Longformer's operations cannot be counted without values.
FAMILIES = ["big_bird", "convbert", "longformer", "megatron-bert", "nystromformer", "rembert", "roformer"]
# A pooler, the projections of global attention, and a table of sines.
WITH_FIXED_WEIGHTS = ("big_bird", "longformer", "roformer")


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_every_kind_train(family: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    said = tiny_run(tmp_path, f"student.family={family}", "train.max_steps=2")
    steps = logged_rows(tmp_path)
    assert list(steps) == [1, 2]
    assert ("of these are not trained" in said) == (family in WITH_FIXED_WEIGHTS)
    assert ("MFU is not known" in said) == ("mfu" not in steps[1]) == (family == "longformer")


def test_families_that_need_fp32_are_refused_in_bf16(
    train: Train, tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("fnet", vocab_size=298, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "fnet")
    AutoTokenizer.from_pretrained(tiny_data / "tokenizer").save_pretrained(tmp_path / "fnet")
    run = [str(tiny_recipe), "--deepspeed_config", "zero2_bf16", f"output_dir={tmp_path}/run"]
    code, said = train(1, [*run, "student.family=fnet"])
    assert (code, said.splitlines()[-1]) == (
        2,
        "error: student.family='fnet' cannot compute in bf16; use --deepspeed_config zero2_fp32",
    )
    code, said = train(1, [*run, f"teacher.path={tmp_path}/fnet"])
    assert (code, said.splitlines()[-1]) == (
        2,
        "error: teacher.path: fnet models cannot compute in bf16; set teacher.dtype=fp32",
    )
