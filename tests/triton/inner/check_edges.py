"""Where kernels go wrong: odd sizes, padding, hidden rows and blocks, strides, chunks, given inputs."""

from __future__ import annotations

import pytest
import torch

from fastalign import AlignSpec
from fastalign.backends import triton as backend

from ...problems import Inputs, random_inputs
from .common import DEVICE, check, inside, run

MEAN = AlignSpec(compare="row")
LOGS = AlignSpec(compare="row", divergence="kl", normalize="visual")
EACH = AlignSpec(compare="row", divergence="kl", heads="each")


def _inputs(spec: AlignSpec, length: int = 21, extras: bool = False, **more) -> Inputs:  # type: ignore[no-untyped-def]
    shapes = {"batch": 1, "heads": (2, 3), "key_heads": (1, 3), **more}
    return random_inputs(spec, length=length, dtype=torch.float32, extras=extras, **shapes)


@pytest.mark.parametrize("length", [8, 15, 16, 17, 33])
def test_lengths_around_a_tile(length: int) -> None:
    check(_inputs(MEAN, length), MEAN)


@pytest.mark.parametrize("sizes", [(1, 16), (17, 3), (40, 80)])
def test_head_sizes(sizes: tuple[int, int]) -> None:
    check(_inputs(LOGS, sizes=sizes), LOGS)


@pytest.mark.parametrize("spec", [MEAN, LOGS, EACH], ids=["mean", "logs", "each"])
def test_leading_hidden_blocks_and_rows_that_see_nothing(spec: AlignSpec) -> None:
    """The first 34 keys (two tiles and more) are padding; no compared column is before row 40."""
    inputs = _inputs(spec, 50)
    valid = torch.ones(1, 50, dtype=torch.bool)
    valid[:, :34] = False
    visual = torch.zeros_like(valid)
    visual[:, 40:47] = True
    inputs.keywords.update(attention_mask=valid, visual_mask=visual)
    dq = check(inputs, spec)[1]
    assert (dq[:, :, :40] == 0).all()  # padding, or rows before the first compared column


def test_no_row_and_no_column_at_all() -> None:
    inputs = _inputs(MEAN)
    nothing = torch.zeros(1, 21, dtype=torch.bool)
    for name in ("query_mask", "visual_mask", "attention_mask"):
        for x in run(inputs, MEAN, **{name: nothing}):
            assert (x == 0).all()
    empty = Inputs(
        *(x[:0] for x in (inputs.q_s, inputs.k_s, inputs.q_t, inputs.k_t)),  # type: ignore[index]
        {name: x[:0] for name, x in inputs.keywords.items()},
    )
    assert run(empty, MEAN)[0] == 0


