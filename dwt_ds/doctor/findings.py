"""What was found, and the table of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dwt_ds.base.words import table

_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"


class Finding(NamedTuple):
    """One check on one host; `host` is "" for what concerns all of them together."""

    check: str
    host: str
    good: bool
    found: str
    fix: str = ""
    """What to do where it is not good."""


def render(findings: Sequence[Finding], *, colour: bool) -> str:
    """A line a check, hosts with the same finding together, and the fix beside every FAIL."""
    rows = [("", "check", "host", "found")]
    for same in _alike(findings):
        one = same[0]
        found = one.found if one.good else f"{one.found}  ->  {one.fix}"
        rows.append(("PASS" if one.good else "FAIL", one.check, _hosts([finding.host for finding in same]), found))
    lines = table(rows)
    if colour:
        for verdict, code in (("PASS", _GREEN), ("FAIL", _RED)):
            lines = [re.sub(f"^{verdict}", f"{code}{verdict}{_PLAIN}", line) for line in lines]
    bad = sum(not finding.good for finding in findings)
    lines.append("everything is in order" if not bad else f"{bad} of {len(findings)} checks failed")
    return "\n".join(lines)


def _alike(findings: Sequence[Finding]) -> list[list[Finding]]:
    groups: dict[Finding, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding._replace(host=""), []).append(finding)
    order = list(dict.fromkeys(finding.check for finding in findings))
    return sorted(groups.values(), key=lambda same: order.index(same[0].check))


def _hosts(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} others"
