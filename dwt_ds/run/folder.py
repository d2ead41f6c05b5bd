"""The folder of a run: resolved settings, metrics, checkpoints, which run it is, and whether it is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dwt_ds.base.files import (
    check_no_file,
    check_replaceable,
    make_folder,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)
from dwt_ds.base.locks import FolderLock
from dwt_ds.base.run_files import CHECKPOINTS, COMPLETE, DS_JSON, EXPORT, IDENTITY, METRICS, RECIPE, SKIPPED, TOKENIZER
from dwt_ds.base.words import shorten
from dwt_ds.base.yaml_and_json import is_dump, json_text, yaml_text
from dwt_ds.distill.metrics_keys import eval_losses
from dwt_ds.run.stop import STOP_FILE

_WRITTEN = "written"


class RunFolder:
    """Paths and files of one run. Every rank may read, rank 0 alone writes."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir).expanduser()
        self._said = f"output_dir={str(self.path)!r}"
        self.checkpoints = self.path / CHECKPOINTS
        self.export = self.path / EXPORT
        self.metrics = self.path / METRICS
        self._waiting: dict[Path, str] = {}
        self._lock: FolderLock | None = None

    def export_of(self, step: int) -> Path:
        """The export along the way, after `step` optimizer steps."""
        return self.export / f"step_{step:08d}"

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder that holds a run on other data, another tokenizer or another model shape (ValueError)."""
        check_no_file(self.path, self._said)
        there = self.read(IDENTITY)
        if there is None:
            return
        for key, value in identity.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{self._said}: holds another run ({key} there {_shortened_json(there.get(key))}, "
                    f"here {_shortened_json(value)}); choose another output_dir or delete it"
                )

    def lock(self) -> None:
        """Be the only process that writes here, until it ends; creates the folder, private to its owner.

        Raises OccupiedError where another process writes here.
        """
        self._lock = FolderLock(self.path, self._said, mode=0o700)

    def require_lock(self) -> None:
        """Raise OccupiedError if another run has got this folder while this host was cut off from it."""
        if self._lock is not None:
            self._lock.require(self._said)

    def check_contents(self) -> None:
        """Refuse a folder where a run would write over what no run wrote, could not write, or finds a damaged line of
        its own (ValueError, OSError).

        A run writes its own recipe and JSON again at each start, in the folder that they may be read from.
        """
        check_replaceable(self.export)
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self._said}: {self.checkpoints} is a file; rename it")
        for name in (RECIPE, DS_JSON):
            if (self.path / name).exists() and not self._is_ours(name):
                raise self._not_ours(name, "or it was changed since")
        if self._was_run():
            self.metrics_rows()
            self.skipped_rows()
            return
        for name in (METRICS, SKIPPED, COMPLETE, EXPORT, TOKENIZER):
            path = self.path / name
            if path.is_dir() and any(path.iterdir()) or path.is_file():
                raise self._not_ours(name, "and there is no run.json")

    def _not_ours(self, name: str, why: str) -> ValueError:
        return ValueError(
            f"{self._said}: the run would replace {name}, which no run wrote there ({why}); "
            "rename it, or choose another output_dir"
        )

    def _was_run(self) -> bool:
        """Whether a run has been here; perhaps only its checkpoints were copied here."""
        return (self.path / IDENTITY).is_file() or any(self.checkpoints.glob("step_*"))

    def _is_ours(self, name: str) -> bool:
        content = (self.path / name).read_bytes()
        written = (self.read(IDENTITY) or {}).get(_WRITTEN)
        if isinstance(written, dict):
            return _sha256(content) in written.get(name, [])
        # Earlier versions kept no record. Their files are in the form that only a program writes.
        return self._was_run() and is_dump(content, is_json=name == DS_JSON)

    def begin(self, identity: Mapping[str, Any], config: Mapping[str, Any], ds_values: Mapping[str, Any]) -> None:
        """Create the folder, private to its owner, and write the settings as resolved."""
        for folder in (self.path, self.checkpoints):
            make_folder(folder, mode=0o700)
        (self.path / COMPLETE).unlink(missing_ok=True)  # of a shorter run that is extended now
        texts = {RECIPE: yaml_text(config), DS_JSON: json_text(ds_values)}
        # The former file's hash as well: a kill between these writes leaves that file.
        written = {name: self._hashes(name, text) for name, text in texts.items()}
        write_json(self.path / IDENTITY, {**identity, _WRITTEN: written})
        for name, text in texts.items():
            write_text(self.path / name, text)

    def _hashes(self, name: str, text: str) -> list[str]:
        file = self.path / name
        contents = [file.read_bytes()] if file.is_file() else []
        return list(dict.fromkeys(_sha256(content) for content in [*contents, text.encode()]))

    def finished_steps(self) -> int:
        """Steps of the finished run in this folder; 0 if it is not finished."""
        complete = self.read(COMPLETE)
        return 0 if complete is None else int(complete["steps"])

    def is_complete(self, exit_code: int, began: float) -> bool:
        """Whether the run is complete once its launcher, started at `began` (seconds since the epoch), has exited: the
        code alone cannot tell."""
        marker = self.path / COMPLETE
        was_finished_since = marker.is_file() and marker.stat().st_mtime >= began
        return was_finished_since or (exit_code == 0 and self.finished_steps() > 0)

    def finish(self, steps: int) -> None:
        """Mark the run as complete."""
        write_text(self.path / COMPLETE, json.dumps({"steps": steps}) + "\n")

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; NaN and infinity, which JSON does not know, become null.

        Raises OccupiedError as `require_lock` does.
        """
        self.require_lock()
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._append(self.metrics, json.dumps(known) + "\n")

    def add_skip(self, row: Mapping[str, Any]) -> None:
        """Append to skipped.jsonl which rows of the data a skipped step had."""
        self._append(self.path / SKIPPED, json.dumps(row) + "\n")

    def _append(self, path: Path, line: str) -> None:
        """Append a line; what does not fit on a full disk is kept and written with the next line."""
        text = self._waiting.pop(path, "") + line
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(text)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            self._waiting[path] = text

    def clear_stop_request(self) -> None:
        """Remove a request to stop: it was fulfilled, or an earlier start left it behind."""
        (self.path / STOP_FILE).unlink(missing_ok=True)

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Objects of metrics.jsonl, the earliest first; a last line torn by a kill is left out."""
        return read_json_lines(self.metrics)

    def skipped_rows(self) -> list[dict[str, Any]]:
        """Objects of skipped.jsonl, the earliest first."""
        return read_json_lines(self.path / SKIPPED)

    def has_held_out_loss(self, step: int) -> bool:
        """Whether the held-out losses after `step` are in metrics.jsonl."""
        return any(row["step"] == step and eval_losses(row) for row in self.metrics_rows())

    def cut_metrics_back(self, step: int) -> None:
        """Drop the rows after `step`, also of skipped.jsonl, so that each step is there once after a resume."""
        for name in (METRICS, SKIPPED):
            kept = [row for row in read_json_lines(self.path / name) if row["step"] <= step]
            if name == METRICS or (self.path / name).is_file():
                write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object of this folder, None if the file is not there."""
        try:
            return read_json(self.path / name)
        except FileNotFoundError:
            return None
        except ValueError:
            raise ValueError(
                f"{self._said}: {name} is damaged; delete that file if this is the same run, "
                "or choose another output_dir"
            ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _shortened_json(value: Any) -> str:
    return shorten(value if isinstance(value, str) else json.dumps(value))
