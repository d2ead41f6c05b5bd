"""The recipe of a run as its folder keeps it: with the DeepSpeed JSON beside it, the same run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwt_ds.config.schema import RunConfig

_OF_SOME_OPTIMIZERS = ("betas", "eps", "weight_decay")


def resolved_recipe(config: RunConfig, ds_values: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """`config` as plain data, without what the JSON decides by itself.

    That is a setting that its optimizer does not have or has by its own default, and `warmup_ratio` where its schedule
    warms up otherwise: to write those down would be untrue, and an error or a change when both files are read again.
    """
    resolved = config.to_dict()
    train = resolved["train"]
    for field in _OF_SOME_OPTIMIZERS:
        if field not in ds_values["optimizer"]["params"]:
            del train[field]
    if ds_values["scheduler"]["params"].get("warmup_num_steps") != config.train.warmup_steps(total_steps):
        del train["warmup_ratio"]
    return resolved
