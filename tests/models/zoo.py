"""Tiny random-weight models of every supported family, and batches as their processors make them.

Nothing is downloaded. Each case builds a model whose q and k are scaled up (a map of equal weights
would prove nothing), and batches of two samples with one and two images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

PAD, IMAGE, VIDEO, START, END = 0, 5, 4, 7, 8
FIRST_TEXT, VOCABULARY = 10, 64
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 8
WIDTH = HEADS * HEAD_DIM

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        build: (seed) -> model. images: (model, count) -> entries of the batch for that many images
            and how many tokens each image takes.
        types: the name of the token-type entry of the batch, if the family has one.
        base: the decoder's attention implementation.
        note: what is peculiar, for the support matrix.
    """

    name: str
    build: Callable[[int], Any]
    images: Callable[[Any, int], tuple[Batch, list[int]]]
    types: str | None = None
    base: str = "sdpa"
    note: str = ""
    video: bool = False

    def model(self, seed: int = 0) -> Any:
        """A model with weights drawn from ``seed``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build(seed)
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.data.normal_(0, 0.4)
                if "gemma4" in model.config.model_type and "q_norm.weight" in name:
                    parameter.data.fill_(0.5)  # its scores are not divided by sqrt(head size)
                if name.endswith("sinks"):
                    parameter.data.normal_(0, 1)
        assert model.config.get_text_config()._attn_implementation == self.base
        return model.eval()

    def batch(self, model: Any, *, left: bool, counts: Sequence[int] = (1, 2)) -> Batch:
        """Two samples with ``counts`` images, padded to one length on either side."""
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            extra, lengths = self.images(model, sum(counts))
        remaining, rows = list(lengths), []
        for count in counts:
            tokens: list[int] = [2, *_text(2, generator)]
            for _ in range(count):
                image = [VIDEO if self.video else IMAGE] * remaining.pop(0)
                tokens += [START, *image, END, *_text(1, generator)]
            rows.append(tokens + _text(8, generator))
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), PAD)
        labels = torch.full_like(ids, -100)
        for row, tokens in zip(ids, rows, strict=True):
            row[width - len(tokens) if left else 0 :][: len(tokens)] = torch.tensor(tokens)
        for row, tokens, target in zip(ids, rows, labels, strict=True):
            end = width if left else len(tokens)
            target[end - 5 : end] = row[end - 5 : end]
        batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels, **extra}
        if self.types == "prefix":  # PaliGemma: 0 in the prompt, 1 in the answer
            batch["token_type_ids"] = (labels != -100).long()
        elif self.types is not None:
            kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
            batch[self.types] = kinds
        return batch


def _text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCABULARY, (count,), generator=generator).tolist()


# ------------------------------------------------------------------------------ parts


def _decoder(cls: Any, **changes: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    common.update(changes)
    return cls(**common)


def _clip() -> Any:
    return tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )


def _siglip(image: int = 12, patch: int = 4, width: int = 16) -> Any:
    return tf.SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image,
        patch_size=patch,
        vision_use_head=False,
    )


def _pixels(size: int, tokens: int) -> Callable[[Any, int], tuple[Batch, list[int]]]:
    """[N, 3, size, size], ``tokens`` a picture."""

    def images(model: Any, count: int) -> tuple[Batch, list[int]]:
        return {"pixel_values": torch.randn(count, 3, size, size)}, [tokens] * count

    return images


# ---------------------------------------------------------------------- LLaVA and kin


def _llava(text: Callable[[], Any]) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=_clip(),
                text_config=text(),
                image_token_id=IMAGE,
                image_seq_length=9,
                vision_feature_layer=-1,
            )
        )

    return build


_TEXTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (lambda: _decoder(tf.LlamaConfig), "sdpa", "GQA"),
    "qwen2": (lambda: _decoder(tf.Qwen2Config), "sdpa", "GQA, biases"),
    "qwen3": (lambda: _decoder(tf.Qwen3Config, head_dim=16), "sdpa", "q/k norm, head size 16"),
    "mistral": (
        lambda: _decoder(tf.MistralConfig, sliding_window=8),
        "sdpa",
        "sliding window in every layer",
    ),
    "gemma2": (
        lambda: _decoder(
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
        lambda: _decoder(
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


def _tiles(model: Any, count: int) -> tuple[Batch, list[int]]:
    """LLaVA-NeXT and OneVision: images of 12 x 24, a base view and two tiles."""
    sizes = torch.tensor([[12, 24]] * count)
    pixels = torch.randn(count, 3, 3, 12, 12)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output
    batch = {"pixel_values": pixels, "image_sizes": sizes}
    return batch, [len(x) for x in features]


def _llava_next(seed: int) -> Any:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=_clip(),
            text_config=_decoder(tf.LlamaConfig),
            image_token_id=IMAGE,
            image_grid_pinpoints=[[12, 24], [24, 12]],
            vision_feature_layer=-1,
        )
    )


def _llava_onevision(seed: int) -> Any:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=_siglip(),
            text_config=_decoder(tf.Qwen2Config),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=[[12, 24], [24, 12]],
            vision_feature_layer=-1,
        )
    )


# --------------------------------------------------------------------------- Qwen-VL

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _qwen(name: str, vision: dict[str, Any], **text: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        config = getattr(tf, f"{name}Config")
        text_config = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "rope_parameters": dict(_MROPE),
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


def _patches(model: Any, count: int) -> tuple[Batch, list[int]]:
    """Images of 4 x 4 and 4 x 6 patches, merged 2 x 2."""
    grid = torch.tensor([[1, 4, 4 + 2 * (i % 2)] for i in range(count)])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    return {"pixel_values": pixels, "image_grid_thw": grid}, (grid.prod(-1) // 4).tolist()


def _frames(model: Any, count: int) -> tuple[Batch, list[int]]:
    """Videos of 2 temporal patches of 4 x 4."""
    grid = torch.tensor([[2, 4, 4]] * count)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}, (grid.prod(-1) // 4).tolist()


_QWEN2 = {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 1}
_QWEN25 = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": WIDTH,
    "fullatt_block_indexes": [0],
}
_QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 16,
}


# -------------------------------------------------------------------------- the others


def _internvl(seed: int) -> Any:
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
            vision_config=vision, text_config=_decoder(tf.Qwen2Config), image_token_id=IMAGE
        )
    )


def _idefics(name: str) -> Callable[[int], Any]:
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
                text_config=_decoder(tf.LlamaConfig),
                image_token_id=IMAGE,
                scale_factor=2,
                pad_token_id=PAD,
            )
        )

    return build


def _idefics_pixels(model: Any, count: int) -> tuple[Batch, list[int]]:
    """[B, images, 3, H, W]; the sample with fewer images gets an empty one, which is dropped."""
    assert count == 3
    pixels = torch.randn(2, 2, 3, 16, 16)
    pixels[0, 1] = 0
    return {"pixel_values": pixels}, [4] * 3


def _mistral3(seed: int) -> Any:
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
            text_config=_decoder(tf.MistralConfig, sliding_window=None, head_dim=HEAD_DIM),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        )
    )


def _pixtral_pixels(model: Any, count: int) -> tuple[Batch, list[int]]:
    sizes = torch.tensor([[16, 16]] * count)
    return {"pixel_values": torch.randn(count, 3, 16, 16), "image_sizes": sizes}, [4] * count


def _pixtral_llava(seed: int) -> Any:
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
            text_config=_decoder(tf.MistralConfig, sliding_window=None),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def _pixtral_llava_pixels(model: Any, count: int) -> tuple[Batch, list[int]]:
    sizes = torch.tensor([[12, 12]] * count)
    return {"pixel_values": torch.randn(count, 3, 12, 12), "image_sizes": sizes}, [9] * count


def _aya(seed: int) -> Any:
    return tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(
            vision_config=_siglip(16),
            text_config=_decoder(tf.Cohere2Config, sliding_window=8),
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
        )
    )


def _paligemma(text: Any, **changes: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        return tf.PaliGemmaForConditionalGeneration(
            tf.PaliGemmaConfig(
                vision_config=_siglip(),
                text_config=_decoder(text, head_dim=HEAD_DIM, **changes),
                image_token_index=IMAGE,
                projection_dim=WIDTH,
                hidden_size=WIDTH,
            )
        )

    return build


def _gemma3(seed: int) -> Any:
    text = _decoder(
        tf.Gemma3TextConfig,
        head_dim=HEAD_DIM,
        sliding_window=6,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=_siglip(16),
            text_config=text,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=4,
        )
    )


def _gemma4(**changes: Any) -> Callable[[int], Any]:
    def build(seed: int) -> Any:
        text = _decoder(
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


def _gemma4_pixels(model: Any, count: int) -> tuple[Batch, list[int]]:
    """4 x 4 patches, pooled 2 x 2."""
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    batch = {
        "pixel_values": torch.rand(count, 16, 3 * 4 * 4),
        "image_position_ids": places.reshape(1, 16, 2).repeat(count, 1, 1),
    }
    return batch, [4] * count


def _llama4(seed: int) -> Any:
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


CASES: list[Case] = [
    *(
        Case(f"LLaVA-1.5, {name} text", _llava(text), _pixels(12, 9), base=base, note=note)
        for name, (text, base, note) in _TEXTS.items()
    ),
    Case("LLaVA with Pixtral tower", _pixtral_llava, _pixtral_llava_pixels, note="image_sizes"),
    Case("LLaVA-NeXT", _llava_next, _tiles, note="tiles and newlines; image_sizes"),
    Case("LLaVA-OneVision", _llava_onevision, _tiles, note="tiles and newlines; image_sizes"),
    Case("Qwen2-VL", _qwen("Qwen2VL", _QWEN2), _patches, "mm_token_type_ids", note="M-RoPE"),
    Case(
        "Qwen2-VL, sliding",
        _qwen("Qwen2VL", _QWEN2, use_sliding_window=True, sliding_window=6, max_window_layers=2),
        _patches,
        "mm_token_type_ids",
        note="M-RoPE, upper layers sliding",
    ),
    Case(
        "Qwen2-VL, video",
        _qwen("Qwen2VL", _QWEN2),
        _frames,
        "mm_token_type_ids",
        note="video tokens",
        video=True,
    ),
    Case("Qwen2.5-VL", _qwen("Qwen2_5_VL", _QWEN25), _patches, "mm_token_type_ids", note="M-RoPE"),
    Case(
        "Qwen3-VL",
        _qwen("Qwen3VL", dict(_QWEN3, deepstack_visual_indexes=[0]), head_dim=HEAD_DIM),
        _patches,
        "mm_token_type_ids",
        note="M-RoPE, q/k norm, deepstack",
    ),
    Case(
        "Qwen3.5",
        _qwen(
            "Qwen3_5",
            _QWEN3,
            head_dim=HEAD_DIM,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            rope_parameters=dict(_MROPE, partial_rotary_factor=1.0),
        ),
        _patches,
        "mm_token_type_ids",
        note="hybrid: full-attention layers only; gated attention",
    ),
    Case("InternVL", _internvl, _pixels(16, 4), note="GQA"),
    Case("Idefics3", _idefics("Idefics3"), _idefics_pixels, note="GQA"),
    Case("SmolVLM", _idefics("SmolVLM"), _idefics_pixels, note="GQA"),
    Case("Mistral3", _mistral3, _pixtral_pixels, note="Pixtral tower; image_sizes"),
    Case("Aya Vision", _aya, _pixels(16, 4), note="sliding layers"),
    Case(
        "PaliGemma",
        _paligemma(tf.GemmaConfig),
        _pixels(12, 9),
        "prefix",
        note="bidirectional prefix",
    ),
    Case(
        "PaliGemma 2",
        _paligemma(
            tf.Gemma2Config,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=16,
        ),
        _pixels(12, 9),
        "prefix",
        base="eager",
        note="bidirectional prefix, softcap, sliding layers; no sdpa in transformers",
    ),
    Case("Gemma 3, causal", _gemma3, _pixels(16, 4), note="sliding layers; no token_type_ids"),
    Case(
        "Gemma 3", _gemma3, _pixels(16, 4), "token_type_ids", note="bidirectional images, sliding"
    ),
    Case("Gemma 4", _gemma4(), _gemma4_pixels, "mm_token_type_ids", note="sliding, scaling 1"),
    Case(
        "Gemma 4, bidirectional",
        _gemma4(use_bidirectional_attention="vision"),
        _gemma4_pixels,
        "mm_token_type_ids",
        note="images bidirectional on sliding layers only",
    ),
    Case(
        "Gemma 4, shared KV",
        _gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8),
        _gemma4_pixels,
        "mm_token_type_ids",
        note="upper layers reuse keys; sliding",
    ),
    Case("Llama 4", _llama4, _pixels(16, 4), note="chunked layers, NoPE, temperature tuning"),
]
