"""Tiny random vision-language models with processors of their own; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from fastalign.evals.images import Picture
from fastalign.evals.shapes.tokenizer import build_processor, build_tokenizer

from .stubs import image

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def picture(number: int, size: tuple[int, int] = (32, 32)) -> Picture:
    """Noise, so that no two look alike."""
    import io

    from PIL import Image

    from fastalign.evals.files import Encoded

    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    data = out.getvalue()
    assert data != image(number)
    return Picture(f"picture {number}", Encoded(lambda: data))


@dataclass(frozen=True)
class Pair:
    """A model and its processor; its chat template is ``TEMPLATE``."""

    model: Any
    processor: Any


def _sharpen(model: Any) -> Any:
    """Weights that make the replies depend on the images and the words."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.data.normal_(0, 0.3)
            elif name.endswith(("v_proj.weight", "o_proj.weight", "lm_head.weight")):
                parameter.data.normal_(0, 1.0)
            elif "project" in name or "connector" in name:
                parameter.data.normal_(0, 0.5)
            elif name.endswith("embed_tokens.weight"):
                parameter.data.normal_(0, 0.3)
    return model.eval()


def _tokenizer(**special: str) -> Any:
    base = build_tokenizer()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        bos_token=base.bos_token,
        eos_token=base.eos_token,
        pad_token=base.pad_token,
        extra_special_tokens=special,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _decoder(cls: Any, tokenizer: Any, **changes: Any) -> Any:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return cls(**sizes, **changes)


def _siglip(size: int = 16) -> Any:
    return tf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=4,
        vision_use_head=False,
    )


def _built(cls: Any, config: Any, processor: Any) -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair(_sharpen(cls(config)), processor)


def llava() -> Pair:
    from fastalign.evals.shapes.models import build_student

    processor = build_processor()
    processor.chat_template = TEMPLATE.replace("IMAGE", "<image>")
    return Pair(_sharpen(build_student(0)), processor)


def llava_next() -> Pair:
    """Images of different numbers of tiles, and their sizes."""
    tokenizer = _tokenizer(image_token="<image>")
    points = [[16, 32], [32, 16], [32, 32]]
    size = {"height": 16, "width": 16}
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=points
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = tf.LlavaNextConfig(
        vision_config=_siglip(),
        text_config=_decoder(tf.Qwen2Config, tokenizer),
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=points,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _built(tf.LlavaNextForConditionalGeneration, config, processor)


def idefics3() -> Pair:
    """A sample's images stand in a dimension of their own, with a mask of their pixels."""
    tokenizer = _tokenizer()
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = tf.Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config=_decoder(tf.LlamaConfig, processor.tokenizer),
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _built(tf.Idefics3ForConditionalGeneration, config, processor)


def gemma3() -> Pair:
    """Sliding windows, and image tokens that see each other in both directions."""
    tokenizer = _tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<boi>"),
    )
    text = _decoder(
        tf.Gemma3TextConfig,
        tokenizer,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    config = tf.Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        tie_word_embeddings=False,
    )
    return _built(tf.Gemma3ForConditionalGeneration, config, processor)


PAIRS: dict[str, Callable[[], Pair]] = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "gemma3": gemma3,
}