@pytest.mark.parametrize("spec", [MEAN, LOGS, EACH], ids=["mean", "logs", "each"])
def test_nothing_beyond_the_tensors_is_used(spec: AlignSpec) -> None:
    """q and k are surrounded by NaN in memory, on every side of every dimension: equal bits."""
    inputs = _inputs(spec, 19)
    plain = run(inputs, spec)
    padded = Inputs(
        *(inside(x) for x in (inputs.q_s, inputs.k_s, inputs.q_t, inputs.k_t)),  # type: ignore[arg-type]
        inputs.keywords,
    )
    # Inputs.run clones its leaves densely; hand the views over as they are
    q, k = padded.q_s.requires_grad_(), padded.k_s.requires_grad_()
    from fastalign import fused_attn_align_loss

    loss = fused_attn_align_loss(
        q, k, padded.q_t, padded.k_t, spec=spec, backend="triton", **padded.keywords
    )
    result = [loss.detach(), *torch.autograd.grad(loss, (q, k))]
    for got, want in zip(result, plain, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("spec", [MEAN, LOGS, EACH], ids=["mean", "logs", "each"])
def test_identical_bits_on_a_second_run(spec: AlignSpec) -> None:
    inputs = _inputs(spec, extras=True)
    for first, second in zip(run(inputs, spec), run(inputs, spec), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE != "cpu", reason="no interpreter: tiles are chosen by timing there")
def test_autotuning_changes_nothing_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(MEAN)
    plain = run(inputs, MEAN)
    monkeypatch.setenv("FASTALIGN_AUTOTUNE", "1")
    for first, second in zip(plain, run(inputs, MEAN), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("spec", [MEAN, LOGS], ids=["mean", "logs"])
def test_masks_that_are_no_intervals(spec: AlignSpec) -> None:
    """Interleaved segments and blocks, a window: every descriptor is compared."""
    inputs = _inputs(spec, 24)
    inputs.keywords.pop("attention_mask")
    check(inputs, spec, segment_ids=torch.arange(24).view(1, 24) % 2)
    check(inputs, spec, block_ids=torch.arange(24).view(1, 24) % 3 - 1, window=5)


@pytest.mark.parametrize("spec", [MEAN, LOGS], ids=["mean", "logs"])
def test_padding_in_a_block(spec: AlignSpec) -> None:
    """A padding token with the block's number lies beyond keys that the block's rows do not see."""
    inputs = _inputs(spec, 20)
    blocks, valid = torch.full((1, 20), -1), torch.ones(1, 20, dtype=torch.bool)
    blocks[:, 2:6], valid[:, -3:] = 0, False
    blocks[:, -1] = 0
    inputs.keywords.update(attention_mask=valid, visual_mask=torch.ones_like(valid))
    check(inputs, spec, block_ids=blocks)


@pytest.mark.parametrize("more", [{"window": 4}, {"chunk": 9}, {"causal": False}], ids=str)
def test_masks_that_are_intervals(more: dict[str, int]) -> None:
    check(_inputs(MEAN, 24), MEAN, **more)


@pytest.mark.parametrize("spec", [MEAN, LOGS], ids=["mean", "logs"])
def test_without_looking_at_the_masks(spec: AlignSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured nothing may be counted: bounds come from shapes."""
    monkeypatch.setattr(backend, "_capturing", lambda device: True)
    check(_inputs(spec), spec)


@pytest.mark.parametrize(
    "spec",
    [MEAN, LOGS, EACH, AlignSpec(compare="pooled"), AlignSpec(heads="mix")],
    ids=["mean", "logs", "each", "pooled", "mix"],
)
def test_rows_in_chunks(spec: AlignSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that holds 16 rows: three chunks, dk continued from one to the next."""
    monkeypatch.setattr(backend, "GRAIN", 16)
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1)
    inputs = _inputs(spec, 35)
    assert len(inputs.q_s[0, 0]) > 32
    check(inputs, spec)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_reach", lambda x: 2**31)
    check(_inputs(MEAN), MEAN)


def test_given_log_sum_exps() -> None:
    """The numbers of a sweep, handed over: the same loss and gradients."""
    inputs = _inputs(MEAN, extras=False)
    visible = torch.ones(21, 21, dtype=torch.bool).tril() & inputs.keywords["attention_mask"]
    lse = {}
    for side, q, k in (("s", inputs.q_s, inputs.k_s), ("t", inputs.q_t, inputs.k_t)):
        assert q is not None
        assert k is not None
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        lse[f"lse_{side}"] = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    check(inputs, MEAN, **lse)


@pytest.mark.parametrize("divergence", ["cosine", "kl"])
@pytest.mark.parametrize("normalize", ["joint", "visual"])
def test_given_targets(divergence: str, normalize: str) -> None:
    """Dense, sparse and pooled maps in the teacher's place."""
    spec = AlignSpec(compare="row", divergence=divergence, normalize=normalize)  # type: ignore[arg-type]
    inputs = _inputs(spec)
    inputs.q_t = inputs.k_t = None
    columns = int(inputs.keywords["visual_mask"].sum())
    dense = torch.rand(1, 1, 21, columns)
    check(inputs, spec, target=dense)
    index = torch.randint(-1, columns, (1, 1, 21, 3))
    check(inputs, spec, target=dense[..., :3].contiguous(), target_index=index)
    pooled = AlignSpec(compare="pooled", divergence=divergence, normalize=normalize)  # type: ignore[arg-type]
    check(inputs, pooled, target=dense[:, :, 0])


def test_rows_that_the_caller_sliced() -> None:
    spec = AlignSpec(compare="row", columns="all")
    inputs = _inputs(spec)
    positions = torch.tensor([[20, 3, -1, 11, 7]])
    inputs.q_s, inputs.q_t = inputs.q_s[:, :, :5], inputs.q_t[:, :, :5]  # type: ignore[index]
    check(inputs, spec, query_positions=positions)


def test_temperature_and_logits_of_thousands() -> None:
    """A confidently wrong student: probabilities underflow, the gradient of kl does not vanish."""
    spec = AlignSpec(divergence="kl", compare="row", temperature=2.0)
    inputs = _inputs(spec)
    inputs.q_s, inputs.q_t = inputs.q_s * 300, inputs.q_t * 300  # type: ignore[operator]
    assert check(inputs, spec, largest=1000.0)[1].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x.repeat(1, 1, 1, 40), "head size of 320"),
    ],
)
def test_what_cannot_be_done_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    inputs = _inputs(MEAN)
    inputs.q_s, inputs.k_s = change(inputs.q_s), change(inputs.k_s)
    with pytest.raises(ValueError, match=rf"'triton'.*{message}.*'reference', 'tiled'"):
        run(inputs, MEAN)
