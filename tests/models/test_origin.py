from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwt_ds.models import origin
from dwt_ds.models.origin import weights_origin


def test_it_changes_with_the_weights_alone(tmp_path: Path) -> None:
    assert weights_origin(None) is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = weights_origin(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert weights_origin(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert weights_origin(str(tmp_path)) != before


@pytest.mark.parametrize("trusted", [False, True])
def test_the_code_of_a_named_model_runs_only_if_trusted(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def config(path: str, *, trust_remote_code: bool = False) -> Any:
        asked.append((path, trust_remote_code))
        return SimpleNamespace(_commit_hash="abc")

    monkeypatch.setattr(origin, "load_model_config", config)
    assert weights_origin("someone/own-kind", trust_remote_code=trusted) == "revision abc"
    assert asked == [("someone/own-kind", trusted)]
