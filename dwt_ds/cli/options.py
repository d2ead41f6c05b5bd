"""Parsed options as the fields of a dataclass."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any


def options_of(owner: type, args: argparse.Namespace) -> dict[str, Any]:
    """The options that have the name of a field of the dataclass `owner`."""
    return {each.name: getattr(args, each.name) for each in fields(owner) if hasattr(args, each.name)}
