"""The gates on compiled code, a part of `make gates`: head size 128 in bf16, without a GPU.

Compiles the head-mean kernels with the tables' configurations, and with them checks the limits of
docs/triton.md; ``benchmarks.static_report`` says what a gate is. And the bound itself, on a program whose
loops, peeled passes and pipes can be counted by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks.exponentials import SIZE, TURNS, _exponentials
from benchmarks.static import report
from benchmarks.static.bound import Job, bound_of, loops_of, work_of
from benchmarks.static.compiling import Compiled, compile_launch
from benchmarks.static.record import Launch
from benchmarks.static.report import (
    BRANCHES,
    TARGETS,
    Row,
    failures,
    launches,
    row_of,
    sums,
)


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The head-mean kernels, compiled for one architecture of each matrix instruction."""
    target = request.param
    return [
        row_of(objective, launch, TARGETS[target], 128, "bf16")
        for objective, launch in launches(target, 128, "bf16", variants=False)
        if objective == "head mean"
    ]


def test_head_mean_kernels(rows: list[Row]) -> None:
    """Launch limits, stack, spills, matrix instruction, atomics; bounds near their floors."""
    assert failures(rows) == []
    ratios = {total.name: total.ratio for total in sums(rows)}
    assert len(ratios) == 4
    assert all(ratios.values())
    assert ratios["forward, log-sum-exps given"] <= 1.25  # type: ignore[operator]
    assert ratios["dq + dk"] <= 1.6  # type: ignore[operator]


def test_a_missed_gate_is_told(rows: list[Row]) -> None:
    """Rows that are slow, that have no bound, or whose kernel was refused fail."""
    slow = [replace(r, clocks_per_element=1.7 * r.floor) if r.floor else r for r in rows]
    assert any("dq + dk" in message for message in failures(slow))
    lost = [replace(r, clocks_per_element=None) if r.kernel == "statistics" else r for r in rows]
    assert any("forward" in message for message in failures(lost))
    spilled = [replace(rows[0], problems=("8 bytes of stack, 2 spills",)), *rows[1:]]
    assert any("8 bytes of stack" in message for message in failures(spilled))


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, Launch]]:
    """Every launch that the report compiles for one target, further branches included."""
    return list(launches("sm_90", 128, "bf16", variants=True))


@pytest.mark.parametrize(
    ("branch", "kernels", "facts"),
    [
        ("few rows", {"dq", "row_delta"}, {"SPLIT": True}),
        ("64-bit offsets", {"row_lse", "statistics", "map_gradient", "dq", "dk"}, {"WIDE": True}),
        (
            "scattered blocks",
            {"row_lse", "statistics", "map_gradient", "dq", "dk"},
            {"INTERVAL": False, "CAUSAL": True, "WINDOW": True, "BLOCKS": True},
        ),
        ("softcap", {"row_lse", "statistics", "map_gradient", "dq", "dk"}, {"CAP_S": True}),
        ("softcap, head kl", {"head_kl"}, {"CAP_S": True, "CAP_T": True}),
        ("sinks, head kl", {"head_kl"}, {"SINK_S": True, "SINK_T": True}),
        ("sink filter", {"map_gradient"}, {"SINK": True}),
        ("mix", {"statistics", "map_gradient"}, {"HEADS": "mix"}),
        ("given map", {"statistics", "map_gradient"}, {"TEACHER": "map"}),
    ],
)
def test_a_branch_is_what_its_name_says(
    branch: str, kernels: set[str], facts: dict[str, object], recorded: list[tuple[str, Launch]]
) -> None:
    """Recorded, not compiled: its launches of these kernels have these compile-time facts."""
    assert branch in BRANCHES
    for kernel in kernels:
        found = [x for objective, x in recorded if (objective, x.name) == (branch, kernel)]
        assert found, kernel
        assert all(launch.arguments[k] == v for launch in found for k, v in facts.items()), kernel


