"""A teacher with a vocabulary of its own, as a run and its plan see it; the teacher here is never built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig

from dwt_ds.config.schema import RunConfig, TeacherConfig
from dwt_ds.data.overlap import Overlap
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.teacher_rows import TeacherTokens
from dwt_ds.models.flops import forward_flops, teacher_width, work_of_a_row
from dwt_ds.plan.hardware import find_device
from dwt_ds.plan.memory import TEACHER
from dwt_ds.plan.plan import Plan
from dwt_ds.plan.report import report
from dwt_ds.plan.settings import resolve_plan
from dwt_ds.plan.shapes import build_shapes
from dwt_ds.prepare.case_and_accents import Wishes
from dwt_ds.prepare.train_tokenizer import train_tokenizer
from dwt_ds.run.models import check_initial_weights
from dwt_ds.run.other_vocabulary import OtherVocabulary, overlap_lines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """The folder of a 2 x 24 BERT without weights; a byte-level BPE of half the text."""
    text = tiny_text.read_text(encoding="utf-8").split("\n")
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(text[: len(text) // 2], 500, "bpe", Wishes(cased=False, keep_accents=False))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(tokenizer) + 3, max_position_embeddings=64, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(teacher: Path, tiny_data: Path) -> OtherVocabulary:
    config = TeacherConfig(path=str(teacher), vocabulary="shared")
    found = OtherVocabulary.load(config, PreparedData.open(tiny_data).tokenizer())
    assert found is not None
    return found


def test_entries_to_grow_from_mean_the_same(other: OtherVocabulary, tiny_data: Path) -> None:
    """`the` is `Ġthe`; special tokens go by their role."""
    ours = PreparedData.open(tiny_data).tokenizer().get_vocab()
    theirs = {index: entry for entry, index in other._teacher.get_vocab().items()}
    entries = other.entries_to_grow_from().tolist()
    assert theirs[entries[ours["the"]]] == "Ġthe"
    assert theirs[entries[ours["."]]] == "."
    for role in ("mask_token", "sep_token", "cls_token", "pad_token"):
        assert theirs[entries[ours[getattr(other._student, role)]]] == getattr(other._teacher, role)
    assert sum(each >= 0 for each in entries) == len(other.shared.student_ids) + 5
    assert len({each for each in entries if each >= 0}) == len(other.shared.student_ids) + 5


def test_a_decoder_with_fewer_rows_than_tokens_is_refused(other: OtherVocabulary) -> None:
    other.check_decoder(other.size)
    with pytest.raises(ValueError, match=f"decoder has 9 rows for a vocabulary of {other.size}"):
        other.check_decoder(9)


def test_mistakes_name_the_setting_in_one_line(teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    student = PreparedData.open(tiny_data).tokenizer()

    def error(path: Path) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            OtherVocabulary.load(TeacherConfig(path=str(path), vocabulary="shared"), student)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert error(tmp_path / "none").startswith("teacher.path: model path ")
    shutil.copy(teacher / "config.json", tmp_path)
    assert (
        error(tmp_path)
        == f"teacher.path: tokenizer path {str(tmp_path)!r} holds no tokenizer; copy its tokenizer files there"
    )
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfreilich\n")
    assert error(tmp_path).startswith(
        "teacher.vocabulary=shared: the teacher's vocabulary and that of the data folder have no"
    )


def test_growth_from_another_vocabulary_has_to_be_asked_for(teacher: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    """Even where the soft weight is 0, so that the teacher itself is never loaded: its rows would mean other tokens."""
    settings = [f"teacher.path={teacher}", "student.init=fna", "student.num_heads=2", "student.hidden_size=24"]
    settings += ["student.intermediate_size=32", "student.max_positions=64", "distill.soft_weight=0"]
    tokenizer = PreparedData.open(tiny_data).tokenizer()
    with pytest.raises(ValueError, match="^teacher.path: its vocabulary of .* or set teacher.vocabulary=shared"):
        check_initial_weights(resolve_plan(str(tiny_recipe), settings, None, 1), tokenizer)
    check_initial_weights(resolve_plan(str(tiny_recipe), [*settings, "teacher.vocabulary=shared"], None, 1), tokenizer)


def test_little_overlap_is_a_warning(other: OtherVocabulary, tiny_data: Path) -> None:
    measured = Overlap.measure(other.tokens, PreparedData.open(tiny_data), RunConfig().data)
    assert measured.entries == len(other.shared.student_ids)
    assert 0.5 < measured.aligned_share < 1
    assert 1 < measured.teacher_tokens < 2
    assert len(list(overlap_lines(other, measured))) == 1
    [_, warning] = overlap_lines(other, Overlap(10, 0.299, 1.0))
    assert warning.startswith("warning: only 30% of the labelled tokens are aligned")
    assert len(list(overlap_lines(other, Overlap(10, 0.3, 1.0)))) == 1


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (Wishes(cased=True, keep_accents=False), "capitals"),
        (Wishes(cased=False, keep_accents=True), "accents"),
        (Wishes(cased=True, keep_accents=True), "capitals and accents"),
    ],
)
def test_a_teacher_that_misses_capitals_or_accents_is_a_warning(
    kept: Wishes, lost: str, tiny_data: Path, tiny_text: Path
) -> None:
    rows = PreparedData.open(tiny_data).tokenizer()
    theirs = train_tokenizer(tiny_text.read_text(encoding="utf-8").split("\n"), 500, "bpe", kept)
    other = OtherVocabulary(TeacherTokens.of(rows, theirs, None), None, rows, theirs)
    [_, warning] = overlap_lines(other, Overlap(10, 0.5, 1.0))
    assert warning.startswith(f"warning: the rows have no {lost}, which the teacher's tokenizer keeps")
    # The other way round, the teacher drops what the rows have, as it always did.
    other = OtherVocabulary(TeacherTokens.of(theirs, rows, None), None, theirs, rows)
    assert len(list(overlap_lines(other, Overlap(10, 0.5, 1.0)))) == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_a_plan_counts_both_heads_and_longer_rows(
    sharded: bool, teacher: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    content["teacher"] = {"path": str(teacher), "vocabulary": "shared", "sharded": sharded}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    settings = resolve_plan(str(recipe), [], None, 2)
    shapes = build_shapes(settings)
    plan = Plan(settings, shapes, find_device("cpu", 2), 1)
    overlap, labels = shapes.overlap, settings.positions_per_row
    assert overlap is not None
    assert shapes.teacher is not None
    aligned, width = round(overlap.aligned_share * labels), round(overlap.teacher_tokens * settings.corpus.seq_len)
    assert plan.work.teacher_forward == (
        forward_flops(shapes.teacher, width, aligned, overlap.entries) + 3 * 2 * aligned * overlap.entries * 32
    )
    assert plan.work.student_forward == forward_flops(shapes.student, 32, labels, settings.corpus.vocab_size)
    size = 4  # fp32
    weights = sum(parameter.numel() for parameter in shapes.teacher.parameters())
    if not sharded:
        buffers = plan.simulator.teacher_bytes() - size * (weights + overlap.entries * (24 + 1))
        assert 0 <= buffers < 2000
    assert plan.memory(2).most[TEACHER] < 1.3 * size * (weights + overlap.entries * 25) + 40_000
    shown = report(plan, [], None, str(recipe))
    assert f"shared   {overlap.entries} entries of both vocabularies, " in shown
    assert "(on rows of the data folder)" in shown


def test_a_plan_without_the_teacher_takes_everything_to_be_shared(tiny_recipe: Path) -> None:
    settings = resolve_plan(str(tiny_recipe), ["teacher.path=runs/none/export", "teacher.vocabulary=shared"], None, 1)
    shapes = build_shapes(settings)
    assert shapes.overlap == Overlap(settings.corpus.vocab_size, 1.0, 1.0)
    assert shapes.overlap_source.startswith("assumed")


def test_no_row_is_longer_than_the_teacher_can_read(teacher: Path, tiny_recipe: Path) -> None:
    settings = resolve_plan(str(tiny_recipe), [f"teacher.path={teacher}", "teacher.vocabulary=shared"], None, 1)
    shapes = build_shapes(settings)
    assert shapes.teacher is not None
    long = Overlap(5, 0.5, 9.0)
    assert teacher_width(shapes.teacher, long, 32) == 64
    work_of_a_row(shapes.student, shapes.teacher, seq_len=32, labels=4, vocab_size=298, overlap=long)
