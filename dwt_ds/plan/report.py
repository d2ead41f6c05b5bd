"""The plan as text: sections of short lines and small tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from dwt_ds.base.trees import NOT_SET, Difference, differences
from dwt_ds.base.words import GIB, counted, table
from dwt_ds.base.yaml_and_json import yaml_text
from dwt_ds.config.schema import RunConfig
from dwt_ds.launch.local import printed_commands
from dwt_ds.plan.communication import bytes_per_second
from dwt_ds.plan.hardware import LATENCY_SECONDS, LINK_SHARE, RESERVED_SHARE
from dwt_ds.plan.memory import PARTS, STAGES, RankMemory, export_bytes
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.speed import StepTime, traffic_seconds
from dwt_ds.run.resolve import Resolved

Lines = list[str]


def report(plan: Plan, overrides: list[str], deepspeed_config: str | None, recipe_argument: str) -> str:
    """All sections; `overrides`, `deepspeed_config` and `recipe_argument` are those of the command line."""
    commands = printed_commands(
        recipe_argument, overrides, deepspeed_config, nodes=plan.nodes, ranks_per_node=plan.ranks // plan.nodes
    )
    begin = plan if plan.teacher_share else plan.after_release  # a weight that is 0 from the start loads no teacher
    sections = {
        "settings that are not the defaults": _settings(plan),
        "data": [plan.settings.corpus.source, *plan.settings.corpus.text],
        "models": _models(plan),
        "batch and length": _batch(plan),
        f"memory of a rank, micro-batch {plan.settings.config.train.micro_batch_size}": _memory(begin),
        "speed": _speed(begin),
        "traffic of a step": _traffic(begin),
        "disk": _disk(plan),
        "command": commands,
    }
    title = f"{plan.settings.recipe.name}: {plan.nodes} x {plan.ranks // plan.nodes} {plan.device.name}"
    parts = [f"{title}, ZeRO-{plan.stage}, {plan.settings.ds.precision} ({plan.settings.ds.origin.source})"]
    for heading, lines in sections.items():
        parts.append(f"\n{heading}\n" + "\n".join(f"  {line}" for line in lines))
    return "\n".join(parts)


def whole_settings(settings: Resolved) -> str:
    """The whole recipe as YAML and the DeepSpeed JSON, as a run's folder has them in config.yaml and ds_config.json."""
    recipe = yaml_text(settings.to_recipe())
    values = json.dumps(settings.ds_values, indent=2)
    return f"recipe, resolved\n{recipe}\nDeepSpeed JSON, resolved ({settings.ds.origin.source})\n{values}"


def changes(config: RunConfig) -> list[Difference]:
    """All settings that are not the defaults."""
    changed = differences(RunConfig().to_dict(), config.to_dict())
    return [change for change in changed if change.now is not NOT_SET]


def _settings(plan: Plan) -> Lines:
    rows = [(name, _written(now), f"default {_written(old)}") for name, old, now in changes(plan.settings.config)]
    return table(rows)


def _models(plan: Plan) -> Lines:
    student, shapes = plan.settings.config.student, plan.shapes
    size = f"{student.layers} x {student.hidden_size}"
    lines = [f"student  {student.family}, {size}, {shapes.student_parameters:,} parameters"]
    if shapes.teacher is None:
        lines.append("teacher  none: the student trains alone")
    else:
        share = shapes.teacher_parameters / shapes.student_parameters
        lines.append(f"teacher  {shapes.teacher_parameters:,} parameters, {share:.2f} of the student's")
        lines.append(f"         {shapes.teacher_source}")
    if shapes.overlap is not None:
        lines.append(
            f"shared   {shapes.overlap.entries:,} entries of both vocabularies, {shapes.overlap.aligned_share:.0%} of "
            f"the labels aligned, {shapes.overlap.teacher_tokens:.2f} of the teacher's tokens for one of the student's "
            f"({shapes.overlap_source})"
        )
    growth = plan.growth
    if growth is None:
        lines.append("init     random weights")
    else:
        width = f", width by {growth.width}" if growth.width else ""
        lines.append(f"init     {student.init}: depth by {growth.depth}{width}")
        lines.extend(f"         {line}" for line in growth.lines())
    if plan.settings.quantization is not None:
        lines.append(f"rounding {plan.settings.quantization.describe()}")
    return lines


