"""Tiny random-weight LLaVA models and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE = 5
PAD = 0
PATCHES = 9


def llava(
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    text: str = "llama",
    **changes: Any,
) -> Any:
    """A LLaVA over a 3 x 3 patch CLIP tower; q and k large enough to look somewhere."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    configs = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
    }
    width = heads * head_dim
    text_config = configs[text](
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        pad_token_id=PAD,
        **changes,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.data.normal_(0, 0.4)
    return model


def batch(
    *,
    images: tuple[int, ...] = (1, 2),
    lengths: tuple[int, ...] = (17, 29),
    left: bool = False,
    seed: int = 0,
    size: int = 12,
) -> dict[str, Tensor]:
    """Input ids, mask, labels (the last 5 tokens of each) and pixels."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    labels = torch.full_like(ids, -100)
    for row, (count, length) in enumerate(zip(images, lengths, strict=True)):
        tokens = torch.randint(6, 64, (length,), generator=generator)
        for image in range(count):
            start = 2 + image * (PATCHES + 1)
            tokens[start : start + PATCHES] = IMAGE
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = tokens
        marked = torch.full_like(tokens, -100)
        marked[-5:] = tokens[-5:]
        labels[row, place] = marked
    out = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
    if sum(images):
        pixels = torch.randn(sum(images), 3, size, size, generator=generator)
        out["pixel_values"] = pixels
    return out


def checkpoint_layers(model: Any, *, reentrant: bool = False) -> None:
    """Gradient checkpointing, under the name that this release of transformers has for it."""
    arguments = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
