"""How much each head, channel, residual dimension and layer does on calibration data.

One pass, forward only. a[t] is a unit's activation at a valid token t of a sample:

    heads      norm of the head's output before the output projection
    mlp        |act(gate) * up|, what the down projection gets
    hidden     |RMSNorm(x)_i|, summed over all the norms of the residual stream
    projector  |act(linear_1)|, the hidden units of LLaVA's projector

These are Minitron's scores (arXiv 2407.14679, section 2.2), aggregated as it recommends: the mean over a
sample's tokens, then the 2-norm over the samples. Block influence of a layer, 1 - E_t cos(x_in, x_out), is
ShortGPT's (arXiv 2403.03853, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .structure import Structure, linears

#: Entries of a batch that a model's forward does not take.
_NOT_INPUTS = ("labels", "skipped_samples")


@dataclass(frozen=True)
class Importance:
    """Scores, float64 on the CPU; larger is more important.

    Attributes:
        heads: [layers, H]. mlp: [layers, channels]. hidden: [d]. projector: [units] or None.
        influence: [layers], block influence, 0 (the layer changes no direction) to 2.
        power: norm's name -> [d] mean square of what it normalises.
        samples, tokens: how many were looked at.
    """

    heads: Tensor
    mlp: Tensor
    hidden: Tensor
    projector: Tensor | None
    influence: Tensor
    power: dict[str, Tensor]
    samples: int
    tokens: int


def measure(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Run the model (eval mode, no gradients, no output head) on batches as its processor makes them.

    Args:
        batches: with input_ids [B, L] and attention_mask [B, L] or None; on any device.
        progress: called with the number of samples of each batch that is done.

    Raises:
        PruneError: see ``Structure``.
        ValueError: no batch, or scores that are not finite.
    """
    structure = Structure(model)
    sums = _Sums(structure)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), sums:
            for batch in batches:
                inputs = {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                    if name not in _NOT_INPUTS
                }
                mask = inputs.get("attention_mask")
                ids = inputs["input_ids"]
                sums.valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
                sums.samples += len(ids)
                sums.tokens += int(sums.valid.sum())
                model.model(**inputs, use_cache=False)
                if progress is not None:
                    progress(len(ids))
    finally:
        model.train(training)
    return sums.result()


class _Sums:
    """Hooks while it is entered, and what they add up."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.valid = torch.ones(0, 0, dtype=torch.bool)
        self.samples = 0
        self.tokens = 0
        self.squares: dict[str, Tensor] = {}  # of each sample's mean activation
        self.power: dict[str, Tensor] = {}
        self.cosines: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Sums:
        keep = self._handles.append
        for i, layer in enumerate(self.structure.layers):
            keep(layer.register_forward_hook(self._layer(i), with_kwargs=True))
            for axis, linear in linears(layer):
                keep(linear.register_forward_pre_hook(self._unit(f"{axis}.{i}", axis)))
        for name, norm in self.structure.norms.items():
            keep(norm.register_forward_hook(self._norm(name)))
        output = self.structure.projector_output
        if output is not None:
            keep(output.register_forward_pre_hook(self._unit("projector", "projector")))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, name: str, activation: Tensor, valid: Tensor) -> None:
        """[B, L, units] >= 0 at [B, L] valid tokens."""
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        mean = (_wide(activation) * valid.unsqueeze(-1)).sum(1) / count
        _accumulate(self.squares, name, mean.double().square().sum(0))

    def _unit(self, name: str, axis: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if axis == "heads":
                x = x.unflatten(-1, (-1, self.structure.head_size)).norm(dim=-1)
            if axis == "projector":  # [images, patches, units]; never padding
                x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.unsqueeze(0)
                self._add(name, x.abs(), torch.ones(x.shape[:2], device=x.device).bool())
            else:
                self._add(name, x.abs(), self.valid)

        return hook

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._add(name, output.abs(), self.valid)
            square = _wide(arguments[0][self.valid]).square().sum(0)
            _accumulate(self.power, name, square.double())

        return hook

    def _layer(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            pair = (_wide(x[self.valid]) for x in (before, after))
            cosine = F.cosine_similarity(*pair, dim=-1).double().sum()  # type: ignore[misc, arg-type]
            _accumulate(self.cosines, index, cosine)

        return hook

    def result(self) -> Importance:
        if not self.tokens:
            raise ValueError("calibration: no sample; allowed: at least one with a token")
        depth = range(len(self.structure.layers))
        scores = {name: total.sqrt().cpu() for name, total in self.squares.items()}
        found = Importance(
            heads=torch.stack([scores[f"heads.{i}"] for i in depth]),
            mlp=torch.stack([scores[f"mlp.{i}"] for i in depth]),
            hidden=torch.stack([scores[name] for name in self.structure.norms]).sum(0),
            projector=scores.get("projector"),
            influence=1 - torch.stack([self.cosines[i].cpu() for i in depth]) / self.tokens,
            power={name: total.cpu() / self.tokens for name, total in self.power.items()},
            samples=self.samples,
            tokens=self.tokens,
        )
        for name in ("heads", "mlp", "hidden", "influence"):
            if not torch.isfinite(getattr(found, name)).all():
                raise ValueError(
                    f"calibration: scores of {name} are not finite; allowed: a model that gives finite "
                    "activations in this type (try bfloat16 or float32)"
                )
        return found


def _accumulate(sums: dict[Any, Tensor], name: Any, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
