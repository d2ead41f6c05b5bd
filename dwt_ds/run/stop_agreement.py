"""How the ranks agree to stop: all of them after the same step."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from dwt_ds.engine import ranks
from dwt_ds.run.stop import StopRequest

# On a network file system each look is a request to its server, for which a step would wait.
_SECONDS_BETWEEN_LOOKS = 1.0


class StopAgreement:
    """Whether the ranks stop. `request` is this rank's; rank 0 also looks for one in the run's folder, now and then."""

    agreed: bool
    """All ranks know that one of them was asked to stop."""

    def __init__(self, request: StopRequest, folder: Path) -> None:
        self._request, self._folder = request, folder if ranks.rank() == 0 else None
        self._next_look = time.monotonic()
        self._ranks_to_stop: ranks.HostCopy | None = None
        self.agreed = False

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        now = time.monotonic()
        if now < self._next_look:
            return self._request.is_asked(None)
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        return self._request.is_asked(self._folder)

    def agree(self) -> None:
        """Ask all ranks now, unless they have agreed: a collective, for which the host waits."""
        if not self.agreed:
            asked = torch.tensor([int(self.is_asked())]).to(ranks.device())
            self.agreed = bool(ranks.reduce_sum(asked))

    def agree_late(self, ranks_to_stop: Tensor) -> None:
        """Note a step's sum of `is_asked` over the ranks, 0-d; it counts after the next step, so that no rank waits."""
        before, self._ranks_to_stop = self._ranks_to_stop, ranks.HostCopy(ranks_to_stop)
        self.agreed = before is not None and before.number() > 0

    def reasons(self) -> str:
        """Of all ranks, for people; a collective."""
        return ", ".join(sorted({reason for reason in ranks.gather_from_ranks(self._request.reason) if reason}))
