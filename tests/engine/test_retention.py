"""Which checkpoints go once a newer one is complete."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwt_ds.base.files import file_facts, write_manifest
from dwt_ds.engine.checkpoint import save_and_load
from dwt_ds.engine.checkpoint.manifest import NewestCheckpoint, newest_checkpoint
from dwt_ds.engine.checkpoint.save_and_load import Retention, _delete_old, load_checkpoint


class TestRetention:
    @staticmethod
    def save(folder: Path, step: int, starts: list[int]) -> None:
        """A checkpoint of a run that was started at these steps."""
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        (path / "weights.pt").write_bytes(b"x" * 10)
        state = {"step": step, "starts": [{"step": each, "at": f"start {i}"} for i, each in enumerate(starts)]}
        write_manifest(path, {"state": state, "files": file_facts(path, ["weights.pt"])})

    @staticmethod
    def kept(folder: Path, saved: int, **retention: int) -> list[int]:
        _delete_old(folder, saved, Retention(**{"keep_last": 1, "keep_every": 0, **retention}))
        return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())

    def test_damaged_newer_ones_do_not_push_out_the_good(self, tmp_path: Path) -> None:
        for step in (100, 200, 300):
            self.save(tmp_path, step, [0])
        for step in (200, 300):
            (tmp_path / f"step_{step:08d}" / "weights.pt").write_bytes(b"y" * 10)
        assert newest_checkpoint(tmp_path).path == tmp_path / "step_00000100"
        self.save(tmp_path, 150, [0, 100])
        assert self.kept(tmp_path, 150, keep_last=2) == [100, 150, 200, 300]
        assert newest_checkpoint(tmp_path).path == tmp_path / "step_00000150"
        self.save(tmp_path, 250, [0, 100])
        assert self.kept(tmp_path, 250, keep_last=2) == [150, 200, 250, 300], "200 is no good one"
        self.save(tmp_path, 350, [0, 100])
        assert self.kept(tmp_path, 350, keep_last=2) == [250, 300, 350]
        self.save(tmp_path, 450, [0, 100])
        assert self.kept(tmp_path, 450) == [450]

    def test_those_of_earlier_starts_count(self, tmp_path: Path) -> None:
        self.save(tmp_path, 100, [0])
        self.save(tmp_path, 200, [0])
        self.save(tmp_path, 300, [0, 200])
        self.save(tmp_path, 400, [0, 200, 300])
        assert self.kept(tmp_path, 400, keep_last=3) == [200, 300, 400]
        assert self.kept(tmp_path, 400, keep_last=1, keep_every=200) == [200, 400]

    def test_nothing_goes_where_the_newest_does_not_tell_its_past(self, tmp_path: Path) -> None:
        self.save(tmp_path, 100, [0])
        self.save(tmp_path, 200, [0])
        (tmp_path / "step_00000200" / "manifest.json").write_text("{")
        assert self.kept(tmp_path, 200) == [100, 200]

    def test_what_a_kill_leaves_of_a_conversion_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def killed(engine: object, universal: Path) -> None:
            raise KeyboardInterrupt

        self.save(tmp_path, 100, [0])
        monkeypatch.setattr(save_and_load, "_convert", lambda path, universal: universal.mkdir())
        monkeypatch.setattr(save_and_load, "_load", killed)
        engine: Any = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
        with pytest.raises(KeyboardInterrupt):
            load_checkpoint(engine, NewestCheckpoint(tmp_path / "step_00000100", [], {"world_size": 2}), 0)
        assert len(list(tmp_path.iterdir())) == 2
        self.save(tmp_path, 200, [0, 100])
        assert self.kept(tmp_path, 200) == [200]
