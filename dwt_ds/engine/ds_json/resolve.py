"""Recipe and DeepSpeed JSON resolved into one configuration.

As Hugging Face users expect, "auto" in the JSON means that the recipe decides. Where both decide, they must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from dwt_ds.base.trees import flatten, get_place, set_place
from dwt_ds.config.recipe import Recipe
from dwt_ds.config.schema import RunConfig, TrainConfig
from dwt_ds.config.validate import must_be
from dwt_ds.engine.ds_json.combinations import check_combinations
from dwt_ds.engine.ds_json.load import DeepSpeedJson
from dwt_ds.engine.ds_json.optimizer_and_schedule import optimizer_kinds, schedule_kinds, schedule_needs
from dwt_ds.engine.ds_json.origin import Origin
from dwt_ds.engine.warmup_stable_decay import DECAY_RATIO, WARMUP_STABLE_DECAY_LR, decay_steps_of

# Field of RunConfig.train, its place in the JSON, whether the JSON gets it even where neither of them sets it.
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

_OF_SOME_OPTIMIZERS = ("betas", "eps", "weight_decay")
# Muon has a rate for its matrices and one for the rest.
_RATES = ("lr", "muon_lr", "adam_lr")
_PEAK = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
"""The setting of each schedule that sets the highest rate itself; the other schedules do without."""


def resolve_batch(recipe: Recipe, ds: DeepSpeedJson, world_size: int) -> tuple[RunConfig, dict[str, Any]]:
    """Resolve everything that does not depend on the number of steps.

    Returns:
        The RunConfig, with the values that only the JSON has; and the JSON, with every "auto" filled but those of the
        scheduler and of ZeRO (`resolve_schedule`).

    Raises:
        ValueError: a conflict, with both sides named.
    """
    values = copy.deepcopy(ds.values)
    values.setdefault("optimizer", copy.deepcopy(_DEFAULT_OPTIMIZER)).setdefault("params", {})
    values.setdefault("scheduler", copy.deepcopy(_DEFAULT_SCHEDULER)).setdefault("params", {})
    origin = ds.origin
    _take_batch_from_total(values, recipe, origin, world_size)
    _take_rate_from_schedule(values, recipe)

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


def resolve_schedule(
    values: dict[str, Any], recipe: Recipe, config: RunConfig, total_steps: int, origin: Origin
) -> dict[str, Any]:
    """Fill every "auto" that is left, and check that the settings work together.

    `values` and `config` are from `resolve_batch`.

    Raises:
        ValueError: a conflict, with both sides named; an "auto" without a value; a value that the schedule needs;
            settings that exclude each other.
    """
    values = copy.deepcopy(values)
    schedule, params = str(values["scheduler"]["type"]), values["scheduler"]["params"]
    needs = schedule_needs(schedule)
    # DeepSpeed has a default rate of its own, which must not be used.
    always = {*needs, "warmup_max_lr"} & schedule_kinds(schedule).keys()
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
        wanted = key in always or (field in recipe.written and key in schedule_kinds(schedule))
        if theirs == "auto" or (theirs is None and wanted):
            params[key] = ours
        elif theirs is not None and field in recipe.written and theirs != ours:
            raise ValueError(
                f"{field} gives {ours:g} (recipe) and {origin.assignment(place, theirs)} differ; "
                f"{origin.leave_to_recipe(place)} or make them equal"
            )
    if schedule == WARMUP_STABLE_DECAY_LR:
        _fill_decay(params, origin)
    _check_rates(values, origin)
    missing = next((key for key in needs if key not in params), None)
    if missing is not None:
        section = origin.name("scheduler.type").removesuffix(".type")
        raise ValueError(f"{section}.params: {schedule} needs {missing}; write it")
    _size_zero_buckets(values.get("zero_optimization", {}), config.student.hidden_size)
    left = next((place for place, value in flatten(values).items() if value == "auto"), None)
    if left is not None:
        raise ValueError(f'{origin.name(left)}="auto": the recipe has no value for it; write the value')
    check_combinations(values, origin)
    return values


def resolved_recipe(config: RunConfig, ds_values: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """`config` as plain data for the run's folder: with the JSON beside it, it gives the same run again.

    Settings that only the JSON decides are left out: those that its optimizer does not have or leaves at its default,
    `warmup_ratio` if its schedule warms up differently, and what its schedule sets by itself: LRRangeTest the rate,
    OneCycle the betas. They would be wrong, and an error or a change if both files were read again.
    """
    resolved = config.to_dict()
    train = resolved["train"]
    for field in _OF_SOME_OPTIMIZERS:
        if field not in ds_values["optimizer"]["params"]:
            del train[field]
    schedule, params = ds_values["scheduler"]["type"], ds_values["scheduler"]["params"]
    if params.get("warmup_num_steps") != config.train.warmup_steps(total_steps):
        del train["warmup_ratio"]
    if schedule == "LRRangeTest":
        del train["learning_rate"]
    if schedule == "OneCycle" and params.get("cycle_momentum", True):
        train.pop("betas", None)
    return resolved


def _fill_decay(params: dict[str, Any], origin: Origin) -> None:
    """Steps of a decay that is written as a share of the run, or not at all; those written must leave the warm-up."""
    total_steps, warmup_steps = params["total_num_steps"], params["warmup_num_steps"]
    steps, room = params.get("decay_num_steps"), max(0, total_steps - warmup_steps)
    ratio = params.pop("decay_ratio", None)
    if steps in (None, "auto"):
        ratio = DECAY_RATIO if ratio in (None, "auto") else ratio
        params["decay_num_steps"] = min(decay_steps_of(ratio, total_steps), room)
    elif steps > room:
        raise ValueError(
            f"{origin.assignment('scheduler.params.decay_num_steps', steps)}: of the run's {total_steps} steps "
            f"{warmup_steps} are the warm-up's; at most {room} are left"
        )


def _take_rate_from_schedule(values: dict[str, Any], recipe: Recipe) -> None:
    """Where only the schedule of the JSON names a rate, its highest is the optimizer's as well."""
    peaks = _peaks(values)
    if peaks and "train.learning_rate" not in recipe.written:
        params = values["optimizer"]["params"]
        if params.get("lr") in (None, "auto"):
            params["lr"] = max(peaks)


