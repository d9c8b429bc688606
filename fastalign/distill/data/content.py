"""What a sample is, as a name: two samples have it in common if a model gets the same of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: What the dataset says of a sample beside its content.
NOTES = ("skipped_samples", "recorded")


def content_digest(item: Mapping[str, Any]) -> str:
    """sha256 of an encoded sample: every entry's name, type, shape and values, labels included."""
    digest = hashlib.sha256()
    for name in sorted(item):
        if name in NOTES:
            continue
        value = item[name]
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.int64)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
