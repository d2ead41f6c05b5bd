"""Recipe, DeepSpeed JSON and data, checked against each other and resolved to one value, for runs and plans alike."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dwt_ds.base.software import software
from dwt_ds.config.objective import SoftPositions
from dwt_ds.config.quantization import Quantization, check_start_step, parse_quantization
from dwt_ds.config.recipe import Recipe
from dwt_ds.config.schema import RunConfig
from dwt_ds.data.manifest import ONE_SENTENCE_PER_ROW, Manifest
from dwt_ds.data.masks import further_by_length, labels_by_length
from dwt_ds.data.show import unknown_share_text, warnings_of
from dwt_ds.distill.adaptive import check_adaptive
from dwt_ds.distill.release import check_something_is_trained
from dwt_ds.engine.checkpoint.manifest import RunFacts
from dwt_ds.engine.ds_json.load import DeepSpeedJson, load_ds_json
from dwt_ds.engine.ds_json.resolve import resolve_batch, resolve_schedule, resolved_recipe
from dwt_ds.engine.learning_rate import WITHOUT_HIGHEST_RATE
from dwt_ds.engine.optimizers import check_optimizer_and_stage
from dwt_ds.models.build import check_row_length


@dataclass(frozen=True)
class Corpus:
    """What has to be known of the data before a step is taken: how many rows, and what is in them."""

    rows: int
    """Training rows."""
    seq_len: int
    tokens_per_row: float
    """Real tokens, without padding."""
    vocab_size: int
    pad_token_id: int
    validation_rows: int | None
    """Held-out rows; None: not known."""
    fingerprint: str | None
    """Of the rows, from the data folder's manifest; None: there is no folder, and the figures are assumed."""
    source: str
    """Where the figures come from, for people."""
    by_length: bool = False
    """Rows of similar length are computed together, padded to the longest of a micro-batch instead of to `seq_len`."""
    tokenizer_sha256: str | None = None
    """None: there is no folder."""
    text: tuple[str, ...] = ()
    """What to know of its text, for people: what the tokenizer does not know, what was dropped."""

    @classmethod
    def of(cls, manifest: Manifest, folder: str) -> Corpus:
        """Of a prepared data folder."""
        by_length = manifest.form == ONE_SENTENCE_PER_ROW
        form = ", a sentence a row" if by_length else ""
        text = [f"warning: {warning}" for warning in warnings_of(manifest)]
        if manifest.unknown_share is not None:
            text.insert(0, f"unknown tokens: {unknown_share_text(manifest)}")
        return cls(
            rows=manifest.rows,
            seq_len=manifest.seq_len,
            tokens_per_row=manifest.tokens / max(1, manifest.rows + manifest.validation_rows),
            vocab_size=manifest.vocab_size,
            pad_token_id=int(manifest.settings["pad_id"]),
            validation_rows=manifest.validation_rows,
            fingerprint=manifest.fingerprint,
            tokenizer_sha256=manifest.tokenizer_sha256,
            source=f"{folder}: {manifest.sentences_kept:,} sentences in {manifest.rows:,} rows{form}",
            by_length=by_length,
            text=tuple(text),
        )

    @property
    def with_mean_rows(self) -> Corpus:
        """The same with rows as long as they are computed in the mean, for sums over many; grouped by length, rows have
        next to no padding."""
        return replace(self, seq_len=round(self.tokens_per_row)) if self.by_length else self

    def labels_per_row(self, mask_probability: float) -> int:
        """Labelled tokens of a full row, as `dwt_ds.data.masks` draws them."""
        return int(labels_by_length(np.array(self.seq_len), mask_probability))

    def further_per_row(self, mask_probability: float, soft_positions: SoftPositions) -> int:
        """Unlabelled tokens of a full row that the soft loss sees."""
        return int(further_by_length(np.array(self.seq_len), mask_probability, soft_positions))


@dataclass(frozen=True)
class Resolved:
    """Settings and data that agree with each other; nothing is "auto" any more."""

    recipe: Recipe
    """As it was loaded."""
    config: RunConfig
    """The recipe's settings, with the values that only the JSON has."""
    ds: DeepSpeedJson
    """The JSON as it was written."""
    ds_values: dict[str, Any]
    """The JSON as DeepSpeed gets it."""
    corpus: Corpus
    total_steps: int
    """Optimizer steps."""
    world_size: int
    """Ranks."""
    quantization: Quantization | None

    @property
    def with_mean_rows(self) -> Resolved:
        """The same with rows as long as they are computed in the mean."""
        return replace(self, corpus=self.corpus.with_mean_rows)

    @property
    def rows_per_step(self) -> int:
        """Global batch."""
        return int(self.ds_values["train_batch_size"])

    @property
    def labels_per_row(self) -> int:
        """Labelled tokens of a full row."""
        return self.corpus.labels_per_row(self.config.data.mask_probability)

    @property
    def further_per_row(self) -> int:
        """Unlabelled tokens of a full row that the soft loss sees; 0 without a teacher."""
        if self.config.teacher.path is None:
            return 0
        return self.corpus.further_per_row(self.config.data.mask_probability, self.config.distill.soft_positions)

    @property
    def positions_per_row(self) -> int:
        """Positions of a full row that reach the head while the teacher takes part."""
        return self.labels_per_row + self.further_per_row

    def to_recipe(self) -> dict[str, Any]:
        """The recipe as a run's config.yaml has it."""
        return resolved_recipe(self.config, self.ds_values, self.total_steps)


