"""The loop a user would write today: what training_speed.py times dwt_ds against."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timing import synchronize
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from dwt_ds.data.prepared import PreparedData

MICRO_BATCH = 16


class EagerLoop:
    """Sentences as rows, full logits, eager losses, torch's AdamW.

    Args:
        data: a prepared data folder; packed rows are cut into their sentences again.
        teacher: Hugging Face folder of a BERT.
        student: configuration of the student.
    """

    def __init__(self, data: Path, teacher: Path, student: BertConfig) -> None:
        prepared = PreparedData.open(data)
        self._tokenizer = prepared.tokenizer()
        self._sentences = _sentences(prepared, self._tokenizer.sep_token_id)
        self._draw = random.Random(0)
        self._collate = DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=0.15)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._student = BertForMaskedLM(student).to(self._device, torch.bfloat16).train()
        self._teacher = BertForMaskedLM.from_pretrained(teacher, dtype=torch.bfloat16).to(self._device).eval()
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=5e-4)
        self._step()  # the first step also allocates the optimizer's state

    def tokens_per_second(self, steps: int) -> float:
        """Real tokens over elapsed seconds of `steps` steps."""
        synchronize()
        began = time.perf_counter()
        tokens = sum(self._step() for _ in range(steps))
        synchronize()
        return tokens / (time.perf_counter() - began)

    def _step(self) -> int:
        sentences = self._draw.choices(self._sentences, k=MICRO_BATCH)
        batch = self._collate([{"input_ids": sentence} for sentence in sentences])
        inputs = {key: batch[key].to(self._device) for key in ("input_ids", "attention_mask")}
        labels = batch["labels"].flatten().to(self._device)
        with torch.no_grad():
            teacher_logits = self._teacher(**inputs).logits.flatten(0, 1)
        logits = self._student(**inputs).logits.flatten(0, 1)
        labelled = labels != -100
        hard = F.cross_entropy(logits.float(), labels)
        soft = F.kl_div(
            F.log_softmax(logits.float(), -1)[labelled],
            F.log_softmax(teacher_logits.float(), -1)[labelled],
            log_target=True,
            reduction="batchmean",
        )
        (hard + soft).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sum(map(len, sentences))


def _sentences(data: PreparedData, separator: int, most_rows: int = 2000) -> list[list[int]]:
    """Sentences of the first rows, each in its own [CLS] ... [SEP]."""
    ids, lengths = data.train.rows(np.arange(min(most_rows, len(data.train))))
    found = []
    for row, length in zip(ids, lengths):
        first, tokens = int(row[0]), row[1:length]
        for part in np.split(tokens, np.flatnonzero(tokens == separator)):
            sentence = part[part != separator]
            if len(sentence):
                found.append([first, *sentence.tolist(), separator])
    return found
