"""A configuration of a family: how its tiny model and its batches are made."""

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
            tokens: list[int] = [2, *random_text(2, generator)]
            for _ in range(count):
                image = [VIDEO if self.video else IMAGE] * remaining.pop(0)
                tokens += [START, *image, END, *random_text(1, generator)]
            rows.append(tokens + random_text(8, generator))
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


def random_text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCABULARY, (count,), generator=generator).tolist()


def decoder(cls: Any, **changes: Any) -> Any:
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


def clip(image: int = 12) -> Any:
    """Patches of 4 pixels."""
    return tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image,
        patch_size=4,
    )


def siglip(image: int = 12, patch: int = 4, width: int = 16) -> Any:
    return tf.SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image,
        patch_size=patch,
        vision_use_head=False,
    )


def square_images(size: int, tokens: int) -> Callable[[Any, int], tuple[Batch, list[int]]]:
    """[N, 3, size, size], ``tokens`` a picture."""

    def images(model: Any, count: int) -> tuple[Batch, list[int]]:
        return {"pixel_values": torch.randn(count, 3, size, size)}, [tokens] * count

    return images
