"""All ranks run the same software on the same data, or none of them trains.

A host with another version would not fail: it would send gradients of another function, or of other text, into every
rank's average.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dwt_ds.base.software import host_name, software
from dwt_ds.base.words import table
from dwt_ds.engine import ranks
from dwt_ds.engine.ranks import AllRanksError, OtherRankError


class RankFacts(NamedTuple):
    """What one rank has."""

    host: str
    facts: dict[str, str]


def require_same_software() -> None:
    """Compare versions over all ranks, before anything is built.

    Raises AllRanksError with a table of who has what on rank 0, OtherRankError on the others.
    """
    _require_same(software(), "the hosts run different software; install the same on each of them")


def require_same_data(fingerprint: str, tokenizer_sha256: str, settings: Mapping[str, Any]) -> None:
    """Compare the data folder's rows, its tokenizer and the resolved settings over all ranks. Raises as above."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    facts = {"data": fingerprint[:12], "tokenizer": tokenizer_sha256[:12], "settings": digest[:12]}
    _require_same(facts, "the hosts read different data or settings; put the same files at the same path on each")


def _require_same(facts: dict[str, str], problem: str) -> None:
    everyone = ranks.gather_from_ranks(RankFacts(host_name(), facts))
    table = disagreements(everyone)
    if not table:
        return
    if ranks.rank() == 0:
        raise AllRanksError(f"{problem}:\n{table}")
    raise OtherRankError(problem)


def disagreements(everyone: Sequence[RankFacts]) -> str:
    """A table of what is not the same on all ranks: each value, and which ranks on which hosts have it. "" if none."""
    names = dict.fromkeys(name for _, facts in everyone for name in facts)
    lines = [("what", "value", "who")]
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(everyone):
            holders.setdefault(facts.get(name, "none"), []).append(rank)
        if len(holders) == 1:
            continue
        for i, (value, of_ranks) in enumerate(holders.items()):
            lines.append(("" if i else name, value, _who(of_ranks, everyone)))
    if len(lines) == 1:
        return ""
    return "\n".join(f"  {line}" for line in table(lines))


def _who(of_ranks: list[int], everyone: Sequence[RankFacts]) -> str:
    hosts: dict[str, list[int]] = {}
    for rank in of_ranks:
        hosts.setdefault(everyone[rank].host, []).append(rank)
    return ", ".join(f"{host} ({_rank_list(numbers)})" for host, numbers in hosts.items())


def _rank_list(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]}-{numbers[-1]}"
    return f"ranks {', '.join(map(str, numbers))}"
