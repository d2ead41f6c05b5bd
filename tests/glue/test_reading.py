"""Reading GLUE's own layouts, other names from files.json, what is wrong with a file; and the hub's form of GLUE."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness.errors import error_of

from dwt_ds.glue.reading import FIRST, LABEL, SECOND, Split, TaskData, read_hub, read_task
from dwt_ds.glue.tasks import TASKS, Task, find_task

HEADERS = {
    "SST-2": "sentence\tlabel",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
}


def task_of(name: str) -> Task:
    return find_task(name, "task")


def read(folder: Path, name: str) -> TaskData:
    return read_task(task_of(name), folder)


@pytest.fixture
def own(tmp_path: Path, glue_dir: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(glue_dir, tmp_path / "glue"))


def rows_of(folder: Path, name: str, content: str | bytes) -> Split:
    """The training rows of a file with this content."""
    path = folder / name / "train.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(folder, name).train


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_layout(task: Task, glue_dir: Path) -> None:
    data = read_task(task, glue_dir)
    assert len(data.train.rows) == 160
    columns = [FIRST, LABEL] if len(task.sentences) == 1 else [FIRST, SECOND, LABEL]
    assert data.train.rows.column_names == columns
    clues = {"dull": 0, "great": 1} if task.labels[:1] == ("0",) else {"great": 0, "plain": 1, "dull": 2}
    clues = {"great": 0, "dull": 1} if task.labels == ("entailment", "not_entailment") else clues
    clues = {"great": 5.0, "dull": 0.0} if task.is_regression else clues
    for row in data.train.rows:
        clue = next(word for word in row[columns[-2]].split() if word in clues)
        assert row[LABEL] == clues[clue]
        assert '"' not in row[FIRST]
    sizes = [(split.split, split.file, len(split.rows)) for split in data.validation]
    if task.name == "MNLI":
        assert sizes == [
            ("validation_matched", "dev_matched.tsv", 42),
            ("validation_mismatched", "dev_mismatched.tsv", 27),
        ]
    else:
        assert sizes == [("validation", "dev.tsv", 40)]


def test_a_quote_is_a_character_outside_qqp(own: Path) -> None:
    lines = [HEADERS["QNLI"], '0\tWho?\t" He did, she said.\tentailment', '1\tWhat "war"?\t"a"b\\n"\tnot_entailment']
    rows = rows_of(own, "QNLI", "\n".join(lines) + "\n").rows
    assert rows[SECOND] == ['" He did, she said.', '"a"b\\n"']
    assert rows[FIRST] == ["Who?", 'What "war"?']


def test_quotes_in_qqp_are_undone_and_may_hold_line_ends(own: Path) -> None:
    lines = [HEADERS["QQP"], '0\t1\t2\t"What does ""otoke"" mean?"\tIs it "so"?\t1', '1\t3\t4\t"Two\nlines"\tOne\t0']
    split = rows_of(own, "QQP", "\n".join(lines) + "\n")
    assert split.rows[FIRST] == ['What does "otoke" mean?', "Two\nlines"]
    assert split.rows[SECOND] == ['Is it "so"?', "One"]
    assert split.left_out == 0


def test_qqp_may_hold_a_spoiled_row_in_a_thousand(own: Path) -> None:
    good = [f"{n}\t1\t2\tHow?\tWhy?\t0" for n in range(1000)]
    split = rows_of(own, "QQP", "\n".join([HEADERS["QQP"], "x\t1\t2\tHow\t?\tWhy?\t0", *good]))
    assert len(split.rows) == 1000
    assert split.facts()["left_out"] == 1
    with pytest.raises(ValueError, match=r"train.tsv:2: 7 columns, not 6, and 1 such rows in all"):
        rows_of(own, "QQP", "\n".join([HEADERS["QQP"], "x\t1\t2\tHow\t?\tWhy?\t0", *good[:900]]))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("unclosed", "closing"),
    [
        ('"why ?\thow ?', '"how" is that ?\twhy ?'),  # the row that closes it has too few fields then
        ('"why ?\thow ?', 'who said "so" ?\twhy ?'),  # and here the right number
        ('why ?\t"how ?', 'why "?\thow ?'),
        ('"why ?\thow ?', "why ?\thow ?"),  # nothing closes it
        ('"why ""so"" ?\thow ?', 'why ?\t"how\nnow" ?'),
    ],
)
def test_a_quote_that_qqp_does_not_close_spoils_its_own_row_only(
    own: Path, unclosed: str, closing: str, end: str
) -> None:
    rows = [f"{n}\t1\t2\twhy {n} ?\thow {n} ?\t{n % 2}" for n in range(3000)]
    rows[100] = f"100\t1\t2\t{unclosed}\t1"
    rows[900] = f"900\t1\t2\t{closing}\t0"
    split = rows_of(own, "QQP", end.join([HEADERS["QQP"], *rows]) + end)
    assert (len(split.rows), split.left_out) == (2999, 1)
    expected = [f"why {n} ?" for n in range(3000) if n not in (100, 900)]
    assert [text for text in split.rows[FIRST] if text in set(expected)] == expected


def test_too_many_unclosed_quotes_are_an_error_with_their_line(own: Path) -> None:
    rows = [f'{n}\t1\t2\t"why {n} ?\thow ?\t0' for n in range(50)]
    with pytest.raises(ValueError, match=r"train.tsv:2: an unclosed quote, and 50 such rows in all"):
        rows_of(own, "QQP", "\n".join([HEADERS["QQP"], *rows, "x\t1\t2\twhy ?\thow ?\t0"]))
    huge = "x" * 200_000
    with pytest.raises(ValueError, match=r"train.tsv:2: an unclosed quote"):
        rows_of(own, "QQP", f"{HEADERS['QQP']}\n1\t1\t2\t{huge}\thow ?\t0\n2\t1\t2\twhy ?\thow ?\t0\n")
    with pytest.raises(ValueError, match=r"train.tsv: 'utf-8' codec"):
        rows_of(own, "QQP", f"{HEADERS['QQP']}\n".encode() + b"1\t1\t2\tcaf\xe9\thow ?\t0\n")


def test_byte_order_mark_carriage_returns_and_no_last_line_end(own: Path) -> None:
    rows = rows_of(own, "SST-2", b"\xef\xbb\xbfsentence\tlabel\r\nun \xe2\x80\xa8 film\t1\r\ndull\t0").rows
    assert rows[FIRST] == ["un \u2028 film", "dull"]
    assert rows[LABEL] == [1, 0]


def test_columns_are_found_by_name(own: Path) -> None:
    rows = rows_of(own, "MNLI", "gold_label\tsentence2\tsentence1\nneutral\tb\ta\n").rows
    assert rows[0] == {FIRST: "a", SECOND: "b", LABEL: 1}


def test_only_glues_own_name_and_number_of_rows_make_its_dev_set(own: Path) -> None:
    official = "\n".join(["index\tsentence1\tsentence2\tlabel", *(f"{n}\ta\tb\t0" for n in range(71))])
    (own / "WNLI" / "dev.tsv").write_text(official)
    shutil.copy(own / "WNLI" / "dev.tsv", own / "WNLI" / "holdout.tsv")
    assert read(own, "WNLI").validation[0].is_official
    assert not read(own, "WNLI").train.is_official
    assert not read(own, "RTE").validation[0].is_official  # the name, but not the rows
    (own / "files.json").write_text(json.dumps({"wnli": {"validation": "holdout.tsv"}}))
    (split,) = read(own, "WNLI").validation
    assert (split.file, len(split.rows), split.is_official) == ("holdout.tsv", 71, False)


def test_files_json(own: Path) -> None:
    (own / "MNLI" / "train_9k.tsv").write_text("sentence1\tsentence2\tgold_label\na\tb\tneutral\n")
    names = {"train": "train_9k.tsv", "validation": "dev_matched.tsv", "note": "free text"}
    (own / "files.json").write_text(json.dumps({"MNLI": names}))
    data = read(own, "MNLI")
    assert len(data.train.rows) == 1
    assert [split.file for split in data.validation] == ["dev_matched.tsv"]
    assert len(read(own, "CoLA").train.rows) == 160


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "files.json: not valid JSON"),
        ("[]", "files.json: must look like"),
        ('{"QNLY": {}}', "'QNLY' is not a task of GLUE; did you mean 'QNLI'"),
        ('{"QNLI": {"validaton": "x.tsv"}}', "unknown key 'validaton'; did you mean 'validation'"),
        ('{"RTE": {"validation_matched": "x.tsv"}}', "RTE has an unknown key 'validation_matched'"),
        ('{"MNLI": {"validation": "x", "validation_matched": "y"}}', "has both validation and validation_matched"),
        ('{"QNLI": {"train": 3}}', "QNLI.train=3: must be the name of a file"),
    ],
)
def test_mistakes_in_files_json(own: Path, content: str, message: str) -> None:
    (own / "files.json").write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(own, "QNLI")


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        (
            "SST-2",
            "text\tlabel\na\t1\n",
            "train.tsv: no column 'sentence' among text, label; GLUE's SST-2 has sentence",
        ),
        ("SST-2", "sentence,label\na,1\n", "no column 'sentence' among sentence,label"),
        ("SST-2", "sentence\tlabel\nfine\t1\na\tb\t1\n", "train.tsv:3: 3 columns, not 2; is it GLUE's SST-2"),
        ("SST-2", "sentence\tlabel\nfine\t1\na\tpositive\n", "train.tsv:3: label 'positive': must be one of 0, 1"),
        ("SST-2", "sentence\tlabel\n", "train.tsv: no rows; replace it"),
        ("SST-2", "", "no column 'sentence' among none"),
        ("SST-2", b"sentence\tlabel\ncaf\xe9\t1\n", "train.tsv, after line 0: 'utf-8' codec"),
        ("CoLA", "source\tlabel\tstar\tsentence\n", "train.tsv:1: label 'label': must be one of 0, 1"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.2\n", "train.tsv:2: score '5.2': must be a number from 0 to 5"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\thigh\n", "score 'high': must be a number from 0 to 5"),
        ("RTE", "sentence1\tsentence2\tlabel\na\tb\tneutral\n", "'neutral': must be one of entailment, not_entailment"),
    ],
)
def test_wrong_content(own: Path, task: str, content: str | bytes, message: str) -> None:
    assert re.search(message, error_of(rows_of, own, task, content))


def test_missing_files(own: Path) -> None:
    (own / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_mismatched.tsv: no such file; .* name another in .*files.json"):
        read(own, "MNLI")
    with pytest.raises(FileNotFoundError, match=r"--glue-dir .*/none: no such folder"):
        read(own / "none", "MNLI")


def test_identity_follows_the_rows(own: Path) -> None:
    before = read(own, "CoLA").train.identity
    assert read(own, "CoLA").train.identity == before
    path = own / "CoLA" / "train.tsv"
    path.write_text(path.read_text().replace("gj04\t0", "gj04\t1", 1))
    assert read(own, "CoLA").train.identity != before


def test_real_glue_has_its_official_sizes(real_glue_dir: Path) -> None:
    whole = {"CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI"}
    for task in TASKS:
        data = read_task(task, real_glue_dir)
        if task.name in whole:
            assert data.train.is_official, task.name
        if task.name in whole | {"QNLI"}:
            assert all(split.is_official for split in data.validation), task.name
        assert data.train.left_out <= 3


def make_repository(folder: Path, task: Task, labels: tuple[str, ...] | None = None) -> Path:
    """A dataset repository laid out like `nyu-mll/glue` (the same loader reads both), with one configuration."""
    names = task.hub_labels if labels is None else labels
    kind: Any = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(names))
    features = {column: datasets.Value("string") for column in task.hub_sentences}
    features |= {"label": kind, "idx": datasets.Value("int32")}
    card = ["---", "configs:", f"- config_name: {task.hub_name}", "  data_files:"]
    for number, official in enumerate((task.train, *task.validation)):
        columns: dict[str, list[Any]] = {column: [f"{column} {number}"] * 2 for column in task.hub_sentences}
        columns |= {"label": [0, 1], "idx": [0, 1]}
        path = folder / task.hub_name / f"{official.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(path)
        card += [f"  - split: {official.split}", f"    path: {path.relative_to(folder)}"]
    (folder / "README.md").write_text("\n".join([*card, "---"]) + "\n")
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["MNLI", "SST-2", "STS-B"])
def test_columns_take_our_names(tmp_path: Path, name: str) -> None:
    task = find_task(name, "task")
    repository = make_repository(tmp_path / "glue", task)
    data = read_hub(task, str(repository))
    expected = {FIRST: f"{task.hub_sentences[0]} 0", LABEL: 1}
    if len(task.hub_sentences) == 2:
        expected |= {SECOND: f"{task.hub_sentences[1]} 0"}
    assert data.train.rows[1] == expected
    assert [split.split for split in data.validation] == [official.split for official in task.validation]
    assert data.validation[0].file == f"{repository}:{task.hub_name}:{task.validation[0].split}"
    assert not data.validation[0].is_official  # two rows


@pytest.mark.usefixtures("own_cache")
def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    task = find_task("RTE", "task")
    repository = make_repository(tmp_path / "glue", task, labels=("not_entailment", "entailment"))
    with pytest.raises(ValueError, match="its classes are not_entailment, entailment, not entailment, not_entailment"):
        read_hub(task, str(repository))


@pytest.mark.usefixtures("own_cache")
def test_what_cannot_be_loaded_is_named_on_one_line(tmp_path: Path) -> None:
    said = error_of(read_hub, find_task("CoLA", "task"), str(tmp_path / "none"))
    assert re.search("cola:train cannot be loaded: .*; give a folder of TSVs with --glue-dir", said)


def test_every_task_has_as_many_classes_in_both_forms() -> None:
    for task in TASKS:
        assert len(task.labels) == len(task.hub_labels)
        assert len(task.sentences) == len(task.hub_sentences)
