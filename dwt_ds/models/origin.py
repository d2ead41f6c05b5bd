"""Where a model's weights came from, as a short text that tells two versions apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dwt_ds.models.build import load_model_config, without_tilde

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def weights_origin(path: str | None, *, trust_remote_code: bool = False) -> str | None:
    """sha256 over the weight files of a local folder, or the hub's revision of a named model; None for None.

    Args:
        path: a folder in Hugging Face format, or a model's name there.
        trust_remote_code: run Python code that comes with a named model; its configuration may need it.

    Raises FileNotFoundError and ValueError as load_model_config does.
    """
    if path is None:
        return None
    folder = Path(without_tilde(path))
    if not folder.is_dir():
        config = load_model_config(path, trust_remote_code=trust_remote_code)
        return f"revision {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            with open(file, "rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
    return f"sha256 {digest.hexdigest()}"
