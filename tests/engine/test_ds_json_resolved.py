"""config.yaml and ds_config.json of a run's folder, read together: the same run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.ds_values import Resolve

from dwt_ds.config.recipe import load_recipe
from dwt_ds.config.schema import RunConfig
from dwt_ds.engine.ds_json.load import load_ds_json, packaged_ds_configs
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule, resolved_recipe

PACKAGED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in packaged_ds_configs().values()}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30}}}
COSINE = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 7}}}
STABLE = {"scheduler": {"type": "WarmupStableDecayLR", "params": {"decay_ratio": 0.3, "decay_type": "1-sqrt"}}}
ONE_CYCLE = {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": "auto"}}}
RANGE_TEST = {"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-4}}}
BATCH = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.5}


def load(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    recipe = load_recipe(str(folder / "config.yaml"), [])
    ds = load_ds_json(str(folder / "ds_config.json"), recipe.config.deepspeed)
    config, values = resolve_batch(recipe, ds, 2)
    return config, resolve_schedule(values, recipe, config, 100, ds.origin)


@pytest.mark.parametrize(
    "ds",
    [*PACKAGED.values(), SGD, MUON, WARMUP, COSINE, STABLE, ONE_CYCLE, RANGE_TEST, BATCH],
    ids=[*PACKAGED, "SGD", "Muon", "warm-up of its own", "cosine", "stable", "one cycle", "range test", "batch"],
)
@pytest.mark.parametrize("overrides", [[], ["deepspeed.optimizer.type=Adagrad"]], ids=["file", "another optimizer"])
def test_both_files_give_the_run_again(
    ds: dict[str, Any], overrides: list[str], resolve: Resolve, tmp_path: Path
) -> None:
    config, values = resolve(ds, "train.max_steps=100", *overrides)
    resolved = resolved_recipe(config, values, 100)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    (tmp_path / "ds_config.json").write_text(json.dumps(values), encoding="utf-8")
    again, same = load(tmp_path)
    assert same == values
    assert again.to_dict() == config.to_dict()


def test_what_the_json_decides_alone_is_not_in_the_recipe(resolve: Resolve) -> None:
    def left_out(ds: dict[str, Any]) -> set[str]:
        config, values = resolve(ds, "train.max_steps=100")
        return config.to_dict()["train"].keys() - resolved_recipe(config, values, 100)["train"].keys()

    assert left_out({}) == left_out(STABLE) == set()
    assert left_out(SGD) == {"betas", "eps", "weight_decay"}
    assert left_out(WARMUP) == left_out(COSINE) == {"warmup_ratio"}
    # What these schedules set themselves.
    assert left_out(ONE_CYCLE) == {"warmup_ratio", "betas"}
    assert left_out(RANGE_TEST) == {"warmup_ratio", "learning_rate"}
