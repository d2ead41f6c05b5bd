"""What `teacher.sharded` does to the teacher's memory and traffic: the engine shards its weights over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM
from dwt_ds.plan.communication import Traffic
from dwt_ds.plan.zero import Partition, ZeroSettings, zero_settings


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of buffers, which are not trained, such as position ids."""
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def head_elements(model: GatheredMaskedLM, entries: int | None = None) -> int:
    """Elements of the decoder's weight and bias, or of so many of its rows."""
    head = [each for each in (model.decoder_weight, model.decoder_bias) if each is not None]
    return sum(each.numel() if entries is None else entries * each[0].numel() for each in head)


@dataclass(frozen=True)
class ShardedTeacher:
    """A teacher whose weights are sharded over the ranks, as ZeRO-3 shards a student's.

    Args:
        model: in the dtype that it computes in, on any device.
        ranks: processes of the run.
        entries: rows of the head that a rank keeps beside it; None: all.
    """

    model: GatheredMaskedLM
    ranks: int
    entries: int | None = None

    @property
    def bytes(self) -> int:
        """What a rank holds from step to step: its shard, small weights whole, and a copy of the head."""
        whole = head_elements(self.model, self.entries)
        small = self._zero.persistent_elements(self._partition)
        return self._zero.element_bytes * (self._partition.shards + small + whole) + buffer_bytes(self.model)

    @property
    def gathered_bytes(self) -> int:
        """What the forward pass has gathered at a time.

        Twice the weights: DeepSpeed copies them out of the buffer that they arrive in, and keeps both.
        """
        return 2 * self._zero.gathered_bytes(self._partition)

    def traffic(self, accumulation: int) -> Traffic:
        """The gathering of the larger weights in each of a step's forward passes."""
        gathered, weights = self._zero.sharded_weights(self._partition)
        return Traffic("all_gather", "teacher's weights", gathered * accumulation, weights * accumulation)

    @property
    def _partition(self) -> Partition:
        return Partition([parameter.numel() for parameter in self.model.parameters()], self.ranks)

    @property
    def _zero(self) -> ZeroSettings:
        """The engine leaves DeepSpeed's defaults alone; without a backward pass nothing is kept for a second use."""
        precision = "fp32" if self.model.decoder_weight.element_size() == 4 else "bf16"
        return zero_settings({"zero_optimization": {"stage3_max_reuse_distance": 0}}, precision, 3)
