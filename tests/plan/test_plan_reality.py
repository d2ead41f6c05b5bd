"""Plans against real runs: bytes of live tensors by part, their peak, what collectives carry, and checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertConfig

from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.memory import BUCKETS, GRADIENTS, MASTER, OPTIMIZER, TEACHER, WEIGHTS
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.train_tokenizer import train_tokenizer

Measure = Callable[..., list[dict[str, Any]]]
MIDDLE = 2
"""Of four steps. The first one is logged; the last one has no pass of the teacher for a next one."""
SHARE = 0.10
"""Largest difference of a measured figure from the predicted one, as a share."""
DISK_SHARE = 0.02
"""The same for a checkpoint, which also has a manifest and generator states."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> str:
    """2.5M parameters; four steps. The bucket holds a part of the model."""
    settings = {
        "deepspeed_config": "zero2_bf16",
        "data": {"dir": str(tiny_data)},
        "student": {"layers": 3, "hidden_size": 256, "num_heads": 4, "max_positions": 64},
        "teacher": {"path": str(tiny_teacher)},
        "train": {"max_steps": 4, "micro_batch_size": 16, "log_every": 100, "eval_rows": 16},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500_000}},
    }
    path = tmp_path_factory.mktemp("plan") / "measured.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def plan_of(recipe: str, ranks: int, *overrides: str) -> Plan:
    settings = resolve_plan(recipe, list(overrides), None, ranks)
    device = find_device("cpu", ranks)
    return Plan(settings, build_shapes(settings), device, nodes=1)


def check_memory(plan: Plan, ranks: list[dict[str, Any]]) -> None:
    memory = plan.memory(plan.stage)
    at_step, in_reduction = memory.moments["optimizer step"], memory.moments["reduction"]
    micro = plan.micro
    fullest = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key not in ("sent", "calls", "peak")}
    assert fullest["weights"] == pytest.approx(at_step[WEIGHTS], rel=SHARE)
    assert fullest["master"] == pytest.approx(at_step[MASTER], rel=SHARE)
    assert fullest["optimizer"] == pytest.approx(at_step[OPTIMIZER], rel=SHARE)
    assert fullest["gradients"] == pytest.approx(at_step[GRADIENTS], rel=SHARE)
    assert fullest["teacher"] == pytest.approx(at_step[TEACHER], rel=SHARE)
    assert fullest["activations"] == pytest.approx(micro.activations + micro.head_gradients, rel=SHARE)
    if "buckets" in fullest:
        copy = min(plan.partition.elements, plan.zero(plan.stage).reduce_bucket) * plan.zero(plan.stage).element_bytes
        assert fullest["buckets"] == pytest.approx(in_reduction[BUCKETS] - (copy if len(ranks) > 1 else 0), rel=SHARE)
    assert max(rank["peak"][MIDDLE] for rank in ranks) == pytest.approx(memory.peak, rel=SHARE)


def check_traffic(plan: Plan, ranks: list[dict[str, Any]]) -> None:
    """Bytes and calls are equal."""
    names = {
        "all_reduce": "allreduce",
        "all_gather": "allgather_base",
        "reduce": "reduce",
        "reduce_scatter": "reduce_scatter_base",
    }
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for each in plan.traffic(plan.stage):
        sent[names[each.collective]] += each.bytes
        calls[names[each.collective]] += each.calls
    for rank in ranks:
        assert rank["sent"][MIDDLE] == sent
        assert plan.stage == 3 or plan.sharded_teacher or rank["calls"][MIDDLE] == calls


def check_disk(plan: Plan, run_folder: Path) -> None:
    files = (run_folder / "checkpoints" / "step_00000004").iterdir()
    assert sum(file.stat().st_size for file in files) == pytest.approx(plan.checkpoint_bytes, rel=DISK_SHARE)


