"""From what a caller passes to a ``Problem``: every check, once, before any kernel runs.

Each error names the argument, what came, and what is allowed. Checks of shapes and dtypes cost no
synchronisation; checks of values (``check_values``) run for CPU tensors, where they are free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .spec import AlignSpec, resolve_spec

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def build_problem(
    *,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    visual_mask: Tensor | None,
    query_mask: Tensor | None,
    attention_mask: Tensor | None,
    spec: AlignSpec | str,
    causal: bool | None,
    scale_s: float | None,
    scale_t: float | None,
    lse_s: Tensor | None,
    lse_t: Tensor | None,
    target: Tensor | None,
    target_index: Tensor | None,
    mix: Tensor | None,
    row_weight: Tensor | None,
    query_positions: Tensor | None,
    segment_ids: Tensor | None,
    block_ids: Tensor | None,
    window: int | None,
    chunk: int | None,
    softcap_s: float | None,
    softcap_t: float | None,
    sink_s: Tensor | None,
    sink_t: Tensor | None,
) -> Problem:
    """The arguments of ``fused_attn_align_loss`` as a validated ``Problem``."""
    spec = resolve_spec(spec)
    if causal is not None and not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}; allowed: True, False or None (the recipe's own)")
    batch, rows, length = _check_side("q_s", "k_s", q_s, k_s, None, query_positions is not None)
    heads_s = q_s.shape[1]
    heads_t = _check_teacher(q_s, k_s, q_t, k_t, target, query_positions is not None)
    _check_heads(spec, heads_s, heads_t, mix)
    _check_target(spec, target, target_index, batch, heads_s, mix)
    _check_lse(spec, lse_s, "lse_s", (batch, heads_s, rows))
    _check_lse(spec, lse_t, "lse_t", None if heads_t is None else (batch, heads_t, rows))
    for name, sink, heads in (("sink_s", sink_s, heads_s), ("sink_t", sink_t, heads_t)):
        if sink is None:
            continue
        if heads is None:
            raise ValueError(f"{name} is given with target; allowed: only with q_t and k_t")
        if spec.normalize == "none":
            raise ValueError(f"{name} is given with normalize='none'; allowed: None")
        _check_tensor(name, sink, (heads,), _FLOATS, "floating point")

    per_token = (batch, length)
    for name, mask in (
        ("visual_mask", visual_mask),
        ("query_mask", query_mask),
        ("attention_mask", attention_mask),
    ):
        if mask is not None:
            _check_tensor(name, mask, per_token, (torch.bool,), "bool")
    if row_weight is not None:
        _check_tensor("row_weight", row_weight, per_token, _FLOATS, "floating point")
    for name, ids in (("segment_ids", segment_ids), ("block_ids", block_ids)):
        if ids is not None:
            _check_tensor(name, ids, per_token, _INTEGERS, "integer")
    if query_positions is not None:
        if query_mask is not None:
            raise ValueError(
                "query_mask is given with query_positions; allowed: one of the two (the positions "
                "already say which rows are compared)"
            )
        _check_tensor("query_positions", query_positions, (batch, rows), _INTEGERS, "integer")
    _check_count("window", window)
    _check_count("chunk", chunk)
    _check_devices(
        q_s,
        {
            "k_s": k_s,
            "q_t": q_t,
            "k_t": k_t,
            "visual_mask": visual_mask,
            "query_mask": query_mask,
            "attention_mask": attention_mask,
            "lse_s": lse_s,
            "lse_t": lse_t,
            "target": target,
            "target_index": target_index,
            "mix": mix,
            "row_weight": row_weight,
            "query_positions": query_positions,
            "segment_ids": segment_ids,
            "block_ids": block_ids,
            "sink_s": sink_s,
            "sink_t": sink_t,
        },
    )

    device = q_s.device
    if attention_mask is None:
        attention_mask = torch.ones(per_token, dtype=torch.bool, device=device)
    columns = _columns(spec, visual_mask, attention_mask)
    positions = _positions(spec, query_mask, query_positions, columns, visual_mask, attention_mask)
    return Problem(
        q_s=q_s,
        k_s=k_s,
        q_t=None if q_t is None else q_t.detach(),
        k_t=None if k_t is None else k_t.detach(),
        target=None if target is None else target.detach(),
        target_index=target_index,
        mix=mix,
        lse_s=None if lse_s is None else lse_s.detach(),
        lse_t=None if lse_t is None else lse_t.detach(),
        positions=positions,
        columns=columns,
        row_weight=_by_row(row_weight, positions),
        segments=_segments(segment_ids, attention_mask, chunk),
        blocks=None if block_ids is None else block_ids.to(torch.int32),
        sink_s=sink_s,
        sink_t=None if sink_t is None else sink_t.detach(),
        causal=spec.causal if causal is None else causal,
        window=window or 0,
        scale_s=_scale("scale_s", scale_s, q_s),
        scale_t=_scale("scale_t", scale_t, q_s if q_t is None else q_t),
        softcap_s=_softcap("softcap_s", softcap_s),
        softcap_t=_softcap("softcap_t", softcap_t),
        spec=spec,
    )


def check_values(problem: Problem) -> None:
    """Checks that need the values of masks and indices; for CPU tensors only (no synchronisation).

    Raises:
        ValueError: ``query_positions`` outside the sequence, a ``target`` too small for the rows and
            columns compared, a ``target_index`` outside its columns, negative weights.
    """
    positions, length = problem.positions, problem.columns.shape[1]
    if positions.device.type != "cpu" or not positions.numel():
        return
    low, high = int(positions.min()), int(positions.max())
    if low < -1 or high >= length:
        raise ValueError(
            f"query_positions holds {low if low < -1 else high}; allowed: -1 (padding) to {length - 1}"
        )
    if problem.row_weight is not None and bool((problem.row_weight < 0).any()):
        raise ValueError("row_weight holds a negative weight; allowed: numbers >= 0")
    target, index = problem.target, problem.target_index
    if target is None:
        return
    columns = int(problem.columns.sum(-1).max())
    if problem.spec.compare != "pooled":
        rows = int((positions >= 0).sum(-1).max())
        if target.shape[2] < rows:
            raise ValueError(
                f"target has {target.shape[2]} rows; allowed: at least {rows}, the most rows that a "
                "sample of this batch compares"
            )
    if index is None and target.shape[-1] < columns:
        raise ValueError(
            f"target has {target.shape[-1]} columns; allowed: at least {columns}, the most compared "
            "columns of a sample of this batch (or sparse entries with target_index)"
        )
    if index is not None and index.numel() and int(index.max()) >= columns:
        raise ValueError(
            f"target_index holds {int(index.max())}; allowed: -1 (none) to {columns - 1}"
        )


# ------------------------------------------------------------------- shapes and dtypes


def _check_side(
    q_name: str, k_name: str, q: Any, k: Any, like: Tensor | None, sliced: bool
) -> tuple[int, int, int]:
    """One model's q and k; returns (B, R, L)."""
    for name, x in ((q_name, q), (k_name, k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}; allowed: a tensor")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {_shape(x)}; allowed: four dimensions [B, heads, length, head size]"
            )
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {x.dtype}; allowed: float16, bfloat16, float32 or float64")
    batch, heads, rows, size = q.shape
    if k.shape[0] != batch:
        raise ValueError(f"{k_name} has batch size {k.shape[0]}; allowed: {batch}, as {q_name}")
    if k.shape[3] != size:
        raise ValueError(f"{k_name} has head size {k.shape[3]}; allowed: {size}, as {q_name}")
    if heads < 1 or size < 1 or k.shape[1] < 1:
        raise ValueError(
            f"{q_name} has shape {_shape(q)} and {k_name} {_shape(k)}; allowed: at least one head "
            "and a head size of at least 1"
        )
    if heads % k.shape[1]:
        raise ValueError(
            f"{q_name} has {heads} heads and {k_name} {k.shape[1]}; allowed: a number of key heads "
            "that divides the number of query heads"
        )
    if not sliced and rows != k.shape[2]:
        raise ValueError(
            f"{q_name} has length {rows} and {k_name} {k.shape[2]}; allowed: equal lengths (or "
            "query_positions, which says where the rows are)"
        )
    if like is not None and (batch, rows) != (like.shape[0], like.shape[2]):
        raise ValueError(
            f"{q_name} has shape {_shape(q)}; allowed: batch size {like.shape[0]} and length "
            f"{like.shape[2]}, as q_s"
        )
    return batch, rows, k.shape[2]


