"""Recipe, DeepSpeed JSON and data folder, checked against each other before anything is built or written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dwt_ds.base.software import software
from dwt_ds.config.quantization import Quantization, check_start_step, parse_quantization
from dwt_ds.config.recipe import load_recipe
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.data.prepared import PreparedData
from dwt_ds.distill.adaptive import check_adaptive
from dwt_ds.engine import ranks
from dwt_ds.engine.ds_json.load import DeepSpeedJson, load_ds_json
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule, resolved_recipe
from dwt_ds.models.build import load_model_config, student_model_config
from dwt_ds.models.growth.plan import check_growth
from dwt_ds.models.origin import weights_origin
from dwt_ds.models.quantization import check_quantization


@dataclass(frozen=True)
class Settled:
    """Settings and data that agree with each other."""

    config: RunConfig
    ds: DeepSpeedJson
    ds_values: dict[str, Any]
    data: PreparedData
    total_steps: int
    quantization: Quantization | None


def settle(recipe_name: str, overrides: list[str], deepspeed_config: str | None) -> Settled:
    """Recipe, JSON and data folder, checked against each other; nothing is built or written."""
    recipe = load_recipe(recipe_name, overrides)
    meant = recipe.config.train.expected_world_size
    if meant is not None and meant != ranks.world_size():
        raise ValueError(
            f"train.expected_world_size={meant}: the run came up with {ranks.world_size()} ranks; "
            "check the hostfile and the launcher's options"
        )
    if deepspeed_config is not None:
        recipe = replace(recipe, config=replace(recipe.config, deepspeed_config=deepspeed_config))
    ds = load_ds_json(recipe.config.deepspeed_config, recipe.config.deepspeed)
    config, ds_values = resolve_batch(recipe, ds, ranks.world_size())
    with naming("data.dir"):
        data = PreparedData.open(config.data.dir)
    check_adaptive(config, len(data.validation))
    rows = int(ds_values["train_batch_size"])
    if len(data.train) < rows:
        raise ValueError(
            f"data.dir={config.data.dir!r}: {len(data.train)} rows are less than one global batch of {rows}; "
            "prepare more text or lower train.micro_batch_size"
        )
    train = config.train
    if train.max_steps is None and train.epochs is None:
        raise ValueError("train.max_steps: not set, nor is train.epochs; set one of them")
    total_steps = train.max_steps or math.ceil((train.epochs or 0) * len(data.train) / rows)
    ds_values = resolve_schedule(ds_values, recipe, config, total_steps, ds.origin)
    quantization = parse_quantization(config.student.quantization)
    if quantization is not None:
        check_start_step(quantization, total_steps)
    return Settled(config, ds, ds_values, data, total_steps, quantization)


def timeout_seconds(recipe: str, overrides: list[str]) -> float:
    """The ranks' patience with each other, needed before they can tell each other of a mistake in the recipe."""
    try:
        return load_recipe(recipe, overrides).config.train.collective_timeout_seconds
    except (ValueError, OSError):
        return TrainConfig().collective_timeout_seconds  # `settle` reports the mistake on all ranks


def run_facts(settled: Settled) -> dict[str, Any]:
    """What a checkpoint's manifest and the export's card say of a run."""
    manifest, student = settled.data.manifest, settled.config.student
    shape = {
        name: getattr(student, name)
        for name in ("family", "layers", "hidden_size", "num_heads", "intermediate_size", "max_positions", "config")
    }
    with naming("teacher.path"):
        chosen = settled.config.teacher
        teacher = None
        if ranks.rank() == 0:
            teacher = weights_origin(chosen.path, trust_remote_code=chosen.trust_remote_code)
    recipe = resolved_recipe(settled.config, settled.ds_values, settled.total_steps)
    settings = {**recipe, "deepspeed": settled.ds_values}
    facts = {
        "data": manifest.fingerprint,
        "tokenizer": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "seq_len": manifest.seq_len,
        "student": shape,
        "teacher": teacher,
        "versions": software(),
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }
    if settled.quantization is not None:
        facts["quantization"] = settled.quantization.to_dict()
    return facts


def identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("data", "tokenizer", "student")}


def check_student(settled: Settled, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the student can start as it should, from the configurations alone (ValueError, FileNotFoundError)."""
    _check_attention(settled)
    init, path = settled.config.student.init, settled.config.teacher.path
    student = student_model_config(settled.config.student, **sizes(settled, tokenizer))
    if settled.quantization is not None:
        check_quantization(student, settled.quantization)
    if init == "random":
        return
    if path is None:
        raise ValueError(f"student.init={init!r}: there is no teacher to start from; set teacher.path or init=random")
    with naming("teacher.path"):
        teacher = load_model_config(path, trust_remote_code=settled.config.teacher.trust_remote_code)
    check_growth(teacher, student, init)


def _check_attention(settled: Settled) -> None:
    if settled.config.student.attention == "flash_attention_2" and settled.ds.precision == "fp32":
        raise ValueError(
            "student.attention='flash_attention_2': it computes in bf16 and fp16, the DeepSpeed JSON says fp32; "
            "use sdpa, or a JSON such as zero2_bf16"
        )


def sizes(settled: Settled, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    manifest = settled.data.manifest
    return {
        "vocab_size": manifest.vocab_size,
        "seq_len": manifest.seq_len,
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Within the block a mistake's message names the recipe's field, so that the user knows where to look."""
    try:
        yield
    except (ValueError, OSError) as error:
        if field in str(error):
            raise
        raise type(error)(f"{field}: {error}") from error
