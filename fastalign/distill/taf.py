"""Teacher's adapter fetch: the student reads the image through the teacher's projector.

x_v = P_s(P_t(z)): P_t is the teacher's projector, copied and frozen; P_s is small and trained
(CompoDistill, arXiv 2510.12184). For LLaVA models P_t is Linear - GELU - Linear.

Where P_s is one Linear (the released code's choice), P_s after P_t's last Linear is one Linear again,
W = W_s W_2 and b = W_s b_2 + b_s: the whole is a two-layer projector whose hidden width is the
*teacher's* (``fold``). Stock LLaVA fixes that width to the student's own. So an exact stock
checkpoint exists only if no more units are needed than the student is wide: always if the teacher is
not wider, and else if enough of its units are idle (``to_stock``). Fewer ones are filled up with units
whose weights are zero, which GELU keeps at zero. Any other wider teacher's projector has more units
than the stock class can hold, and its checkpoint is loaded with this module's class. Importing this
module makes ``AutoConfig`` and ``AutoModelForImageTextToText`` know it; no remote code is involved.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.activations import ACT2FN

from ..models import FAMILIES, Family, register_family

ADAPTERS = ("linear", "mlp", "folded")
#: Activations that map 0 to 0, so that added units stay silent.
_KEEPS_ZERO = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


class TafLlavaConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's configuration, with the width of the fetched projector and the adapter's kind.

    Attributes:
        fetched_width: the teacher's hidden size, d_t.
        adapter: ``"linear"``: P_s is one Linear; ``"mlp"``: Linear - GELU - Linear (the paper);
            ``"folded"``: P_s and P_t's last Linear have become one.
    """

    model_type = "llava_taf"

    fetched_width: int = 4096
    adapter: str = "linear"


