"""Packages called apex that a test makes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest


def install_apex(monkeypatch: pytest.MonkeyPatch, part: str, **attributes: Any) -> None:
    """With attributes in `apex.PART`; without any, the package from the Python index, which has no such part."""
    name = f"apex.{part}"
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    if attributes:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(attributes)
