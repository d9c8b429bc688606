"""The few device functions that every kernel is made of: lists, visibility, tiles, maps, divergences.

Units. Scores enter every kernel in log2: ``x = log2(e) scale q.k / temperature``, so that a
probability is ``exp2(x - l)`` with ``l`` the row's log-sum-exp times log2(e): one FMA and one ``ex2``.
Natural logarithms appear only where a kernel writes to memory that others read.

Lists. Rows and keys are index lists with int32 descriptors, slot by slot ([B, slots, length]): what a
tile needs to know about a token costs O(length) memory and no L x L mask exists. Lists are padded to
whole tiles. Entries behind the end have segment -2 (rows) or -1 (keys), which no partner has, and index
0, which is a readable address.

Rows:  0 index into q, 1 position, 2 segment, 3 block, 4-5 range in the list of all keys,
       6-7 in the compared columns, 8-9 in the other keys, 10 ordinal among the selected rows.
Keys:  0 position, 1 segment, 2 block, 3-4 range in the row list of the rows that can see the key.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Below every score that occurs, above -inf: a pivot that never makes inf - inf.
NEVER = tl.constexpr(-1.0e30)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def slot(p_list, o_i, length, SLOT: tl.constexpr):
    """One descriptor of the list entries o_i; lists are padded to whole tiles, so that none is beyond."""
    return tl.load(p_list + SLOT * length + o_i)


@triton.jit
def row_block(p_rows, o_r, length, LO: tl.constexpr):
    """A block of the row list: (index into q, (position, segment, block), lo, hi), each [BR].

    [lo, hi): the entries of a key list that a row can see, LO the slot of lo. Rows behind the end see
    [L, 0).
    """
    b_row = slot(p_rows, o_r, length, 0)
    b_who = (
        slot(p_rows, o_r, length, 1),
        slot(p_rows, o_r, length, 2),
        slot(p_rows, o_r, length, 3),
    )
    return b_row, b_who, slot(p_rows, o_r, length, LO), slot(p_rows, o_r, length, LO + 1)


@triton.jit
def reached(b_lo, b_hi, SIZE: tl.constexpr):
    """[lo, hi): the tiles of SIZE entries that hold an entry of some range [b_lo, b_hi)."""
    return tl.min(b_lo) // SIZE, tl.cdiv(tl.max(b_hi), SIZE)


@triton.jit
def part_of(i_lo, i_hi, i_part, parts):
    """The i_part-th of ``parts`` equal stretches of the tiles [i_lo, i_hi)."""
    i_step = tl.cdiv(tl.maximum(i_hi - i_lo, 0), parts)
    i_lo += i_part * i_step
    return i_lo, tl.minimum(i_lo + i_step, i_hi)


@triton.jit
def inner_tiles(b_real, b_lo, b_hi, i_lo, i_hi, SIZE: tl.constexpr, INTERVAL: tl.constexpr):
    """[lo, hi) within [i_lo, i_hi): the tiles that lie entirely in every range [b_lo, b_hi).

    There nothing need be masked: a sweep goes over the tiles around them with a mask (``edge_tile``)
    and over these without one. Ranges that are not b_real count as everything: they belong to entries
    behind the end of a list, whose results are dropped. Without INTERVAL every tile has a mask.
    """
    if INTERVAL:
        i_in = tl.cdiv(tl.max(tl.where(b_real, b_lo, 0)), SIZE)
        i_out = tl.min(tl.where(b_real, b_hi, 2147483647)) // SIZE
        i_in = tl.minimum(tl.maximum(i_in, i_lo), tl.maximum(i_hi, i_lo))
        return i_in, tl.maximum(tl.minimum(i_out, i_hi), i_in)
    else:
        return i_lo, i_lo


@triton.jit
def edge_tile(i_edge, i_in, i_out):
    """Tile number i_edge, counted over the tiles around [i_in, i_out) from the first tile on."""
    return i_edge + tl.where(i_edge >= i_in, i_out - i_in, 0)


@triton.jit
def key_positions(p_keys, o_c, length, last, DENSE: tl.constexpr):
    """[BC]: the sequence positions of list entries o_c; where entry i is position i, without a load."""
    if DENSE:
        return tl.minimum(o_c, last)
    else:
        return slot(p_keys, o_c, length, 0)


@triton.jit
def visible(
    b_i, b_si, b_bi, b_j, b_sj, b_bj, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Which key position j each row position i sees (``select.Visibility.visible``).

    The row's and the key's vectors come shaped to broadcast against the tile: [BR, 1] and [1, BC], or
    [1, BR] and [BC, 1] where the tile lies transposed.
    """
    b_see = b_si == b_sj
    if CAUSAL or WINDOW:
        b_near = b_see
        if CAUSAL:
            b_near = b_near & (b_j <= b_i)
        if WINDOW:
            b_gap = b_i - b_j
            b_near = b_near & (b_gap < window) & (b_gap > -window)
        if BLOCKS:
            b_near = b_near | (b_see & (b_bi == b_bj) & (b_bi >= 0))
        b_see = b_near
    return b_see


