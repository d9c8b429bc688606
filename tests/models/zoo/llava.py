"""LLaVA-1.5 over six decoders, LLaVA-NeXT, LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf

from .case import HEAD_DIM, IMAGE, VIDEO, Batch, clip, decoder, siglip


def llava_over(text: Callable[[], Any]) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=clip(),
                text_config=text(),
                image_token_id=IMAGE,
                image_seq_length=9,
                vision_feature_layer=-1,
            )
        )

    return build


def siglip_llava(seed: int, text: Any) -> Any:
    """LLaVA over a SigLIP tower, which has no class token."""
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=siglip(),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=9,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def siglip_qwen3(seed: int) -> Any:
    """The larger of two: 8 layers of 6 heads, 3 key heads, head size 16."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    return siglip_llava(seed, decoder(tf.Qwen3Config, num_hidden_layers=8, hidden_size=48, **heads))


def siglip_llama(seed: int) -> Any:
    """The smaller: 5 layers of 4 heads, 2 key heads, head size 8."""
    return siglip_llava(seed, decoder(tf.LlamaConfig, num_hidden_layers=5))


TEXTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (lambda: decoder(tf.LlamaConfig), "sdpa", "GQA"),
    "qwen2": (lambda: decoder(tf.Qwen2Config), "sdpa", "GQA, biases"),
    "qwen3": (lambda: decoder(tf.Qwen3Config, head_dim=16), "sdpa", "q/k norm, head size 16"),
    "mistral": (
        lambda: decoder(tf.MistralConfig, sliding_window=8),
        "sdpa",
        "sliding window in every layer",
    ),
    "gemma2": (
        lambda: decoder(
            tf.Gemma2Config,
            head_dim=HEAD_DIM,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=16,
        ),
        "eager",
        "softcap, every other layer sliding; no sdpa in transformers",
    ),
    "gpt_oss": (
        lambda: decoder(
            tf.GptOssConfig,
            head_dim=HEAD_DIM,
            sliding_window=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "eager",
        "attention sinks, every other layer sliding; no sdpa in transformers",
    ),
}


def tiles(model: Any, count: int) -> tuple[Batch, list[int]]:
    """LLaVA-NeXT and OneVision: images of 12 x 24, a base view and two tiles."""
    sizes = torch.tensor([[12, 24]] * count)
    side = model.config.vision_config.image_size
    pixels = torch.randn(count, 3, 3, side, side)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output
    batch = {"pixel_values": pixels, "image_sizes": sizes}
    return batch, [len(x) for x in features]


def llava_next(seed: int, side: int = 12) -> Any:
    """Tiles of ``side`` pixels, two of them beside each other or one upon the other."""
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=clip(side),
            text_config=decoder(tf.LlamaConfig),
            image_token_id=IMAGE,
            image_grid_pinpoints=[[side, 2 * side], [2 * side, side]],
            vision_feature_layer=-1,
        )
    )


def llava_onevision(seed: int, pinpoints: Sequence[Sequence[int]] = ((12, 24), (24, 12))) -> Any:
    """Tiles of 12 pixels, arranged in one of the ``pinpoints``."""
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=siglip(),
            text_config=decoder(tf.Qwen2Config),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=[list(x) for x in pinpoints],
            vision_feature_layer=-1,
        )
    )
