"""Exports of a run's student, at its end and along the way."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dwt_ds.config.quantization import Quantization
from dwt_ds.engine import ranks
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState
from dwt_ds.engine.checkpoint.weights import full_fp32_weights
from dwt_ds.engine.student import StudentEngine
from dwt_ds.export.model_card import held_out_losses_at, model_card
from dwt_ds.export.writer import NotFiniteError, write_export


class NotExportedError(RuntimeError):
    """An export could not be written: a full disk, a limit on file sizes, weights that are not finite."""


class Exporter:
    """Writes the student as a Hugging Face folder; facts and held-out losses go on its card."""

    def __init__(
        self,
        student: StudentEngine,
        tokenizer: PreTrainedTokenizerBase,
        quantization: Quantization | None,
        facts: RunFacts,
        metrics: Path,
    ) -> None:
        self._student, self._tokenizer, self._quantization = student, tokenizer, quantization
        self._facts, self._metrics = facts, metrics

    def export(self, folder: Path, state: RunState) -> None:
        """Write `folder` for a run that stands at `state`; every rank has to call it.

        Raises:
            NotExportedError: on rank 0, which alone writes.
        """
        model = self._student.module.student.model
        weights = full_fp32_weights(model, keep=ranks.rank() == 0)
        if ranks.rank() != 0:
            return
        try:
            card = model_card(self._facts, state, held_out_losses_at(state.step, self._metrics))
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
        except (OSError, NotFiniteError) as error:
            raise NotExportedError(error) from error
