"""Which tensors of a vision-language model lie along which axis: what pruning may cut, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

#: ``hidden``: the residual stream. ``heads``, ``kv_heads``: head size entries each. ``mlp``: a layer's
#: channels. ``projector``: hidden units of LLaVA's projector. None: an axis that is never cut.
Axis = Literal["hidden", "heads", "kv_heads", "mlp", "projector"] | None

#: Text models whose layers are RMSNorm - attention - RMSNorm - gated MLP, and nothing else.
TEXT_MODELS = ("llama", "qwen2", "qwen3", "mistral", "qwen2_vl_text", "qwen2_5_vl_text")
#: Their attention takes the head size from hidden_size / heads and cannot be told another.
TIED_HEAD_SIZE = ("qwen2_vl_text", "qwen2_5_vl_text")
LLAVA_TYPES = ("llava", "llava_next", "llava_onevision")
#: Qwen-VL's: the entry of the vision configuration that holds the merger's output size.
MERGER_SIZE = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size"}

_LAYER: dict[str, tuple[Axis, ...]] = {
    "self_attn.q_proj.weight": ("heads", "hidden"),
    "self_attn.q_proj.bias": ("heads",),
    "self_attn.k_proj.weight": ("kv_heads", "hidden"),
    "self_attn.k_proj.bias": ("kv_heads",),
    "self_attn.v_proj.weight": ("kv_heads", "hidden"),
    "self_attn.v_proj.bias": ("kv_heads",),
    "self_attn.o_proj.weight": ("hidden", "heads"),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.down_proj.bias": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_OUTSIDE: dict[str, tuple[Axis, ...]] = {
    "model.language_model.embed_tokens.weight": (None, "hidden"),
    "model.language_model.norm.weight": ("hidden",),
    "lm_head.weight": (None, "hidden"),
    "model.image_newline": ("hidden",),
    "model.multi_modal_projector.linear_1.weight": ("projector", None),
    "model.multi_modal_projector.linear_1.bias": ("projector",),
    "model.multi_modal_projector.linear_2.weight": ("hidden", "projector"),
    "model.multi_modal_projector.linear_2.bias": ("hidden",),
    "model.visual.merger.mlp.2.weight": ("hidden", None),
    "model.visual.merger.mlp.2.bias": ("hidden",),
}
_LAYERS = "model.language_model.layers."
_VISION = ("model.vision_tower.", "model.visual.")


class PruneError(ValueError):
    """A model or sizes for which pruning is not defined; the message says what is allowed."""


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: its axes, its decoder layer and its name in it (None: outside of them)."""

    axes: tuple[Axis, ...]
    layer: int | None
    name: str


class Structure:
    """The parts of a model that pruning looks at and cuts.

    Attributes:
        model: the transformers model. text: its text configuration.
        layers: the decoder's layers. norms: name -> RMSNorm of the residual stream.
        head_size: entries a head.

    Raises:
        PruneError: an unknown family or text model, or a tensor that the tables above do not name.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text: Any = model.config.get_text_config()
        kind = model.config.model_type
        known = (*LLAVA_TYPES, *MERGER_SIZE)
        if kind not in known:
            raise PruneError(
                f"the model's config.model_type is {kind!r}; allowed: {', '.join(known)}"
            )
        if self.text.model_type not in TEXT_MODELS:
            raise PruneError(
                f"the language model's model_type is {self.text.model_type!r}; allowed: "
                f"{', '.join(TEXT_MODELS)}"
            )
        self.layers = list(model.model.language_model.layers)
        self.head_size: int = self.layers[0].self_attn.head_dim
        self.norms: dict[str, nn.Module] = {}
        for i, layer in enumerate(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.norms[f"{_LAYERS}{i}.{name}.weight"] = getattr(layer, name)
        self.norms["model.language_model.norm.weight"] = model.model.language_model.norm
        for name in model.state_dict():
            self.place(name)

    def sizes(self) -> dict[str, int]:
        """layers, hidden, heads, kv_heads, mlp: what the model has."""
        text = self.text
        return {
            "layers": len(self.layers),
            "hidden": text.hidden_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "mlp": text.intermediate_size,
        }

    @property
    def projector_output(self) -> nn.Linear | None:
        """LLaVA's last projector layer, whose inputs are as many as the text model is wide."""
        projector = getattr(self.model.model, "multi_modal_projector", None)
        return None if projector is None else projector.linear_2

    def place(self, name: str) -> Place:
        """Of a state dict's entry.

        Raises:
            PruneError: it is in no table.
        """
        if name in _OUTSIDE:
            return Place(_OUTSIDE[name], None, name)
        if name.startswith(_LAYERS):
            number, _, inner = name.removeprefix(_LAYERS).partition(".")
            if inner in _LAYER:
                return Place(_LAYER[inner], int(number), inner)
        elif name.startswith(_VISION):
            return Place((), None, name)
        raise PruneError(
            f"the model has a tensor {name!r} of which it is not known how to cut it; allowed: models "
            f"of {', '.join((*LLAVA_TYPES, *MERGER_SIZE))} as transformers has them"
        )


def renamed(place: Place, layer: int) -> str:
    """The entry of a state dict that ``place`` is in decoder layer ``layer``."""
    return f"{_LAYERS}{layer}.{place.name}"


def linears(layer: Any) -> Iterator[tuple[str, nn.Linear]]:
    """("heads", output projection) and ("mlp", down projection): what the units of a layer feed."""
    yield "heads", layer.self_attn.o_proj
    yield "mlp", layer.mlp.down_proj
