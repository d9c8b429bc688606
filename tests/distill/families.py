"""Tiny Qwen2.5-VL and LLaVA-OneVision pairs with processors of their own; nothing is downloaded.

The processors are transformers' own but for their video part, which needs torchvision; one without it
cannot be loaded from a folder, so the tests hand it to the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.processing_utils import ProcessorMixin

from ..evals.models import _siglip, _tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _text(tokenizer: Any, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 8 * heads,
        "intermediate_size": 16 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


class _ImagesOnly:
    """In front of a processor class: its tokens and image part, no video part."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        **own: Any,
    ) -> None:
        for kind in ("image", "video"):
            token = getattr(tokenizer, f"{kind}_token")
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
        for name, value in own.items():
            setattr(self, name, value)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class QwenImages(_ImagesOnly, tf.Qwen2_5_VLProcessor):  # type: ignore[misc]
    pass


class OnevisionImages(_ImagesOnly, tf.LlavaOnevisionProcessor):  # type: ignore[misc]
    pass


def qwen2_5_vl(layers: int, heads: int) -> tuple[Any, Any]:
    """Windows of patches merged 2 x 2, M-RoPE; as many image tokens as the picture is large."""
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    tokenizer = _tokenizer(
        image_token=names["image"],
        video_token=names["video"],
        vision_start="<|vision_start|>",
        vision_end="<|vision_end|>",
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = QwenImages(
        tf.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", image),
    )
    config = tf.Qwen2_5_VLConfig(
        text_config={
            **_text(tokenizer, layers, heads),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "patch_size": 4,
            "num_heads": 2,
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "out_hidden_size": 8 * heads,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids(names["image"]),
        video_token_id=tokenizer.convert_tokens_to_ids(names["video"]),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def llava_onevision(layers: int, heads: int) -> tuple[Any, Any]:
    """Tiles of different number, newline tokens, image sizes."""
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    points = [[16, 32], [32, 16], [32, 32]]
    processor = OnevisionImages(
        tf.LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=points
        ),
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=tf.Qwen2Config(**_text(tokenizer, layers, heads)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=points,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "llava_onevision": llava_onevision}


def write_pair(family: str, folder: Path) -> Any:
    """``student`` and ``teacher`` of different depth, width and heads; returns their processor."""
    for seed, (name, layers, heads) in enumerate((("student", 2, 2), ("teacher", 3, 4))):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, processor = FAMILIES[family](layers, heads)
        model.save_pretrained(folder / name)
    return processor
