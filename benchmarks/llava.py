"""A random LLaVA over a Llama decoder: the model of the benchmarks that train a step."""

from __future__ import annotations

from typing import Any

import torch

IMAGE = 5
"""The image token's id; other tokens of a batch are drawn above it."""
HEAD_SIZE = 64


def build_llava(
    seed: int,
    length: int,
    *,
    layers: int,
    heads: int,
    intermediate: int,
    vocabulary: int,
    image_size: int,
    patches: int,
) -> Any:
    """The model, float32.

    Args:
        seed: of the weights.
        length: the longest sequence.
        layers, heads, intermediate, vocabulary: of the decoder; heads have size 64.
        image_size: pixels of a side, in patches of 4.
        patches: tokens of an image, (image_size / 4)^2.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=heads * HEAD_SIZE,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=patches,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)