def _check_teacher(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    target: Tensor | None,
    sliced: bool,
) -> int | None:
    """The teacher's q and k, or the absence of both; returns its number of heads."""
    if target is not None:
        if q_t is not None or k_t is not None:
            raise ValueError(
                "target is given with q_t or k_t; allowed: a given map, or the teacher's q and k"
            )
        return None
    if q_t is None or k_t is None:
        name = "q_t" if q_t is None else "k_t"
        raise ValueError(f"{name} is None; allowed: both q_t and k_t, or target in their place")
    _, _, length = _check_side("q_t", "k_t", q_t, k_t, q_s, sliced)
    if length != k_s.shape[2]:
        raise ValueError(f"k_t has length {length}; allowed: {k_s.shape[2]}, as k_s")
    return q_t.shape[1]


def _check_heads(spec: AlignSpec, heads_s: int, heads_t: int | None, mix: Tensor | None) -> None:
    if spec.heads == "each" and heads_t is not None and heads_s != heads_t:
        raise ValueError(
            f"q_s has {heads_s} heads and q_t {heads_t}; allowed with heads='each': equal numbers "
            "(heads='mean' and 'mix' take unequal ones)"
        )
    if spec.heads != "mix":
        if mix is not None:
            raise ValueError(f"mix is given with heads={spec.heads!r}; allowed: with heads='mix'")
        return
    if mix is None:
        raise ValueError("mix is None; allowed with heads='mix': a tensor [H_s, H_t]")
    wanted = (heads_s, mix.shape[1] if heads_t is None and mix.dim() == 2 else heads_t)
    _check_tensor("mix", mix, wanted, _FLOATS, "floating point")


