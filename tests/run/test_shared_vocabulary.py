"""Runs with a teacher that has a vocabulary of its own: what they log, ZeRO-3, a resume, growth, other settings."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from harness.runs import assert_same_run, back_to, logged_rows, rows_of, values_of
from harness.tiny import TinyRun, save_tiny_bert

from dwt_ds.cli.main import main
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.train_tokenizer import train_tokenizer

LOSSES = ("loss", "hard_loss", "soft_loss", "shared_hard_loss", "soft_weight", "grad_norm", "aligned_share")
HELD_OUT = ("eval_hard_loss", "eval_soft_loss", "eval_shared_hard_loss")
SETTINGS = ["train.max_steps=4", "train.eval_every=2", "train.checkpoint_every=2", "train.keep_last=9"]


@pytest.mark.slow
def test_a_run_and_its_resume(tiny_run: TinyRun, bpe_teacher: Path, tmp_path: Path) -> None:
    """The student's embeddings are tied. Under ZeRO-3, with a sharded teacher, the losses are the same."""
    settings = [*SETTINGS, f"teacher.path={bpe_teacher}", "teacher.vocabulary=shared"]
    settings += ["student.init=fna", "student.num_heads=4", "train.gradient_accumulation_steps=2"]
    settings += ["distill.soft_weight={schedule: adaptive, start: 4, signal: gap}"]
    run, resumed, zero_3 = (tmp_path / name for name in ("run", "resumed", "zero_3"))
    output = tiny_run(run, *settings, ranks=2)
    for line in (
        "of the student's., held-out MLM loss [0-9.]+ on the shared entries, which get [0-9]+% of its probability;",
        "^shared vocabulary: 125 entries .43% of the student's, 25% of the teacher's.; 78% of the labelled tokens "
        "aligned; 1.27 of the teacher's tokens for one of the student's$",
        "^student.init=fna: the encoder's weights and the embeddings of 130 of the student's 298 entries are the",
        "held-out: hard [0-9.]+, soft [0-9.]+; on shared entries [0-9.]+, the teacher's [0-9.]+$",
    ):
        assert re.search(line, output, re.MULTILINE), output
    assert re.findall("^warning: (.*?),", output, re.MULTILINE) == ["the rows have no capitals and accents"]
    rows = rows_of(run)
    logged = logged_rows(run)
    for row in logged.values():
        assert row["loss"] == pytest.approx(row["hard_loss"] + row["soft_weight"] * row["soft_loss"], rel=1e-5)
        assert 0.5 < row["aligned_share"] < 1
        assert row["soft_loss"] > 0
        assert row["shared_hard_loss"] != row["hard_loss"]
    [*_, last] = [row for row in rows if "eval_hard_loss" in row]
    assert 0 < last["teacher_shared_mass"] < 1
    assert last["shared_entries"] == 125
    assert [last["aligned_share"], last["teacher_tokens_per_token"]] == pytest.approx([0.78, 1.27], abs=0.005)
    assert f"the teacher's {last['teacher_shared_hard_loss']:.4f}" in output
    width = 0.5  # of the adaptive weight's signal
    gap = (logged[1]["shared_hard_loss"] - last["teacher_shared_hard_loss"]) / width
    assert logged[2]["soft_weight"] == pytest.approx(4 * min(max(gap, 0), 1), rel=1e-5)
    card = (run / "export" / "README.md").read_text()
    assert len(re.findall(r"tokenizer \(sha256\) \| [0-9a-f]{64} \|", card)) == 2
    assert "on labelled positions and the entries that both vocabularies have; w:" in card

    back_to(2, run, resumed)
    again = tiny_run(resumed, *settings, ranks=2)
    assert "vocabulary:" not in again.replace("shared vocabulary:", "")
    assert_same_run(resumed, run)

    tiny_run(zero_3, *settings, "deepspeed.zero_optimization.stage=3", "teacher.sharded=true", ranks=2)
    expected, found = (values_of(each, *LOSSES, *HELD_OUT) for each in (run, zero_3))
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-5)


