"""The smaller model: a standard one of the same class, its tensors cut from the large one's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .choose import Kept
from .importance import Importance
from .structure import LLAVA_TYPES, MERGER_SIZE, TIED_HEAD_SIZE, Structure, renamed


def cut(model: Any, kept: Kept, importance: Importance) -> Any:
    """A new model, on the CPU, in eval mode, that owns its tensors.

    Where the hidden size shrinks, an RMSNorm divides by the root mean square of fewer entries. Its weight
    is multiplied by the ratio of the two, measured on the calibration data, so that what stays keeps its
    size; dimensions that were always zero can so be cut without any change (up to the norm's epsilon).

    Args:
        kept: from ``choose``. importance: from ``measure``, of the same model.
    """
    from transformers import AutoModelForImageTextToText

    structure = Structure(model)
    config = shrunk_config(structure, kept)
    dtype = next(model.parameters()).dtype
    made = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    old = model.state_dict()
    new: dict[str, Tensor] = {}
    for name in made.state_dict():
        place = structure.place(name)
        source, position = name, None
        if place.layer is not None:
            position = place.layer
            source = renamed(place, kept.layers[position])
        tensor = old[source].detach().cpu()
        for dim, axis in enumerate(place.axes):
            if axis is not None:
                tensor = tensor.index_select(dim, _entries(structure, kept, axis, position))
        if source in structure.norms and len(kept.hidden) < structure.text.hidden_size:
            tensor = tensor * _rescale(importance.power[source], kept.hidden).to(dtype)
        new[name] = tensor
    made.load_state_dict(new)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def shrunk_config(structure: Structure, kept: Kept) -> Any:
    """The configuration of the smaller model."""
    config = copy.deepcopy(structure.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept.layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept.layers]
    text.hidden_size = len(kept.hidden)
    text.num_attention_heads = len(kept.heads[0])
    text.num_key_value_heads = len(kept.kv_heads[0])
    text.intermediate_size = len(kept.mlp[0])
    if text.model_type not in TIED_HEAD_SIZE:
        text.head_dim = structure.head_size  # else it would follow from hidden_size / heads
    if config.model_type not in LLAVA_TYPES:
        setattr(config.vision_config, MERGER_SIZE[config.model_type], len(kept.hidden))
    return config


def _entries(structure: Structure, kept: Kept, axis: str, layer: int | None) -> Tensor:
    """The indices along an axis that stay; ``layer`` counts the kept ones."""
    if axis == "hidden":
        return torch.tensor(kept.hidden)
    if axis == "projector":
        assert kept.projector is not None
        return torch.tensor(kept.projector)
    assert layer is not None
    if axis == "mlp":
        return torch.tensor(kept.mlp[layer])
    heads = torch.tensor(kept.heads[layer] if axis == "heads" else kept.kv_heads[layer])
    size = structure.head_size
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _rescale(power: Tensor, hidden: list[int]) -> Tensor:
    """sqrt(mean square of the kept entries / mean square of all): scalar, float64."""
    kept, all_of_them = power[hidden].mean(), power.mean()
    return torch.where(all_of_them > 0, kept / all_of_them, torch.ones_like(kept)).sqrt()
