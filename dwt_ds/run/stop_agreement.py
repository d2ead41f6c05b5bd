"""How the ranks agree to stop: all of them after the same step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dwt_ds.engine import ranks
from dwt_ds.run.stop import StopRequest


class StopAgreement:
    """Whether the ranks stop. `request` is this rank's; rank 0 also looks for one in the run's folder."""

    agreed: bool
    """All ranks know that one of them was asked to stop."""

    def __init__(self, request: StopRequest, folder: Path) -> None:
        self._request, self._folder = request, folder if ranks.rank() == 0 else None
        self._ranks_to_stop = LateNumber()
        self.agreed = False

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._request.is_asked(self._folder)

    def agree(self) -> None:
        """Ask all ranks now, unless they have agreed: a collective, for which the host waits."""
        if not self.agreed:
            asked = torch.tensor([int(self.is_asked())]).to(ranks.device())
            self.agreed = bool(ranks.reduce_sum(asked))

    def agree_late(self, ranks_to_stop: Tensor) -> None:
        """Note a step's sum of `is_asked` over the ranks, 0-d; it counts after the next step, so that no rank waits."""
        self.agreed = self._ranks_to_stop.exchange(ranks_to_stop) > 0

    def reasons(self) -> str:
        """Of all ranks, for people; a collective."""
        return ", ".join(sorted({reason for reason in ranks.gather_from_ranks(self._request.reason) if reason}))


class LateNumber:
    """A number of each step, computed on the device and read one step later, so that the host does not wait for it."""

    def __init__(self) -> None:
        self._number = torch.zeros(())
        self._copied: torch.cuda.Event | None = None

    def exchange(self, number: Tensor) -> float:
        """Start the copy of this step's `number`, 0-d; returns that of the step before, at first 0."""
        if self._copied is not None:
            self._copied.synchronize()
        before = float(self._number)
        if number.device.type == "cuda":
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._number = number
        return before
