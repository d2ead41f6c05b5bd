"""Whether the run that lies in a folder is the one that a study would make there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dwt_ds.base.trees import flatten, merge
from dwt_ds.config.schema import RunConfig
from dwt_ds.engine.ds_json.resolve import resolved_recipe
from dwt_ds.plan.settings import Settings

# Settings that change nothing in what is learned, and may change between two starts of one run.
_MAY_CHANGE = (
    "output_dir",
    "data.workers",
    # The global batch is compared, their product with the ranks.
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.export_every",
    "train.collective_timeout_seconds",
    "train.report_stuck_after_seconds",
    "train.expected_world_size",
)
# Without a teacher there is no soft loss for them to change.
_OF_THE_SOFT_LOSS = ("distill.soft_weight", "distill.soft_positions", "distill.temperature")
# Sections of the DeepSpeed JSON that decide what is learned; a file may change while its name stays.
_OF_THE_JSON = ("optimizer", "scheduler", "bf16", "fp16")


def check_same(folder: Path, settings: Settings) -> None:
    """Refuse a folder whose run was made with other settings, another global batch or other data.

    Args:
        folder: of the run; where it holds none yet, all is well.
        settings: of the run that the study would make there.

    Raises:
        ValueError: the first difference, in one line.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        return
    # What an older version did not write yet was as it is by default.
    stored = merge(RunConfig().to_dict(), yaml.safe_load(config.read_text(encoding="utf-8")))
    ds_values, identity = (_json(folder / name) for name in ("ds_config.json", "run.json"))
    for what, theirs, ours in _pairs(stored, ds_values, identity, settings):
        if theirs != ours:
            raise ValueError(
                f"{folder}: was made with {what}={theirs!r}, this study says {ours!r}; "
                "choose another --out or delete that run"
            )


def _pairs(
    stored: Mapping[str, Any], ds_values: Mapping[str, Any], identity: Mapping[str, Any], settings: Settings
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value there, value here) of all that has to be equal and is known on both sides."""
    resolved = resolved_recipe(settings.config, settings.ds_values, settings.total_steps)
    here, fingerprint = merge(RunConfig().to_dict(), resolved), settings.corpus.fingerprint
    passed_over = list(_MAY_CHANGE)
    if fingerprint and "data" in identity:
        passed_over.append("data.dir")  # its rows tell more than its name
        yield "data.dir's fingerprint", identity["data"], fingerprint
    for key in flatten(RunConfig().to_dict()):
        unused = settings.config.teacher.path is None and key.startswith(_OF_THE_SOFT_LOSS)
        if key not in passed_over and not unused:
            yield key, _at(stored, key), _at(here, key)
    if "train_batch_size" in ds_values:
        yield "train_batch_size", ds_values["train_batch_size"], settings.rows_per_step
    if fingerprint and ds_values:  # without the data the number of steps is a guess, and the scheduler's with it
        theirs, ours = _what_is_learned(ds_values), _what_is_learned(settings.ds_values)
        for key in theirs | ours:
            yield key, theirs.get(key), ours.get(key)


def _what_is_learned(ds_values: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({section: ds_values[section] for section in _OF_THE_JSON if section in ds_values})


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    # A study may be named by another path, or have moved: RUN/export says whose export it is.
    return "/".join(Path(values).parts[-2:]) if key == "teacher.path" and values else values


def _json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if the file is not there."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
