"""A tokenizer's path is read as a model's is."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from dwt_ds.models.vocabulary import load_tokenizer, vocabulary_size


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vocabulary_size(load_tokenizer("~/teacher")) == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="^tokenizer path '~/empty' holds no tokenizer; "):
        load_tokenizer("~/empty")
