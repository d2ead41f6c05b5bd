"""Results of finished (task, seed) pairs, a file each, so that no pair is run twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwt_ds.base.files import atomic_file
from dwt_ds.base.trees import differences

MADE_WITH = "made_with"


class FinishedPairs:
    """The folder `pairs` under the output folder."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "pairs"

    def path(self, task: str, seed: int) -> Path:
        return self._folder / task / f"seed_{seed}.json"

    def read(self, task: str, seed: int, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
        """The pair's result; None if it has not been run.

        Args:
            made_with: all that the result depends on, as JSON has it.

        Raises:
            ValueError: there is a result that was made with something else; the line names what.
        """
        path = self.path(task, seed)
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            different = differences(result[MADE_WITH], made_with)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: no result of dwt-ds glue; delete it to run this pair again") from error
        if different:
            name, then, now = different[0]
            raise ValueError(f"{path} was made with {name} = {then}, now it is {now}; choose another --out")
        return dict(result)

    def write(self, task: str, seed: int, made_with: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        path = self.path(task, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps({**result, MADE_WITH: made_with}, indent=1).encode())
