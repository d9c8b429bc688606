"""What each family of vision-language models needs beyond what all of them share.

They share: a decoder whose layers have ``self_attn``, an attention function from transformers'
registry, ``config.image_token_id``. They differ in who sees whom: some let image tokens, or a
prefix, see each other in both directions. That is all a ``Family`` says; masks that it states
wrongly are caught by comparing them with the mask that the model itself made
(``visibility.check_mask``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]


def _causal(config: Any, inputs: Inputs, layer_type: str) -> Tensor | None:
    return None


def _runs(member: Tensor) -> Tensor:
    """[B, L] int: consecutive True positions share a number, -1 elsewhere."""
    before = torch.nn.functional.pad(member, (1, 0))[:, :-1]
    return torch.where(member, (member & ~before).cumsum(-1) - 1, -1)


def _gemma3_blocks(config: Any, inputs: Inputs, layer_type: str) -> Tensor | None:
    """An image's tokens see each other on every layer, once token_type_ids are given."""
    types = inputs.get("token_type_ids")
    return None if types is None else _runs(types == 1)


def _gemma4_blocks(config: Any, inputs: Inputs, layer_type: str) -> Tensor | None:
    """On sliding layers only, and only where the configuration asks for it."""
    types = inputs.get("mm_token_type_ids")
    text = config.get_text_config()
    if types is None or getattr(text, "use_bidirectional_attention", None) != "vision":
        return None
    return _runs((types == 1) | (types == 2)) if layer_type == "sliding_attention" else None


def _paligemma_blocks(config: Any, inputs: Inputs, layer_type: str) -> Tensor | None:
    """The prefix (token_type_ids 0) sees itself in both directions, sliding layers included."""
    types = inputs.get("token_type_ids")
    return None if types is None else torch.where(types == 0, 0, -1)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_types: the ``config.model_type`` of its models.
        blocks: (config, inputs, layer type) -> [B, L] integers or None: tokens of the same block
            >= 0 see each other both ways on layers of that type (``"full_attention"``, ...).
        needs: entries that a batch with images must have; without them positions or masks would
            silently be others.
        cut_blocks: whether a sliding window hides keys of the row's own block, too, if they lie before it.
    """

    model_types: tuple[str, ...]
    blocks: Callable[[Any, Inputs, str], Tensor | None] = _causal
    needs: tuple[str, ...] = ()
    cut_blocks: bool = False


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make models of ``family.model_types`` known; a later registration replaces an earlier one."""
    for model_type in family.model_types:
        FAMILIES[model_type] = family


for _family in (
    Family(("llava", "vipllava")),
    Family(("llava_next", "llava_onevision"), needs=("image_sizes",)),
    Family(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        needs=("mm_token_type_ids", "image_grid_thw"),
    ),
    Family(("internvl", "idefics3", "smolvlm", "aya_vision")),
    Family(("mistral3",), needs=("image_sizes",)),
    Family(("paligemma",), blocks=_paligemma_blocks),
    Family(("gemma3",), blocks=_gemma3_blocks, cut_blocks=True),
    Family(("gemma4",), blocks=_gemma4_blocks, cut_blocks=True),
    Family(("llama4",)),
):
    register_family(_family)


def family_of(config: Any) -> Family:
    """The family of a model's configuration.

    Raises:
        ValueError: a family that is not known.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"the model's config.model_type is {config.model_type!r}; allowed: "
            f"{', '.join(sorted(FAMILIES))}, or one added with fastalign.models.register_family"
        )
    return family
