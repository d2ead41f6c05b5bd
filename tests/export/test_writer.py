from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness.ranks import Ended, Python
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dwt_ds.base.files import problems
from dwt_ds.config.objective import DistillConfig, Schedule, SoftPositions
from dwt_ds.config.quantization import Quantization
from dwt_ds.config.schema import RunConfig, StudentConfig, TeacherConfig
from dwt_ds.engine.checkpoint.manifest import RunFacts, RunState
from dwt_ds.export import writer as export
from dwt_ds.export.model_card import held_out_losses_at, model_card
from dwt_ds.export.writer import NotFiniteError, write_export
from dwt_ds.models.build import build_student

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "electra", "albert", "esm"]

# What a user does, with nothing of this project within reach.
RELOAD = """
import json, sys
for name in [name for name in sys.modules if name.split(".")[0] in ("dwt_ds", "dwt_kernels")]:
    del sys.modules[name]
sys.modules["dwt_ds"] = sys.modules["dwt_kernels"] = None
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
for family in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{family}"
    model = AutoModelForMaskedLM.from_pretrained(f"{folder}/export")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/export")
    assert model.dtype == torch.float32, model.dtype
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["tokens"]).logits
    too_long = tokenizer("the bada dadan . " * 30, truncation=True, return_tensors="pt")
    assert too_long["input_ids"].shape[1] == tokenizer.model_max_length == 32
    model(**too_long)
    guess = pipeline("fill-mask", model=f"{folder}/export", device="cpu")("the [MASK] .", top_k=1)[0]
    off = (logits - expected["logits"]).abs().max().item()
    print(json.dumps({"family": family, "off": off, "size": len(tokenizer), "guess": guess["token_str"]}))
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_data / "tokenizer")


def student(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedModel:
    shape = {"layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "dropout": 0.2, **changes}
    return build_student(
        StudentConfig(**shape),
        vocab_size=len(tokenizer),
        seq_len=32,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Other weights than the model's own, tied ones once, as the engine hands them over."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: 0.3 * torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}
    saved = model.state_dict()
    return weights | {name: each.clone() for name, each in model.named_buffers() if name in saved}


@torch.no_grad()
def logits_with(model: PreTrainedModel, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    model.load_state_dict(weights, strict=False)
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("started", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "started"])
def test_plain_transformers_reads_every_family_and_gives_the_trained_models_logits(
    started: bool, python: Python, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In a process that has forgotten this project, and in one that has never loaded it."""
    tokens = torch.randint(5, len(tokenizer), (3, 20), generator=torch.Generator().manual_seed(1))
    for family in FAMILIES:
        model = student(tokenizer, family=family, config={"type_vocab_size": 1} if family == "roberta" else {})
        weights = trained_weights(model)
        (tmp_path / family).mkdir()
        expected = {"tokens": tokens, "logits": logits_with(model, weights, tokens)}
        write_export(model.bfloat16(), weights, tokenizer, "# card\n", tmp_path / family / "export", seq_len=32)
        torch.save(expected, tmp_path / family / "expected.pt")
    words = ["-c", RELOAD, str(tmp_path), *FAMILIES]
    if started:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=550)
        ended = Ended(done.returncode, done.stdout, done.stderr)
    else:
        ended = python(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    reports = [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]
    assert [report["family"] for report in reports] == FAMILIES
    for report in reports:
        assert report["off"] <= 1e-4, report
        assert report["size"] == len(tokenizer)
        assert report["guess"].strip() in tokenizer.get_vocab()


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = student(tokenizer)
    weights = trained_weights(model)
    assert "cls.predictions.decoder.weight" not in weights
    write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in stored
    word_embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(stored[word_embeddings], weights[word_embeddings])
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float32}


def test_an_untied_head_keeps_its_own_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = student(tokenizer, config={"tie_word_embeddings": False})
    weights = trained_weights(model)
    write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    head = "cls.predictions.decoder.weight"
    assert torch.equal(stored[head], weights[head])
    assert not torch.equal(stored[head], stored["bert.embeddings.word_embeddings.weight"])


