"""A checkpoint for evaluation: any image-text-to-text model, and students of fastalign."""

from __future__ import annotations

import torch

from .vlm import VisionLanguageModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    model: str,
    *,
    processor: str | None = None,
    template: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> VisionLanguageModel:
    """The model in the folder (or of the hub name) ``model``; safetensors only, no remote code.

    Raises:
        ValueError: an unknown dtype. TemplateError: see ``VisionLanguageModel``. OSError: no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..distill import taf  # noqa: F401  (makes the Auto classes know its checkpoints)

    loaded = AutoModelForImageTextToText.from_pretrained(
        model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
    )
    return VisionLanguageModel(
        loaded.to(device), AutoProcessor.from_pretrained(processor or model), template
    )
