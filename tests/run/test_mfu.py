"""A run's arithmetic as a share of what its devices can do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.data.batches import StepBatches
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import PreparedData
from dwt_ds.models.build import student_model_config
from dwt_ds.models.flops import Work, forward_flops, meta_model, teacher_width, work_of_a_row
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import corpus_sizes
from dwt_ds.run import mfu
from dwt_ds.run.mfu import Utilization, matrix_rate, peak_flops_per_second, row_work


def test_the_teachers_forward_pass_counts_in_one_share_and_not_in_the_other() -> None:
    # 3 x 100 + 60 and 3 x 100 operations a token, 1,000 tokens/s, on ranks that do 2,000,000 a second.
    shares = Utilization(Work(100, 60), 2e6).shares(1000)
    assert shares == {"mfu": pytest.approx(0.18), "mfu_student": pytest.approx(0.15)}
    assert Work(3, 1, 2, 1).without_teacher() == Work(2, 0, 2), "what checkpointing repeats stays"


def test_operations_of_a_bert_by_hand() -> None:
    """Products of H x H: 12 a layer and token; the last layer's, but queries, keys and values, at labelled tokens."""
    hidden, layers, length, labels, vocabulary = 32, 3, 16, 5, 97
    sizes = {"hidden_size": hidden, "num_attention_heads": 2, "intermediate_size": 4 * hidden}
    config = BertConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=length, **sizes)
    gathered = GatheredMaskedLM(BertForMaskedLM(config))
    square = hidden * hidden
    attention = 3 * square * length + 2 * length * length * hidden
    rest = (1 + 8) * square
    encoder = layers * attention + (layers - 1) * rest * length + rest * labels
    head = square * labels + vocabulary * hidden * labels
    model = meta_model(gathered.model.config, type(gathered.model))
    assert forward_flops(model, length, labels, vocabulary) == 2 * (encoder + head)
    # A hidden loss needs the teacher's last layer at all tokens, and projects the student's hidden states there: one
    # product forward and two backward.
    row = {"seq_len": length, "labels": labels, "vocab_size": vocabulary}
    plain, hidden_loss = (work_of_a_row(model, model, **row, hidden_loss=each) for each in (False, True))
    assert hidden_loss.student_forward == plain.student_forward
    more = 2 * rest * (length - labels) + 3 * 2 * square * length
    assert hidden_loss.teacher_forward - plain.teacher_forward == more
    overlap = Overlap(vocabulary, 1.0, 1.0)
    plain, hidden_loss = (work_of_a_row(model, model, **row, overlap=overlap, hidden_loss=it) for it in (False, True))
    assert hidden_loss.teacher_forward - plain.teacher_forward == more


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 5),  # not in the table
        ("NVIDIA H200 NVL", "bf16", 5),
        ("NVIDIA H100 NVL", "bf16", 5),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", 5),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", 5),
        ("GRID A100-10C", "bf16", 5),
        ("NVIDIA A100-40C", "bf16", 5),
        ("NVIDIA RTX A1000", "bf16", 5),
    ],
)
def test_a_gpus_peak_is_the_data_sheets_or_measured(
    name: str, precision: str, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(mfu, "matrix_rate", lambda device, dtype: 5e12)
    assert peak_flops_per_second(torch.device("cuda", 0), precision) == tflops * 1e12


def test_rows_of_another_vocabulary_are_no_longer_than_the_teacher_can_read() -> None:
    teacher = meta_model(BertConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=40))
    assert [teacher_width(teacher, Overlap(9, 0.5, 1.5), seq_len) for seq_len in (20, 32)] == [30, 40]


@pytest.mark.parametrize(("precision", "tflops"), [("bf16", 989.0), ("fp32", 5.0)])
def test_the_peak_of_fp32_is_measured_where_products_are_rounded(
    precision: str, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(mfu, "matrix_rate", lambda device, dtype: 5e12)
    assert peak_flops_per_second(torch.device("cuda", 0), precision) == tflops * 1e12


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that shows products of 4, 2 and 8 ms, and then the end of the time for them."""
    clock = iter([0.0, 0.0, 0.004, 0.004, 0.004, 0.006, 0.006, 0.006, 0.014, 99.0])
    monkeypatch.setattr(mfu, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert matrix_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * 512**3 / 0.002)


def test_rows_of_a_sentence_each_count_with_the_padding_that_they_have(tiny_recipe: Path, sentence_data: Path) -> None:
    """They are computed beside rows of similar length, and few are as long as the longest."""
    settings = resolve_plan(str(tiny_recipe), [f"data.dir={sentence_data}", "teacher.path=null"], None, 1)
    vocab_size, train = settings.corpus.vocab_size, settings.config.train
    model = meta_model(student_model_config(settings.config.student, **corpus_sizes(settings.corpus)))
    data = PreparedData.open(sentence_data)
    batches = StepBatches(
        data.train,
        data.facts,
        settings.config.data,
        seed=1,
        micro_batch_size=train.micro_batch_size,
        accumulation=1,
        rank=0,
        world_size=1,
    )
    a_row = {width: forward_flops(model, width, 0, vocab_size) for width in range(1, 33)}
    a_label = forward_flops(model, 32, 1, vocab_size) - a_row[32]
    flops = tokens = 0
    for step in range(len(data.train) // train.micro_batch_size):
        [batch] = batches[step]
        flops += 3 * (train.micro_batch_size * a_row[batch.input_ids.shape[1]] + len(batch.labels) * a_label)
        tokens += batch.token_count
    counted = row_work(settings.config, settings.corpus, model, None, None).per_token(settings.corpus.tokens_per_row)
    assert counted.per_row == pytest.approx(flops / tokens, rel=0.05)
    assert tokens < 0.9 * 32 * len(data.train), "the test wants short rows"
