"""One DeepSpeed configuration out of a JSON file, overrides and the recipe.

As Hugging Face users expect, "auto" in the JSON means that the recipe decides. Where both decide, they must agree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import dwt_ds
from dwt_ds.config.recipe import Recipe, must_be, nearest
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.engine.ds_json.keys import check_ds_keys
from dwt_ds.engine.ds_json.origin import Origin, first_auto, get_place, lay_over, set_place
from dwt_ds.engine.ds_json.types import (
    drop_settings_of_another_type,
    optimizer_settings,
    schedule_needs,
    schedule_settings,
)

# Field of RunConfig.train -> its place in the JSON, and whether the JSON gets it where it says nothing.
_SHARED = (
    ("micro_batch_size", "train_micro_batch_size_per_gpu", True),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", True),
    ("max_grad_norm", "gradient_clipping", True),
    ("learning_rate", "optimizer.params.lr", True),
    ("betas", "optimizer.params.betas", False),
    ("eps", "optimizer.params.eps", False),
    ("weight_decay", "optimizer.params.weight_decay", False),
)

_DEFAULT_OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
_DEFAULT_SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_type": "linear",
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
    },
}


@dataclass(frozen=True)
class DeepSpeedJson:
    """A DeepSpeed JSON as the user wrote it, overrides applied, keys checked; `origin` names its places in messages."""

    origin: Origin
    values: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.values.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """`bf16`, `fp16` or `fp32`: the dtype of the student's weights in the forward pass."""
        for name, sections in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
            if any(self.values.get(section, {}).get("enabled") for section in sections):
                return name
        return "fp32"


