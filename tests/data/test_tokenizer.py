"""Loading a tokenizer; what training knows of it: facts of each kind, and a fingerprint of what it does."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from harness.languages import trained, with_roles
from tokenizers import Tokenizer, models
from transformers import BertConfig, DebertaV2Config, PreTrainedConfig, PreTrainedTokenizerFast, RobertaConfig

from dwt_ds.data.tokenizer import TokenizerFacts, load_tokenizer, save_tokenizer, tokenizer_sha256, vocabulary_size
from dwt_ds.prepare.case_and_accents import Treatment
from dwt_ds.prepare.tokenizer import wordpiece_tokenizer


def wordpiece(*entries: str, lowercase: bool = True) -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *entries]
    return wordpiece_tokenizer({name: number for number, name in enumerate(names)}, Treatment(lowercase, lowercase))


def test_fingerprint_sees_content_order_case_and_roles() -> None:
    tokenizers = [wordpiece("the", "cat"), wordpiece("cat", "the"), wordpiece("the", "cat", "sat")]
    tokenizers += [wordpiece("the", "cat", lowercase=False), wordpiece("the", "cat")]
    tokenizers[-1].mask_token = "cat"
    assert len({tokenizer_sha256(tokenizer) for tokenizer in tokenizers}) == 5
    assert tokenizer_sha256(wordpiece("the", "cat")) == tokenizer_sha256(tokenizers[0])


def test_facts_of_wordpiece_and_byte_level() -> None:
    """Only the vocabulary of WordPiece tells which tokens continue a word."""
    facts = TokenizerFacts.of(wordpiece("the", "##re", "cat", "."))
    assert facts.vocab_size == 9
    assert np.flatnonzero(facts.is_special).tolist() == [0, 1, 2, 3, 4]
    assert facts.continues_word is not None
    assert np.flatnonzero(facts.continues_word).tolist() == [6]
    assert facts.ordinary_ids.tolist() == [5, 6, 7, 8]

    facts = TokenizerFacts.of(with_roles(trained("byte-level BPE")))
    assert facts.continues_word is None
    assert facts.is_special.sum() == 5


def test_ids_that_no_entry_has_are_no_random_tokens() -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    vocabulary = {entry: number for number, entry in enumerate(entries)} | {"cat": 9}
    facts = TokenizerFacts.of(wordpiece_tokenizer(vocabulary, Treatment(True, True)))
    assert (facts.vocab_size, facts.ordinary_ids.tolist()) == (10, [5, 9])


def test_tokenizer_without_a_mask_token() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a"
    )
    with pytest.raises(ValueError, match="has no cls_token: masked language modelling needs"):
        TokenizerFacts.of(tokenizer)


def test_a_tokenizer_that_the_disk_does_not_hold_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tokenizer(wordpiece("the", "cat"), tmp_path)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "of a later version"}}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error(content: str, tmp_path: Path) -> None:
    wordpiece("the", "cat").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FileNotFoundError, match="^tokenizer path '.*' cannot be read: "):
        load_tokenizer(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wordpiece("the", "cat").save_pretrained(tmp_path / "teacher")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vocabulary_size(load_tokenizer("~/teacher")) == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="^tokenizer path '~/empty' holds no tokenizer; "):
        load_tokenizer("~/empty")


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, DebertaV2Config])
def test_a_model_without_a_vocabulary_is_not_a_tokenizer_of_special_tokens(
    config: type[PreTrainedConfig], tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