def _check_rates(values: Mapping[str, Any], origin: Origin) -> None:
    """Raise ValueError if the optimizer names a rate that the schedule would replace by another."""
    peaks = _peaks(values)
    for key in _RATES if peaks else ():
        rate = values["optimizer"]["params"].get(key)
        if rate is not None and rate not in peaks:
            peak = f"scheduler.params.{_PEAK[values['scheduler']['type']]}"
            peak_said = origin.assignment(peak, get_place(values, peak))
            raise ValueError(
                f"{origin.assignment(f'optimizer.params.{key}', rate)} and {peak_said} differ, and the schedule would "
                'replace the first; make them equal, set one of them to "auto", or use WarmupCosineLR or '
                f"{WARMUP_STABLE_DECAY_LR}, which scale the optimizer's"
            )


def _peaks(values: Mapping[str, Any]) -> list[float]:
    """The highest rates that the schedule sets, one or one a parameter group; empty if it leaves that to others."""
    scheduler = values["scheduler"]
    peak = scheduler.get("params", {}).get(_PEAK.get(str(scheduler.get("type"))))
    if peak in (None, "auto"):
        return []
    return list(peak) if isinstance(peak, (list, tuple)) else [peak]


def _check_optimizer_has(place: str, optimizer: str, written: str, origin: Origin) -> None:
    """Raise ValueError if the recipe (or one of its bases) sets what the optimizer does not have."""
    section, _, setting = place.rpartition(".")
    if section == "optimizer.params" and setting not in optimizer_kinds(optimizer):
        where = "deepspeed.optimizer.type" if origin.overridden("optimizer.type") else origin.source
        raise ValueError(
            f"{written}: the optimizer {optimizer} ({where}) has no such setting; remove it (a base of the recipe may "
            "have it), or choose another optimizer"
        )


def _size_zero_buckets(section: dict[str, Any], hidden_size: int) -> None:
    """Number of elements of each bucket that is "auto", as in the documentation of Hugging Face's Trainer."""
    square = hidden_size * hidden_size
    for key, elements in (
        ("reduce_bucket_size", square),
        ("stage3_prefetch_bucket_size", int(0.9 * square)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if section.get(key) == "auto":
            section[key] = elements


def _take_batch_from_total(values: dict[str, Any], recipe: Recipe, origin: Origin, world_size: int) -> None:
    """Compute the accumulation from the JSON's total and micro-batch, as DeepSpeed does."""
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
    """`train` with a value of the JSON, checked by the rules of the recipe's field."""
    changed: Any = {field: value}
    try:
        return replace(train, **changed)
    except ValidationError as error:
        raise ValueError(f"{place}={value!r}: must be {must_be(error.errors()[0])}") from None
