"""Nothing is lost or unknown unseen: it is told, in characters and by source, warned of, and refused if much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dwt_ds.cli.main import main
from dwt_ds.config.schema import DataConfig
from dwt_ds.data.manifest import Manifest
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.show import manifest_table, warnings_of
from dwt_ds.plan.settings import corpus_of
from dwt_ds.prepare import corpus
from dwt_ds.prepare.corpus import is_held_out
from dwt_ds.prepare.hold_out import _without_tail
from dwt_ds.prepare.rows import Chunk

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`dwt-ds prepare ... --out tmp_path/data` -> exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["prepare", *map(str, words), "--out", str(tmp_path / "data"), "--workers", "1"])
        return code, *capsys.readouterr()

    return run


def manifest(tmp_path: Path) -> Manifest:
    return PreparedData.open(tmp_path / "data").manifest


LONG_LINES = {
    "zh": "这是第{}句话，说的是第{}件事情。",
    "ja": "これは{}番目の文で、{}番目の話です。",
    "hi": "यह {} वाक्य है और {} बात है। ",
    "ar": "هل هذه هي الجملة {} عن الشيء {}؟ ",
    "th": "นี่คือประโยคที่{}เกี่ยวกับเรื่องที่{} ",
    "unmarked": "words {} without any mark {} ",
    "unspaced": "字{}符{}",
}


@pytest.mark.parametrize("language", list(LONG_LINES))
def test_long_paragraphs_of_any_script_keep_their_characters(language: str, tmp_path: Path, run: Run) -> None:
    lines = ["".join(LONG_LINES[language].format(n, i) for n in range(250)).strip() for i in range(6)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    usual = ("--text", tmp_path / "text.txt", "--train-tokenizer", 600, "--max-chars", 400)
    code, out, _ = run(*usual, "--validation", 0.2)
    assert code == 0
    found = manifest(tmp_path)
    assert found.characters_kept == found.characters_seen > 0.9 * sum(map(len, lines))
    assert "warning" not in out


def test_drop_long_drops_and_warns_in_the_last_line(tmp_path: Path, run: Run) -> None:
    short = "\n\n".join(f"A plain paragraph has number {n} in it." for n in range(60))
    (tmp_path / "text.txt").write_text(f"{short}\n\n{'words without end ' * 200}", encoding="utf-8")
    usual = ("--text", tmp_path / "text.txt", "--train-tokenizer", 200)
    code, out, _ = run(*usual, "--drop-long")
    assert code == 0
    found = manifest(tmp_path)
    assert found.dropped["too_long"] == 1
    assert found.dropped_characters["too_long"] == 3599
    assert found.characters_seen == found.characters_kept + 3599
    assert out.splitlines()[-1].startswith("warning: 6")
    assert "% of the characters were dropped: sentences longer than --max-chars 6" in out.splitlines()[-1]
    assert "sentences longer than --max-chars: 3,599 characters" in out
    assert out.splitlines()[-1] in (tmp_path / "data" / "manifest.txt").read_text()
    assert found.settings["identity"]["drop_long"] is True
    code, _, err = run(*usual)
    assert code == 2
    assert "drop_long" in err


def test_every_drop_has_its_characters(tmp_path: Path, run: Run) -> None:
    lines = [f"A plain paragraph has number {n} in it. Short." for n in range(80)]
    (tmp_path / "text.txt").write_text("\n\n".join([*lines, *lines[:20]]), encoding="utf-8")
    code, out, _ = run("--text", tmp_path / "text.txt", "--train-tokenizer", 200, "--every", 4)
    found = manifest(tmp_path)
    assert code == 0
    assert found.dropped_characters["duplicate_lines"] == sum(map(len, lines[:20]))
    assert found.dropped_characters["too_short"] == 80 * len("Short.")
    assert found.characters_seen == found.characters_kept + sum(
        found.dropped_characters[name] for name in ("too_short", "not_sampled")
    )
    assert "sentences skipped by --every: 2," in out
    lost = sum(found.dropped_characters[name] for name in ("duplicate_lines", "too_short"))
    share = lost / (found.characters_seen + found.dropped_characters["duplicate_lines"])
    assert warnings_of(found)[0].startswith(f"{share:.1%} of the characters were dropped")
    assert "--every" not in warnings_of(found)[0]  # what it leaves out was asked for


@pytest.fixture
def half_known(tmp_path: Path, vocab_file: Path) -> tuple[object, ...]:
    """Text of which a vocabulary of Latin letters knows the most, and a second source of which it knows nothing."""
    (tmp_path / "en.txt").write_text("\n\n".join(f"ka lo mi ren tu sha {n} vel do pir." for n in range(200)))
    (tmp_path / "ru.txt").write_text("\n\n".join(f"Слово номер {n}." for n in range(20)), encoding="utf-8")
    return ("--text", tmp_path / "en.txt", tmp_path / "ru.txt", "--tokenizer", vocab_file)


def test_unknown_tokens_are_counted_by_source(tmp_path: Path, run: Run, half_known: tuple[object, ...]) -> None:
    code, out, _ = run(*half_known)
    assert code == 0
    found = manifest(tmp_path)
    by_source = [source["unknown_share"] for source in found.sources]
    assert by_source[0] == 0
    assert by_source[1] > 0.3
    assert found.unknown_share is not None
    assert 0.01 < found.unknown_share < 0.1
    assert "о" in found.unknown_characters
    assert "unknown tokens" in manifest_table(found)
    assert out.splitlines()[-1].startswith(f"warning: {found.unknown_share:.1%} of the tokens are unknown")
    assert "ru.txt" in out.splitlines()[-1]
    assert " о" in out.splitlines()[-1]
    text = corpus_of(DataConfig(dir=str(tmp_path / "data"))).text
    assert text[0].startswith(f"unknown tokens: {found.unknown_share:.2%} of the text's tokens; highest in")
    assert text[1] == out.splitlines()[-1]


def test_mostly_unknown_text_is_refused_unless_allowed(
    tmp_path: Path, run: Run, half_known: tuple[object, ...]
) -> None:
    words = (*half_known[:1], *half_known[2:])  # the Russian text alone
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "of the tokens are unknown to the tokenizer (" in err
    assert "accept this with --allow-unknown" in err
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert run(*words, "--allow-unknown")[0] == 0
    found = manifest(tmp_path)
    assert found.unknown_share == found.sources[0]["unknown_share"] > 0.2
    assert run(*words)[0] == 0  # finished


def test_a_folder_of_before_opens_and_says_nothing_it_does_not_know(packed: PreparedData) -> None:
    values = json.loads(packed.manifest.to_json())
    for name in ("characters_seen", "characters_kept", "dropped_characters", "unknown_share", "unknown_characters"):
        del values[name]
    for name in ("held_out_instead", "case_and_accents"):
        del values[name]
    for source in values["sources"]:
        del source["unknown_share"], source["records"]
    before = Manifest.from_json(json.dumps(values))
    assert "unknown tokens" not in manifest_table(before)
    assert warnings_of(before) == []


@pytest.mark.parametrize(("suffix", "column"), [(".jsonl", "text"), (".parquet", "body")])
def test_many_records_without_text_are_told(suffix: str, column: str, tmp_path: Path, run: Run) -> None:
    """Of two sources, the one with another key for most of its text is named."""
    texts = [f"A plain paragraph has number {n} in it." for n in range(2000)]
    lost = [{"content" if n % 20 else column: text} for n, text in enumerate(texts[:1000])]
    kept = [{column: text if n % 20 else None} for n, text in enumerate(texts[1000:])]
    for name, records in (("lost", lost), ("kept", kept)):
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("\n".join(map(json.dumps, records)))
    code, out, _ = run("--text", tmp_path / f"*{suffix}", "--text-column", column, "--train-tokenizer", 200)
    assert code == 0
    assert [(source["records"], source["unreadable_records"]) for source in manifest(tmp_path).sources] == [
        (1000, 50),
        (1000, 950),
    ]
    assert out.splitlines()[-1] == (
        f'warning: records without text were skipped: 95% of {tmp_path}/lost{suffix} (no "{column}"); name another '
        "column with --text-column"
    )


NO_TEXT = "1.\n2."
TEXT = "\n".join(f"A plain paragraph has number {n} in it." for n in range(30))
ONE_LINE = TEXT.replace("\n", " ")


@pytest.mark.parametrize(
    "documents",
    [
        [TEXT, NO_TEXT, NO_TEXT.replace("1", "3")],
        [TEXT, TEXT.replace("plain", "simple"), NO_TEXT],
        [f"{TEXT}\nThe end.", f"{TEXT}\nIts end.".replace("plain", "simple")],  # the line to hold out has no text
        [ONE_LINE, ONE_LINE.replace("plain", "simple"), NO_TEXT, ONE_LINE.replace("plain", "short")],
        # One line of text: nothing can be held out.
        [TEXT.split("\n")[0], NO_TEXT],
        [NO_TEXT, TEXT.split("\n")[0]],
        [TEXT.split("\n")[0], TEXT.split("\n")[0]],
        ["A title\n" + TEXT.split("\n")[0]],
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_another_document_is_held_out_where_one_has_no_text(
    documents: list[str], seed: int, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    code, out, err = run("--text", tmp_path / "text.txt", "--train-tokenizer", 80, "--seed", seed)
    assert code == 0
    found = manifest(tmp_path)
    if len(documents[0]) < 100:
        assert "another document is held out" not in err
        assert out.splitlines()[-1] == "warning: no text is held out, so training will show no held-out loss"
        assert (found.rows, found.validation_rows, found.validation_documents) == (1, 0, 0)
        return
    assert 0 < found.validation_rows <= found.rows / 2
    assert found.held_out_instead == ("another document is held out" in err) == ("was all dropped" in out)
    [chosen] = [text for number, text in enumerate(documents) if is_held_out(number, len(documents), 0.01, seed)]
    assert found.held_out_instead == (len(chosen.split("\n")[-1]) < 10)
    assert found.validation_documents == 1 + found.held_out_instead


def test_a_document_that_is_all_text_of_its_chunk_is_held_out_for_one_without_text(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 1)
    documents = [ONE_LINE.replace("plain", word) for word in ("plain", "simple", "short")]
    documents[next(number for number in range(3) if is_held_out(number, 3, 0.01, 0))] = NO_TEXT
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    assert run("--text", tmp_path / "text.txt", "--train-tokenizer", 80)[0] == 0
    found = manifest(tmp_path)
    assert found.held_out_instead
    assert 0 < found.validation_rows <= found.rows


def test_last_lines_that_are_held_out_are_of_their_documents_source() -> None:
    chunk = Chunk(0, ["a\nb\nc", "d"], [False, True], [4, 5])
    assert _without_tail(chunk, 0, ["a", "b"], ["c"]) == Chunk(0, ["a\nb", "c", "d"], [False, True, False], [4, 4, 5])
