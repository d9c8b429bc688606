"""The LLaVA models of the shapes world, in transformers' own classes.

Teacher and student read the image through the same small SigLIP tower, as in the paper: the
student's copy is frozen. Their decoders differ in width *and in the number of heads*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastalign.evals.shapes.tokenizer import PATCH, build_tokenizer
from fastalign.evals.shapes.world import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

VISION_WIDTH = 64


def vision_config() -> SiglipVisionConfig:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def config(width: int, layers: int, heads: int, *, init: float) -> LlavaConfig:
    """A LLaVA over the tower above and a Llama decoder; ``init`` is the weights' initial std."""
    from transformers import LlamaConfig, LlavaConfig

    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        initializer_range=init,
        tie_word_embeddings=False,
    )


def build_teacher(seed: int = 0, *, layers: int = 4) -> LlavaForConditionalGeneration:
    """An untrained teacher: width 128, 4 heads."""
    return _build(config(128, layers, 4, init=0.06), seed)


def build_student(
    seed: int = 0, teacher: LlavaForConditionalGeneration | None = None, *, layers: int = 4
) -> LlavaForConditionalGeneration:
    """An untrained student: width 64, 2 heads. The teacher's tower is copied and frozen."""
    student = _build(config(64, layers, 2, init=0.06), seed)
    if teacher is not None:
        tower = teacher.model.vision_tower.state_dict()
        student.model.vision_tower.load_state_dict(tower)
    student.model.vision_tower.requires_grad_(False)
    return student


def _build(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)
