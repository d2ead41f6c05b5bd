"""What training knows of a tokenizer: facts of each kind, and a fingerprint of what it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dwt_ds.data.tokenizer import TokenizerFacts, tokenizer_sha256
from dwt_ds.prepare.case_and_accents import Treatment
from dwt_ds.prepare.tokenizer import wordpiece_tokenizer

Documents = Callable[..., list[list[str]]]


def wordpiece(*entries: str, lowercase: bool = True) -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *entries]
    return wordpiece_tokenizer({name: number for number, name in enumerate(names)}, Treatment(lowercase, lowercase))


def test_fingerprint_sees_content_order_and_case() -> None:
    tokenizers = [wordpiece("the", "cat"), wordpiece("cat", "the"), wordpiece("the", "cat", "sat")]
    hashes = {tokenizer_sha256(tokenizer) for tokenizer in [*tokenizers, wordpiece("the", "cat", lowercase=False)]}
    assert len(hashes) == 4
    assert tokenizer_sha256(wordpiece("the", "cat")) == tokenizer_sha256(tokenizers[0])


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def test_facts_of_wordpiece_and_byte_level(made_up_documents: Documents) -> None:
    """Only the vocabulary of WordPiece tells which tokens continue a word."""
    facts = TokenizerFacts.of(wordpiece("the", "##re", "cat", "."))
    assert facts.vocab_size == 9
    assert np.flatnonzero(facts.is_special).tolist() == [0, 1, 2, 3, 4]
    assert facts.continues_word is not None
    assert np.flatnonzero(facts.continues_word).tolist() == [6]
    assert facts.ordinary_ids.tolist() == [5, 6, 7, 8]

    facts = TokenizerFacts.of(byte_level([line for lines in made_up_documents(20) for line in lines]))
    assert facts.continues_word is None
    assert facts.is_special.sum() == 5


def test_tokenizer_without_a_mask_token() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a"
    )
    with pytest.raises(ValueError, match="has no cls_token: masked language modelling needs"):
        TokenizerFacts.of(tokenizer)
