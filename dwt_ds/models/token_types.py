"""A model's embedding of token types swapped for one that is quick on a GPU."""

from __future__ import annotations

from torch import Tensor, nn


class OneTokenType(nn.Embedding):
    """For rows that are all of type 0. On a GPU the gradient of a look-up takes long if all tokens look up one row."""

    def forward(self, token_types: Tensor) -> Tensor:
        """(B, S) to (B, S, H)."""
        return self.weight[0].expand(*token_types.shape, -1)


def use_one_token_type(model: nn.Module) -> None:
    """Swap the embedding of token types, in place, where the model has one."""
    for name, module in list(model.named_modules()):
        if name.endswith(".token_type_embeddings") and isinstance(module, nn.Embedding):
            swapped = OneTokenType(module.num_embeddings, module.embedding_dim, device="meta")
            swapped.weight = module.weight
            model.set_submodule(name, swapped)