@triton.jit
def seen_keys(
    p_keys, o_c, b_j, b_lo, b_hi, b_who, length, window,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[BR, BC]: which entries o_c of a key list each row sees.

    INTERVAL: every row sees exactly the entries [lo, hi) of the list, as it is unless segments or blocks
    are interleaved (``lists.build_lists``); else positions, segments and blocks are compared.
    """
    if INTERVAL:
        # in one comparison: what lies below lo wraps to a huge number
        b_width = tl.maximum(b_hi - b_lo, 0).to(tl.uint32)
        return (o_c[None, :] - b_lo[:, None]).to(tl.uint32) < b_width[:, None]
    else:
        b_i, b_si, b_bi = b_who
        b_sj = slot(p_keys, o_c, length, 1)  # [BC]
        b_bj = slot(p_keys, o_c, length, 2)  # [BC]
        return visible(
            b_i[:, None], b_si[:, None], b_bi[:, None], b_j[None, :], b_sj[None, :], b_bj[None, :],
            window, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip


@triton.jit
def tile_offsets(b_i, stride, o_d, WIDE: tl.constexpr):
    """[N, BD] element offsets of the rows b_i of one head; 64 bits wide where the host asks."""
    if WIDE:
        b_i = b_i.to(tl.int64)
    return b_i[:, None] * stride + o_d[None, :]


@triton.jit
def workspace_offsets(o_r, o_c, pitch):
    """Offsets into one map of the workspace; 32 bits: one map is at most 2^31 entries.

    o_r and o_c come shaped to broadcast against the tile.
    """
    return o_r * pitch + o_c


@triton.jit
def load_tile(p, o, o_d, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """[N, BD]: rows of q or k, zero beyond D."""
    if D == BD:
        b = tl.load(p + o)
    else:
        b = tl.load(p + o, mask=o_d[None, :] < D, other=0.0)
    if UPCAST:  # the interpreter's bf16 arithmetic is wrong; its fp32 is exact
        b = b.to(tl.float32)
    return b


@triton.jit
def log2_scores(b_dot, factor, cap, CAP: tl.constexpr):
    """[..]: scores in log2. Without a cap: dot factor. With one: cap tanh(dot factor)."""
    if CAP:
        return cap * tanh(b_dot * factor)
    return b_dot * factor


@triton.jit
def tanh(b):
    """tanh to a few roundings: its series to b^11 below 0.4, else 1 - 2 / (exp(2 b) + 1).

    The second form alone is good to 1e-7 of 1, not of a small result: times a cap of 50 that would be
    5e-6 of a score.
    """
    b_2 = b * b
    b_series = -0.05396825396825397 + b_2 * (0.021869488536155203 - b_2 * 0.008863235529902197)
    b_series = 1.0 + b_2 * (-0.3333333333333333 + b_2 * (0.13333333333333333 + b_2 * b_series))
    b_far = 1.0 - 2.0 / (tl.exp2(b * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(b) < 0.4, b * b_series, b_far)


@triton.jit
def online_logsumexp(b_m, b_l, b_x):
    """Add the row sums of 2^x [BR, BC] to (m, l) [BR]; -inf entries add exactly 0."""
    b_new = tl.maximum(b_m, tl.max(b_x, 1))
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_l = b_l * tl.exp2(b_m - b_pivot) + tl.sum(tl.exp2(b_x - b_pivot[:, None]), 1)
    return b_new, b_l


@triton.jit
def logaddexp2(b_x, b_y):
    """log2(2^x + 2^y) of finite x, y with one exp2."""
    return tl.maximum(b_x, b_y) + tl.log2(1.0 + tl.exp2(-tl.abs(b_x - b_y)))


@triton.jit
def head_scores(
    side, o_q, o_k, o_d, b_row, i_h, rows, REPEAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCORES: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BR, BC]: log2 of the probabilities of head i_h, x - l; with SCORES the scores x.

    side: as ``side_map``. o_q: [BR, BD], o_k: [BC, BD] offsets in a head.
    """
    p_q, p_k, p_lse, _, stride_qh, _, _, stride_kh, _, _, factor, cap = side
    i_k = tl.cast(i_h // REPEAT, tl.int64)
    i_h = tl.cast(i_h, tl.int64)
    b_q = load_tile(p_q + i_h * stride_qh, o_q, o_d, D, BD, UPCAST)  # [BR, BD]
    b_k = load_tile(p_k + i_k * stride_kh, o_k, o_d, D, BD, UPCAST)  # [BC, BD]
    b_dot = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_x = log2_scores(b_dot, factor, cap, CAP)
    if SCORES:
        return b_x
    b_l = tl.load(p_lse + i_h * rows + b_row)  # [BR]
    return b_x - b_l[:, None]


@triton.jit
def side_map(
    side, p_mix, b_row, b_j, i_g, rows, groups, REPEAT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SINGLE: tl.constexpr, MIX: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr,
    CAP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BR, BC] fp32: one side's map of group i_g, A or (LOGS) log2 A, unmasked.

    A = sum over the group's heads of exp2(x_h - l_h), l_h holding the head's share and normalisation.
    Nothing in the loop depends on the mask: hidden entries come out as any value (inf included) and are
    replaced by the caller once a tile, not once a head. In logs, A = l 2^m takes one exp2 a head:
    e = 2^-|x - m|; l = l e + 1 where x is the new pivot, else l + e.

    side: (q, k, lse; strides of q by sample, head, row; of k by sample, head, key; heads, factor, cap),
    the pointers at the sample. b_row [BR], b_j [BC]: which rows of q and k.
    SINGLE: the group is the head i_g alone. MIX: head h counts mix[h, i_g] times. SCORES: the sum of
    the scores themselves, in natural units through ``factor``.
    """
    o_d = tl.arange(0, BD)  # [BD]
    o_q = tile_offsets(b_row, side[5], o_d, WIDE)  # [BR, BD]
    o_k = tile_offsets(b_j, side[8], o_d, WIDE)  # [BC, BD]
    if SINGLE:
        b_x = head_scores(
            side, o_q, o_k, o_d, b_row, i_g, rows, REPEAT, D, BD, SCORES, CAP, UPCAST, PRECISION
        )  # fmt: skip
        if not SCORES and not LOGS:
            b_x = tl.exp2(b_x)
        return b_x
    else:
        b_a = tl.zeros([BR, BC], tl.float32)
        b_m = tl.full([BR, BC], NEVER, tl.float32)
        for i_h in range(0, side[9]):
            b_x = head_scores(
                side, o_q, o_k, o_d, b_row, i_h, rows, REPEAT, D, BD, SCORES, CAP, UPCAST, PRECISION
            )  # fmt: skip
            if LOGS:
                b_e = tl.exp2(-tl.abs(b_x - b_m))
                b_a = tl.where(b_x > b_m, b_a * b_e + 1.0, b_a + b_e)
                b_m = tl.maximum(b_m, b_x)
            else:
                b_p = b_x
                if not SCORES:
                    b_p = tl.exp2(b_x)
                if MIX:
                    b_p *= tl.load(p_mix + i_h * groups + i_g)
                b_a += b_p
        if LOGS:
            b_a = b_m + tl.log2(b_a)
        return b_a


@triton.jit
def as_map(b_x, b_see, LOGS: tl.constexpr):
    """(A, log2 A) of a ``side_map`` tile, both 0 where hidden."""
    b_x = tl.where(b_see, b_x, 0.0)
    if LOGS:
        return tl.where(b_see, tl.exp2(b_x), 0.0), b_x
    else:
        return b_x, b_x


@triton.jit
def given_map(
    p_target, b_ordinal, stride, o_c, b_see, b_mass, LOGS: tl.constexpr, VISUAL: tl.constexpr
):  # fmt: skip
    """(A, log2 A) [BR, BC] of a given map: rows by their ordinal, columns as they come, over its mass.

    In the logarithm 0 counts as the smallest normal number (``maths.given_map``).
    """
    o_t = b_ordinal.to(tl.int64)[:, None] * stride + o_c[None, :]
    b_a = tl.load(p_target + o_t, mask=b_see, other=0.0).to(tl.float32)
    if VISUAL:
        b_a = tl.where(b_mass[:, None] > 0, b_a / tl.where(b_mass > 0, b_mass, 1.0)[:, None], 0.0)
    if LOGS:
        return b_a, tl.where(b_see, tl.log2(tl.maximum(b_a, TINY)), 0.0)
    else:
        return b_a, b_a


@triton.jit
def below_sinks(b_see, b_as, b_at, b_high_s, b_high_t):
    """The entries that the sink filter keeps: visible, at most the thresholds, teacher not 0."""
    return b_see & (b_as <= b_high_s) & (b_at <= b_high_t) & (b_at != 0.0)


@triton.jit
def divergence_term(b_as, b_at, b_xs, b_xt, DIVERGENCE: tl.constexpr):
    """What an entry adds to its unit (``maths.row_statistics``); x: log2 of the maps; not for cosine."""
    if DIVERGENCE == "kl":
        return b_at * (b_xt - b_xs) * LN2
    elif DIVERGENCE == "reverse_kl":
        return b_as * (b_xs - b_xt) * LN2
    elif DIVERGENCE == "js":
        b_xm = logaddexp2(b_xs, b_xt) - 1.0
        return (b_at * (b_xt - b_xm) + b_as * (b_xs - b_xm)) * (0.5 * LN2)
    else:
        b_gap = b_as - b_at
        return b_gap * b_gap


@triton.jit
def entry_gradient(
    b_as, b_at, b_xs, b_xt, b_c0, b_c1, DIVERGENCE: tl.constexpr, LOGS: tl.constexpr
):  # fmt: skip
    """dL/dA_s, or with LOGS dL/d log A_s, of a tile (``gradients.entry_gradient``).

    b_c0, b_c1: d loss / d statistics, broadcast against the tile; b_c1 for cosine only.
    """
    if DIVERGENCE == "kl":
        return -b_c0 * b_at
    elif DIVERGENCE == "reverse_kl":
        return b_c0 * b_as * ((b_xs - b_xt) * LN2 + 1.0)
    elif DIVERGENCE == "js":
        return b_c0 * b_as * (b_xs - logaddexp2(b_xs, b_xt) + 1.0) * (0.5 * LN2)
    else:
        if DIVERGENCE == "cosine":
            b_g = b_c0 * b_at + 2.0 * b_c1 * b_as
        else:
            b_g = 2.0 * b_c0 * (b_as - b_at)
        if LOGS:
            b_g *= b_as
        return b_g


@triton.jit
def score_gradient(
    b_dot, b_g, b_x, b_l, b_fold, b_delta, factor, cap,
    INSIDE: tl.constexpr, EACH: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """dL/dS of one head in natural units, times the slope of the softcap, whether visible or not.

    Row vectors come shaped to broadcast against the tile, whichever way it lies.

        maps as they are:  dS = P (g [in V] - delta),            P = 2^(x - fold), the head's share in it
        maps in logs:      dS = E 2^(x - fold - log2 A) [in V] - P delta,                P = 2^(x - l)
            (EACH: the map is the head's own, A = 2^(x - fold), and the power is 1)
        scores:            dS = g [in V]

    Args:
        b_g, b_x: the workspace's tile, read only INSIDE the compared columns; b_x with LOGS of more
            heads than one.
        b_l: log2-sum-exp of the head's softmax (LOGS). b_fold: the folded one.
    """
    b_t = b_dot * factor
    if CAP:
        b_t = tanh(b_t)
    if SCORES:
        b_ds = b_g
    else:
        b_s = b_t
        if CAP:
            b_s = cap * b_t
        if LOGS:
            b_ds = -tl.exp2(b_s - b_l) * b_delta
            if INSIDE and EACH:
                b_ds += b_g
            elif INSIDE:
                b_ds += tl.exp2(b_s - b_fold - b_x) * b_g
        elif INSIDE:
            b_ds = tl.exp2(b_s - b_fold) * (b_g - b_delta)
        else:
            b_ds = -tl.exp2(b_s - b_fold) * b_delta
    if CAP:
        b_ds *= 1.0 - b_t * b_t
    return b_ds
