"""Recipe, JSON and data made to agree as a run does it, without ranks, data or teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dwt_ds.base.trees import NOT_SET, Difference, differences
from dwt_ds.config.quantization import Quantization, check_start_step, parse_quantization
from dwt_ds.config.recipe import Recipe, load_recipe
from dwt_ds.config.schema import RunConfig
from dwt_ds.distill.adaptive import check_adaptive
from dwt_ds.engine.ds_json.load import DeepSpeedJson, load_ds_json
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule
from dwt_ds.engine.optimizers import check_optimizer_and_stage
from dwt_ds.plan.corpus import Corpus, corpus_of


@dataclass(frozen=True)
class Settings:
    """Everything a plan is made of, but for the models' shapes."""

    recipe: Recipe
    config: RunConfig
    ds: DeepSpeedJson
    ds_values: dict[str, Any]
    corpus: Corpus
    total_steps: int
    world_size: int
    quantization: Quantization | None

    @property
    def rows_per_step(self) -> int:
        """Global batch."""
        return int(self.ds_values["train_batch_size"])

    @property
    def labels_per_row(self) -> int:
        """Rows of the head for a row of the data: labelled tokens, or all where the soft loss sees all."""
        if self.config.distill.soft_positions == "all":
            return self.corpus.seq_len
        return self.corpus.labels_per_row(self.config.data.mask_probability)


def settle(recipe_name: str, overrides: list[str], deepspeed_config: str | None, world_size: int) -> Settings:
    """As `dwt_ds.run.resolve.settle`, with the paper's corpus where the data folder is missing.

    Raises ValueError and OSError of one line for the mistakes that a run would stop at, but for those that show only
    on its devices or in the data's rows.
    """
    recipe = load_recipe(recipe_name, overrides)
    meant = recipe.config.train.expected_world_size
    if meant is not None and meant != world_size:
        raise ValueError(
            f"train.expected_world_size={meant}: the plan is for {world_size} ranks; set --nodes and --gpus-per-node"
        )
    ds = load_ds_json(deepspeed_config or recipe.config.deepspeed_config, recipe.config.deepspeed)
    config, ds_values = resolve_batch(recipe, ds, world_size)
    corpus = corpus_of(config.data)
    check_adaptive(config, corpus.validation_rows)
    rows = int(ds_values["train_batch_size"])
    train = config.train
    if train.max_steps is None and train.epochs is None:
        raise ValueError("train.max_steps: not set, nor is train.epochs; set one of them")
    total_steps = train.max_steps or math.ceil((train.epochs or 0) * corpus.rows / rows)
    ds_values = resolve_schedule(ds_values, recipe, config, total_steps, ds.origin)
    check_optimizer_and_stage(ds_values, ds.origin)
    quantization = parse_quantization(config.student.quantization)
    if quantization is not None:
        check_start_step(quantization, total_steps)
    return Settings(recipe, config, ds, ds_values, corpus, total_steps, world_size, quantization)


def changes(config: RunConfig) -> list[Difference]:
    """All settings that are not the defaults."""
    changed = differences(RunConfig().to_dict(), config.to_dict())
    return [change for change in changed if change.now is not NOT_SET]
