"""InternVL, Idefics3, SmolVLM, Pixtral and Mistral, Aya, PaliGemma, Gemma, Llama 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from .case import (
    END,
    HEAD_DIM,
    HEADS,
    IMAGE,
    KV_HEADS,
    LAYERS,
    PAD,
    START,
    VIDEO,
    VOCABULARY,
    WIDTH,
    Batch,
    decoder,
    siglip,
)


def internvl(seed: int) -> Any:
    vision = tf.InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[16, 16],
        patch_size=[4, 4],
    )
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=vision, text_config=decoder(tf.Qwen2Config), image_token_id=IMAGE
        )
    )


def idefics(name: str) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        }
        return getattr(tf, f"{name}ForConditionalGeneration")(
            getattr(tf, f"{name}Config")(
                vision_config=vision,
                text_config=decoder(tf.LlamaConfig),
                image_token_id=IMAGE,
                scale_factor=2,
                pad_token_id=PAD,
            )
        )

    return build


def idefics_images(model: Any, count: int) -> tuple[Batch, list[int]]:
    """[B, images, 3, H, W]; the sample with fewer images gets an empty one, which is dropped."""
    assert count == 3
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[0, 1] = 0
    return {"pixel_values": pixels}, [4] * 3


def mistral3(seed: int) -> Any:
    vision = tf.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        head_dim=8,
    )
    return tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            vision_config=vision,
            text_config=decoder(tf.MistralConfig, sliding_window=None, head_dim=HEAD_DIM),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        )
    )


def pixtral_images(model: Any, count: int) -> tuple[Batch, list[int]]:
    sizes = torch.tensor([[16, 16]] * count)
    return {"pixel_values": torch.randn(count, 3, 16, 16), "image_sizes": sizes}, [4] * count


def pixtral_llava(seed: int) -> Any:
    vision = tf.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        head_dim=8,
    )
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=vision,
            text_config=decoder(tf.MistralConfig, sliding_window=None),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def pixtral_llava_images(model: Any, count: int) -> tuple[Batch, list[int]]:
    sizes = torch.tensor([[12, 12]] * count)
    return {"pixel_values": torch.randn(count, 3, 12, 12), "image_sizes": sizes}, [9] * count


def aya(seed: int) -> Any:
    return tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(
            vision_config=siglip(16),
            text_config=decoder(tf.Cohere2Config, sliding_window=8),
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
        )
    )


def paligemma(text: Any, **changes: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        return tf.PaliGemmaForConditionalGeneration(
            tf.PaliGemmaConfig(
                vision_config=siglip(),
                text_config=decoder(text, head_dim=HEAD_DIM, **changes),
                image_token_index=IMAGE,
                projection_dim=WIDTH,
                hidden_size=WIDTH,
            )
        )

    return build


def gemma3(seed: int) -> Any:
    text = decoder(
        tf.Gemma3TextConfig,
        head_dim=HEAD_DIM,
        sliding_window=6,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=siglip(16),
            text_config=text,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=4,
        )
    )


def gemma4(**changes: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        text = decoder(
            tf.Gemma4TextConfig,
            head_dim=HEAD_DIM,
            sliding_window=6,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **{"hidden_size_per_layer_input": 0, **changes},
        )
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        }
        return tf.Gemma4ForConditionalGeneration(
            tf.Gemma4Config(
                vision_config=vision,
                text_config=text,
                audio_config=None,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                boi_token_id=START,
                eoi_token_id=END,
            )
        )

    return build


def gemma4_images(model: Any, count: int) -> tuple[Batch, list[int]]:
    """4 x 4 patches, pooled 2 x 2."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    batch = {
        "pixel_values": torch.rand(count, 16, 3 * 4 * 4),
        "image_position_ids": places.reshape(1, 16, 2).repeat(count, 1, 1),
    }
    return batch, [4] * count


def llama4(seed: int) -> Any:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "image_size": 16,
        "patch_size": 4,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "intermediate_size_mlp": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": 2,
        "attention_chunk_size": 10,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    return tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )
