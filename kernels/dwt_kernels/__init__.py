"""Masked-LM cross-entropy and temperature KL distillation in one pass, on logits or fused with the linear head.

See ``distill_loss`` (logits in) and ``linear_distill_loss`` (hidden states and head weights in).
"""

from __future__ import annotations

from dwt_kernels.linear import linear_distill_loss
from dwt_kernels.logits import DistillLoss, distill_loss

__all__ = ["DistillLoss", "distill_loss", "linear_distill_loss"]
__version__ = "0.6.9"