def _batch(plan: Plan) -> Lines:
    settings = plan.settings.with_mean_rows
    train, corpus = settings.config.train, settings.corpus
    rows = settings.rows_per_step
    return [
        f"{train.micro_batch_size} rows x {train.gradient_accumulation_steps} accumulated x "
        f"{counted(plan.ranks, 'rank')} = "
        f"{rows:,} rows per step, {rows * corpus.tokens_per_row:,.0f} tokens, "
        f"{rows * settings.labels_per_row:,} labels{_further(plan)}",
        f"{settings.total_steps:,} steps, {plan.tokens:,.0f} tokens, {plan.epochs:.3g} epochs of {corpus.rows:,} rows",
    ]


def _further(plan: Plan) -> str:
    further = plan.settings.rows_per_step * plan.settings.with_mean_rows.further_per_row
    return f" and {further:,} more for the soft loss" if further else ""


def _memory(plan: Plan) -> Lines:
    by_stage = [plan.memory(stage) for stage in STAGES]
    names = [f"ZeRO-{stage}{' *' if stage == plan.stage else ''}" for stage in STAGES]
    rows: list[Sequence[str]] = [("GiB", *names)]
    rows += [(part, *(_gib(memory.most[part]) for memory in by_stage)) for part in PARTS]
    rows.append(("peak", *(_gib(memory.peak) for memory in by_stage)))
    rows.append(("reached in the", *(memory.fullest for memory in by_stage)))
    if plan.shapes.teacher is not None and (plan.teacher_share < 1 or plan.release_is_unknown):
        released = [plan.after_release.memory(stage) for stage in STAGES]
        rows.append(("peak after the teacher's release", *(_gib(memory.peak) for memory in released)))
    largest = plan.largest_micro_batches()
    rows.append(("largest micro-batch", *(f"{largest[stage]:,}" for stage in STAGES)))
    lines = [
        *table(rows, "<>"),
        "each part at its largest; the parts do not all peak at once, so the peak is less than their sum",
        f"* the JSON's stage. {_room(plan)}",
        *_host(by_stage[plan.stage]),
    ]
    logit_rows = plan.simulator.logit_rows(plan.settings.config.train.micro_batch_size)
    lines.append(
        "logits are never in memory" if logit_rows is None else f"logits in memory: {logit_rows:,} rows at a time"
    )
    return lines


def _room(plan: Plan) -> str:
    room = f"A rank has {_gib(plan.device.memory_bytes)} GiB"
    if plan.device.is_cpu:
        return f"{room} of this machine's memory; libraries and cached data are not counted"
    return f"{room}; {RESERVED_SHARE:.0%} of it is reserved for CUDA, NCCL and fragmentation"


def _host(memory: RankMemory) -> Lines:
    if not memory.host:
        return []
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in memory.host.items())
    return [f"in the host's memory, GiB per rank: {parts}"]


