"""`dwt-ds plan` on every packaged recipe, without data, teacher, GPU or other processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed
from harness.errors import Refusal
from harness.plans import plan
from harness.tiny import save_tiny_bert
from transformers import AutoTokenizer

from dwt_ds.config.recipe import recipe_names
from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student, parameter_count
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes

pytestmark = pytest.mark.usefixtures("empty_folder")
HALF = "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}"


def test_a_family_with_parameters_that_it_does_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    esm = ["student.family=esm", "student.config.token_dropout=true", "student.config.position_embedding_type=rotary"]
    assert "largest micro-batch" in plan(capsys, "quickstart", "teacher.path=null", *esm)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_packaged_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, recipe)
    assert "the paper's 30M sentences" in text
    for heading in ("settings that are not", "models", "batch and", "memory of a rank", "speed", "disk", "command"):
        assert f"\n{heading}" in text
    assert re.search(r"largest micro-batch +[\d,]+ +[\d,]+ +[\d,]+ +[\d,]+\n", text)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("recipe", "layers"), [("paper_weak", 4), ("paper_very_weak", 2), ("paper_extremely_weak", 1)])
def test_a_missing_teacher_has_the_shape_of_the_recipe_that_trains_it(recipe: str, layers: int) -> None:
    shapes = build_shapes(resolve_plan(recipe, [], None, 8))
    assert f"bert, {layers} x 768 (recipe paper_teacher_{layers} trains it)" in shapes.teacher_source
    with torch.device("meta"):
        alone = build_student(StudentConfig(layers=layers), vocab_size=30522, seq_len=128, pad_token_id=0)
    assert shapes.teacher_parameters == parameter_count(alone)


def test_an_existing_teacher_and_existing_data_are_read(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, str(tiny_recipe), "--gpu", "cpu")
    assert "bert, 1 x 16, from its config.json" in text
    assert "assumed" not in text.partition("models")[0]
    assert "4 rows x 1 accumulated x 2 ranks = 8 rows per step" in text


def test_arithmetic_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(
        capsys,
        "paper_teacher_1",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "train.gradient_accumulation_steps=3",
        "train.epochs=1",
    )
    # 16 x 3 x 8 rows; round(0.15 x 128) = 19 labels a row; 30M x 28.9 / 128 rows in the corpus
    assert "16 rows x 3 accumulated x 8 ranks = 384 rows per step, 49,152 tokens, 7,296 labels" in text
    assert "17,640 steps" in text
    assert "1 epochs of 6,773,437 rows" in text


def test_the_source_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "paper_remap", "student.init=stack")
    for layer, source in enumerate([0, 1, 2, 3, 0, 1]):
        assert f"student layer {layer} <- teacher layer {source}" in text


def test_quantization_is_shown_and_weights_stay_tied(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    text = plan(
        capsys,
        "paper_alone",
        "student.layers=2",
        "student.quantization={weight_bits: 4, modules: [encoder, embeddings, head]}",
    )
    assert "2 x 768, 38,635,578 parameters" in text
    assert re.search(r"rounding .*4", text)


def test_launch_command(capsys: pytest.CaptureFixture[str]) -> None:
    one = plan(capsys, "paper_teacher_1", "--gpus-per-node", "4", "--deepspeed_config", "zero1", "seed=3")
    run = "paper_teacher_1 seed=3 train.expected_world_size=4 --deepspeed_config zero1"
    assert f"  dwt-ds launch --ranks 4 {run}\n" in one
    assert f"  deepspeed --num_gpus 4 --module dwt_ds.pretrain {run}" in one
    assert "  dwt-ds launch --ranks 1 paper_weak_h100 " in plan(capsys, "paper_weak_h100")
    expected = plan(capsys, "paper_teacher_1", "train.expected_world_size=4", "--nodes", "2")
    assert expected.startswith("paper_teacher_1: 2 x 2 h100")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paper_weak", "--gpu", "h900"], "--gpu h900: unknown; use one of"),
        (["paper_weak", "--nodes", "0"], "--nodes 0: must be above 0, and finite"),
        (["paper_weak", "--mfu", "35"], "--mfu 35.0: must be above 0 and at most 1"),
        (["paper_weak", "--launch-us", "0"], "--launch-us 0.0: must be above 0, and finite"),
        (["paper_weak", "--launch-us", "inf"], "--launch-us inf: must be above 0, and finite"),
        (["paper_weak", "--network-gbps", "nan"], "--network-gbps nan: must be above 0, and finite"),
        (["paper_weak", "--release-at", "50"], "--release-at 50: must be at least 0 and at most 1"),
        (["paper_alone", "--release-at", "0.5"], "--release-at 0.5: there is no teacher to release; set teacher.path"),
        (
            ["paper_weak", "--release-at", "0.5", "teacher.release=never"],
            "--release-at 0.5: teacher.release=never keeps the teacher to the end; leave one out",
        ),
        (
            ["paper_weak", "--release-at", "0.6", "train.max_steps=1000", HALF],
            "--release-at 0.6: the soft weight's schedule releases the teacher after step 500 of 1,000; give less",
        ),
        (["paper_weak", "train.expected_world_size=16"], "there are 8 ranks"),
        (["paper_week"], "did you mean 'paper_weak'?"),
        (["paper_remap", "student.hidden_size=1024", "student.num_heads=16"], "hidden_size=1024"),
        (
            ["paper_weak", "student.quantization={start_step: 99999999}"],
            "start_step=99999999: the run has 1058350 steps",
        ),
        (["paper_weak", "--data", "nowhere"], "data folder nowhere does not exist"),
    ],
)
def test_mistakes(arguments: list[str], words: str, refusal: Refusal) -> None:
    assert words in refusal("plan", *arguments)


def test_a_teacher_that_cannot_read_the_rows(
    tiny_data: Path,
    tiny_recipe: Path,
    bpe_teacher: Path,
    tmp_path: Path,
    refusal: Refusal,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = refusal("plan", tiny_recipe, f"teacher.path={bpe_teacher}", "--gpu", "cpu")
    assert "its vocabulary of 500 tokens is not the 298 of the data folder" in other
    short = save_tiny_bert(AutoTokenizer.from_pretrained(tiny_data / "tokenizer"), tmp_path / "short", positions=16)
    words = f"teacher.path='{short}': the rows have 32 tokens, the model has positions for 16"
    assert words in refusal("plan", tiny_recipe, f"teacher.path={short}", "--gpu", "cpu")
    never_loaded = [f"teacher.path={bpe_teacher}", "distill.soft_weight=0", "--gpu", "cpu"]
    assert "ZeRO-2" in plan(capsys, str(tiny_recipe), *never_loaded)


@pytest.mark.parametrize("name", ["data #1", "2024", "'q'", "null", "[1]"])
def test_the_data_folder_is_the_one_that_was_named(
    name: str, tiny_data: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).symlink_to(tiny_data)
    assert f"{name}: " in plan(capsys, str(tiny_recipe), "--gpu", "cpu", "--data", name)