def resolve(
    recipe: Recipe,
    deepspeed_config: str | None,
    world_size: int,
    corpus: Corpus,
    eval_sets: Mapping[str, Corpus] | None = None,
) -> Resolved:
    """Check recipe, JSON and data against each other; nothing is built or written.

    Args:
        deepspeed_config: overrides the recipe's.
        eval_sets: name -> corpus of those of `train.eval_sets` whose folders exist.

    Raises:
        ValueError, FileNotFoundError: one line for a mistake that does not depend on the devices.
    """
    expected = recipe.config.train.expected_world_size
    if expected is not None and expected != world_size:
        raise ValueError(
            f"train.expected_world_size={expected}: there are {world_size} ranks; check the hostfile and the "
            "launcher's options (of dwt-ds plan: --nodes, --gpus-per-node)"
        )
    if deepspeed_config is not None:
        recipe = replace(recipe, config=replace(recipe.config, deepspeed_config=deepspeed_config))
    ds = load_ds_json(recipe.config.deepspeed_config, recipe.config.deepspeed)
    config, ds_values = resolve_batch(recipe, ds, world_size)
    rows_per_step = int(ds_values["train_batch_size"])
    if corpus.rows < rows_per_step:
        raise ValueError(
            f"data.dir={config.data.dir!r}: {corpus.rows} rows are less than one global batch of {rows_per_step}; "
            "prepare more text or lower train.micro_batch_size"
        )
    _check_student(config, ds)
    check_adaptive(config, corpus.validation_rows)
    _check_highest_rate(config, ds_values, ds)
    for name, other in (eval_sets or {}).items():
        _check_eval_set(name, other, config, corpus)
    total_steps = _total_steps(config, corpus, rows_per_step)
    check_something_is_trained(config, total_steps)
    ds_values = resolve_schedule(ds_values, recipe, config, total_steps, ds.origin)
    check_optimizer_and_stage(ds_values, ds.origin)
    quantization = parse_quantization(config.student.quantization)
    if quantization is not None:
        check_start_step(quantization, total_steps)
    return Resolved(recipe, config, ds, ds_values, corpus, total_steps, world_size, quantization)


def run_facts(resolved: Resolved, manifest: Manifest) -> RunFacts:
    """What a checkpoint's manifest and the export's card say of a run, except for its teacher."""
    settings = {**resolved.to_recipe(), "deepspeed": resolved.ds_values}
    student, quantization = resolved.config.student, resolved.quantization
    shape = ("family", "layers", "hidden_size", "num_heads", "intermediate_size", "max_positions", "config")
    return RunFacts(
        data=manifest.fingerprint,
        tokenizer=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        seq_len=manifest.seq_len,
        student={name: getattr(student, name) for name in shape},
        teacher=None,
        versions=software(),
        settings=settings,
        settings_sha256=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        quantization=None if quantization is None else quantization.to_dict(),
    )


def _check_student(config: RunConfig, ds: DeepSpeedJson) -> None:
    """Raise ValueError for a student that cannot start or compute as these settings say."""
    student = config.student
    if student.init != "random" and config.teacher.path is None:
        raise ValueError(
            f"student.init={student.init!r}: there is no teacher to start from; set teacher.path or init=random"
        )
    if student.attention == "flash_attention_2" and ds.precision == "fp32":
        raise ValueError(
            "student.attention='flash_attention_2': it computes in bf16 and fp16, the DeepSpeed JSON says fp32; "
            "use sdpa, or a JSON such as zero2_bf16"
        )


def _check_highest_rate(config: RunConfig, ds_values: dict[str, Any], ds: DeepSpeedJson) -> None:
    """Raise ValueError for a soft weight that follows the learning rate, where that has no highest value."""
    schedule = ds_values["scheduler"]["type"]
    if config.distill.soft_weight.schedule == "learning_rate" and schedule == WITHOUT_HIGHEST_RATE:
        place = ds.origin.assignment("scheduler.type", schedule)
        raise ValueError(
            f"distill.soft_weight.schedule='learning_rate' and {place}: it has no highest rate; choose another schedule"
        )


def _check_eval_set(name: str, other: Corpus, config: RunConfig, corpus: Corpus) -> None:
    assert config.train.eval_sets is not None
    field = f"train.eval_sets.{name}={config.train.eval_sets[name]!r}"
    if corpus.tokenizer_sha256 not in (None, other.tokenizer_sha256):
        raise ValueError(
            f"{field}: its tokenizer is not that of data.dir={config.data.dir!r}; prepare it with --tokenizer "
            f"{config.data.dir}"
        )
    if other.validation_rows == 0:
        raise ValueError(f"{field}: has no held-out rows; prepare it with --validation above 0")
    fix = f"set student.max_positions to {other.seq_len} or more"
    check_row_length(field, other.seq_len, config.student.max_positions, fix)


def _total_steps(config: RunConfig, corpus: Corpus, rows_per_step: int) -> int:
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    if train.epochs is None:
        raise ValueError("train.max_steps: not set, nor is train.epochs; set one of them")
    return math.ceil(train.epochs * corpus.rows / rows_per_step)
