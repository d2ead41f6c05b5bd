"""The tokenizers of a recipe, named and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dwt_ds.cli.main import main
from dwt_ds.doctor import examine
from dwt_ds.doctor.tokenizers import check_tokenizers


def recipe_with(tiny_recipe: Path, folder: Path, **teacher: str | None) -> str:
    content = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    content["teacher"] |= teacher
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_both_are_named(tiny_recipe: Path, tmp_path: Path) -> None:
    same = check_tokenizers(str(tiny_recipe))
    kind, _, of_teacher = same.found.removeprefix("data: ").partition("; teacher: ")
    assert same.passed
    assert kind.startswith("WordPiece, 298 entries, ")
    assert of_teacher == f"{kind}; the same vocabulary"
    shared = check_tokenizers(recipe_with(tiny_recipe, tmp_path, vocabulary="shared"))
    assert shared.passed
    assert shared.found.endswith(" shared entries")
    alone = check_tokenizers(recipe_with(tiny_recipe, tmp_path, path=None))
    assert alone.found == f"data: {kind}"


def test_what_does_not_go_together_fails_in_one_line(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    (teacher / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(examine, "examine", lambda *_: [])
    assert main(["doctor", "--recipe", recipe_with(tiny_recipe, tmp_path, path=str(teacher))]) == 1
    [line, last] = capsys.readouterr().out.strip().splitlines()[-2:]
    assert line.startswith("FAIL  tokenizers")
    assert "teacher.vocabulary=shared" in line
    assert last == "1 of 1 checks failed"