def _check_target(
    spec: AlignSpec,
    target: Tensor | None,
    index: Tensor | None,
    batch: int,
    heads_s: int,
    mix: Tensor | None,
) -> None:
    if target is None:
        if index is not None:
            raise ValueError("target_index is given without target; allowed: both")
        return
    if not isinstance(target, Tensor) or target.dtype not in _FLOATS:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target is {kind}; allowed: a floating-point tensor")
    if spec.sink_sigma is not None and spec.compare == "pooled":
        raise ValueError(
            "target is given with compare='pooled' and sink_sigma: the filter needs the teacher's "
            "whole map; allowed: sink_sigma=None, or q_t and k_t"
        )
    groups = {"mean": 1, "each": heads_s}.get(spec.heads) or (
        mix.shape[1] if mix is not None else 1
    )
    names = "[B, G, C]" if spec.compare == "pooled" else "[B, G, rows, C]"
    rank = 3 if spec.compare == "pooled" else 4
    if target.dim() != rank or tuple(target.shape[:2]) != (batch, groups):
        raise ValueError(
            f"target has shape {_shape(target)}; allowed with compare={spec.compare!r}: {names} with "
            f"B = {batch} and G = {groups}"
        )
    if index is not None:
        _check_tensor("target_index", index, tuple(target.shape), (torch.int64,), "int64")


def _check_lse(
    spec: AlignSpec, lse: Tensor | None, name: str, shape: tuple[int, ...] | None
) -> None:
    if lse is None:
        return
    if shape is None:
        raise ValueError(f"{name} is given with target; allowed: only with q_t and k_t")
    if not spec.sweeps_all_keys or spec.temperature != 1:
        raise ValueError(
            f"{name} is given with normalize={spec.normalize!r} and temperature {spec.temperature}; "
            "allowed: with normalize 'joint' or 'visual' and temperature 1, whose softmax is the "
            "attention's own"
        )
    _check_tensor(name, lse, shape, _FLOATS, "floating point")


