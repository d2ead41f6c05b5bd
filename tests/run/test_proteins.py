"""Proteins, end to end: a FASTA file, a row a protein, two steps of an ESM, its export in plain transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from harness.ranks import Train
from harness.runs import completed, rows_of
from transformers import AutoTokenizer, EsmForMaskedLM

from dwt_ds.cli.main import main
from dwt_ds.data.prepared import PreparedData

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
FREQUENCIES = [60] + [2] * 19  # two steps are enough to learn the one that leads
SEQ_LEN = 64


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    """Forty proteins, three of them longer than a row."""
    draw = random.Random(3)
    lengths = [draw.randint(20, SEQ_LEN - 2) for _ in range(37)] + [400, 2500, 34_350]
    return ["M" + "".join(draw.choices(AMINO_ACIDS, FREQUENCIES, k=length - 1)) for length in lengths]


@pytest.fixture(scope="module")
def data(sequences: list[str], tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The data folder of the proteins and a repeated one, their lines 60 letters long as databases have them."""
    folder = tmp_path_factory.mktemp("proteins")
    records = [f">sp|P{n}|NAME_{n} A protein. OS=Made up\n" for n in range(len(sequences))] + [">again\n"]
    with open(folder / "proteins.fasta", "w") as file:
        for header, sequence in zip(records, [*sequences, sequences[0]], strict=True):
            lines = [sequence[start : start + 60] for start in range(0, len(sequence), 60)]
            file.write(header + "\n".join(lines) + "\n")
    words = ["--text", folder / "proteins.fasta", "--train-tokenizer", 33, "--kind", "characters"]
    words += ["--out", folder / "data"]
    rows = ["--one-sentence-per-row", "--seq-len", SEQ_LEN, "--max-chars", 100_000, "--validation", 0.1]
    assert main(["prepare", "--workers", "1", *map(str, [*words, *rows])]) == 0
    return PreparedData.open(folder / "data")


def test_a_row_is_a_protein(data: PreparedData, sequences: list[str]) -> None:
    manifest = data.manifest
    assert (manifest.documents, manifest.sentences_kept) == (41, 40)
    assert manifest.dropped["duplicate_lines"] == 1
    assert manifest.dropped["cut_to_row"] == 3
    assert manifest.dropped["too_long"] == manifest.dropped["too_short"] == 0
    tokenizer = data.tokenizer()
    found = []
    for split in (data.train, data.validation):
        ids, lengths = split.rows(torch.arange(len(split)).numpy())
        for row, length in zip(ids, lengths, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(row[:length].tolist())
            assert (tokens[0], tokens[-1]) == ("<cls>", "<eos>")
            found.append("".join(tokens[1:-1]))
    assert sorted(found) == sorted(sequence[: SEQ_LEN - 2] for sequence in sequences)


def test_an_esm_trains_on_them_and_plain_transformers_loads_it(
    data: PreparedData, sequences: list[str], train: Train, tmp_path: Path
) -> None:
    recipe = tmp_path / "esm.yaml"
    content = {
        "deepspeed_config": "zero2_fp32",
        "output_dir": str(tmp_path / "run"),
        "data": {"dir": str(data.folder)},
        "student": {
            **{"family": "esm", "layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": SEQ_LEN},
            "config": {"token_dropout": True, "position_embedding_type": "rotary"},
        },
        "teacher": {"path": None},
        "train": {"max_steps": 2, "micro_batch_size": 4, "log_every": 1, "eval_every": 1, "learning_rate": 1e-2},
    }
    recipe.write_text(json.dumps(content))  # JSON is YAML
    completed(train(1, [str(recipe)]))
    rows = rows_of(tmp_path / "run")
    held_out = [row["eval_hard_loss"] for row in rows if "eval_hard_loss" in row]
    assert held_out[-1] < held_out[0]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    model = EsmForMaskedLM.from_pretrained(tmp_path / "run" / "export").eval()
    assert (model.config.mask_token_id, model.config.token_dropout) == (tokenizer.mask_token_id, True)
    assert model.lm_head.bias.any()  # it stands beside the decoder and learns as well
    assert tokenizer.model_max_length == SEQ_LEN
    batch = tokenizer([sequences[-1], sequences[0]], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, SEQ_LEN)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    again = EsmForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
