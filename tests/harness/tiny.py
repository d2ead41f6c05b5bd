"""A text of invented words, the data folder made of it, a teacher, a recipe, and runs of it, which take seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from harness.ranks import Train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 short documents of invented words, some 9,500 words; subject, verb and object go together, so there is
    something to learn."""
    draw = random.Random(11)
    nouns, verbs = _invented_words()
    documents = []
    for _ in range(320):
        sentences = []
        for _ in range(3 + int(draw.random() * 5)):
            subject = int(len(nouns) * draw.random() ** 2)
            verb = verbs[subject % len(verbs)]
            object_ = nouns[(subject + 1 + int(3 * draw.random())) % len(nouns)]
            sentences.append(f"the {nouns[subject]} {verb} the {object_} .")
        documents.append(" ".join(sentences))
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt of BERT's special tokens, the letters with and without "##", and every word of `tiny_text`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    nouns, verbs = _invented_words()
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*entries, "the", *nouns, *verbs]) + "\n", encoding="utf-8")
    return path


def prepare_tiny(folder: Path, text: Path, vocabulary: Path, *options: str) -> Path:
    """The data folder, of rows of 32 tokens."""
    from dwt_ds.cli.main import main

    arguments = f"prepare --text {text} --tokenizer {vocabulary} --out {folder} --seq-len 32 --workers 1"
    assert main([*arguments.split(), *options]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_vocabulary: Path) -> Path:
    """A prepared data folder: rows of 32 tokens, a vocabulary of 298. Read only: all tests of a session share it."""
    return prepare_tiny(tmp_path_factory.mktemp("data") / "tiny", tiny_text, tiny_vocabulary, "--validation", "0.1")


@pytest.fixture(scope="session")
def sentence_data(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_vocabulary: Path) -> Path:
    """As `tiny_data`, but with a sentence a row, and nothing held out."""
    options = ("--validation", "0", "--one-sentence-per-row")
    return prepare_tiny(tmp_path_factory.mktemp("data") / "sentences", tiny_text, tiny_vocabulary, *options)


def save_tiny_bert(tokenizer: PreTrainedTokenizerBase, folder: Path, *, positions: int) -> Path:
    """A random BERT of 1 layer x 16 with this tokenizer, in Hugging Face format."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A random BERT of 1 layer x 16 with the tokenizer of `tiny_data`, in Hugging Face format."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    return save_tiny_bert(tokenizer, tmp_path_factory.mktemp("teacher") / "tiny", positions=32)


@pytest.fixture(scope="session")
def bpe_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """The same with a vocabulary of its own: a byte-level BPE of half of `tiny_text`."""
    from dwt_ds.prepare.case_and_accents import Wishes
    from dwt_ds.prepare.train_tokenizer import train_tokenizer

    text = tiny_text.read_text(encoding="utf-8").split("\n")
    tokenizer = train_tokenizer(text[: len(text) // 2], 500, "bpe", Wishes())
    return save_tiny_bert(tokenizer, tmp_path_factory.mktemp("teacher") / "bpe", positions=64)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    """A recipe over `tiny_data` and `tiny_teacher`: a student of 2 layers x 32, four steps of 4 rows a rank in fp32.
    Give it an `output_dir`."""
    recipe = {
        "deepspeed_config": "zero2_fp32",
        "data": {"dir": str(tiny_data)},
        "student": {"layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32},
        "teacher": {"path": str(tiny_teacher)},
        "train": {"max_steps": 4, "micro_batch_size": 4, "log_every": 1, "eval_rows": 16},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


TinyRun = Callable[..., str]


@pytest.fixture(scope="session")
def tiny_run(train: Train, tiny_recipe: Path) -> TinyRun:
    """`tiny_run(folder, *settings)` is a run of `tiny_recipe` there; its output. `code` is how it must end, and other
    keywords are those of `train`."""

    def run(folder: Path, *settings: str, ranks: int = 1, code: int = 0, **how: Any) -> str:
        ended, output = train(ranks, [str(tiny_recipe), f"output_dir={folder}", *settings], **how)
        assert ended == code, output
        return output

    return run


def _invented_words() -> tuple[list[str], list[str]]:
    """200 nouns and 39 verbs."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    nouns = [syllables[i % 70] + syllables[(i * 3 + i // 70 * 11) % 70] + "n" for i in range(200)]
    verbs = [syllables[i] + syllables[(i * 7 + 5) % 70] + "s" for i in range(39)]
    return nouns, verbs