def test_the_folder_has_model_tokenizer_and_card(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = student(tokenizer)
    write_export(model, trained_weights(model), tokenizer, "# the card\n", tmp_path / "export", seq_len=32)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert (tmp_path / "export" / "README.md").read_text(encoding="utf-8") == "# the card\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab() == tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_replaces_the_one_before_and_what_a_kill_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for folder in (tmp_path / "export", tmp_path / "export.tmp"):
        folder.mkdir()
        (folder / "old").write_text("x", encoding="utf-8")
    model = student(tokenizer)
    write_export(model, trained_weights(model), tokenizer, "", tmp_path / "export", seq_len=32)
    assert not (tmp_path / "export" / "old").exists()
    assert not (tmp_path / "export.tmp").exists()


@pytest.mark.parametrize("lost", ["bert.encoder.layer.1.output.dense.weight", "cls.predictions.bias"])
def test_a_weight_that_is_missing_stops_the_export(
    lost: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = student(tokenizer)
    weights = trained_weights(model)
    del weights[lost]
    with pytest.raises(RuntimeError, match="has no counterpart in BertForMaskedLM"):
        write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)
    assert not (tmp_path / "export").exists()


def test_a_weight_that_the_model_does_not_have_stops_the_export(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = student(tokenizer)
    weights = trained_weights(model) | {"bert.encoder.layer.9.extra": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=r"bert\.encoder\.layer\.9\.extra has no counterpart"):
        write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)


@pytest.mark.parametrize("damaged", ["bert.encoder.layer.0.attention.self.query.weight", "cls.predictions.bias"])
def test_damage_between_writing_and_reading_back_is_found_and_the_old_export_stays(
    damaged: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(tokenizer)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").write_text("x", encoding="utf-8")
    save = type(model).save_pretrained

    def save_with_damage(self: PreTrainedModel, folder: Path) -> None:
        save(self, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[damaged].view(-1)[0] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", save_with_damage)
    with pytest.raises(RuntimeError, match="export: read back, [12] tensors differ"):
        write_export(model, trained_weights(model), tokenizer, "", tmp_path / "export", seq_len=32)
    assert (tmp_path / "export" / "old").is_file()


def test_an_export_that_the_disk_does_not_hold_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its files would take the room that the next checkpoint needs."""
    model = student(tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(OSError, match="export: .*[Ff]ile too large"):
            write_export(model, trained_weights(model), tokenizer, "", tmp_path / "export", seq_len=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# The card.


def card_of(
    path: str | None,
    positions: SoftPositions = "labelled",
    *,
    init: str = "random",
    soft_weight: float = 1.0,
    quantization: Quantization | None = None,
) -> str:
    facts = RunFacts(
        data="abc",
        tokenizer="def",
        vocab_size=298,
        seq_len=32,
        student={"layers": 2},
        teacher="sha256 0123",
        versions={"torch": "2.13.0"},
        settings=RunConfig(
            student=StudentConfig(init=init),
            teacher=TeacherConfig(path=path),
            distill=DistillConfig(soft_positions=positions, soft_weight=Schedule(start=soft_weight)),
            seed=17,
        ).to_dict(),
        settings_sha256="4567",
        quantization=None if quantization is None else quantization.to_dict(),
    )
    starts = [{"step": 0, "ranks": 2, "at": "2026-01-01T00:00:00Z"}, {"step": 700, "ranks": 4, "at": "2026-01-02"}]
    state = RunState(step=1500, tokens=2_048_000, starts=starts)
    return model_card(facts, state, {"": 2.5, "books": 3.12345})


def test_the_card_tells_what_was_trained_on_what() -> None:
    card = card_of("runs/teacher/export")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"tags": ["masked-lm", "dwt_ds"]}
    assert "distilled from a weak teacher" in text
    assert "`runs/teacher/export`" in text
    assert "1,500 steps and 2,048,000 tokens" in text
    assert "| data (fingerprint of its rows) | abc |" in text
    assert "* step 700: 4 ranks" in text
    assert "| held-out MLM loss | 2.5 |\n| held-out MLM loss, books | 3.1235 |\n" in text
    assert "the latter on labelled positions;" in text
    assert "the latter on labelled positions and 0.3 of the other positions;" in card_of("runs/teacher/export", 0.3)


def test_the_cards_settings_are_the_runs() -> None:
    settings = card_of("t").split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == RunConfig(teacher=TeacherConfig(path="t"), seed=17).to_dict()


def test_the_card_of_a_model_trained_alone_speaks_of_no_teacher() -> None:
    card = card_of(None)
    assert "without a teacher" in card
    assert "pre-trained on masked tokens alone" in card
    assert "Lee et al." not in card


def test_the_card_says_where_the_weights_began() -> None:
    assert "initial weights" not in card_of("t")
    assert "| initial weights | grown from those of `t` (`student.init=stack`) |" in card_of("t", init="stack")


def test_a_model_that_only_began_from_the_teacher_is_not_called_distilled() -> None:
    card = card_of("t", init="stack", soft_weight=0.0)
    assert "pre-trained on masked tokens alone" in card
    assert "grown from those of `t`" in card
    assert "Lee et al." not in card


def test_the_card_of_a_quantized_model_says_from_which_step() -> None:
    card = card_of("t", quantization=Quantization(start_step=1000))
    assert "trained quantized from step 1,000 on" in card
    assert "From that step on, a held-out loss is the rounded model's." in card


def test_the_held_out_loss_on_the_card_is_that_of_its_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert held_out_losses_at(8, metrics) == {}
    losses = {"eval_hard_loss": 4.5, "eval_soft_loss": 1.0, "eval_hard_loss.books": 5.5}
    rows = [{"step": 4, "loss": 9.0}, {"step": 4, **losses}, {"step": 8, "loss": 8.0}]
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert held_out_losses_at(4, metrics) == {"": 4.5, "books": 5.5}
    assert held_out_losses_at(8, metrics) == {}
    with open(metrics, "a") as file:
        file.write('{"step": 8, "eval_hard_loss": null}\n{"step": 12, "eval_hard_loss": 3.25}\n{"step": 16, "eval_h')
    assert held_out_losses_at(8, metrics) == {}
    assert held_out_losses_at(12, metrics) == {"": 3.25}


def test_the_export_of_a_student_with_flash_attention_is_for_every_machine(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = student(tokenizer)
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    model.config._attn_implementation = "flash_attention_2"
    write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)
    assert "flash" not in (tmp_path / "export" / "config.json").read_text()
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_student_whose_logits_are_large_is_exported(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain transformers takes another attention: its logits are as close as fp32 allows at their size, not 1e-4."""
    weights = trained_weights(model := student(tokenizer, hidden_size=32))
    weights["cls.predictions.transform.LayerNorm.weight"] *= 1e5
    for name in weights:
        if name.endswith(("query.weight", "key.weight")):
            weights[name] *= 20
    write_export(model, weights, tokenizer, "", tmp_path / "export", seq_len=32)


def test_a_student_whose_logits_are_not_finite_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    weights = trained_weights(model := student(tokenizer))
    huge = {name: 1e12 * tensor for name, tensor in weights.items()}
    with pytest.raises(NotFiniteError, match="weights are so large that logits are not finite; export an earlier"):
        write_export(model, huge, tokenizer, "", tmp_path / "export", seq_len=32)
    assert not list(tmp_path.iterdir())


def test_an_export_killed_at_its_very_end_is_whole_or_not_there(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = student(tokenizer), tmp_path / "export"
    weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
    write_export(model, weights, tokenizer, "first", folder, seq_len=32)
    plain = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if (Path(path) / "config.json").is_file():
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt
        plain(path, **options)

    monkeypatch.setattr(export.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_export(model, weights, tokenizer, "second", folder, seq_len=32)
    assert problems(folder) == []
    monkeypatch.undo()
    write_export(model, weights, tokenizer, "third", folder, seq_len=32)
    assert (folder / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
