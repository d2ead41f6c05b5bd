"""The model to be fine-tuned: a Hugging Face folder, or a name on the hub, with its tokenizer."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.files import add_to_digest
from dwt_ds.base.words import one_line
from dwt_ds.data.tokenizer import load_tokenizer, vocabulary_size
from dwt_ds.glue.options import PAPER_MAX_LENGTH
from dwt_ds.glue.tasks import Task
from dwt_ds.models.build import longest_row
from dwt_ds.models.load import load_model_config
from dwt_ds.models.tokenizers import fit_to_model

# Embeddings are padded to round sizes. With more unused rows than this, the tokenizer is another model's.
_MOST_UNUSED_ROWS = 1024


@dataclass(frozen=True)
class Checkpoint:
    """A pre-trained encoder with the tokenizer that belongs to it."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    longest_row: int | None
    """Tokens it has positions for; None if there is no limit."""
    identity: str
    """SHA-256 of the folder's files, or the name with the commit on the hub."""

    @classmethod
    def open(cls, path: str) -> Checkpoint:
        """Read configuration and tokenizer, and check that they fit; the weights are only hashed.

        Raises:
            FileNotFoundError: no such folder, or no model or tokenizer in it.
            ValueError: not a masked language model, a tokenizer and an embedding of different vocabularies, or no
                token for padding.
        """
        path = os.path.expanduser(path)
        config = load_model_config(path)
        tokenizer = fit_to_model(load_tokenizer(path), config)
        size, rows = vocabulary_size(tokenizer), config.vocab_size
        if not size <= rows <= size + _MOST_UNUSED_ROWS:
            raise ValueError(
                f"--model {path}: its tokenizer has {size:,} tokens, its embedding {rows:,} rows; give the model "
                "together with its own tokenizer"
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"--model {path}: its tokenizer has no pad_token to fill batches with; set one")
        folder = Path(path)
        identity = _hash_of_files(folder) if folder.is_dir() else f"{path}@{config._commit_hash}"
        return cls(path, tokenizer, longest_row(config), identity)

    def row_length(self, max_length: int | None) -> int:
        """Tokens a row: `max_length`, else 128 or as many as the model has positions for.

        Raises ValueError if `max_length` is more than the model has positions for.
        """
        longest = self.longest_row or max_length or PAPER_MAX_LENGTH
        if max_length is not None and max_length > longest:
            raise ValueError(
                f"--max-length={max_length}: {self.path} has positions for {longest} tokens; lower --max-length to "
                f"{longest}"
            )
        return max_length or min(PAPER_MAX_LENGTH, longest)

    def classifier(self, task: Task) -> PreTrainedModel:
        """The encoder in fp32 under a new head; seed it with `torch.manual_seed` before the call.

        Raises ValueError if the architecture has no classifier, or weights of its encoder are missing.
        """
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.path,
                num_labels=len(task.labels) or 1,
                problem_type="regression" if task.is_regression else "single_label_classification",
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # safetensors, pickle and the model classes raise errors of many types
            raise ValueError(f"--model {self.path}: {one_line(error)}") from error
        encoder = f"{model.base_model_prefix}."
        # Masked language models are pre-trained without BERT's pooler, so it is part of the new head.
        absent = [key for key in report["missing_keys"] if key.startswith(encoder) and "pooler" not in key]
        if absent:
            raise ValueError(
                f"--model {self.path}: it lacks {len(absent)} weights of its encoder, first {min(absent)}; "
                "export the model again"
            )
        return model


def _hash_of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        # The card does not change what the model computes.
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md":
            digest.update(path.name.encode())
            add_to_digest(digest, path)
    return digest.hexdigest()
