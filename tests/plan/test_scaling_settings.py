"""Settings that docs/scaling.md speaks of train as plain ZeRO-2 does: equal losses on two ranks, in fp32.

What gloo cannot show: on a CPU `overlap_comm` has no second stream, so the arithmetic is checked and not its timing.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness.watched import Watch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

pytestmark = pytest.mark.slow
ZERO = "deepspeed.zero_optimization"
COMMON = ["student.dropout=0", "train.max_steps=6", "train.learning_rate=2e-3", "train.checkpoint_every=0"]
ZERO_3 = [f"{ZERO}.stage=3", f"{ZERO}.stage3_param_persistence_threshold=100"]
RELEASED = [*ZERO_3, f"{ZERO}.stage3_max_reuse_distance=0", f"{ZERO}.stage3_prefetch_bucket_size=0"]
SETTINGS = {
    "overlap_comm and small buckets": [f"{ZERO}.overlap_comm=true", f"{ZERO}.reduce_bucket_size=6000"],
    "reduce to the owner": [f"{ZERO}.use_multi_rank_bucket_allreduce=false"],
    "accumulation": ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2"],
    "ZeRO-1 with accumulation": [
        f"{ZERO}.stage=1",
        "train.micro_batch_size=2",
        "train.gradient_accumulation_steps=2",
    ],
    "offloaded optimizer": [f"{ZERO}.offload_optimizer.device=cpu"],
    "ZeRO-3": ZERO_3,
    "ZeRO-3, weights released": RELEASED,
    "ZeRO-3, activation checkpointing": [*ZERO_3, "train.activation_checkpointing=true"],
    "ZeRO-3 with hpZ": [*RELEASED, f"{ZERO}.zero_hpz_partition_size=2"],
}


def losses(watch: Watch, recipe: Path, output: Path, overrides: list[str]) -> tuple[list[float], dict[str, Any]]:
    """Also rank 0's notes (harness/watched.py)."""
    code, text, notes = watch([str(recipe), f"output_dir={output}", *COMMON, *overrides])
    assert code == 0, text
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row], notes[0]


@pytest.fixture(scope="module")
def plain(
    watch: Watch, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, Any]]:
    return losses(watch, tiny_recipe, tmp_path_factory.mktemp("plain") / "run", [])


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_plain_zero_2(
    name: str, plain: tuple[list[float], dict[str, Any]], watch: Watch, tiny_recipe: Path, tmp_path: Path
) -> None:
    expected, plain_notes = plain
    assert len(expected) == 6
    found, notes = losses(watch, tiny_recipe, tmp_path / "run", SETTINGS[name])
    assert found == pytest.approx(expected, abs=1e-5)
    assert_in_effect(name, notes, plain_notes)


def assert_in_effect(name: str, notes: dict[str, Any], plain: dict[str, Any]) -> None:
    """Check that the settings are not ignored: equal losses alone do not show it."""
    collectives, before = Counter(notes["collectives"]), Counter(plain["collectives"])
    optimizer = notes["optimizer"]
    assert plain["optimizer"] == {
        "is": "DeepSpeedZeroOptimizer",
        "overlap_comm": False,
        "partition_gradients": True,
        "cpu_offload": False,
    }
    if name.startswith("overlap_comm"):
        assert optimizer["overlap_comm"]
        assert collectives["all_reduce"] >= before["all_reduce"] + 6 * 3, "in several buckets a step"
    if name == "reduce to the owner":
        assert before["reduce"] == 0
        assert collectives["reduce"] >= 6 * 2, "to each of two ranks"
    if name.startswith("ZeRO-1"):
        assert not optimizer["partition_gradients"]
    if name == "offloaded optimizer":
        assert optimizer["cpu_offload"]
    if name.startswith("ZeRO-3"):
        assert optimizer["is"] == "DeepSpeedZeroOptimizer_Stage3"
        # Once for both passes; the first step, which learns the order, for each.
        gatherings = collectives["gathered"] / notes["parameters"] / 6
        assert gatherings > (1.5 if "released" in name or "hpZ" in name else 0.9)
        assert gatherings < 1.5 or name != "ZeRO-3"
        assert (collectives["in the second partition"] >= 6) == ("hpZ" in name)


@pytest.fixture(scope="module")
def wide_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers x 384, whose matrices DeepSpeed does cut: it leaves those below 100,000 elements whole."""
    folder = tmp_path_factory.mktemp("wide teacher")
    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "initializer_range": 0.1}
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tiny_teacher, **wide)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return f"teacher.path={folder}"


@pytest.fixture(scope="module")
def whole_teacher(
    watch: Watch, tiny_recipe: Path, wide_teacher: str, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    return losses(watch, tiny_recipe, tmp_path_factory.mktemp("whole") / "run", [wide_teacher])[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_with_a_sharded_teacher_are_those_with_a_whole_one(
    stage: int,
    whole_teacher: list[float],
    plain: tuple[list[float], dict[str, Any]],
    wide_teacher: str,
    watch: Watch,
    tiny_recipe: Path,
    tmp_path: Path,
) -> None:
    overrides = [wide_teacher, "teacher.sharded=true", f"{ZERO}.stage={stage}"]
    assert whole_teacher != pytest.approx(plain[0], abs=1e-2)  # this teacher does make a difference
    assert losses(watch, tiny_recipe, tmp_path / "run", overrides)[0] == pytest.approx(whole_teacher, abs=1e-5)
