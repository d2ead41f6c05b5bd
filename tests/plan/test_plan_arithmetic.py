"""Traffic, time and memory that a plan computes, where the right answer is known without a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from dwt_ds.config.recipe import load_recipe
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.masks import draw_masks
from dwt_ds.data.tokenizer import TokenizerFacts
from dwt_ds.models.flops import forward_flops, recomputed_flops
from dwt_ds.plan.communication import Traffic, bytes_per_second, own_sums, step_traffic
from dwt_ds.plan.hardware import LATENCY_SECONDS, LAUNCH_SECONDS, LEAST_STEP_SECONDS, find_device
from dwt_ds.plan.memory import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    MASTER,
    OPTIMIZER,
    TEACHER,
    TEMPORARIES,
    WEIGHTS,
    checkpoint_bytes,
)
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.settings import paper_corpus, resolve_plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.plan.simulation import LiveBytes
from dwt_ds.plan.speed import REPLAY_LAUNCHES, traffic_seconds
from dwt_ds.plan.stand_ins import Loss
from dwt_ds.plan.zero import Partition, zero_settings

BUCKET = "deepspeed.zero_optimization.reduce_bucket_size"


def plan_of(recipe: str, *overrides: str) -> Plan:
    device = find_device("h100", 8)
    settings = resolve_plan(recipe, list(overrides), None, 8)
    return Plan(settings, build_shapes(settings), device, nodes=1)


@pytest.mark.parametrize(("seq_len", "labels"), [(32, 5), (64, 9), (128, 19), (384, 57), (512, 77)])
def test_a_full_row_has_the_labels_that_are_drawn_for_it(seq_len: int, labels: int) -> None:
    ids = np.full((1, seq_len), 50)
    ids[0, 0], ids[0, -1] = 2, 3
    special = np.arange(60) < 5
    facts = TokenizerFacts(60, 0, 2, 3, 4, special, special, np.arange(5, 60))
    zero = np.zeros(1, dtype=np.int64)
    drawn = draw_masks(ids, np.array([seq_len]), zero, zero, facts, DataConfig(), 1)
    assert len(drawn.labels) == labels
    corpus = dataclasses.replace(paper_corpus("data"), seq_len=seq_len)
    assert corpus.labels_per_row(DataConfig().mask_probability) == labels


def second_gathering(hpz: int) -> Traffic:
    """Of the weights for the backward pass, by 16 ranks."""
    section = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "zero_hpz_partition_size": hpz}
    zero = zero_settings({"zero_optimization": section}, "bf16", 3)
    traffic = step_traffic(3, zero, Partition([1 << 20] * 4, 16), 1, [])
    return next(each for each in traffic if each.what == "weights, for the backward pass")


@pytest.mark.parametrize(
    ("hpz", "group", "machines"), [(1, 16, 2), (2, 2, 1), (4, 4, 1), (8, 8, 1), (16, 16, 2), (32, 16, 2)]
)
def test_hpz_gathers_over_its_own_partition(hpz: int, group: int, machines: int) -> None:
    """Two machines of eight: over the network only where a partition is larger than a machine."""
    device, traffic = find_device("h100", 8, network_gbps=400), second_gathering(hpz)
    sent = (group - 1) / group * 2 * 4 * (1 << 20)
    assert traffic.sent_bytes(16) == sent
    seconds = sent / bytes_per_second(device, machines) + 4 * LATENCY_SECONDS * math.log2(group)
    assert traffic_seconds(traffic, device, nodes=2, ranks=16) == pytest.approx(seconds)


def test_a_partition_that_spans_two_machines_is_not_local() -> None:
    device = find_device("h100", 3)
    traffic = second_gathering(2)  # of three ranks a machine: 0 1 | 2, 3 | 4 5
    slow = traffic.seconds(6, bytes_per_second(device, 2))
    assert traffic_seconds(traffic, device, nodes=2, ranks=6) == slow > traffic.seconds(6, bytes_per_second(device, 1))


def test_the_loss_sums_the_heads_gradient_of_fp16_in_fp32() -> None:
    """And keeps it so: no second one in 16 bits."""
    hidden, weight = (torch.empty(size, 64, dtype=torch.float16, device="meta") for size in (8, 1000))
    with LiveBytes() as live:
        loss = Loss.apply(hidden, weight, None, None, 8)
    assert loss.dtype == torch.float32
    assert 4 * weight.numel() <= live.peak < 5 * weight.numel()


def test_few_rows_take_as_long_as_the_host_needs() -> None:
    eager = "train.cuda_graphs=off"
    few, many = (plan_of("paper_weak", f"train.micro_batch_size={rows}", eager) for rows in (4, 4096))
    short, long = few.step_time(2), many.step_time(2)
    assert short.host == long.host > short.compute
    assert short.total == short.host + short.exposed
    assert long.total == long.compute + long.exposed
    assert few.after_release.step_time(2).host < short.host
    quicker = Plan(few.settings, few.shapes, find_device("h100", 8, launch_us=1e6 * LAUNCH_SECONDS / 2), nodes=1)
    assert quicker.step_time(2).host == pytest.approx(short.host / 2)
    on_cpu = Plan(few.settings, few.shapes, find_device("cpu", 8), nodes=1)
    assert on_cpu.step_time(2).host == 0, "a CPU's MFU has it"


def test_a_replayed_teacher_is_few_launches_and_keeps_its_memory() -> None:
    student = "train.activation_checkpointing=true"  # not replayed
    replayed, eager = (plan_of("paper_weak", f"train.cuda_graphs={mode}", student) for mode in ("auto", "off"))
    fewer = eager.micro.teacher_launches - REPLAY_LAUNCHES
    assert fewer > 50
    assert eager.step_time(2).host - replayed.step_time(2).host == pytest.approx(fewer * LAUNCH_SECONDS)
    alone = [plan.after_release.step_time(2).host for plan in (replayed, eager)]
    assert alone[0] == alone[1]
    more = [plan.memory(2).moments["optimizer step"][TEACHER] for plan in (replayed, eager)]
    assert more[0] - more[1] == eager.micro.teacher_peak
    assert replayed.memory(2).moments["teacher"] == eager.memory(2).moments["teacher"]


def test_a_replayed_training_pass_is_few_launches_and_keeps_its_memory() -> None:
    replayed, eager = (plan_of("paper_alone", f"train.cuda_graphs={mode}") for mode in ("auto", "off"))
    launches = [plan.launches(2) for plan in (replayed, eager)]
    assert launches[0] < 50 < 200 < launches[1]
    assert replayed.step_time(2).host == LEAST_STEP_SECONDS < eager.step_time(2).host
    kept = replayed.memory(2).moments["optimizer step"][ACTIVATIONS]
    passes = [eager.memory(2).moments[name] for name in ("loss", "backward pass")]
    assert kept == max(each[ACTIVATIONS] + each[LOSS] + each[TEMPORARIES] for each in passes)
    assert eager.memory(2).moments["optimizer step"][ACTIVATIONS] == 0
    assert replayed.step_time(3).host == eager.step_time(3).host, "not under ZeRO-3"


@pytest.mark.parametrize(
    "setting",
    [
        "student.attention=flash_attention_2",
        "train.activation_checkpointing=true",
        "student.quantization=w8a8",
        "distill.hidden_weight=0.5",
        "deepspeed.torch_autocast={enabled: true, dtype: bfloat16}",
        "deepspeed.flops_profiler.enabled=true",  # it waits for the device in each layer, which ends a recording
    ],
)
def test_a_training_pass_that_cannot_be_recorded_is_not_counted_as_replayed(setting: str) -> None:
    replayed = plan_of("paper_weak")
    assert replayed.replays_training(2)
    settings = resolve_plan("paper_weak", [setting], None, 8)
    assert not dataclasses.replace(replayed, settings=settings).replays_training(2)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.label_draw=bernoulli"],
        ["data.whole_word=true"],
        ["teacher.sharded=true"],
        ["teacher.kernel_inject=true"],
        ["teacher.path=null"],
        ["distill.hidden_weight=0.5"],
    ],
)
def test_a_teacher_is_not_replayed_where_shapes_vary_or_a_run_would_not(settings: list[str]) -> None:
    assert plan_of("paper_weak").replays_teacher
    plan = plan_of("paper_weak", *settings)
    assert not plan.replays_teacher
    on_cpu = Plan(plan.settings, plan.shapes, find_device("cpu", 8), nodes=1)
    assert not on_cpu.replays_teacher


def test_a_released_teacher_counts_for_its_share_of_the_steps() -> None:
    half = "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}"
    plan = plan_of("paper_weak", half, "teacher.sharded=true")
    assert plan.teacher_share == 0.5
    work, steps, rows = plan.work, plan.settings.total_steps, plan.settings.rows_per_step
    assert plan.flops == pytest.approx(steps * rows * (3 * work.student_forward + work.teacher_forward / 2))
    taught, alone = plan.step_time(plan.stage), plan.after_release.step_time(plan.stage)
    assert alone.compute / taught.compute == pytest.approx(3 * work.student_forward / work.per_row)
    assert alone.traffic < taught.traffic, "nobody gathers the weights of a teacher that is gone"
    assert plan.hours == pytest.approx(steps * (taught.total + alone.total) / 2 / 3600)
    quarter = dataclasses.replace(plan, release_at=0.25)
    assert quarter.hours == pytest.approx(steps * (taught.total + 3 * alone.total) / 4 / 3600)
    assert plan_of("paper_weak", half, "teacher.release=never").teacher_share == 1.0
    adaptive = plan_of("paper_weak", "distill.soft_weight={schedule: adaptive, start: 4}")
    assert adaptive.teacher_share == 1.0
    assert adaptive.release_is_unknown
    assert not dataclasses.replace(adaptive, release_at=0.5).release_is_unknown
    assert not plan.release_is_unknown
    assert plan_of("paper_decay").teacher_share == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        ["teacher.vocabulary=shared"],  # alone, the student's pass is a CUDA graph
        ["distill.soft_positions=0.3", "train.cuda_graphs=off"],
        ["distill.soft_weight={schedule: adaptive, start: 4}", "teacher.sharded=true"],
    ],
)
def test_after_the_teachers_release_a_step_is_that_of_a_student_alone(settings: list[str]) -> None:
    plan = dataclasses.replace(plan_of("paper_weak", *settings), release_at=0.25)
    alone = plan_of("paper_weak", *settings[1:], "teacher.path=null")
    taught, later = plan.step_time(plan.stage), alone.step_time(alone.stage)
    assert plan.hours == pytest.approx(plan.settings.total_steps * (taught.total + 3 * later.total) / 4 / 3600)
    assert plan.after_release.launches(2) == alone.launches(2) < plan.launches(2)
    assert plan.after_release.traffic(2) == alone.traffic(2)


def test_the_projection_of_a_hidden_loss_stays_after_the_teachers_release() -> None:
    """It is among what the optimizer trains: 768 x 768 weights."""
    plan = plan_of("paper_weak", "distill.hidden_weight=0.5")
    alone = plan_of("paper_weak", "teacher.path=null")
    for kind in (WEIGHTS, GRADIENTS, MASTER, OPTIMIZER):
        with_teacher, released = (each.memory(0).most[kind] for each in (plan, plan.after_release))
        assert released == with_teacher > alone.memory(0).most[kind]
    assert plan.after_release.traffic(2)[0].bytes == plan.traffic(2)[0].bytes
    assert alone.launches(2) < plan.after_release.launches(2) < plan.launches(2), "neither is a CUDA graph"
    never_loaded = plan_of("paper_weak", "distill.hidden_weight=0.5", "distill.soft_weight=0")
    assert never_loaded.after_release.memory(0).most[MASTER] == alone.memory(0).most[MASTER]
    assert never_loaded.checkpoint_bytes == alone.checkpoint_bytes < plan.checkpoint_bytes


@pytest.mark.parametrize(
    ("overrides", "sums"),
    [
        ([], [40]),
        (["train.spike_sigma=6"], [40, 4]),
        (["distill.soft_weight.schedule=adaptive"], [40, 12]),
        (["distill.soft_weight.schedule=adaptive", "teacher.path=null"], [40]),
        (["distill.soft_weight.schedule=adaptive", "distill.soft_positions=0.3"], [40, 16]),
        (["distill.soft_weight.schedule=adaptive", "distill.hidden_weight=0.5"], [40, 16]),
    ],
)
def test_small_sums_of_a_step(overrides: list[str], sums: list[int]) -> None:
    assert own_sums(load_recipe("paper_weak", overrides).config) == sums


def test_activation_checkpointing_adds_time_but_no_flops() -> None:
    plain, again = plan_of("paper_weak"), plan_of("paper_weak", "train.activation_checkpointing=true")
    corpus, labels = plain.settings.corpus, plain.settings.positions_per_row
    six, one = (
        forward_flops(plan.shapes.student, corpus.seq_len, labels, corpus.vocab_size)
        for plan in (plain, plan_of("paper_weak", "student.layers=1"))
    )
    # All layers but the last, which is not checkpointed.
    assert recomputed_flops(plain.shapes.student, corpus.seq_len, labels) == six - one
    assert again.work.per_row == plain.work.per_row
    assert again.step_time(2).compute == pytest.approx(
        plain.step_time(2).compute * (1 + (six - one) / plain.work.per_row)
    )


def test_the_largest_micro_batch_leaves_room_for_the_teacher() -> None:
    """The teacher has 4 layers x 768. Without CUDA graphs what its pass needs is free again afterwards."""
    small = ["student.layers=1", "student.hidden_size=32", "student.num_heads=2", f"{BUCKET}=1000000"]
    small.append("train.cuda_graphs=off")
    plan = plan_of("paper_weak", *small)
    rows = plan.largest_micro_batches()[2]
    micro = plan.simulator.micro_batch(rows)
    needed = plan.simulator.teacher_bytes() + micro.teacher_peak
    assert 0.9 * plan.device.usable_bytes < needed <= plan.device.usable_bytes
    assert plan.memory(2, micro).fullest == "teacher"


def test_a_sharded_teacher_is_gathered_for_its_forward_pass() -> None:
    whole, sharded = plan_of("paper_weak").memory(2), plan_of("paper_weak", "teacher.sharded=true").memory(2)
    held, gathered = (sharded.moments[moment]["teacher"] for moment in ("loss", "teacher"))
    assert held < 0.6 * whole.moments["loss"]["teacher"]
    assert gathered > 1.4 * held


# The student of paper_weak: 30,522 tokens, 512 positions and 2 types x 768 with their norm; in each of six layers the
# four matrices of attention, the two of the feed-forward part, and two norms; the head's matrix, norm and bias.
LAYER = 4 * (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 2 * 768
STUDENT = (30_522 + 512 + 2 + 2) * 768 + 6 * LAYER + (768 * 768 + 768) + 2 * 768 + 30_522


@pytest.mark.parametrize(
    ("kind", "params", "stage", "moments"),
    [
        ("AdamW", {}, 2, 2),
        ("AdamW", {"amsgrad": True, "torch_adam": True}, 2, 3),
        ("RMSprop", {"momentum": 0.9}, 2, 2),
        ("SGD", {"momentum": 0.0}, 2, 0),
        # A quarter of the elements are of Muon's matrices: its momentum is in bf16, or in fp32 without ZeRO.
        ("Muon", {}, 2, 0.75 * 2 + 0.25 / 2),
        ("Muon", {}, 0, 0.75 * 2 + 0.25),
    ],
)
def test_numbers_that_an_optimizer_keeps(kind: str, params: dict[str, Any], stage: int, moments: float) -> None:
    values = {"optimizer": {"type": kind, "params": params}}
    zero = zero_settings(values, "bf16", stage, muon_share=0.25)
    assert zero.moments == moments
    assert zero.staged_share == (0.25 if kind == "Muon" and stage == 2 else 0)
    assert checkpoint_bytes(stage, zero, Partition([800], 1), 0) == 800 * (2 + 4 + 4 * moments)


def test_masters_and_moments_in_bf16_take_half() -> None:
    in_bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    zero, plain = (zero_settings({**offload, "bf16": section}, "bf16", 2) for section in (in_bf16, {"enabled": True}))
    partition = Partition([800], 1)
    assert checkpoint_bytes(2, zero, partition, 0) == 800 * (2 + 2 + 2 * 2)
    assert checkpoint_bytes(2, plain, partition, 0) == 800 * (2 + 4 + 2 * 4)


@pytest.mark.parametrize(
    ("stage", "weights", "master_and_moments", "gradients"),
    [(0, 2, 12, 2), (1, 2, 12 / 8, 2), (2, 2, 12 / 8, None), (3, 2 / 8, 12 / 8, 2 / 8)],
)
def test_bytes_per_parameter_are_those_of_the_paper(
    stage: int, weights: float, master_and_moments: float, gradients: float | None
) -> None:
    """Of Adam in bf16 over eight ranks (Rajbhandari et al. 2020, figure 1)."""
    plan = plan_of("paper_weak", "data.dir=nowhere")
    assert plan.shapes.student_parameters == STUDENT == 66_987_066
    memory = plan.memory(stage)
    at_step = memory.moments["optimizer step"]
    # Two tables of 512 positions; stage 3 leaves vectors whole on every rank, and rounds each parameter up.
    assert at_step[WEIGHTS] == pytest.approx(weights * STUDENT, rel=2e-4 if stage < 3 else 2e-2)
    assert at_step[MASTER] + at_step[OPTIMIZER] == pytest.approx(master_and_moments * STUDENT, rel=1e-5)
    if gradients is not None:
        assert memory.most[GRADIENTS] == pytest.approx(gradients * STUDENT, rel=1e-5)
    else:
        assert memory.most[GRADIENTS] == pytest.approx(2 * STUDENT, rel=1e-5), "a bucket would hold them: one buffer"
        small_buckets = plan_of(
            "paper_weak", "data.dir=nowhere", "deepspeed.zero_optimization.reduce_bucket_size=30000000"
        )
        memory = small_buckets.memory(stage)
        # Whole parameters: the table of tokens, of which three ranks have a part, and what else lies in a rank's part.
        assert 2 * 30_522 * 768 <= memory.most[GRADIENTS] < 2 * (30_522 * 768 + STUDENT / 8)
    assert memory.peak < sum(memory.most.values()), "not all at once"