def _check_tensor(
    name: str, x: Any, shape: tuple[Any, ...], dtypes: tuple[torch.dtype, ...], kind: str
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; allowed: a tensor of shape {list(shape)}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {_shape(x)}; allowed: {list(shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; allowed: {kind}")


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; allowed: None or an integer of at least 1")


def _check_devices(first: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name} is on {x.device}; allowed: {first.device}, as q_s")


def _scale(name: str, value: float | None, q: Tensor) -> float:
    if value is None:
        return 1 / math.sqrt(q.shape[-1])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; allowed: None (1 / sqrt(D)) or a finite number")
    return float(value)


def _softcap(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; allowed: None or a finite number > 0")
    return float(value)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


# --------------------------------------------------------- masks to descriptors


def _columns(spec: AlignSpec, visual: Tensor | None, valid: Tensor) -> Tensor:
    if visual is not None:
        return visual & valid
    if spec.columns == "visual":
        raise ValueError(
            "visual_mask is None; allowed with columns='visual': a bool tensor [B, L] (recipes with "
            "columns='all' need none)"
        )
    return valid


def _positions(
    spec: AlignSpec,
    query_mask: Tensor | None,
    query_positions: Tensor | None,
    columns: Tensor,
    visual: Tensor | None,
    valid: Tensor,
) -> Tensor:
    """[B, R] int64: the sequence position of each query row, -1 where it is not compared."""
    batch, length = valid.shape
    if query_positions is not None:
        positions = query_positions.to(torch.int64)
        if length == 0:
            return positions
        on_token = valid.gather(1, positions.clamp(0, length - 1))
        return torch.where(on_token | (positions < 0) | (positions >= length), positions, -1)
    if query_mask is not None:
        rows = query_mask & valid
    elif spec.rows == "given":
        raise ValueError(
            "query_mask is None; allowed with this recipe (rows='given'): a bool tensor [B, L], for "
            "example the answer's tokens"
        )
    elif spec.rows == "all":
        rows = valid
    elif visual is None:
        raise ValueError(
            f"visual_mask is None; allowed with rows={spec.rows!r}: a bool tensor [B, L]"
        )
    else:
        rows = columns if spec.rows == "visual" else valid & ~columns
    place = torch.arange(length, device=valid.device).expand(batch, length)
    return torch.where(rows, place, -1)


def _segments(segment_ids: Tensor | None, valid: Tensor, chunk: int | None) -> Tensor:
    """[B, L] int32 ids that must be equal for one token to see another; -1 for padding.

    Chunks are segments of a fixed length: a token's chunk, counted from the first valid position, is
    folded into its segment id.
    """
    if segment_ids is None and chunk is None:
        return torch.where(valid, 0, -1).to(torch.int32)
    length = valid.shape[1]
    ids = torch.zeros_like(valid, dtype=torch.int64)
    if segment_ids is not None:
        ids = segment_ids.to(torch.int64)
        ids = ids - ids.amin(-1, keepdim=True) if length else ids
    if chunk is not None and length:
        place = torch.arange(length, device=valid.device)
        first = valid.to(torch.int8).argmax(-1, keepdim=True)
        ids = ids * (length + 1) + torch.div(place - first, chunk, rounding_mode="floor").clamp(
            min=0
        )
    return torch.where(valid, ids, -1).to(torch.int32)


def _by_row(row_weight: Tensor | None, positions: Tensor) -> Tensor | None:
    """[B, R]: the weights of the query rows, from weights by position."""
    if row_weight is None:
        return None
    if row_weight.shape[1] == 0:
        return torch.zeros_like(positions, dtype=row_weight.dtype)
    return row_weight.detach().gather(1, positions.clamp(0, row_weight.shape[1] - 1))