@pytest.mark.slow
def test_another_setting_of_the_vocabulary_is_reported(tiny_run: TinyRun, tmp_path: Path) -> None:
    """What was measured and averaged before is of other entries, and begins anew."""
    settings = [*SETTINGS, "distill.soft_weight={schedule: adaptive, start: 4, signal: gap}"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    tiny_run(run, *settings)
    keys = {key for row in rows_of(run) for key in row}
    assert not {"aligned_share", "shared_hard_loss", "teacher_shared_mass"} & keys
    checkpoint = back_to(2, run, resumed)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert not {"teacher_tokenizer"} & set(manifest)
    assert "teacher_mass" not in manifest["state"]
    output = tiny_run(resumed, *settings, "teacher.vocabulary=shared")
    assert "changed since that checkpoint: teacher.vocabulary: same -> shared" in output
    assert "on the shared entries" in output
    assert logged_rows(resumed)[3]["soft_weight"] == 4.0


@pytest.mark.slow
def test_after_its_release_nothing_is_left_of_the_teacher(tiny_run: TinyRun, bpe_teacher: Path, tmp_path: Path) -> None:
    """The run goes on, and resumes without the teacher's folder, to the bit."""
    folder = shutil.copytree(bpe_teacher, tmp_path / "teacher")
    settings = [*SETTINGS, f"teacher.path={folder}", "teacher.vocabulary=shared", "distill.hidden_weight=0.5"]
    settings += ["train.max_steps=6", "distill.soft_weight={schedule: linear, start: 4, end: 0, span: 0.5}"]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    assert "step 3/6  teacher released" in tiny_run(run, *settings)
    shares = [row["step"] for row in rows_of(run) if any("share" in key and "wait" not in key for key in row)]
    assert shares == [1, 2, 2, 3]
    folder.rename(tmp_path / "gone")
    back_to(4, run, resumed)
    tiny_run(resumed, *settings)
    assert_same_run(resumed, run)
    of_teacher = [
        line for line in (run / "export" / "README.md").read_text().splitlines() if line.startswith("| teacher")
    ]
    assert len(of_teacher) == 3
    assert all(line in (resumed / "export" / "README.md").read_text() for line in of_teacher)


def text_of(language: str, tiny_text: Path) -> list[str]:
    """Documents: `tiny_text` with capitals, or Chinese of invented words."""
    if language == "latin":
        documents = tiny_text.read_text(encoding="utf-8").split("\n\n")
        return [
            " ".join(f"{s.strip().capitalize()} ." for s in document.split(".") if s.strip()) for document in documents
        ]
    draw = random.Random(3)
    words = ["".join(chr(0x4E00 + draw.randrange(150)) for _ in range(draw.randint(1, 3))) for _ in range(300)]
    return ["".join("".join(draw.choices(words, k=9)) + "。" for _ in range(5)) for _ in range(120)]


PAIRS = {
    "cased to uncased": ("latin", ("wordpiece", 400, "--cased"), (300, "wordpiece", Wishes())),
    "small to large": ("latin", ("wordpiece", 150, "--uncased"), (700, "bpe", Wishes())),
    "Unigram to WordPiece": ("latin", ("unigram", 300, "--uncased"), (400, "wordpiece", Wishes())),
    "Chinese characters to byte-level BPE": ("chinese", ("characters", 400, "--uncased"), (700, "bpe", Wishes())),
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_of_pair_trains(pair: str, tiny_run: TinyRun, tiny_text: Path, tmp_path: Path) -> None:
    """From the data folder to the export; what is aligned is more than nothing."""
    language, (kind, entries, case), theirs = PAIRS[pair]
    text = text_of(language, tiny_text)
    file, data, run = tmp_path / "text.txt", tmp_path / "data", tmp_path / "run"
    file.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    arguments = f"prepare --text {file} --train-tokenizer {entries} --kind {kind} {case} --out {data} --seq-len 32"
    assert main([*arguments.split(), "--validation", "0.1", "--workers", "1"]) == 0
    tokenizer = train_tokenizer(text[: len(text) // 2], *theirs)
    teacher = save_tiny_bert(tokenizer, tmp_path / "teacher", positions=64)
    settings = [f"data.dir={data}", f"teacher.path={teacher}", "teacher.vocabulary=shared", "train.max_steps=2"]
    tiny_run(run, *settings)
    assert all(row["aligned_share"] > 0 and row["soft_loss"] > 0 for row in logged_rows(run).values())
    assert 0 < rows_of(run)[-1]["teacher_shared_mass"] < 1
    assert (run / "export" / "model.safetensors").is_file()