def test_the_command_with_several_processes_and_threads(tmp_path: Path) -> None:
    """As `make gates` runs it: forked after torch had started its threads, processes stood still."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.static_report", "--kernels", "row_sums"]
    command += ["--targets", "sm_80", "gfx950", "--head-dims", "64", "--dtypes", "bf16", "tf32"]
    threads = {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--jobs", "2", "--json", str(file)],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["target"], row["dtype"]) for row in json.loads(file.read_text())["rows"]}
    # gfx950 has no tf32: its fp32 is one cell, not two
    assert found == {("sm_80", "bf16"), ("sm_80", "tf32"), ("gfx950", "bf16")}


def _program(*lines: str) -> str:
    return "\n".join(x if x.startswith(".L") else f"  /*0000*/  {x} ;" for x in lines)


def test_the_bound_of_a_program_that_can_be_counted_by_hand() -> None:
    """One warp; a loop of two products and two exponentials a pass; one whole pass peeled off."""
    product, power = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.EX2 R4, R4"
    code = _program(
        *(product, power, product, power),  # the pass that pipelining peeled off
        ".L_x_1:",
        *(product, power, product, power),
        *["FFMA R1, R2, R3, R4"] * 8,
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    compiled = Compiled(TARGETS["sm_80"], code, 32, 0, 0, 0, 1, 0, 1)
    flops = 2 * 2.0 * 16 * 8 * 16
    bound = bound_of(compiled, Job((10.0,), flops, 64.0, 10 * 64.0, flops / 64, 1.0))
    # a pass: 2 x 4096 FLOP at 2048 a clock, 2 x 32 exponentials at 16, 13 instructions at 4 a clock
    assert bound.inner == pytest.approx(4.0 / 64)
    # nine turns of 4 clocks; outside 4 clocks, too
    assert bound.clocks == pytest.approx((9 * 4.0 + 4.0) / (10 * 64))
    assert bound.floor == pytest.approx(1 / 16)
    assert bound.limiter in ("tensor", "special")


def test_what_cannot_be_read_is_refused() -> None:
    compiled = Compiled(TARGETS["sm_80"], _program("EXIT"), 32, 0, 0, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="0 loops with matrix products, 1 expected"):
        bound_of(compiled, Job((1.0,), 1.0, 1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("objective", "kernel", "some"),
    [
        ("scattered blocks", "row_sums", False),
        ("softcap", "row_delta", True),
        ("softcap, head kl", "row_delta", False),
        ("pooled, in logs", "map_gradient", True),
        ("pooled", "map_gradient", False),
    ],
)
def test_where_products_are_needed(
    objective: str,
    kernel: str,
    some: bool,
    recorded: list[tuple[str, Launch]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is said of a launch's task, what its source asks for and what the machine does are one."""
    launch = next(x for o, x in recorded if (o, x.name) == (objective, kernel))
    assert report.has_products(launch) is some
    row = row_of(objective, launch, TARGETS["sm_90"], 128, "bf16")
    assert row.problems == ()
    assert (row.tensor_core_ops > 0) is some
    monkeypatch.setattr(report, "has_products", lambda _: not some)
    assert len(row_of(objective, launch, TARGETS["sm_90"], 128, "bf16").problems) == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_of_exponentials_is_bound_by_them(target: str) -> None:
    """The bench's ceiling: eight a thread and turn, in registers; all else together takes fewer clocks."""
    arguments = {"p_out": torch.empty(SIZE), "turns": TURNS, "SIZE": SIZE}
    tile = report.Tile(SIZE, 1, 4, 1, "as the bench launches it")
    compiled = compile_launch(Launch(_exponentials, arguments, tile), TARGETS[target])
    assert compiled.stack_bytes == compiled.spills == 0
    loops, _, instructions = loops_of(compiled.code, "MUFU.EX2")
    loop = max(loops, key=len)  # several turns at once; a shorter one does the rest
    work = work_of(compiled, [instructions[i] for i in loop])
    assert work.ex2 % 8 == 0
    assert work.ex2 > 0
    assert work.limiter() == "special"
    assert not any(instructions[i][0].startswith(("LD", "ST")) for i in loop)
