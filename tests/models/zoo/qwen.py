"""Qwen2-VL to Qwen3.5: M-RoPE, grids that come with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from .case import END, HEADS, IMAGE, KV_HEADS, LAYERS, PAD, START, VIDEO, VOCABULARY, WIDTH, Batch

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen_vl(name: str, vision: dict[str, Any], **text: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        config = getattr(tf, f"{name}Config")
        text_config = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "rope_parameters": dict(MROPE),
            "pad_token_id": PAD,
            "bos_token_id": 2,
            "eos_token_id": 1,
        }
        text_config.update(text)
        return getattr(tf, f"{name}ForConditionalGeneration")(
            config(
                text_config=text_config,
                vision_config=dict(patch_size=4, num_heads=2, depth=1, **vision),
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                vision_start_token_id=START,
                vision_end_token_id=END,
            )
        )

    return build


def qwen_images(model: Any, count: int) -> tuple[Batch, list[int]]:
    """Images of 4 x 4 and 4 x 6 patches, merged 2 x 2."""
    grid = torch.tensor([[1, 4, 4 + 2 * (i % 2)] for i in range(count)])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    return {"pixel_values": pixels, "image_grid_thw": grid}, (grid.prod(-1) // 4).tolist()


def qwen_videos(frames: int = 2, width: int = 4) -> Callable[[Any, int], tuple[Batch, list[int]]]:
    """Videos of ``frames`` temporal patches of 4 x ``width``, merged 2 x 2."""

    def videos(model: Any, count: int) -> tuple[Batch, list[int]]:
        grid = torch.tensor([[frames, 4, width]] * count)
        pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
        batch = {"pixel_values_videos": pixels, "video_grid_thw": grid}
        return batch, (grid.prod(-1) // 4).tolist()

    return videos


QWEN2 = {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 1}
QWEN25 = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": WIDTH,
    "fullatt_block_indexes": [0],
}
QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 16,
}
