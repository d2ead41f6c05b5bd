"""`dwt-ds glue` as a user types it: tiny real fine-tunings, resumption, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness import languages
from harness.languages import WITH_SPECIAL, with_roles
from transformers import RobertaConfig, RobertaForMaskedLM

from dwt_ds.base.locks import FolderLock
from dwt_ds.cli import main as command
from dwt_ds.glue import finetune, run
from dwt_ds.glue.reading import FIRST, SECOND
from dwt_ds.glue.tasks import SEVEN

Glue = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scores"


@pytest.fixture
def glue(checkpoint: Path, glue_dir: Path, out: Path) -> Glue:
    """Runs the command on the tiny checkpoint and rows, with more options."""

    def call(*words: object, model: Path = checkpoint, folder: Path = glue_dir) -> int:
        fixed = ["glue", "--model", model, "--glue-dir", folder, "--out", out]
        return command.main([str(word) for word in (*fixed, *words)])

    return call


@pytest.fixture
def refused(glue: Glue, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*words)`: the one-line error of the command."""

    def call(*words: object, **where: Path) -> str:
        capsys.readouterr()
        assert glue(*words, **where) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces the fine-tuning; the (task, seed) pairs that were to be run."""
    pairs: list[tuple[str, int]] = []

    def pretend(checkpoint: Any, task: Any, data: Any, seed: int, settings: Any) -> dict[str, Any]:
        pairs.append((task.name, seed))
        if (task.name, seed) == ("RTE", 7):
            raise ValueError("RTE: diverged")
        score = 50.0 + seed + SEVEN.index(task.name) if task.name in SEVEN else 10.0
        metrics = [dict.fromkeys(task.metrics, score) for _ in data.validation]
        facts = {"train_rows": len(data.train.rows), "steps": 3, "seconds": 0.1, "device": "none"}
        return {"score": score, "metrics": metrics, **facts}

    monkeypatch.setattr(run, "fine_tune", pretend)
    monkeypatch.setattr(run, "visible_gpus", list)
    return pairs


def results_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text()))


def test_a_tiny_model_learns_one_sentence_pairs_and_scores(
    glue: Glue, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--seeds", 1, "--learning-rate", 5e-3, "--epochs", 8, "--batch-size", 16)
    assert glue("--tasks", "sst2,MNLI,STS-B", *small) == 0
    results = results_of(out)
    assert list(results["tasks"]) == ["MNLI", "SST-2", "STS-B"]
    for name in ("SST-2", "MNLI", "STS-B"):
        assert results["tasks"][name]["score"]["mean"] > 90, name
    matched, mismatched = results["tasks"]["MNLI"]["validation"]
    assert (matched["file"], mismatched["file"]) == ("dev_matched.tsv", "dev_mismatched.tsv")
    assert (matched["rows"], mismatched["rows"]) == (42, 27)
    assert matched["is_glue_dev"] is False
    train = results["tasks"]["SST-2"]["train"]
    assert (train["rows_used"], train["official_rows"], train["steps"]) == (160, 67_349, 80)
    assert results["settings"]["max_length"] == 40
    assert results["mean_of_seven"]["mean"] is None
    assert results["mean_of_seven"]["missing"] == ["QQP", "QNLI", "CoLA", "MRPC"]
    printed = capsys.readouterr().out
    assert "dev.tsv (not GLUE dev, 40 rows)" in printed
    assert "160 of 67,349 rows, 80 steps" in printed
    assert "mean of the seven tasks: none (no score of QQP, QNLI, CoLA, MRPC)" in printed


def test_a_roberta_with_one_token_type_and_a_wordpiece_tokenizer(
    glue: Glue, out: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "roberta"))  # its tokenizer gives token types 0 and 1
    config = RobertaConfig.from_pretrained(model, type_vocab_size=1, max_position_embeddings=41, pad_token_id=0)
    RobertaForMaskedLM(config).save_pretrained(model)
    assert glue("--tasks", "RTE", "--seeds", 1, "--max-steps", 1, model=model) == 0
    assert results_of(out)["failed"] == []


def test_spoiled_rows_are_printed(
    glue: Glue, out: Path, glue_dir: Path, tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(glue_dir, tmp_path / "glue"))
    rows = [f"{n}\t1\t2\twhy ?\thow ?\t{n % 2}" for n in range(1000)] + ['x\t1\t2\t"why ?\thow ?\t1']
    (folder / "QQP" / "train.tsv").write_text(
        "\n".join(["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", *rows]) + "\n"
    )
    assert glue("--tasks", "QQP", "--seeds", 1, folder=folder) == 0
    assert "QQP, train.tsv: 1 of 1,001 rows left out (a stray tab or quote)" in capsys.readouterr().out
    assert results_of(out)["tasks"]["QQP"]["train"]["left_out"] == 1


def test_small_budgets_and_seeds(glue: Glue, out: Path) -> None:
    assert glue("--tasks", "CoLA,RTE", "--seeds", 2, "--max-steps", 2, "--max-train-rows", 48) == 0
    results = results_of(out)
    assert results["settings"]["max_steps"] == 2
    assert results["settings"]["max_train_rows"] == 48
    for task in results["tasks"].values():
        assert (task["train"]["steps"], task["train"]["rows_used"], task["train"]["rows"]) == (2, 48, 160)
        assert list(task["score"]["by_seed"]) == ["0", "1"]
        assert task["score"]["std"] is not None
    pair = json.loads((out / "pairs" / "RTE" / "seed_1.json").read_text())
    assert pair["score"] == results["tasks"]["RTE"]["score"]["by_seed"]["1"]


def test_a_quantized_model_is_trained_the_same_and_scored_rounded(
    glue: Glue, refused: Callable[..., str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    seen: list[int] = []

    def round_weights(model: Any) -> None:
        real_round_weights(model)
        layer = model.base_model.encoder.layer[0].output.dense.weight
        seen.append(max(len(channel.unique()) for channel in layer))

    real_round_weights = finetune.round_weights
    monkeypatch.setattr(finetune, "round_weights", round_weights)
    assert glue("--tasks", "SST-2", "--seeds", 1, "--max-steps", 2, "--quantize", "w4a8") == 0
    assert seen == [16]  # of 64 inputs
    assert results_of(out)["settings"]["quantize"] == "w4a8"
    for other, now in ((("--quantize", "w8a8"), "w8a8"), ((), "None")):
        error = refused("--tasks", "SST-2", "--seeds", 1, "--max-steps", 2, *other)
        assert f"was made with quantize = w4a8, now it is {now}; choose another --out" in error


def test_a_pair_repeats_exactly(glue: Glue, out: Path) -> None:
    few = ("--tasks", "QNLI", "--seeds", 2, "--max-steps", 4, "--learning-rate", 1e-3)
    first, second = [], []
    for metrics in (first, second):
        assert glue(*few) == 0
        metrics += [json.loads(path.read_text())["metrics"] for path in sorted(out.glob("pairs/QNLI/*.json"))]
        shutil.rmtree(out)
    assert first == second


def test_a_seed_draws_the_new_head(glue: Glue, out: Path) -> None:
    # The weights do not move, so only the head's first ones can tell the scores apart.
    assert glue("--tasks", "STS-B", "--seeds", 2, "--max-steps", 1, "--learning-rate", 1e-12) == 0
    first, second = results_of(out)["tasks"]["STS-B"]["score"]["by_seed"].values()
    assert first != pytest.approx(second)


def test_defaults_are_the_papers(glue: Glue, out: Path, trained: list[tuple[str, int]]) -> None:
    assert glue() == 0
    assert trained == [(task, seed) for task in SEVEN for seed in range(3)]
    results = results_of(out)
    assert results["settings"]["learning_rate"] == 2e-5
    assert results["settings"]["batch_size"] == 32
    assert {name: task["train"]["epochs"] for name, task in results["tasks"].items()} == {
        name: 5 if name == "MRPC" else 3 for name in SEVEN
    }


def test_mean_of_seven_and_its_spread(glue: Glue, out: Path, trained: list[tuple[str, int]]) -> None:
    assert glue("--tasks", ",".join([*SEVEN, "RTE"]), "--seeds", 3) == 0
    mean = results_of(out)["mean_of_seven"]
    # Scores are 50 + seed + the task's place among the seven.
    assert mean["by_seed"] == {"0": 53.0, "1": 54.0, "2": 55.0}
    assert (mean["mean"], mean["std"]) == (54.0, 1.0)
    assert mean["is_glue_dev"] is False
    assert (mean["tasks"], mean["missing"]) == (list(SEVEN), [])


def test_finished_pairs_are_not_run_again(glue: Glue, out: Path, trained: list[tuple[str, int]]) -> None:
    assert glue("--tasks", "MRPC", "--seeds", 2) == 0
    assert trained == [("MRPC", 0), ("MRPC", 1)]
    trained.clear()
    assert glue("--tasks", "MRPC,CoLA", "--seeds", 3) == 0
    assert trained == [("CoLA", 0), ("CoLA", 1), ("CoLA", 2), ("MRPC", 2)]
    assert list(results_of(out)["tasks"]["MRPC"]["score"]["by_seed"]) == ["0", "1", "2"]
    trained.clear()
    assert glue("--tasks", "MRPC,CoLA", "--seeds", 3) == 0
    assert trained == []


def test_a_failed_pair_does_not_end_the_others(
    glue: Glue, out: Path, trained: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert glue("--tasks", "RTE,WNLI", "--seeds", 9) == 1
    assert len(trained) == 18
    results = results_of(out)
    assert results["failed"] == [{"task": "RTE", "seed": 7, "error": "RTE: diverged"}]
    assert "7" not in results["tasks"]["RTE"]["score"]["by_seed"]
    assert "RTE, seed 7: failed: RTE: diverged" in capsys.readouterr().out
    trained.clear()
    assert glue("--tasks", "RTE,WNLI", "--seeds", 9) == 1
    assert trained == [("RTE", 7)]


def test_results_of_other_settings_data_or_model_are_not_taken(
    glue: Glue,
    refused: Callable[..., str],
    out: Path,
    tmp_path: Path,
    checkpoint: Path,
    glue_dir: Path,
    trained: list[tuple[str, int]],
) -> None:
    only = ("--tasks", "CoLA", "--seeds", 1)
    assert glue(*only) == 0
    other_model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (other_model / "README.md").write_text("a card")
    other_data = Path(shutil.copytree(glue_dir, tmp_path / "glue"))
    assert glue(*only, model=other_model, folder=other_data) == 0  # copies are the same
    with open(other_data / "CoLA" / "dev.tsv", "a") as file:
        file.write("gj04\t1\t\tthe film\n")
    (other_model / "tokenizer_config.json").write_text("{}")
    faster = refused(*only, "--learning-rate", "3e-5")
    assert "learning_rate = 2e-05, now it is 3e-05; choose another --out" in faster
    assert "max_steps = None, now it is 9" in refused(*only, "--max-steps", 9)
    assert "validation[0].rows = 40, now it is 41" in refused(*only, folder=other_data)
    assert "model = " in refused(*only, model=other_model)
    (out / "pairs" / "CoLA" / "seed_0.json").write_text('{"score": 99}')
    assert "not a result of dwt-ds glue; delete it" in refused(*only)
    assert trained == [("CoLA", 0)]


def _without_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    (model / "vocab.txt").unlink()


def _with_too_small_an_embedding(model: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(small).save_pretrained(model)


def _with(**changed: int) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changed))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_tokenizer, "holds no tokenizer"),
        (_with_too_small_an_embedding, "its tokenizer has 18 tokens, its embedding 12 rows"),
        (_with(vocab_size=30_522), "its tokenizer has 18 tokens, its embedding 30,522 rows"),
        (_with(num_hidden_layers=2), "it lacks 16 weights of its encoder, first bert.encoder.layer.1."),
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), "error: --model"),
        (lambda model: (model / "config.json").unlink(), "config.json"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_checkpoints_that_do_not_fit(
    refused: Callable[..., str],
    out: Path,
    tmp_path: Path,
    checkpoint: Path,
    trained: list[tuple[str, int]],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    spoil(model)
    assert message in refused("--tasks", "CoLA", model=model)
    assert trained == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "CoLa,SST"), "--tasks: 'SST' is not a task of GLUE; did you mean 'SST-2'?"),
        (("--tasks", ","), "--tasks is empty"),
        (("--seeds", "0"), "--seeds=0: must be above 0"),
        (("--learning-rate", "-1"), "--learning-rate=-1.0: must be above 0"),
        (("--max-steps", "0"), "--max-steps=0: must be above 0"),
        (("--max-length", "64"), "tokens; lower --max-length to "),
        (("--precision", "bf16"), "--precision=bf16: there is no GPU; use fp32"),
    ],
)
def test_wrong_options(
    refused: Callable[..., str], trained: list[tuple[str, int]], words: tuple[str, str], message: str
) -> None:
    assert message in refused(*words)
    assert trained == []


def test_what_is_not_installed_is_named(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwt_ds.glue.options.find_spec", lambda name: None if name == "sklearn" else object())
    assert refused() == "error: dwt-ds glue needs scikit-learn; pip install 'dwt-ds[study]'\n"


def test_all_files_are_read_before_the_first_training(
    refused: Callable[..., str], tmp_path: Path, glue_dir: Path, trained: list[tuple[str, int]]
) -> None:
    folder = Path(shutil.copytree(glue_dir, tmp_path / "glue"))
    (folder / "MRPC" / "dev.tsv").unlink()
    assert "MRPC/dev.tsv: no such file" in refused(folder=folder)
    assert trained == []


@pytest.mark.slow
def test_two_workers_give_what_one_gives(glue: Glue, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--tasks", "RTE,CoLA", "--seeds", 2, "--max-steps", 3)
    assert glue(*few) == 0
    alone = results_of(out)["tasks"]
    shutil.rmtree(out)
    monkeypatch.setattr(run, "visible_gpus", lambda: ["", ""])  # two workers, each without a GPU
    assert glue(*few) == 0
    together = results_of(out)["tasks"]
    for task in ("RTE", "CoLA"):
        assert together[task]["score"]["by_seed"] == pytest.approx(alone[task]["score"]["by_seed"])


def test_a_second_command_in_the_folder_and_a_results_file_of_somebody_elses_are_refused(
    refused: Callable[..., str], out: Path, trained: list[tuple[str, int]]
) -> None:
    with FolderLock(out, "here"):
        assert f"error: --out {out}: this process" in refused("--tasks", "RTE")
    out.mkdir(exist_ok=True)
    for mine in ('{"mine": 1}', "not JSON"):
        (out / "results.json").write_text(mine)
        assert "results.json is not a result of dwt-ds glue; rename it" in refused("--tasks", "RTE")
        assert (out / "results.json").read_text() == mine
    assert not trained


def test_names_of_special_tokens_in_a_sentence_are_text() -> None:
    tokenizer = with_roles(languages.trained("byte-level BPE"))
    rows = datasets.Dataset.from_dict({FIRST: [WITH_SPECIAL], SECOND: ["Here </s> ends."]})
    [ids] = finetune._tokenized(rows, tokenizer, 512)["input_ids"]
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.sep_token_id not in ids  # this tokenizer adds none by itself