def packaged_ds_configs() -> dict[str, Path]:
    """Name -> path of the JSON files that come with the project."""
    package = Path(dwt_ds.__file__).parent
    folders = (package / "ds_configs", package.parent / "ds_configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def load_ds_json(name_or_path: str, overrides: Mapping[str, Any]) -> DeepSpeedJson:
    """Read a JSON by path or packaged name and lay the nested `overrides` over it.

    Raises FileNotFoundError or a one-line ValueError for a file that is missing, is not JSON, or has an unknown key;
    what the overrides wrote is named as `deepspeed.key`.
    """
    packaged = packaged_ds_configs()
    path = Path(name_or_path)
    if not path.is_file():
        if name_or_path not in packaged:
            raise FileNotFoundError(
                f"deepspeed_config={name_or_path!r}: no such file and no packaged JSON of that name"
                f"{nearest(name_or_path, packaged)} (packaged: {', '.join(sorted(packaged))})"
            )
        path = packaged[name_or_path]
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: not valid JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: holds {type(values).__name__}; a DeepSpeed JSON is an object in braces")
    drop_settings_of_another_type(values, overrides)
    lay_over(values, overrides, path.name)
    check_ds_keys(values, path.name, overrides)
    origin = Origin(path.name, overrides)
    _decide_precision(values, origin)
    _keep_the_gradient_check(values, origin)
    return DeepSpeedJson(origin, values)


def settle_batch(recipe: Recipe, ds: DeepSpeedJson, world_size: int) -> tuple[RunConfig, dict[str, Any]]:
    """Make recipe and JSON agree on all but the number of steps.

    Returns the RunConfig with the values that only the JSON wrote, and the JSON with its "auto"s filled, but for the
    scheduler's, which need the number of steps (`fill_steps`). Raises ValueError naming both sides of a conflict.
    """
    values = copy.deepcopy(ds.values)
    values.setdefault("optimizer", copy.deepcopy(_DEFAULT_OPTIMIZER)).setdefault("params", {})
    values.setdefault("scheduler", copy.deepcopy(_DEFAULT_SCHEDULER)).setdefault("params", {})
    origin = ds.origin
    _take_batch_from_total(values, recipe, origin, world_size)

    train = recipe.config.train
    for field, place, always in _SHARED:
        written = f"train.{field}" in recipe.written
        ours, theirs = getattr(train, field), get_place(values, place)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if theirs is None and not (always or written):
            continue
        if theirs is None or theirs == "auto":
            if written:
                _check_optimizer_has(place, str(values["optimizer"]["type"]), f"train.{field}={ours}", origin)
            set_place(values, place, ours)
        elif written and theirs != ours:
            raise ValueError(
                f"train.{field}={ours} (recipe) and {origin.assignment(place, theirs)} differ; "
                f"{origin.leave_to_recipe(place)} or make them equal"
            )
        else:
            train = _with(train, field, theirs, origin.name(place))

    rows = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    total = get_place(values, "train_batch_size")
    if total not in (None, "auto", rows):
        raise ValueError(
            f"{origin.assignment('train_batch_size', total)} is not micro-batch {train.micro_batch_size} x "
            f'accumulation {train.gradient_accumulation_steps} x {world_size} ranks = {rows}; set it to "auto"'
        )
    values["train_batch_size"] = rows
    return replace(recipe.config, train=train), values


def fill_steps(
    values: dict[str, Any], recipe: Recipe, config: RunConfig, total_steps: int, origin: Origin
) -> dict[str, Any]:
    """Fill what depends on the number of optimizer steps, and make sure that no "auto" is left.

    Raises ValueError naming both sides of a conflict, an "auto" without a value, or what the schedule still needs.
    """
    values = copy.deepcopy(values)
    schedule, params = str(values["scheduler"]["type"]), values["scheduler"]["params"]
    needs = schedule_needs(schedule)
    # Where the rate is not written, DeepSpeed has one of its own.
    always = {*needs, "warmup_max_lr"} & schedule_settings(schedule)
    train = config.train
    length = "train.epochs" if train.max_steps is None else "train.max_steps"
    by_recipe = {
        "warmup_min_lr": ("", 0.0),
        "warmup_max_lr": ("train.learning_rate", train.learning_rate),
        "cycle_max_lr": ("train.learning_rate", train.learning_rate),
        "warmup_num_steps": ("train.warmup_ratio", train.warmup_steps(total_steps)),
        "total_num_steps": (length, total_steps),
    }
    for key, (field, ours) in by_recipe.items():
        place, theirs = f"scheduler.params.{key}", params.get(key)
        if theirs == "auto" or (theirs is None and key in always):
            params[key] = ours
        elif theirs is not None and field in recipe.written and theirs != ours:
            raise ValueError(
                f"{field} gives {ours:g} (recipe) and {origin.assignment(place, theirs)} differ; "
                f"{origin.leave_to_recipe(place)} or make them equal"
            )
    missing = next((key for key in needs if key not in params), None)
    if missing is not None:
        section = origin.name("scheduler.type").removesuffix(".type")
        raise ValueError(f"{section}.params: {schedule} needs {missing}; write it")
    _size_zero_buckets(values.get("zero_optimization", {}), config.student.hidden_size)
    left = first_auto(values)
    if left:
        raise ValueError(f'{origin.name(left)}="auto": the recipe has no value for it; write the value')
    return values


def _check_optimizer_has(place: str, optimizer: str, written: str, origin: Origin) -> None:
    """Whether what the recipe wrote down for `place` is a setting of the optimizer; base recipes count as written."""
    section, _, setting = place.rpartition(".")
    if section == "optimizer.params" and setting not in optimizer_settings(optimizer):
        where = "deepspeed.optimizer.type" if origin.overridden("optimizer.type") else origin.source
        raise ValueError(
            f"{written}: the optimizer {optimizer} ({where}) has no such setting; remove it (a base of the recipe may "
            "have it), or choose another optimizer"
        )


def _size_zero_buckets(section: dict[str, Any], hidden_size: int) -> None:
    """Elements of a bucket where the JSON says "auto", as Hugging Face's documentation of its Trainer has it."""
    square = hidden_size * hidden_size
    for key, elements in (
        ("reduce_bucket_size", square),
        ("stage3_prefetch_bucket_size", int(0.9 * square)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if section.get(key) == "auto":
            section[key] = elements


def _decide_precision(values: dict[str, Any], origin: Origin) -> None:
    """Files written for Hugging Face leave both precisions on "auto"; that is bf16 here."""
    bf16, fp16 = values.get("bf16", {}), values.get("fp16", {})
    if fp16.get("enabled") == "auto":
        fp16["enabled"] = False
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = not fp16.get("enabled")
    if bf16.get("enabled") and fp16.get("enabled"):
        second = origin.name("fp16.enabled").removeprefix(f"{origin.source}: ")
        raise ValueError(f"{origin.name('bf16.enabled')} and {second} are both on; switch one off")


def _keep_the_gradient_check(values: dict[str, Any], origin: Origin) -> None:
    """Steps that must not be taken are marked by a NaN in the gradient (guard.py); these keys would let it through."""
    for section, key in (
        ("bf16", "check_grad_overflow"),
        ("bfloat16", "check_grad_overflow"),
        ("zero_optimization", "compute_grad_norm"),
    ):
        if values.get(section, {}).get(key) is False:
            place = origin.name(f"{section}.{key}")
            raise ValueError(f"{place}=false: bad steps would reach the optimizer; remove it")


def _take_batch_from_total(values: dict[str, Any], recipe: Recipe, origin: Origin, world_size: int) -> None:
    """A JSON with a total and a micro-batch but no accumulation leaves the division to be done, as for DeepSpeed."""
    total = get_place(values, "train_batch_size")
    if not isinstance(total, int) or "train.gradient_accumulation_steps" in recipe.written:
        return
    if get_place(values, "gradient_accumulation_steps") not in (None, "auto"):
        return
    micro = get_place(values, "train_micro_batch_size_per_gpu")
    micro = micro if isinstance(micro, int) and micro > 0 else recipe.config.train.micro_batch_size
    if total < 1 or total % (micro * world_size):
        raise ValueError(
            f"{origin.assignment('train_batch_size', total)} does not divide by micro-batch {micro} x {world_size} "
            f"ranks; choose a multiple of {micro * world_size}"
        )
    values["gradient_accumulation_steps"] = total // (micro * world_size)


def _with(train: TrainConfig, field: str, value: Any, place: str) -> TrainConfig:
    """`train` with a value of the JSON, held to the rules of the recipe's field."""
    changed: Any = {field: value}
    try:
        return replace(train, **changed)
    except ValidationError as error:
        raise ValueError(f"{place}={value!r}: must be {must_be(error.errors()[0])}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice in one section; remove one")
    return dict(pairs)
