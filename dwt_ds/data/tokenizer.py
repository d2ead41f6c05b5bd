"""Loading and saving a tokenizer, the facts of it that training needs, and a fingerprint of its behaviour."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.base.words import one_line

# Files with a vocabulary. From a folder without one, transformers makes a tokenizer of special tokens alone.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "*.model")

# Exercises case, accents, punctuation, digits, subwords and unknown characters; part of the fingerprint.
_PROBE = "The café's 1,234 re-tokenised WORDS (naïve; “quoted”) \u4e2d\u6587 e.g. unbelievableness\t\u2603 end."


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face format, or of a model's name on the hub; `~` is the home folder.

    Raises:
        FileNotFoundError: there is no tokenizer, or it cannot be read.
    """
    where = os.path.expanduser(path)
    if Path(where).is_dir() and not any(any(Path(where).glob(name)) for name in _VOCABULARY_FILES):
        raise FileNotFoundError(f"tokenizer path {str(path)!r} holds no tokenizer; copy its tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise FileNotFoundError(
            f"tokenizer path {str(path)!r} cannot be read: {one_line(error, with_type=True)}"
        ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files to a folder; raises OSError where they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of a tokenizer for masking and batching."""

    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_special: np.ndarray
    """(V,) bool: tokens that are never labels or random replacements, the unknown token included."""
    continues_word: np.ndarray | None
    """(V,) bool: tokens that continue the word of the token before them, by WordPiece's prefix ("##"); None for other
    models, whose words can only be found in the text."""
    ordinary_ids: np.ndarray
    """(V',) int64: the ids that are not special."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
        """Raises ValueError for a tokenizer without the special tokens that masked language modelling needs."""
        for role in ("pad_token", "cls_token", "sep_token", "mask_token"):
            if getattr(tokenizer, role, None) is None:
                raise ValueError(
                    f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no {role}: "
                    "masked language modelling needs pad, cls, sep and mask tokens; choose another tokenizer"
                )
        vocabulary = tokenizer.get_vocab()
        vocab_size = vocabulary_size(tokenizer)
        is_special = np.zeros(vocab_size, dtype=bool)
        is_special[list(tokenizer.all_special_ids)] = True
        in_vocabulary = np.zeros(vocab_size, dtype=bool)
        in_vocabulary[list(vocabulary.values())] = True
        return cls(
            vocab_size=vocab_size,
            pad_id=int(tokenizer.pad_token_id),
            cls_id=int(tokenizer.cls_token_id),
            sep_id=int(tokenizer.sep_token_id),
            mask_id=int(tokenizer.mask_token_id),
            is_special=is_special,
            continues_word=_continues_word(tokenizer, vocabulary, is_special),
            ordinary_ids=np.flatnonzero(in_vocabulary & ~is_special),
        )


def _continues_word(
    tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], is_special: np.ndarray
) -> np.ndarray | None:
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not isinstance(model, WordPiece):
        return None
    continues = np.zeros(len(is_special), dtype=bool)
    prefix = model.continuing_subword_prefix
    continues[[index for token, index in vocabulary.items() if token.startswith(prefix)]] = True
    return continues & ~is_special


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus one. A model's embedding may have more rows, as padding that no token uses."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of a tokenizer's behaviour: its vocabulary by id, the roles of special tokens, and the ids of a fixed
    probe text. Its files would not do, since their form changes between library versions."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    roles = [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id]
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    content = json.dumps([vocabulary, roles, probe], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()
