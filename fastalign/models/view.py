"""A model seen as its attention layers: unwrapping, layers, and the switch to the capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import nn

from .capture import capture_name
from .families import Family, family_of

#: How the bases are named, and the flag by which a decoder says that it can run them.
_SUPPORTED = {
    "sdpa": "_supports_sdpa",
    "flash": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


class ModelView:
    """What the alignment needs to know of one model.

    Attributes:
        role: ``"student"`` or ``"teacher"``, for messages.
        model: the transformers model, without PEFT, DDP or ``torch.compile`` around it.
        config, text_config: its configurations.
        family: what its family needs.
        layers: decoder layer index -> layer; attentions: index -> attention module, only of layers
            that have softmax attention.
    """

    def __init__(self, role: str, model: nn.Module) -> None:
        self.role = role
        self.model: Any = unwrap(role, model)
        self.config: Any = self.model.config
        self.text_config: Any = self.config.get_text_config()
        self.family: Family = family_of(self.config)
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if layers is None:
            layers = decoder.model.layers
        self.layers = dict(enumerate(layers))
        self.attentions: dict[int, Any] = {
            i: layer.self_attn for i, layer in self.layers.items() if hasattr(layer, "self_attn")
        }
        for i, attention in self.attentions.items():
            if attention.config is not self.text_config:
                raise ValueError(
                    f"{role}: the attention of layer {i} has a configuration of its own; allowed: "
                    "the model's text configuration, through which its attention is switched"
                )

    def layer_type(self, layer: int) -> str:
        """``"full_attention"``, ``"sliding_attention"``, ..., as the configuration says."""
        types = getattr(self.text_config, "layer_types", None)
        return "full_attention" if not types else types[layer]

    @cached_property
    def visual_ids(self) -> tuple[int, ...]:
        """The token ids that stand for image patches and video patches."""
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        values = (getattr(self.config, name, None) for name in names)
        return tuple(dict.fromkeys(value for value in values if isinstance(value, int)))

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The decoder's attention goes through the capture inside, and as before afterwards.

        The vision tower is left alone. The configuration's property is set, not
        ``set_attn_implementation``: the base was validated when the model was built, and the switch
        happens twice a step.
        """
        before = self.text_config._attn_implementation
        self.check_base(before or "eager")
        self.text_config._attn_implementation = capture_name(before or "eager")
        try:
            yield
        finally:
            self.text_config._attn_implementation = before

    def check_base(self, base: str) -> None:
        """Refuse an attention that the decoder cannot run, as transformers does where it is asked.

        Raises:
            ValueError: flash attention, sdpa or FlexAttention for a decoder without it.
        """
        decoder = self.model.get_decoder()
        for kind, flag in _SUPPORTED.items():
            # hub kernels are named like "kernels-community/flash-attn2"
            asked = base.startswith(kind) or (kind == "flash" and "/flash" in base)
            if asked and not getattr(decoder, flag, True):
                able = [k for k, other in _SUPPORTED.items() if getattr(decoder, other, True)]
                raise ValueError(
                    f"{self.role}: the attention implementation is {base!r}, which "
                    f"{type(decoder).__name__} does not support; allowed: "
                    f"{', '.join(map(repr, ['eager', *able]))}"
                )

    def check_checkpointing(self, layers: tuple[int, ...]) -> None:
        """Refuse reentrant gradient checkpointing, under which no gradient would reach q and k.

        Raises:
            RuntimeError: one of ``layers`` is checkpointed with ``use_reentrant=True``.
        """
        for i in layers:
            layer = self.layers[i]
            if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
                continue
            keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
            if keywords.get("use_reentrant"):
                raise RuntimeError(reentrant_message(self.role, i))


def reentrant_message(role: str, layer: int) -> str:
    """Why the step was refused."""
    return (
        f"{role} layer {layer} runs under reentrant gradient checkpointing: its forward has no "
        "gradients, and the alignment would silently not train; allowed: use_reentrant=False "
        "(transformers' default)"
    )


def unwrap(role: str, model: Any) -> Any:
    """The transformers model inside PEFT, DDP, FSDP and ``torch.compile`` wrappers.

    Raises:
        TypeError: nothing with a configuration and a decoder is inside.
    """
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif not hasattr(model, "config") and isinstance(
            getattr(model, "module", None), nn.Module
        ):  # DDP and its like
            model = model.module
        else:
            break
    if not (hasattr(model, "config") and hasattr(model, "get_decoder")):
        raise TypeError(
            f"{role} is {type(model).__name__}; allowed: a transformers vision-language model "
            "(also inside PEFT, DistributedDataParallel, FSDP or torch.compile)"
        )
    return model
