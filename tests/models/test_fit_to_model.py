"""A tokenizer beside a model gives what the model takes: plain transformers reads a text of any length with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dwt_ds.cli.main import main
from dwt_ds.config.schema import StudentConfig
from dwt_ds.data.manifest import read_data_manifest
from dwt_ds.data.tokenizer import tokenizer_sha256
from dwt_ds.models.build import build_student, longest_row
from dwt_ds.models.tokenizers import fit_to_model

# Masked language models of transformers that a student of the plain sizes can be, each with fields that it needs.
FIELDS = {"roberta": {"type_vocab_size": 1}, "squeezebert": {"embedding_size": 32}, "luke": {"entity_vocab_size": 9}}
COMMON = ["bert", "albert", "deberta-v2", "distilbert", "electra", "esm", "modernbert", "roberta", "xlm", "xlm-roberta"]
OTHERS = [
    *("big_bird", "camembert", "convbert", "data2vec-text", "deberta", "ernie", "eurobert", "flaubert", "fnet"),
    *("ibert", "layoutlm", "longformer", "luke", "megatron-bert", "mpnet", "mra", "nystromformer"),
    *("rembert", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "tapas", "xlm-roberta-xl", "yoso"),
]
WITH_TWO_TYPES = {
    *("albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "electra", "ernie", "fnet", "ibert"),
    *("layoutlm", "longformer", "luke", "megatron-bert", "nystromformer", "rembert", "roberta-prelayernorm"),
    *("roc_bert", "roformer", "squeezebert", "xlm-roberta"),
}
LONG = "the bada dadan sees the lamp . " * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer, which gives token_type_ids and knows no limit."""
    return AutoTokenizer.from_pretrained(tiny_data / "tokenizer")


@pytest.mark.parametrize("family", COMMON + [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_every_family_reads_a_text_that_is_too_long(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    shape = {"layers": 1, "hidden_size": 32, "num_heads": 2, "max_positions": 24, "config": FIELDS.get(family, {})}
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask")}
    student = StudentConfig(family=family, **shape)
    model = build_student(student, vocab_size=len(tokenizer), seq_len=24, **special).eval()
    fit_to_model(tokenizer, model.config, 24).save_pretrained(tmp_path)
    fitted = AutoTokenizer.from_pretrained(tmp_path)
    assert fitted.model_max_length == 24
    assert ("token_type_ids" in fitted.model_input_names) == (family in WITH_TWO_TYPES)
    pair = fitted(LONG, LONG, truncation=True, return_tensors="pt")
    several = fitted([LONG, "the"], truncation=True, padding=True, return_tensors="pt")
    assert pair["input_ids"].shape == (1, 24)
    with torch.no_grad():
        for batch in (pair, several):
            assert model(**batch).logits.isfinite().all()


def test_what_the_tokenizer_does_with_text_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    student = StudentConfig(family="roberta", layers=1, hidden_size=16, num_heads=2, max_positions=24)
    config = build_student(student, vocab_size=len(tokenizer), seq_len=24, pad_token_id=0).config
    before = tokenizer.model_max_length
    fitted = fit_to_model(tokenizer, config)
    assert tokenizer_sha256(fitted) == tokenizer_sha256(tokenizer)
    assert fitted.get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.model_max_length, longest_row(config), fitted.model_max_length) == (before, 24, 24)
    assert "token_type_ids" in tokenizer.model_input_names


def test_text_prepared_with_a_fitted_tokenizer_makes_the_same_rows(
    tokenizer: PreTrainedTokenizerBase, tiny_data: Path, tiny_text: Path, tmp_path: Path
) -> None:
    student = StudentConfig(family="roberta", layers=1, hidden_size=16, num_heads=2, max_positions=8)
    config = build_student(student, vocab_size=len(tokenizer), seq_len=8, pad_token_id=0).config
    fit_to_model(tokenizer, config).save_pretrained(tmp_path / "export")
    words = f"prepare --text {tiny_text} --tokenizer {tmp_path}/export --out {tmp_path}/data --seq-len 32 --workers 1"
    assert main([*words.split(), "--validation", "0.1"]) == 0
    ours, theirs = read_data_manifest(tmp_path / "data"), read_data_manifest(tiny_data)
    assert (ours.fingerprint, ours.tokenizer_sha256) == (theirs.fingerprint, theirs.tokenizer_sha256)


def test_without_a_limit_of_the_model_the_rows_decide(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.for_model("funnel")
    assert fit_to_model(tokenizer, config, 24).model_max_length == 24
    assert fit_to_model(tokenizer, config).model_max_length == tokenizer.model_max_length
