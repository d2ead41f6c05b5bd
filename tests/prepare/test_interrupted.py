"""A preparation that was stopped, killed or ran out of disk, and its next attempt."""

from __future__ import annotations

import errno
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.corpus import Make, as_text, made_up_documents
from harness.ranks import Python, Start
from harness.waiting import wait_until

from dwt_ds.data.manifest import Manifest
from dwt_ds.data.prepared import PreparedData, data_problems
from dwt_ds.prepare import pipeline


class Stop(Exception):
    pass


@pytest.fixture
def make_until_the_rows(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """A preparation that is stopped after its survey."""

    def stopping(*args: Any, **options: Any) -> Any:
        raise Stop

    def stopped(out: Path, text: Path) -> None:
        with monkeypatch.context() as until_here:
            until_here.setattr(pipeline, "store_part", stopping)
            with pytest.raises(Stop):
                make(out, text)

    return stopped


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_work_resumes_from_its_parts(
    tmp_path: Path, make: Make, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make(tmp_path / "straight", corpus_file, seq_len=32)
    made: list[int] = []
    original = pipeline.store_part

    def stopping(item: Any, **options: Any) -> Any:
        if len(made) == 4:
            raise Stop
        made.append(item.index if hasattr(item, "index") else -1)
        return original(item, **options)

    out = tmp_path / "data"
    monkeypatch.setattr(pipeline, "store_part", stopping)
    with pytest.raises(Stop):
        make(out, corpus_file, seq_len=32)
    assert made == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match="half-written.*with the same options"):
        PreparedData.open(out)
    with pytest.raises(ValueError, match=r"unfinished preparation with other settings \(seq_len is 32 there, 64 now\)"):
        make(out, corpus_file, seq_len=64)

    remade: list[int] = []

    def recording(item: Any, **options: Any) -> Any:
        if hasattr(item, "index"):
            remade.append(item.index)
        return original(item, **options)

    left = out / "unfinished" / "train" / "data-00009.arrow"  # of an attempt that joined the parts
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr(pipeline, "store_part", recording)
    monkeypatch.setattr(pipeline, "survey", lambda *args, **options: pytest.fail("surveyed again"))
    resumed = make(out, corpus_file, seq_len=32)
    assert remade == list(range(4, len(remade) + 4))
    assert resumed.manifest.fingerprint == straight.manifest.fingerprint
    assert resumed.manifest.shards == straight.manifest.shards
    assert not (out / "unfinished").exists()
    assert not (out / "train" / left.name).exists()


def test_work_started_with_another_segmenter_is_refused(
    tmp_path: Path,
    make: Make,
    make_until_the_rows: Callable[[Path, Path], None],
    corpus_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(pipeline, "segmenters", lambda: {"Chinese": "jieba 1.0"})
        make_until_the_rows(tmp_path / "data", corpus_file)
    monkeypatch.setattr(pipeline, "segmenters", lambda: {"Chinese": "by character"})
    difference = r"\(words.Chinese is jieba 1.0 there, by character now\)"
    with pytest.raises(ValueError, match=f"unfinished preparation with other settings {difference}"):
        make(tmp_path / "data", corpus_file)


@pytest.mark.parametrize("place", ["dwt_ds.prepare.pipeline.save_tokenizer", "numpy.save"])
def test_stopped_while_the_survey_is_stored_it_surveys_again(
    place: str, tmp_path: Path, make: Make, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(place, stop)
        with pytest.raises(Stop):
            make(tmp_path / "data", corpus_file)
    assert data_problems(make(tmp_path / "data", corpus_file).folder) == []


@pytest.mark.usefixtures("small_chunks")
def test_stopped_before_the_manifest_it_is_finished_by_the_next(
    tmp_path: Path, make: Make, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    with monkeypatch.context() as patched:

        def stop(manifest: Manifest) -> str:
            raise Stop

        patched.setattr("dwt_ds.prepare.output.manifest_table", stop)
        with pytest.raises(Stop):
            make(out, corpus_file, seq_len=32)
    assert (out / "train").is_dir()
    with pytest.raises(FileNotFoundError, match="half-written"):
        PreparedData.open(out)
    data = make(out, corpus_file, seq_len=32)
    straight = make(tmp_path / "straight", corpus_file, seq_len=32)
    assert data.manifest.fingerprint == straight.manifest.fingerprint


_SLOW_PREPARE = """
    import sys, time
    from pathlib import Path
    from dwt_ds.prepare import corpus, pipeline
    from dwt_ds.prepare.options import PrepareOptions
    from dwt_ds.prepare.reading import LocalFile

    corpus.CHUNK_CHARS = 5000
    original = pipeline.store_part

    def slow(item, **options):
        if not isinstance(item, Path):
            time.sleep(float(sys.argv[4]))
        return original(item, **options)

    pipeline.store_part = slow
    pipeline.prepare(PrepareOptions(sources=[LocalFile(Path(sys.argv[1]))], out=Path(sys.argv[2]),
                                    tokenizer=sys.argv[3], seq_len=32, validation=0.1))
"""


@pytest.mark.usefixtures("small_chunks")
def test_killed_at_any_time_it_is_never_taken_for_whole(
    tmp_path: Path, make: Make, corpus_file: Path, vocab_file: Path, start_ranks: Start, python: Python
) -> None:
    out = tmp_path / "data"
    words = ["-c", textwrap.dedent(_SLOW_PREPARE), str(corpus_file), str(out), str(vocab_file)]
    process = start_ranks([[*words, "0.1"]])
    wait_until((out / "unfinished" / "part-000002.npz").exists, process)
    process.kill()
    with pytest.raises(FileNotFoundError, match="half-written"):
        PreparedData.open(out)
    assert python(*words, "0").code == 0
    data = PreparedData.open(out)
    assert data_problems(data.folder) == []
    straight = make(tmp_path / "straight", corpus_file, seq_len=32)
    assert data.manifest.fingerprint == straight.manifest.fingerprint


@pytest.mark.usefixtures("small_chunks")
def test_a_full_disk_is_reported_and_nothing_is_lost(
    tmp_path: Path, make: Make, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    written = 0
    original = np.savez

    def savez(file: Any, **arrays: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:
            file.write(b"half a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", savez)
        with pytest.raises(OSError, match="no space left for --out .*what is finished stays.*repeat the command"):
            make(out, corpus_file, seq_len=32)
    left = sorted(path.name for path in (out / "unfinished").iterdir() if "part" in path.name)
    assert left == ["part-000000.npz", "part-000001.npz", "part-000002.npz"]
    with pytest.raises(FileNotFoundError, match="half-written"):
        PreparedData.open(out)
    make(out, corpus_file, seq_len=32)
    assert data_problems(out) == []


def test_another_error_of_the_disk_is_not_called_a_full_one(
    tmp_path: Path, make: Make, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def savez(*args: Any, **arrays: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path / "data", corpus_file)


@pytest.mark.parametrize("changed", [made_up_documents(6), made_up_documents(5, seed=1)])
def test_a_source_that_changes_while_it_is_read(
    changed: list[list[str]], tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(as_text(made_up_documents(5)))
    original = pipeline.survey

    def then_changed(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        path.write_text(as_text(changed))
        return result

    monkeypatch.setattr(pipeline, "survey", then_changed)
    with pytest.raises(ValueError, match="text.txt changed while it was read"):
        make(tmp_path / "data", path)


def test_work_left_by_a_version_before_is_refused(
    tmp_path: Path, make: Make, make_until_the_rows: Callable[[Path, Path], None], corpus_file: Path
) -> None:
    """Its counts and parts say less, so they do not go with those made now."""
    make_until_the_rows(tmp_path / "data", corpus_file)
    work = tmp_path / "data" / "unfinished"
    left = json.loads((work / "survey.json").read_text())
    del left["per_source"][0]["records"]
    (work / "survey.json").write_text(json.dumps(left))
    (work / "part-000000.npz").touch()
    with pytest.raises(ValueError, match="unfinished was left by an earlier version: remove the output folder"):
        make(tmp_path / "data", corpus_file)
