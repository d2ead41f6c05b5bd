"""Check that all ranks run the same software on the same data, and write to one folder, before any of them trains.

A host with another version or other data would not fail: it would add wrong gradients to the average of all ranks.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dwt_ds.base.files import appears
from dwt_ds.base.software import host_name, software
from dwt_ds.base.words import table
from dwt_ds.engine import ranks
from dwt_ds.engine.ranks import AllRanksError, OtherRankError

# How long a file server may take to show one host what another has written.
_VISIBLE_SECONDS = 15.0


class RankFacts(NamedTuple):
    """Name -> version or hash, on one rank."""

    host: str
    facts: dict[str, str]


def require_same_software() -> None:
    """Compare the versions of all ranks, before anything is built.

    Raises:
        AllRanksError: on rank 0, with a table of the differences; OtherRankError on the others.
    """
    _require_same(software(), "the hosts run different software; install the same on each of them")


def require_same_data(fingerprints: Mapping[str, str], tokenizer_sha256: str, settings_sha256: str) -> None:
    """Compare data folders, tokenizer and resolved settings of all ranks; raises as `require_same_software` does.

    Args:
        fingerprints: of the rows of each data folder, by what the folder is for.
        tokenizer_sha256: of all of them.
        settings_sha256: of the recipe and the DeepSpeed JSON.
    """
    facts = {**fingerprints, "tokenizer": tokenizer_sha256, "settings": settings_sha256}
    facts = {name: fact[:12] for name, fact in facts.items()}
    _require_same(facts, "the hosts read different data or settings; put the same files at the same path on each")


def require_same_teacher(weights: str | None, tokenizer_sha256: str | None) -> None:
    """Compare the teachers of all ranks; raises as `require_same_software` does.

    Args:
        weights: a text that tells two versions of them apart; None without a teacher.
        tokenizer_sha256: of the teacher's own; None for the data folder's.
    """
    facts = {"teacher": (weights or "none")[:20], "teacher's tokenizer": (tokenizer_sha256 or "none")[:12]}
    _require_same(facts, "teacher.path: the hosts read different teachers; put the same files at the same path on each")


def require_shared_folder(folder: Path) -> None:
    """Have every rank find a file that rank 0 writes to the run's folder.

    Otherwise a host would write its shards of a checkpoint to a folder of its own, without an error, and no checkpoint
    could be loaded. Raises AllRanksError of one line on the first rank that does not find it, OtherRankError on others.
    """
    mark = folder / ranks.broadcast_from_rank_0(f".ranks-{secrets.token_hex(8)}")
    with ranks.raise_on_all_ranks():
        if ranks.rank() == 0:
            mark.touch()
    try:
        with ranks.raise_on_all_ranks():
            if not appears(mark, _VISIBLE_SECONDS):
                raise ValueError(
                    f"output_dir: rank {ranks.rank()} on {host_name()} does not see in {folder.resolve()} what rank 0 "
                    "writes there; name a folder that all hosts share"
                )
    finally:
        if ranks.rank() == 0:
            mark.unlink(missing_ok=True)


def require_same_choices(choices: dict[str, str]) -> None:
    """Compare what each rank's machine can run, where that decides (what is chosen -> the choice).

    Raises as `require_same_software` does.
    """
    problem = "the hosts would run different code; install the same on each of them, or name one in the settings"
    _require_same(choices, problem)


def _require_same(facts: dict[str, str], problem: str) -> None:
    differing = disagreements(ranks.gather_from_ranks(RankFacts(host_name(), facts)))
    if differing and ranks.rank() == 0:
        raise AllRanksError(f"{problem}:\n{differing}")
    if differing:
        raise OtherRankError(problem)


def disagreements(everyone: Sequence[RankFacts]) -> str:
    """A table of the facts that differ: each value, with the hosts and ranks that have it; "" if none differs."""
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