@pytest.mark.slow
def test_two_ranks_under_zero_2(measure: Measure, recipe: str, tmp_path: Path) -> None:
    """With all the sums that a step can have."""
    overrides = [
        f"output_dir={tmp_path}",
        "train.gradient_accumulation_steps=2",
        "train.spike_sigma=6",
        "distill.soft_weight.schedule=adaptive",
        "distill.soft_positions=0.3",
    ]
    plan, ranks = plan_of(recipe, 2, *overrides), measure(2, recipe, *overrides)
    check_memory(plan, ranks)
    check_traffic(plan, ranks)
    check_disk(plan, tmp_path)
    assert plan.settings.ds_values == json.loads((tmp_path / "ds_config.json").read_text())
    assert plan.settings.config.to_dict() == yaml.safe_load((tmp_path / "config.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (2, ["deepspeed_config=zero2_fp32", "deepspeed.zero_optimization.reduce_bucket_size=10000000"]),
        (2, ["train.activation_checkpointing=true", "student.layers=6"]),
        (2, ["deepspeed.zero_optimization.use_multi_rank_bucket_allreduce=false"]),
        (2, ["deepspeed_config=zero1", "train.gradient_accumulation_steps=2"]),
        (2, ["deepspeed_config=zero0"]),
        (2, ["distill.hidden_weight=0.5"]),
        (1, ["deepspeed.optimizer.type=Muon", "train.max_grad_norm=0"]),
        (
            1,
            [
                "deepspeed.optimizer.type=RMSprop",
                "deepspeed.optimizer.params.momentum=0.9",
                "deepspeed.zero_allow_untested_optimizer=true",
            ],
        ),
        (2, ["deepspeed_config=zero3"]),
        (
            2,
            [
                "deepspeed_config=zero3",
                "deepspeed.zero_optimization.stage3_max_reuse_distance=0",
                "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0",
            ],
        ),
    ],
    ids=[
        "one rank",
        "fp32, one bucket",
        "activation checkpointing",
        "reduce",
        "ZeRO-1",
        "ZeRO-0",
        "hidden loss",
        "Muon",
        "RMSprop",
        "ZeRO-3",
        "ZeRO-3, weights released",
    ],
)
def test_other_runs(ranks: int, overrides: list[str], measure: Measure, recipe: str, tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}", *overrides]
    plan, measured = plan_of(recipe, ranks, *overrides), measure(ranks, recipe, *overrides)
    check_memory(plan, measured)
    check_disk(plan, tmp_path)
    if ranks > 1:
        check_traffic(plan, measured)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharded"), [(1, "false"), (2, "true")], ids=["whole", "sharded"])
def test_a_teacher_that_needs_more_than_its_student(
    ranks: int, sharded: str, measure: Measure, recipe: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 16384}
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tiny_teacher, **wide)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path)
    overrides = [f"teacher.path={tmp_path}", f"teacher.sharded={sharded}"]
    overrides += ["student.layers=1", "student.hidden_size=32", "student.num_heads=2"]
    plan, measured = plan_of(recipe, ranks, *overrides), measure(ranks, recipe, *overrides)
    check_memory(plan, measured)
    assert plan.memory(plan.stage).fullest == "teacher"


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["zero2_bf16", "zero3"])
def test_a_sharded_teacher(settings: str, measure: Measure, recipe: str, tiny_teacher: Path, tmp_path: Path) -> None:
    """Two layers x 384; DeepSpeed leaves biases and norms whole, and the head is whole too."""
    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2}
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tiny_teacher, **wide)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path)
    overrides = [f"deepspeed_config={settings}", f"teacher.path={tmp_path}", "train.gradient_accumulation_steps=2"]
    whole = measure(2, recipe, *overrides)[0]["teacher"]
    overrides.append("teacher.sharded=true")
    plan, measured = plan_of(recipe, 2, *overrides), measure(2, recipe, *overrides)
    check_memory(plan, measured)
    check_traffic(plan, measured)
    assert measured[0]["teacher"] < 0.7 * whole


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_teacher_with_another_vocabulary(
    sharded: str, measure: Measure, recipe: str, tiny_text: Path, tmp_path: Path
) -> None:
    """Its rows are longer; the head's rows of shared entries are kept beside it."""
    tokenizer = train_tokenizer(tiny_text.read_text(encoding="utf-8").split("\n"), 1000, "bpe", Wishes())
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    overrides = [f"teacher.path={tmp_path}", "teacher.vocabulary=shared", f"teacher.sharded={sharded}"]
    overrides.append("distill.soft_weight.schedule=adaptive")
    plan, measured = plan_of(recipe, 2, *overrides), measure(2, recipe, *overrides)
    check_memory(plan, measured)
    check_traffic(plan, measured)
