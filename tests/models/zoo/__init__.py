"""Tiny random-weight models of every supported family, and batches as their processors make them.

Nothing is downloaded. Each case builds a model whose q and k are scaled up (a map of equal weights
would prove nothing), and batches of two samples with one and two images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as tf

from .case import HEAD_DIM, IMAGE, Batch, Case, square_images
from .llava import (
    TEXTS,
    llava_next,
    llava_onevision,
    llava_over,
    siglip_llama,
    siglip_qwen3,
    tiles,
)
from .others import (
    aya,
    gemma3,
    gemma4,
    gemma4_images,
    idefics,
    idefics_images,
    internvl,
    llama4,
    mistral3,
    paligemma,
    pixtral_images,
    pixtral_llava,
    pixtral_llava_images,
)
from .qwen import MROPE, QWEN2, QWEN3, QWEN25, qwen_images, qwen_videos, qwen_vl

__all__ = [
    "CASES",
    "IMAGE",
    "LARGER_NEXT",
    "LONGER_VIDEO",
    "SIGLIP_LLAMA",
    "SIGLIP_QWEN3",
    "Batch",
    "Case",
    "onevision_of_many_tiles",
]

CASES: list[Case] = [
    *(
        Case(
            f"LLaVA-1.5, {name} text", llava_over(text), square_images(12, 9), base=base, note=note
        )
        for name, (text, base, note) in TEXTS.items()
    ),
    Case("LLaVA with Pixtral tower", pixtral_llava, pixtral_llava_images, note="image_sizes"),
    Case("LLaVA-NeXT", llava_next, tiles, note="tiles and newlines; image_sizes"),
    Case("LLaVA-OneVision", llava_onevision, tiles, note="tiles and newlines; image_sizes"),
    Case("Qwen2-VL", qwen_vl("Qwen2VL", QWEN2), qwen_images, "mm_token_type_ids", note="M-RoPE"),
    Case(
        "Qwen2-VL, sliding",
        qwen_vl("Qwen2VL", QWEN2, use_sliding_window=True, sliding_window=6, max_window_layers=2),
        qwen_images,
        "mm_token_type_ids",
        note="M-RoPE, upper layers sliding",
    ),
    Case(
        "Qwen2-VL, video",
        qwen_vl("Qwen2VL", QWEN2),
        qwen_videos(),
        "mm_token_type_ids",
        note="video tokens",
        video=True,
    ),
    Case(
        "Qwen2.5-VL", qwen_vl("Qwen2_5_VL", QWEN25), qwen_images, "mm_token_type_ids", note="M-RoPE"
    ),
    Case(
        "Qwen3-VL",
        qwen_vl("Qwen3VL", dict(QWEN3, deepstack_visual_indexes=[0]), head_dim=HEAD_DIM),
        qwen_images,
        "mm_token_type_ids",
        note="M-RoPE, q/k norm, deepstack",
    ),
    Case(
        "Qwen3.5",
        qwen_vl(
            "Qwen3_5",
            QWEN3,
            head_dim=HEAD_DIM,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            rope_parameters=dict(MROPE, partial_rotary_factor=1.0),
        ),
        qwen_images,
        "mm_token_type_ids",
        note="hybrid: full-attention layers only; gated attention",
    ),
    Case("InternVL", internvl, square_images(16, 4), note="GQA"),
    Case("Idefics3", idefics("Idefics3"), idefics_images, note="GQA"),
    Case("SmolVLM", idefics("SmolVLM"), idefics_images, note="GQA"),
    Case("Mistral3", mistral3, pixtral_images, note="Pixtral tower; image_sizes"),
    Case("Aya Vision", aya, square_images(16, 4), note="sliding layers"),
    Case(
        "PaliGemma",
        paligemma(tf.GemmaConfig),
        square_images(12, 9),
        "prefix",
        note="bidirectional prefix",
    ),
    Case(
        "PaliGemma 2",
        paligemma(
            tf.Gemma2Config,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=16,
        ),
        square_images(12, 9),
        "prefix",
        base="eager",
        note="bidirectional prefix, softcap, sliding layers; no sdpa in transformers",
    ),
    Case("Gemma 3, causal", gemma3, square_images(16, 4), note="sliding layers; no token_type_ids"),
    Case(
        "Gemma 3",
        gemma3,
        square_images(16, 4),
        "token_type_ids",
        note="bidirectional images, sliding",
    ),
    Case("Gemma 4", gemma4(), gemma4_images, "mm_token_type_ids", note="sliding, scaling 1"),
    Case(
        "Gemma 4, bidirectional",
        gemma4(use_bidirectional_attention="vision"),
        gemma4_images,
        "mm_token_type_ids",
        note="images bidirectional on sliding layers only",
    ),
    Case(
        "Gemma 4, shared KV",
        gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8),
        gemma4_images,
        "mm_token_type_ids",
        note="upper layers reuse keys; sliding",
    ),
    Case("Llama 4", llama4, square_images(16, 4), note="chunked layers, NoPE, temperature tuning"),
]

#: A pair as of CompoDistill: one tower's kind, other decoders, depths, heads and head sizes.
SIGLIP_QWEN3 = Case("SigLIP + Qwen3", siglip_qwen3, square_images(12, 9))
SIGLIP_LLAMA = Case("SigLIP + Llama", siglip_llama, square_images(12, 9))

#: Teachers whose grids differ from those of the case that they are named after.
LARGER_NEXT = Case("larger LLaVA-NeXT", partial(llava_next, side=16), tiles)
LONGER_VIDEO = Case(
    "longer Qwen2-VL video",
    qwen_vl("Qwen2VL", QWEN2),
    qwen_videos(frames=3, width=6),
    "mm_token_type_ids",
    video=True,
)


def onevision_of_many_tiles(seed: int) -> Any:
    """Twenty tiles an image, more than OneVision keeps at their full resolution."""
    return llava_onevision(seed, pinpoints=((48, 60),))
