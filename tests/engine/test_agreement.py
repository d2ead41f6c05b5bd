"""Ranks that do not run the same thing are stopped before anything is built, with a table of who has what."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from harness.ranks import Run
from safetensors.torch import load_file, save_file

from dwt_ds.base.software import package_folder, software, source_hash
from dwt_ds.engine.agreement import RankFacts, disagreements

# A rank may get another package, another torch's version, another Adam, as with nvcc on one host only, or be in another
# folder, as on a host that shares none.
DRIVER = """
import os, sys
from pathlib import Path
import torch
from dwt_ds.base import software
os.chdir(os.environ.get("AT", "."))
torch.__version__ = os.environ.get("OTHER_TORCH", torch.__version__)
folder_of, other = software.package_folder, os.environ.get("OTHER_PACKAGE")
software.package_folder = lambda name: Path(other, name) if other and name == "dwt_ds" else folder_of(name)
from dwt_ds.engine import agreement, optimizers
from dwt_ds.pretrain import main
agreement._VISIBLE_SECONDS = 1.0
if "OTHER_ADAM" in os.environ:
    optimizers._is_torchs_fused_adam = lambda *_: False
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def other_package(tmp_path: Path) -> Path:
    """A folder with a dwt_ds of another version."""
    folder = tmp_path / "other"
    shutil.copytree(package_folder("dwt_ds"), folder / "dwt_ds", ignore=shutil.ignore_patterns("__pycache__"))
    init = folder / "dwt_ds" / "__init__.py"
    lines = init.read_text(encoding="utf-8").splitlines()
    changed = [line if not line.startswith("__version__") else '__version__ = "9.9.9"' for line in lines]
    init.write_text("\n".join(changed) + "\n", encoding="utf-8")
    return folder


def test_a_rank_with_another_package_or_torch_stops_all_before_training(
    run_ranks: Run, tiny_recipe: Path, tmp_path: Path, other_package: Path
) -> None:
    run = ["-c", DRIVER, str(tiny_recipe), f"output_dir={tmp_path / 'run'}"]
    said = run_ranks([run] * 3, own=[{}, {"OTHER_PACKAGE": str(other_package)}, {"OTHER_TORCH": "1.0.0"}])
    assert [rank.code for rank in said] == [2, 2, 2], said
    assert said[0].err.startswith("error: the hosts run different software; install the same on each of them:\n")
    table = [line.split() for line in said[0].err.splitlines()[1:]]
    ours, torch = software()["dwt_ds"], software()["torch"]
    host = socket.gethostname().partition(".")[0]
    assert table[0] == ["what", "value", "who"]
    # The names and versions first, since only they are in a fixed order.
    assert table[1] == ["torch", torch, host, "(ranks", "0,", "1)"]
    assert table[2] == ["1.0.0", host, "(rank", "2)"]
    assert table[3] == ["dwt_ds", *ours.split(), host, "(ranks", "0,", "2)"]
    assert table[4][0] == "9.9.9"
    assert table[4][-3:] == [host, "(rank", "1)"]
    assert len(table) == 5, said[0].err
    assert said[1].err == said[2].err == ""
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_optimizer_stops_all_before_training(
    run_ranks: Run, tiny_recipe: Path, tmp_path: Path
) -> None:
    run = ["-c", DRIVER, str(tiny_recipe), f"output_dir={tmp_path / 'run'}"]
    said = run_ranks([run] * 2, own=[{}, {"OTHER_ADAM": "yes"}])
    assert [rank.code for rank in said] == [2, 2], said
    assert said[0].err.startswith("error: the hosts would run different code; install the same on each")
    table = [line.split("  ") for line in said[0].err.splitlines()[2:]]
    host = socket.gethostname().partition(".")[0]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert cells == [["optimizer", "torch's fused AdamW", f"{host} (rank 0)"], ["AdamW", f"{host} (rank 1)"]]
    assert said[1].err == ""
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_rank_with_other_data_stops_all_before_training(
    run_ranks: Run, tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest_fingerprint = manifest["fingerprint"]
    manifest.update(fingerprint="f" * 64)
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    run = ["-m", "dwt_ds.pretrain", str(tiny_recipe), f"output_dir={tmp_path / 'run'}"]
    run.append(f"train.eval_sets.books={tiny_data}")
    said = run_ranks([run, [*run, f"data.dir={other}", f"train.eval_sets.books={other}"]])
    assert [rank.code for rank in said] == [2, 2], said
    first, *table = said[0].err.splitlines()
    assert first.startswith("error: the hosts read different data or settings; put the same files at the same path")
    heading, *data, books, other_books, first, second = (line.split() for line in table)
    for name, (ours, theirs) in (("data", data), ("train.eval_sets.books", (books, other_books))):
        assert (heading[0], ours[:2], theirs[0]) == ("what", [name, manifest_fingerprint[:12]], "ffffffffffff")
    settings = [first, second]
    assert settings[0][0] == "settings"
    digests = [settings[0][1], settings[1][0]]
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests), table
    assert digests[0] != digests[1]
    assert "tokenizer" not in said[0].err
    assert said[1].err == ""
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_share_the_folder_stops_all_before_training(
    run_ranks: Run, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Each would write its shards to a folder of its own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    run = ["-c", DRIVER, str(tiny_recipe), "output_dir=run"]
    said = run_ranks([run] * 3, own=[{"AT": str(tmp_path / at)} for at in ("here", "here", "there")])
    assert [rank.code for rank in said] == [2, 2, 2], said
    assert [rank.err for rank in said[:2]] == ["", ""]
    assert re.fullmatch(
        rf"error: output_dir: rank 2 on \S+ does not see in {tmp_path}/there/run what rank 0 writes there; .*\n",
        said[2].err,
    )
    assert not (tmp_path / "there" / "run").exists()
    assert not list((tmp_path / "here" / "run").glob("*.yaml")) + list((tmp_path / "here" / "run").glob(".ranks-*"))


def test_a_rank_with_another_teacher_stops_all_before_training(
    run_ranks: Run, tiny_recipe: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    for at in ("here", "there"):
        shutil.copytree(tiny_teacher, tmp_path / at / "teacher")
    weights = load_file(tmp_path / "there" / "teacher" / "model.safetensors")
    other = {name: -3 * weight for name, weight in weights.items()}
    save_file(other, tmp_path / "there" / "teacher" / "model.safetensors", {"format": "pt"})
    run = ["-c", DRIVER, str(tiny_recipe), "teacher.path=teacher", f"output_dir={tmp_path / 'run'}"]
    said = run_ranks([run] * 2, own=[{"AT": str(tmp_path / at)} for at in ("here", "there")])
    assert [rank.code for rank in said] == [2, 2], said
    first, _, ours, theirs = said[0].err.splitlines()
    assert first.startswith("error: teacher.path: the hosts read different teachers; put the same files at the same")
    assert (ours.split()[:2], theirs.split()[0]) == (["teacher", "sha256"], "sha256")
    assert "tokenizer" not in said[0].err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ranks_that_agree_have_no_table() -> None:
    facts = {"torch": "2", "data": "a"}
    assert disagreements([RankFacts("node-1", facts), RankFacts("node-2", dict(facts))]) == ""


def test_the_table_names_hosts_with_their_ranks() -> None:
    everyone = [RankFacts("node-1", {"torch": "2.11", "triton": "3"}) for _ in range(8)]
    everyone += [RankFacts("node-2", {"torch": "2.13", "triton": "3"}) for _ in range(8)]
    everyone += [RankFacts("node-3", {"torch": "2.11"})]
    assert disagreements(everyone).splitlines() == [
        "  what    value  who",
        "  torch   2.11   node-1 (ranks 0-7), node-3 (rank 16)",
        "          2.13   node-2 (ranks 8-15)",
        "  triton  3      node-1 (ranks 0-7), node-2 (ranks 8-15)",
        "          none   node-3 (rank 16)",
    ]


def test_the_hash_follows_every_line_of_the_source(other_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = source_hash("dwt_ds")
    assert ours == source_hash("dwt_ds")
    monkeypatch.setattr("dwt_ds.base.software.package_folder", lambda _: other_package / "dwt_ds")
    changed = source_hash("dwt_ds")
    assert changed != ours
    (other_package / "dwt_ds" / "engine" / "ranks.py").write_text("", encoding="utf-8")
    assert source_hash("dwt_ds") not in (ours, changed)
