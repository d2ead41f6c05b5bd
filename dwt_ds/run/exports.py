"""Exports of a run's student, at its end and along the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dwt_ds.config.quantization import Quantization
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts
from dwt_ds.engine.checkpoint.weights import full_fp32_weights
from dwt_ds.engine.student import StudentEngine
from dwt_ds.export.model_card import held_out_losses_at, model_card
from dwt_ds.export.writer import NotFiniteError, write_export


class NotExportedError(RuntimeError):
    """An export could not be written: a full disk, a limit on file sizes, weights that are not finite."""


class Exporter:
    """Writes the student as a Hugging Face folder; facts, starts and held-out losses go on its card."""

    def __init__(
        self,
        student: StudentEngine,
        tokenizer: PreTrainedTokenizerBase,
        quantization: Quantization | None,
        facts: RunFacts,
        starts: Sequence[dict[str, Any]],
        metrics: Path,
    ) -> None:
        self._student, self._tokenizer, self._quantization = student, tokenizer, quantization
        self._facts, self._starts, self._metrics = facts, starts, metrics

    def export(self, folder: Path, *, steps: int, tokens: int, teacher_released: int | None) -> None:
        """Write `folder` after `steps` optimizer steps and `tokens` real tokens; every rank has to call it.

        `teacher_released` is for the card, as in `RunState`.

        Raises:
            NotExportedError: on rank 0, which alone writes.
        """
        model = self._student.module.student.model
        weights = full_fp32_weights(model, keep=ranks.rank() == 0)
        if ranks.rank() != 0:
            return
        try:
            card = model_card(
                self._facts,
                steps=steps,
                tokens=tokens,
                starts=self._starts,
                held_out=held_out_losses_at(steps, self._metrics),
                teacher_released=teacher_released,
            )
            with torch.random.fork_rng(devices=[]):  # it draws weights for a model that it then fills
                write_export(
                    model,
                    weights,
                    self._tokenizer,
                    card,
                    folder,
                    seq_len=self._facts.seq_len,
                    quantization=self._quantization,
                )
        except (OSError, SafetensorError, NotFiniteError) as error:
            raise NotExportedError(error) from error