class FetchedProjector(nn.Module):
    """[..., d_v] -> [..., d_s]: ``fetched`` is P_t (frozen), ``adapter`` is P_s."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.adapter not in ADAPTERS:
            raise ValueError(f"adapter is {config.adapter!r}; allowed: {', '.join(ADAPTERS)}")
        layers = config.vision_feature_layer
        inner = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        width, out = config.fetched_width, config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.fetched = nn.ModuleDict({"linear_1": nn.Linear(inner, width, bias=bias)})
        self.act = ACT2FN[config.projector_hidden_act]
        if config.adapter == "folded":
            self.adapter: nn.Module = nn.Linear(width, out, bias=bias)
        else:
            self.fetched["linear_2"] = nn.Linear(width, width, bias=bias)
            first = nn.Linear(width, out, bias=bias)
            self.adapter = (
                first
                if config.adapter == "linear"
                else nn.Sequential(first, nn.GELU(), nn.Linear(out, out, bias=bias))
            )
        self.fetched.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.act(self.fetched["linear_1"](features))
        if "linear_2" in self.fetched:
            hidden = self.fetched["linear_2"](hidden)
        out: Tensor = self.adapter(hidden)
        return out


class TafLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with a ``FetchedProjector``; all else, generation included, is LLaVA's."""

    config_class = TafLlavaConfig
    config: TafLlavaConfig

    def __init__(self, config: TafLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = FetchedProjector(config)
        self.post_init()


def fetch_adapter(
    student: Any, teacher: Any, *, adapter: str = "linear"
) -> TafLlavaForConditionalGeneration:
    """The student with the teacher's vision tower and projector, both frozen, and a new adapter.

    Args:
        student: a stock LLaVA; its language model is taken over, its projector is not.
        teacher: a stock LLaVA whose vision tower has the same configuration.
        adapter: "linear" or "mlp".

    The adapter's weights are drawn from torch's generator.

    Raises:
        TypeError, ValueError: models for which this is not defined.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if type(model) is not LlavaForConditionalGeneration:
            raise TypeError(
                f"taf: the {role} is a {type(model).__name__}; allowed: LlavaForConditionalGeneration "
                "(a projector of two linear layers)"
            )
    if adapter not in ("linear", "mlp"):
        raise ValueError(f"taf: adapter is {adapter!r}; allowed: 'linear', 'mlp'")
    config = taf_config(student.config, teacher.config, adapter)
    made = TafLlavaForConditionalGeneration(config)
    dtype = student.lm_head.weight.dtype
    made.model.language_model = student.model.language_model
    made.lm_head = student.lm_head
    made.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    projector = teacher.model.multi_modal_projector.state_dict()
    made.model.multi_modal_projector.fetched.load_state_dict(projector)
    made.to(dtype)
    made.model.vision_tower.requires_grad_(False)
    # The language model's configuration must be one object with its attention layers'.
    made.config.text_config = student.model.language_model.config
    made.model.config = made.config
    return made


def taf_config(student: Any, teacher: Any, adapter: str) -> TafLlavaConfig:
    """The configuration of a student (a LLaVA's configuration) with the teacher's tower and projector."""
    plain = student.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        plain.pop(name, None)
    for name in (
        "vision_config",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "image_seq_length",
    ):
        plain[name] = copy.deepcopy(teacher.to_dict()[name])
    return TafLlavaConfig(**plain, fetched_width=teacher.text_config.hidden_size, adapter=adapter)


def fold(model: TafLlavaForConditionalGeneration) -> TafLlavaForConditionalGeneration:
    """A copy in which the linear adapter and the fetched projector's last layer are one.

    Products are formed in float64 and rounded once: equal up to rounding, and cheaper to run.

    Raises:
        ValueError: the adapter is not linear.
    """
    config = copy.deepcopy(model.config)
    if config.adapter != "linear":
        raise ValueError(f"fold: the adapter is {config.adapter!r}; allowed: 'linear'")
    config.adapter = "folded"
    made = TafLlavaForConditionalGeneration(config).to(model.lm_head.weight.dtype)
    state = model.state_dict()
    prefix = "model.multi_modal_projector."
    second = model.model.multi_modal_projector.fetched["linear_2"]
    last = model.model.multi_modal_projector.adapter
    weight, bias = _product(last, second)
    state = {k: v for k, v in state.items() if not k.startswith(prefix + "fetched.linear_2")}
    state[prefix + "adapter.weight"] = weight
    if bias is not None:
        state[prefix + "adapter.bias"] = bias
    made.load_state_dict(state)
    return cast(TafLlavaForConditionalGeneration, made.eval())


def to_stock(model: TafLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same function as a stock ``LlavaForConditionalGeneration``.

    For a wider teacher, hidden units that are idle go: those that nothing reads, those that do not look at
    the image (a constant, which joins the bias), and all but one of equal ones (their readers add up).

    Raises:
        ValueError: the adapter is not one Linear, or more units remain than the student is wide: the
            stock projector has as many.
    """
    folded = model if model.config.adapter == "folded" else fold(model)
    width, own = folded.config.fetched_width, folded.config.text_config.hidden_size
    units = _needed_units(folded.model.multi_modal_projector, spare=own - width)
    if len(units.read) > own:
        raise ValueError(
            f"to_stock: {len(units.read)} of the fetched projector's {width} hidden units are needed "
            f"and a stock LLaVA of this size has {own}; allowed: a teacher that is not wider, or the "
            "checkpoint of TafLlavaForConditionalGeneration (import fastalign.distill.taf, then "
            "AutoModel)"
        )
    if folded.config.projector_hidden_act not in _KEEPS_ZERO:
        raise ValueError(
            f"to_stock: projector_hidden_act is {folded.config.projector_hidden_act!r}; allowed: "
            f"{', '.join(_KEEPS_ZERO)}"
        )
    plain = folded.config.to_dict()
    for name in ("model_type", "architectures", "fetched_width", "adapter"):
        plain.pop(name, None)
    made = LlavaForConditionalGeneration(LlavaConfig(**plain)).to(folded.lm_head.weight.dtype)
    state = folded.state_dict()
    prefix = "model.multi_modal_projector."
    state = {name: value for name, value in state.items() if not name.startswith(prefix)}
    empty = {n: torch.zeros_like(v) for n, v in made.state_dict().items() if n.startswith(prefix)}
    count = len(units.read)
    empty[prefix + "linear_1.weight"][:count] = units.look
    empty[prefix + "linear_2.weight"][:, :count] = units.read.T
    if folded.config.multimodal_projector_bias:
        empty[prefix + "linear_1.bias"][:count] = units.offset
        empty[prefix + "linear_2.bias"][:] = units.bias
    made.load_state_dict({**state, **empty})
    return cast(LlavaForConditionalGeneration, made.eval())


class _Units(NamedTuple):
    """n hidden units: what each looks at [n, d_v], its offset [n], who reads it [n, d_s]; bias [d_s]."""

    look: Tensor
    offset: Tensor
    read: Tensor
    bias: Tensor


def _needed_units(projector: Any, spare: int) -> _Units:
    """The units of a folded projector; without the idle ones where there is no room to spare."""
    first, last = projector.fetched["linear_1"], projector.adapter
    zero = first.weight.new_zeros
    offset = zero(first.out_features) if first.bias is None else first.bias.detach()
    bias = zero(last.out_features) if last.bias is None else last.bias.detach()
    units = _Units(first.weight.detach(), offset, last.weight.detach().T, bias)
    if spare >= 0:
        return units
    seen, read = units.look.any(1), units.read.any(1)
    constant = (
        projector.act(units.offset[~seen & read].double()) @ units.read[~seen & read].double()
    )
    kept = seen & read
    both = torch.cat([units.look, units.offset[:, None]], 1)[kept]
    distinct, which = torch.unique(both, dim=0, return_inverse=True)
    readers = distinct.new_zeros(len(distinct), len(bias), dtype=torch.float64)
    readers.index_add_(0, which, units.read[kept].double())
    return _Units(
        distinct[:, :-1],
        distinct[:, -1],
        readers.to(bias.dtype),
        (bias.double() + constant).to(bias.dtype),
    )


def _product(last: Any, second: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of last(second(x))."""
    dtype = last.weight.dtype
    w_s, w_2 = last.weight.detach().double(), second.weight.detach().double()
    if last.bias is None:
        return (w_s @ w_2).to(dtype), None
    bias = w_s @ second.bias.detach().double() + last.bias.detach().double()
    return (w_s @ w_2).to(dtype), bias.to(dtype)


if TafLlavaConfig.model_type not in FAMILIES:
    AutoConfig.register(TafLlavaConfig.model_type, TafLlavaConfig)
    AutoModelForImageTextToText.register(TafLlavaConfig, TafLlavaForConditionalGeneration)
    register_family(Family((TafLlavaConfig.model_type,)))
