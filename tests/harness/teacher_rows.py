"""Students' data with teachers' tokenizers, and the text of their rows."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dwt_ds.config.schema import DataConfig
from dwt_ds.data.batches import StepBatches
from dwt_ds.data.masks import MaskedRows, draw_masks
from dwt_ds.data.teacher_rows import TeacherRows, TeacherTokens
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.train_tokenizer import train_tokenizer
from harness.corpus import Make, made_up_documents

CASED = Wishes(cased=True)
LATIN, CHINESE = "latin", "chinese"
# name -> (text, student's kind, entries and wishes, teacher's)
PAIRS: dict[str, tuple[str, tuple[str, int, Wishes], tuple[str, int, Wishes]]] = {
    "WordPiece uncased to byte-level BPE": (LATIN, ("wordpiece", 500, Wishes()), ("bpe", 700, Wishes())),
    "cased to uncased": (LATIN, ("wordpiece", 500, CASED), ("wordpiece", 400, Wishes())),
    "small to large": (LATIN, ("wordpiece", 300, Wishes()), ("wordpiece", 700, Wishes())),
    "Unigram to WordPiece": (LATIN, ("unigram", 600, Wishes()), ("wordpiece", 500, Wishes())),
    "byte-level BPE to Unigram": (LATIN, ("bpe", 600, Wishes()), ("unigram", 600, Wishes())),
    "Chinese characters to byte-level BPE": (CHINESE, ("characters", 400, Wishes()), ("bpe", 700, Wishes())),
    "Chinese WordPiece to byte-level BPE": (CHINESE, ("wordpiece", 600, Wishes()), ("bpe", 700, Wishes())),
}
# Without labels.
NONE = np.zeros(0, dtype=np.int64)


@lru_cache
def text_of(language: str) -> str:
    """Lines of some 20 words with capitals, accents, quotes, numbers and contractions; or of Chinese words."""
    draw = random.Random(3)
    if language == CHINESE:
        words = ["".join(chr(0x4E00 + draw.randrange(150)) for _ in range(draw.randint(1, 3))) for _ in range(300)]
        sentences = ["".join(draw.choices(words, k=draw.randint(6, 14))) + draw.choice("。！？") for _ in range(500)]
        return "\n\n".join("\n".join(sentences[k : k + 5]) for k in range(0, 500, 5))

    def changed(word: str) -> str:
        variants = [f"{word}'s", f'"{word}"', f"({word}),", "3,450.5", word.replace("e", "é")]
        return draw.choice([word, word, word, *variants])

    documents = made_up_documents(40)
    lines = [[" ".join(map(changed, line.split(" "))) for line in document] for document in documents]
    return "\n\n".join("\n".join(document) for document in lines)


@lru_cache
def tokenizer_of(language: str, kind: Any, entries: int, wishes: Wishes) -> PreTrainedTokenizerBase:
    return train_tokenizer(text_of(language).split("\n"), entries, kind, wishes)


class Pair:
    """A student's data and a teacher's tokenizer, with all training rows and their masks."""

    def __init__(self, name: str, folder: Path, make: Make, longest_row: int | None = None) -> None:
        language, ours, theirs = PAIRS[name]
        tokenizer_of(language, *ours).save_pretrained(folder / "tokenizer")
        (folder / "text.txt").write_text(text_of(language), encoding="utf-8")
        self.data = make(folder / "data", folder / "text.txt", tokenizer=str(folder / "tokenizer"), seq_len=64)
        self.student, self.teacher = self.data.tokenizer(), tokenizer_of(language, *theirs)
        self.tokens = TeacherTokens.of(self.student, self.teacher, longest_row)
        self.rows = np.arange(min(len(self.data.train), 20))
        self.ids, self.lengths = self.data.train.rows(self.rows, 64)
        self.starts = self.data.train.starts_word(self.rows, 64)

    def masked(self) -> MaskedRows:
        return draw_masks(self.ids, self.lengths, self.rows, self.rows * 0, self.data.facts, DataConfig(), 1)

    def teacher_rows(self, positions: np.ndarray, shown: np.ndarray | None = None) -> TeacherRows:
        """shown: what the student sees there; None: its mask token."""
        return self.tokens.rows(self.ids, self.lengths, positions, self.all_masked(positions, shown), self.starts)

    def all_masked(self, positions: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
        return np.full(len(positions), self.student.mask_token_id) if shown is None else shown

    def batches(self, workers: int = 0, teacher: bool = True) -> StepBatches:
        return StepBatches(
            self.data.train,
            self.data.facts,
            DataConfig(),
            seed=3,
            micro_batch_size=2,
            accumulation=2,
            rank=0,
            world_size=1,
            teacher_tokens=self.tokens if teacher else None,
        )


def squeezed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens without its spaces, in lower case; special tokens left out."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return "".join(text.split()).removeprefix("##").lower()


@lru_cache(maxsize=1000)
def spans(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """The place of each token in the row's squeezed text: from the whole characters before it to those up to it, the
    one of which it has a part among them."""
    texts = [squeezed(tokenizer, list(ids[:count])) for count in range(len(ids) + 1)]
    whole = [len(text.rstrip("\ufffd")) for text in texts]
    begun = [count + text.endswith("\ufffd") for count, text in zip(whole, texts, strict=True)]
    return list(zip(whole, begun[1:], strict=False))


def row_of(rows: TeacherRows, row: int) -> list[int]:
    ids = rows.input_ids[row]
    return ids.tolist() if rows.attention_mask is None else ids[rows.attention_mask[row].bool()].tolist()


def without_accents(text: str) -> str:
    return text.replace("é", "e")
