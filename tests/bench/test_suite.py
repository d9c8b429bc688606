"""The benchmark suite: what it refuses to report, what it writes, what it reads back."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import ceilings, page, phases, plot, providers, rehearsal, table
from benchmarks.alignment import Options, run
from benchmarks.case import Case
from benchmarks.ceilings import Ceilings
from benchmarks.clock import CudaClock, rounds, spread
from benchmarks.gate import check, error
from benchmarks.modes import MODES
from benchmarks.scaling import exponent, line
from benchmarks.shapes import SHAPES, SWEEP, Shape
from fastalign.commands import build_app

ROOT = Path(__file__).parents[2]
SMALL = Shape("tiny", 60, 5, 30, (2, 4), (1, 2), 16, count=12)
runner = CliRunner()


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("rows", ["text", "visual"])
def test_every_provider_that_runs_here_passes_the_gate(mode: str, rows: str) -> None:
    case = Case.of(replace(SMALL, rows=rows, count=12 if rows == "text" else 0))
    kind = MODES[mode]
    steps = {
        name: make(case)
        for name, make in kind.providers.items()
        if not kind.applies(name, case.shape, 2**30, "cpu") and "compiled" not in name
    }
    assert {"eager_rows", "tiled", "cpu"} <= set(steps)
    assert check(case, kind, steps) == dict.fromkeys(steps, "")


def test_the_gate_sees_a_wrong_gradient_a_nan_and_an_exception() -> None:
    case, kind = Case.of(SMALL), MODES["fwd+bwd"]
    right = kind.providers["eager_rows"](case)

    def wrong() -> tuple[torch.Tensor, ...]:
        loss, dq, dk = right()
        return loss, dq, dk * 1.01

    def nan() -> tuple[torch.Tensor, ...]:
        loss, dq, dk = right()
        return loss, dq * float("nan"), dk

    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no luck")

    verdicts = check(case, kind, {"right": right, "wrong": wrong, "nan": nan, "broken": broken})
    assert verdicts["right"] == ""
    assert "error 1" in verdicts["wrong"] or "error 9" in verdicts["wrong"]
    assert "error nan" in verdicts["nan"]
    assert verdicts["broken"] == "RuntimeError: no luck"
    assert error(case, right(), right()) == 0


def test_a_red_gate_gives_no_figure_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case) -> object:
        step = providers.eager_rows(case)
        return lambda: tuple(2 * x for x in step())

    monkeypatch.setitem(providers.PROVIDERS, "tiled", wrong)  # type: ignore[arg-type]
    arguments = ["bench", "--shape", "tiny", "--rounds", "1"]
    arguments += ["--provider", "eager_rows", "--provider", "tiled"]
    result = runner.invoke(build_app(), arguments)
    assert result.exit_code == 1
    assert "RED: tiny tiled: error" in result.output
    outcome = run(Options(("tiny",), ("eager_rows", "tiled"), rounds=1, resident=False), print)
    assert [name for _, name, _ in outcome.red] == ["tiled"]
    assert {row.provider for row in outcome.rows if row.metric == "time_ms"} == {"eager_rows"}


def test_the_command_writes_the_table(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    arguments = ["bench", "--shape", "tiny", "--rounds", "2", "--out", str(out)]
    arguments += ["--provider", "eager_rows", "--provider", "cpu", "--provider", "flex_identity"]
    result = runner.invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    rows = table.read(out)
    kinds = {(row.provider, row.metric) for row in rows if row.shape == "tiny"}
    factor = "factor_over_eager_rows"
    for provider in ("eager_rows", "cpu"):
        for metric in ("time_ms", "roofline", "in_turn", "peak_mib", factor):
            assert (provider, metric) in kinds
    (left,) = (row for row in rows if row.metric == "left_out")
    assert (left.provider, left.note) == ("flex_identity", "FlexAttention has no backward on CPUs")
    own = next(r for r in rows if (r.provider, r.metric) == ("eager_rows", factor))
    assert own.p50 == 1
    assert {row.metric for row in rows if row.shape == "machine"} >= {"gemm_float32_gflops"}


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shape", "no"), ("--provider", "no"), ("--mode", "no"), ("--device", "tpu")],
)
def test_a_name_that_is_none_is_a_usage_error(option: str, value: str) -> None:
    result = runner.invoke(build_app(), ["bench", option, value])
    assert result.exit_code == 2
    assert f"{option} is {value!r}; allowed: " in result.output


def test_the_list_names_everything() -> None:
    result = runner.invoke(build_app(), ["bench", "--list"])
    assert result.exit_code == 0
    assert all(name in result.output for name in SHAPES)
    assert "sdpa_identity" in result.output


def test_away_from_the_repository_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastalign.commands import bench as command

    module = sys.modules[command.__module__]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "bench.py"))
    result = runner.invoke(build_app(), ["bench"])
    assert result.exit_code == 1
    assert "part of the repository, not of the installed package" in result.output


def test_rounds_interleave_and_a_slow_one_stops_early() -> None:
    calls: list[str] = []
    steps = {"fast": lambda: calls.append("f"), "slow": lambda: calls.append("s")}

    def clock(step: object) -> float:
        step()  # type: ignore[operator]
        return 4000.0 if calls[-1] == "s" else 1.0

    times = rounds(steps, clock, count=5, seconds=10)
    assert "".join(calls) == "fsfsfsff"
    assert {name: len(taken) for name, taken in times.items()} == {"fast": 5, "slow": 3}
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_the_cuda_clock_reads_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed with stand-ins: the buffer is written, then start, step, end, in this order."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def elapsed_time(self, end: Event) -> float:
            order.append("elapsed")
            return 1.5

    class Buffer:
        def zero_(self) -> None:
            order.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert CudaClock()(lambda: order.append("step")) == 1.5
    assert order == ["flush", "record", "step", "record", "wait", "elapsed"]


# run without torch.compile, which is as right and needs no compilation
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_on_the_identity_is_the_eager_map() -> None:
    """Its forward, which CPUs have, on more columns than one call takes."""
    case = Case.of(Shape("flex", 200, 10, 150, (2, 2), (2, 2), 16, count=30))
    with torch.no_grad():
        got = providers.flex_side(case)(case.q_t, case.k_t)
        want = providers.attention_map(case.q_t, case.k_t, case.hidden, case.columns)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_triton_rehearsal_in_the_interpreter(tmp_path: Path) -> None:
    """The same bench with the Triton kernels, as it will run on a GPU, at a tiny size."""
    out = tmp_path / "t.csv"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.alignment", "--shapes", "tiny", "--providers", "eager_rows",
         "triton", "--rounds", "1", "--seconds", "0", "--no-rss", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    timed = {(r.mode, r.provider) for r in table.read(out) if r.metric == "time_ms"}
    assert {("fwd+bwd", "triton"), ("pooled fwd", "triton")} <= timed


def results(tmp_path: Path) -> Path:
    """A table of made-up figures over the sweep."""
    rows = [
        table.Row("align", name, "bfloat16", provider, "fwd+bwd", metric, SHAPES[name].visual,
                  p50 * 0.9, p50, p50 * 1.1, 9, "Test machine", "v0")
        for name in SWEEP
        for provider, factor in (("eager_rows", 4.0), ("cpu", 1.0))
        for metric, p50 in (
            ("time_ms", factor * SHAPES[name].visual / 100),
            ("peak_mib", factor * SHAPES[name].visual / 500),
            ("roofline", 0.5 / factor),
            ("in_turn", 0.7 / factor),
            ("factor_over_eager_rows", 4.0 / factor),
        )
    ]  # fmt: skip
    path = tmp_path / "made-up.csv"
    table.write(path, rows)
    assert json.dumps([r.p50 for r in table.read(path)]) == json.dumps(
        [float(f"{r.p50:.4g}") for r in rows]
    )
    return path


def test_page_and_picture_follow_the_table(tmp_path: Path) -> None:
    path = results(tmp_path)
    text = page.page(f"Before\n{page.BEGIN}\nold\n{page.END}\nafter\n", [path])
    assert text.startswith("Before\n")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text
    assert "## Test machine" in text
    assert "| sweep-256 | cpu | 4.00 [3.60, 4.40] | eager, compared rows |  | 50% | 70% |" in text
    assert page.page(text, [path]) == text
    plot.draw(table.read(path), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lost a marker"):
        page.page("nothing", [path])


def test_the_committed_page_is_what_the_results_say() -> None:
    files = table.result_files()
    text = page.PAGE.read_text()
    assert page.page(text, files) == text


def test_the_fit_finds_a_line() -> None:
    work = [1.0, 2.0, 5.0, 40.0, 100.0]
    a, b = line(work, [3 + 0.5 * w for w in work])
    assert (a, b) == pytest.approx((3, 0.5))
    assert exponent(work, [2 * w**1.5 for w in work]) == pytest.approx(1.5)


def test_phases_add_up_to_the_step() -> None:
    times = phases.phases(SMALL, repeats=3)
    assert set(times) == {"select rows and keys", "maps", "gradients", "scale gradients", "whole"}
    assert all(took > 0 for took in times.values())
    assert sum(times.values()) <= 3 * times["whole"]  # medians, each of its own rounds
    rates = Ceilings({"float32": 1e12}, 1e10, 1e10)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(phases.table(SHAPES["long-d64"], {**times, "whole": 80.0, "maps": 30.0}, rates))
    lines = {
        line.split("│")[1].strip(): line
        for line in console.export_text().splitlines()
        if "│" in line
    }
    products, exponentials = rates.floor_seconds(SHAPES["long-d64"])
    assert f"{1e3 * products:.2f}" in lines["whole"]
    assert f"{1e3 * exponentials:.2f}" in lines["maps"]
    assert "30.00" in lines["maps"]


def test_a_rehearsal_runs_the_gpu_path_in_the_interpreter() -> None:
    """In a process of its own; the Triton kernels are right, and nothing is timed."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "fastalign", "bench", "--rehearse"]
    names = ["--provider", "triton", "--provider", "eager_rows", "--provider", "cpu"]
    done = subprocess.run(
        [*command, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.replace("│", " ").splitlines()
    lines = [line.split() for line in table if "fwd+bwd" in line]
    got = {(line[0], line[2], line[3]) for line in lines}
    assert {provider for _, provider, _ in got} == {"triton", "eager_rows"}  # not the CPU's own
    assert all(outcome == "right" for _, _, outcome in got)
    assert len(got) == 6
    assert "ms" not in done.stdout.split()


def test_a_rehearsal_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = runner.invoke(build_app(), ["bench", "--rehearse"])
    assert result.exit_code == 2
    assert "TRITON_INTERPRET" in result.output


def test_a_rehearsal_tells_a_wrong_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MODES["fwd+bwd"].providers["eager_rows"]
    broken = {"broken": lambda case: lambda: tuple(2 * x for x in right(case)())}
    known = {**MODES["fwd+bwd"].providers, **broken}
    mode = replace(MODES["fwd+bwd"], providers=known)
    monkeypatch.setitem(rehearsal.MODES, "fwd+bwd", mode)  # type: ignore[index]
    verdicts = rehearsal.rehearse(("broken",), ("fwd+bwd",), lambda line: None)
    assert len(verdicts) == 3
    assert all("error" in v.wrong for v in verdicts)


def test_a_gpu_run_on_a_stand_in(tmp_path: Path) -> None:
    """Every line that only a GPU run executes, but for torch's own and compiled providers."""
    pytest.importorskip("triton")
    out = tmp_path / "g.csv"
    names = ("eager_full", "eager_rows", "eager_rows_upcast", "chunked_checkpoint", "sdpa_identity")
    command = [sys.executable, "-m", "tests.bench.stand_in", "--modes", "fwd+bwd", "pooled fwd"]
    done = subprocess.run(
        [
            *command,
            "--rounds",
            "2",
            "--out",
            str(out),
            "--providers",
            *names,
            "tiled",
            "triton",
            "cpu",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = table.read(out)
    timed = {(r.mode, r.provider) for r in rows if r.metric == "time_ms" and r.n == 2 and r.p20 > 0}
    assert timed == {("fwd+bwd", name) for name in (*names, "tiled", "triton")} | {
        ("pooled fwd", name) for name in ("eager_rows", "tiled", "triton")
    }
    assert {(r.provider, r.note) for r in rows if r.metric == "left_out"} == {
        ("cpu", "runs on CPUs")
    }
    assert {r.p50 for r in rows if r.metric == "peak_mib"} == {3.0}
    assert {r.device for r in rows} == {"Stand-in"}
    machine = {r.metric: r.p50 for r in rows if r.shape == "machine"}
    assert machine.keys() >= {"gemm_bfloat16_gflops", "exp_g_per_s", "copy_gb_per_s"}
    assert min(machine.values()) > 0


def test_without_a_gpu_a_gpu_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(build_app(), ["bench", "--device", "cuda"])
    assert result.exit_code == 2
    assert "--device is 'cuda'; torch finds no GPU" in result.output


def test_compiled_providers_stay_compiled_after_many_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch gives up on a function after eight shapes; a bench forgets the earlier ones."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph.__class__.__name__)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **named: real(f, backend=backend, **named))
    rates = Ceilings({"float32": 1e12}, 1e10, 1e10)
    monkeypatch.setattr(ceilings, "measure", lambda *_: rates)
    names = tuple(f"many-{i}" for i in range(10))
    for i, name in enumerate(names):
        monkeypatch.setitem(SHAPES, name, replace(SMALL, name=name, length=60 + 4 * i))
    options = Options(names, ("eager_rows_compiled",), rounds=1, resident=False)
    assert run(options, lambda line: None).red == []
    assert len(compiled) == 10