def _speed(plan: Plan) -> Lines:
    settings, work = plan.settings, plan.work
    time = plan.step_time(plan.stage)
    peak = plan.device.flops_per_second(settings.ds.compute_precision)
    lines = [
        f"{work.per_row / 1e9:,.2f} GFLOP per row (student {3 * work.student_forward / 1e9:,.2f}, teacher "
        f"{work.teacher_forward / 1e9:,.2f}), {plan.flops:.3g} FLOP in total",
        f"at {plan.device.mfu:.0%} of {peak / 1e12:,.4g} TFLOP/s per rank (assumed; --mfu sets it): "
        f"{1e3 * time.compute:,.2f} ms per step, and {1e3 * time.exposed:,.2f} ms waiting for traffic",
        *_host_time(plan, time),
        f"{plan.tokens / plan.hours / 3600:,.0f} tokens/s, {plan.hours:,.1f} hours, "
        f"{plan.hours * plan.ranks:,.0f} device hours, scaling efficiency {time.efficiency:.0%}",
    ]
    if work.teacher_forward and plan.teacher_share < 1:
        alone = plan.after_release.step_time(plan.stage)
        lines.insert(
            -1,
            f"teacher released after {plan.teacher_share:.0%} of the steps: {1e3 * alone.total:,.2f} ms per step from "
            f"there on, {1e3 * time.total:,.2f} before, waiting included",
        )
    if work.teacher_forward and plan.release_is_unknown:
        lines.insert(
            2, "the adaptive weight may release the teacher; it is counted to the end (--release-at SHARE: until then)"
        )
    if work.recomputed:
        lines.insert(1, f"{work.recomputed / 1e9:,.2f} GFLOP per row recomputed (activation checkpointing): time only")
    zero = plan.zero(plan.stage)
    if zero.optimizer_on_cpu or zero.parameters_on_cpu:
        lines.append("offload: transfers and the optimizer on the CPU are not counted")
    return lines


def _host_time(plan: Plan, time: StepTime) -> Lines:
    if not time.host:
        return []
    graph = ", the teacher's as one CUDA graph" if plan.replays_teacher else ""
    if plan.replays_training(plan.stage):
        graph = ", the student's and the teacher's passes as CUDA graphs" if graph else ", its passes as CUDA graphs"
    launches, launch_seconds = plan.launches(plan.stage), plan.device.launch_seconds
    at_least = ", the measured minimum per step" if time.host > launches * launch_seconds else ""
    line = (
        f"the CPU launches {launches:,} operations a step{graph}, at {1e6 * launch_seconds:.3g} us (--launch-us sets "
        f"it): {1e3 * time.host:,.2f} ms{at_least}"
    )
    if time.host <= time.compute:
        return [line]
    rows = math.ceil(plan.settings.config.train.micro_batch_size * time.host / time.compute)
    return [f"{line}, more than the device needs; from about {rows:,} rows per micro-batch the device needs longer"]


def _traffic(plan: Plan) -> Lines:
    traffic = plan.traffic(plan.stage)
    if not traffic:
        return ["none: there is one rank"]
    rate = bytes_per_second(plan.device, plan.nodes)
    rows: list[Sequence[str]] = [("collective", "bytes", "calls", "sent per rank", "ms")]
    for each in traffic:
        name = f"{each.collective} of {each.what}{' (during the backward pass)' if each.hidden else ''}"
        seconds = traffic_seconds(each, plan.device, plan.nodes, plan.ranks)
        sent = f"{each.sent_bytes(plan.ranks):,.0f}"
        rows.append((name, f"{each.bytes:,}", f"{each.calls:,}", sent, f"{1e3 * seconds:.3f}"))
    return [
        *table(rows, "<>"),
        f"links: {rate / 1e9:,.1f} GB/s per rank ({LINK_SHARE:.0%} of the peak, assumed), "
        f"{LATENCY_SECONDS * 1e6:.0f} us per call for each doubling of the ranks",
    ]


def _disk(plan: Plan) -> Lines:
    keep_last, older, on_the_way = plan.settings.config.train.keep_last, plan.older_checkpoints, plan.exports_on_the_way
    one, export = plan.checkpoint_bytes, export_bytes(plan.shapes.student_parameters)
    most = (keep_last + 1 + older) * one + (on_the_way + 1) * export
    line = (
        f"checkpoint {_gib(one)} GiB, export {_gib(export)} GiB; {_gib(most)} GiB are enough to keep {keep_last} "
        "checkpoints while the next is written"
    )
    if older:
        line += f", {older:,} older ones (train.keep_every)"
    if on_the_way:
        line += f", {on_the_way:,} exports on the way (train.export_every)"
    return [line]


def _gib(size: float) -> str:
    gib = size / GIB
    if size == 0:
        return "-"
    return f"{gib:,.1f}" if gib >= 100 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)
