"""One fine-tuning: a checkpoint, a task, a seed; its scores on the task's validation sets."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dwt_ds.base.gpus import gpu_count
from dwt_ds.config.quantization import PRESETS
from dwt_ds.glue.checkpoint import Checkpoint
from dwt_ds.glue.options import FineTuning
from dwt_ds.glue.reading import FIRST, LABEL, SECOND, TaskData
from dwt_ds.glue.scores import metrics_of_logits, task_score
from dwt_ds.glue.tasks import Task
from dwt_ds.models.quantization import add_fake_quantizers, round_weights

_PROGRESS_EVERY_SECONDS = 60.0
# One sample for all seeds, so that the spread over seeds comes from the fine-tuning alone.
_SAMPLE_SEED = 0


def fine_tune(checkpoint: Checkpoint, task: Task, data: TaskData, seed: int, settings: FineTuning) -> dict[str, Any]:
    """Train on the task's training rows, score on its validation sets.

    The seed decides the new head's weights, the order of the rows and the dropout.

    Args:
        settings: with `max_length` resolved.

    Returns:
        `score` and, for each validation set, `metrics`, all in points; the training rows seen, steps, seconds, device.

    Raises:
        ValueError: the checkpoint does not fit, or the training diverged.
    """
    started = time.monotonic()
    set_seed(seed)
    model = checkpoint.classifier(task)
    rows = data.train.rows
    if settings.max_train_rows is not None and settings.max_train_rows < len(rows):
        rows = rows.shuffle(seed=_SAMPLE_SEED).select(range(settings.max_train_rows))
    steps = settings.steps(task, len(rows))
    assert settings.max_length is not None
    with tempfile.TemporaryDirectory(prefix="dwt_ds_glue_") as folder:
        trainer = Trainer(
            model=model,
            args=_training_arguments(folder, steps, seed, settings),
            train_dataset=_tokenized(rows, checkpoint.tokenizer, settings.max_length),
            data_collator=DataCollatorWithPadding(checkpoint.tokenizer),
            callbacks=[_LineAMinute(f"{task.name}, seed {seed}")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if settings.quantize is not None:
            add_fake_quantizers(model, PRESETS[settings.quantize])
            round_weights(model)
        metrics = []
        for split in data.validation:
            output = trainer.predict(_tokenized(split.rows, checkpoint.tokenizer, settings.max_length))
            logits, labels = np.asarray(output.predictions), np.asarray(output.label_ids)
            metrics.append(metrics_of_logits(task, logits, labels))
        device = trainer.args.device
    return {
        "score": task_score(metrics),
        "metrics": metrics,
        "train_rows": min(len(rows), steps * settings.batch_size),
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _training_arguments(folder: str, steps: int, seed: int, settings: FineTuning) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        bf16=settings.precision == "bf16",
        seed=seed,
        use_cpu=gpu_count() == 0,  # the Trainer does not know of DS_ACCELERATOR
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=[LABEL],
    )


def _tokenized(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Tokenize; names of special tokens in the texts, such as [SEP], are treated as text."""
    texts = [name for name in (FIRST, SECOND) if name in rows.column_names]
    how = {"truncation": True, "max_length": max_length, "split_special_tokens": True}
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in texts), **how),
        batched=True,
        remove_columns=texts,
    )


class _LineAMinute(TrainerCallback):
    """Prints progress once a minute."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last_seconds = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._last_seconds >= _PROGRESS_EVERY_SECONDS:
            self._last_seconds = time.monotonic()
            print(f"{self._name}: step {state.global_step} of {state.max_steps}", file=sys.stderr, flush=True)
