"""What `teacher.sharded` does to memory and traffic: the weights cut over the ranks, as ZeRO-3 cuts a student's."""

from __future__ import annotations

from dataclasses import dataclass

from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.plan.communication import Traffic
from dwt_ds.plan.shapes import buffer_bytes
from dwt_ds.plan.zero import Partition, zero_settings


@dataclass(frozen=True)
class ShardedTeacher:
    """A teacher's weights over `ranks` ranks.

    Args:
        model: in the dtype that it computes in, on any device.
        ranks: processes of the run.
    """

    model: GatheredMaskedLM
    ranks: int

    @property
    def bytes(self) -> int:
        """What a rank holds from step to step: its part, small weights whole, and a whole copy of the head."""
        head = [self.model.decoder_weight, self.model.decoder_bias]
        whole = sum(each.numel() for each in head if each is not None)
        return self._size * (self._partition.shards + sum(self._small) + whole) + buffer_bytes(self.model)

    def traffic(self, accumulation: int) -> Traffic:
        """The gathering of the larger weights in each of a step's forward passes."""
        numels = [numel for numel in self._partition.numels if numel > self._persistent]
        gathered = self._size * sum(-(-numel // self.ranks) * self.ranks for numel in numels)
        return Traffic("all_gather", "teacher's weights", gathered * accumulation, len(numels) * accumulation)

    @property
    def _partition(self) -> Partition:
        return Partition([parameter.numel() for parameter in self.model.parameters()], self.ranks)

    @property
    def _small(self) -> list[int]:
        return [numel for numel in self._partition.numels if numel <= self._persistent]

    @property
    def _persistent(self) -> int:
        return zero_settings({}, "bf16", 3).persistence_threshold  # DeepSpeed's default, which the engine leaves alone

    @property
    def _size(self) -> int:
        return self.model.decoder_weight.element_size()
