"""Encoder layers compiled one by one by torch.compile.

Layers and not whole models, so that the hooks that DeepSpeed puts on parameters and modules stay outside of what is
compiled, and so that all layers of a model share one compiled program.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dwt_ds.models.masked_lm.families import encoder_layers, known_layers

# Student and teacher share the code of a layer. torch compiles it for training, for evaluation and for the teacher,
# each with padding and without, for the first size and then for any size: 12 programs. After 8, its default limit, it
# runs the layers uncompiled. A process that trains several models needs more.
_MOST_PROGRAMS = 64


def compile_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Compile the forward pass of each encoder layer, in place; parameters and their names stay the same.

    Another number of labels or a shorter batch compiles once more, for any size.

    Returns:
        The compiled layers: all, but for a last one that is not called as a whole (`encode_at`). Empty for a family
        whose layers are not found, which stays as it is.
    """
    layers = encoder_layers(model)
    if known_layers(model) is not None:
        layers = layers[:-1]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_PROGRAMS)
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    return layers
