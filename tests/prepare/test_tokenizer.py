"""Tokenizers that make rows: trained the same every time, read from a vocab.txt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dwt_ds.data.tokenizer import tokenizer_sha256
from dwt_ds.prepare.tokenizer import find_tokenizer, train_wordpiece

Documents = Callable[..., list[list[str]]]

TRAIN_AND_PRINT = """
import sys
from dwt_ds.data.tokenizer import tokenizer_sha256
from dwt_ds.prepare.tokenizer import train_wordpiece
print(tokenizer_sha256(train_wordpiece(open(sys.argv[1]).read().split("\\n"), 300)))
"""


def test_training_is_the_same_in_every_process(corpus_file: Path) -> None:
    command = [sys.executable, "-c", TRAIN_AND_PRINT, str(corpus_file)]
    there = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert tokenizer_sha256(train_wordpiece(corpus_file.read_text().split("\n"), 300)) == there


def test_trained_tokenizer_spells_its_text(made_up_documents: Documents, tmp_path: Path) -> None:
    texts = [line for lines in made_up_documents(30) for line in lines]
    tokenizer = train_wordpiece(texts, 250)
    assert len(tokenizer) == 250
    assert [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id] == [0, 2, 4]
    ids = tokenizer(texts[0])["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == texts[0].lower().replace(" ", "")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[0])["input_ids"] == ids
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)


def test_cased_training_keeps_case(made_up_documents: Documents) -> None:
    texts = [line for lines in made_up_documents(10) for line in lines]
    assert any(
        token[0].isupper() for token in train_wordpiece(texts, 300, lowercase=False).get_vocab() if token[0] != "["
    )
    assert not any(token.lower() != token for token in train_wordpiece(texts, 300).get_vocab() if token[0] != "[")


def test_too_small_a_vocabulary(made_up_documents: Documents) -> None:
    with pytest.raises(ValueError, match="--train-tokenizer 20: .* need [0-9]+ entries"):
        train_wordpiece([line for lines in made_up_documents(5) for line in lines], 20)


def write_vocab(path: Path, entries: list[str]) -> str:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *entries]) + "\n", encoding="utf-8")
    return str(path)


def test_a_vocab_file_decides_case(tmp_path: Path) -> None:
    uncased = find_tokenizer(write_vocab(tmp_path / "u.txt", ["the", "caf", "##e"]))
    cased = find_tokenizer(write_vocab(tmp_path / "c.txt", ["The", "the", "caf", "##\u00e9"]))
    assert uncased.tokenize("The caf\u00e9") == ["the", "caf", "##e"]
    assert cased.tokenize("The caf\u00e9") == ["The", "caf", "##\u00e9"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"lacks \[MASK\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nthe\n", "1 entries are there twice"),
    ],
)
def test_bad_vocab_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_tokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("name", ["nowhere/vocab.txt", "not/a/folder"])
def test_missing_files(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        find_tokenizer(name)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--tokenizer {tmp_path}: not a vocab.txt"):
        find_tokenizer(str(tmp_path))
