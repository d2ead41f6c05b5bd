"""A tiny checkpoint, and a folder in GLUE's own layouts with invented rows that a tiny model can learn."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

WORDS = ("the", "film", "plot", "actor", "scene", "was", "is", "a", "very", "quite")
# The one word that decides a row's label; for STS-B the score.
CLUES = {"0": "dull", "1": "great", "entailment": "great", "not_entailment": "dull", "neutral": "plain"}
CLUES |= {"contradiction": "dull", "0.000": "dull", "5.000": "great"}
MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2\tlabel1\tgold_label"
)
# Header line and row pattern of each task's files, as GLUE ships them.
LAYOUTS = {
    "CoLA": (None, "gj04\t{label}\t*\t{second}"),
    "SST-2": ("sentence\tlabel", "{second}\t{label}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t7\t8\t{first}\t{second}"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", '{n}\t1\t2\t"{first}"\t{second}\t{label}'),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{n}\tnews\tx\t2012\t1\tnone\tnone\t{first}\t{second}\t{label}",
    ),
    "MNLI": (MNLI_HEADER, "{n}\t1\t1e\tfiction\t( x )\t( x )\t(X)\t(X)\t{first}\t{second}\t{label}\t{label}"),
    "QNLI": ("index\tquestion\tsentence\tlabel", "{n}\t{first}\t{second}\t{label}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "{n}\t{first}\t{second}\t{label}"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "{n}\t{first}\t{second}\t{label}"),
}
LABELS = {"STS-B": ("0.000", "5.000"), "MNLI": ("entailment", "neutral", "contradiction")}
LABELS |= dict.fromkeys(("QNLI", "RTE"), ("entailment", "not_entailment"))


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 1 layer x 32 with 40 positions and a tokenizer of whole words."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *sorted(set(CLUES.values()))]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(entries) + 3,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_split(path: Path, task: str, rows: int, seed: int) -> None:
    """A file of one task in its own layout."""
    draw = random.Random(seed)
    labels = LABELS.get(task, ("0", "1"))
    header, pattern = LAYOUTS[task]
    lines = [] if header is None else [header]
    for n in range(rows):
        label = labels[n % len(labels)]
        words = [draw.choice(WORDS) for _ in range(5)]
        second = " ".join([*words[:2], CLUES[label], *words[2:]])
        lines.append(pattern.format(n=n, label=label, second=second, first=" ".join(draw.sample(WORDS, 4))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks, 160 training and 40 validation rows each, two thirds as many rows for MNLI's mismatched set."""
    folder = tmp_path_factory.mktemp("glue")
    for task in LAYOUTS:
        write_split(folder / task / "train.tsv", task, rows=160, seed=0)
        if task == "MNLI":
            write_split(folder / task / "dev_matched.tsv", task, rows=42, seed=1)
            write_split(folder / task / "dev_mismatched.tsv", task, rows=27, seed=2)
        else:
            write_split(folder / task / "dev.tsv", task, rows=40, seed=1)
    return folder


@pytest.fixture(scope="session")
def real_glue_dir() -> Path:
    """GLUE itself, where there is one; never part of this repository."""
    folder = os.environ.get("DWT_DS_GLUE_DIR")
    if not folder:
        pytest.skip("set DWT_DS_GLUE_DIR to a folder of GLUE's TSVs")
    return Path(folder)
