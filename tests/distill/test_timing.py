"""The stopwatch: every moment is charged once, and a run says where its time went."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fastalign.distill.report import time_table
from fastalign.distill.timing import Stopwatch

from .test_trainer import train


def test_inner_parts_are_not_charged_to_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])
    watch = Stopwatch(torch.device("cpu"))

    def work(seconds: float) -> None:
        now[0] += seconds

    with watch.part("teacher"):
        work(100)  # not started: not counted
    watch.start()
    work(1)
    with watch.part("student"):
        work(2)
        with watch.part("alignment"):
            work(0.5)
        work(3)
    watch.switch("optimizer")
    work(4)
    watch.stop()
    work(100)
    assert {n: s for n, s in watch.seconds.items() if s} == {
        "rest": 1,
        "student": 5,
        "alignment": 0.5,
        "optimizer": 4,
    }
    assert watch.total == 10.5
    found = watch.summary()
    assert found["cpu_seconds_by_part"]["student"] == 10
    assert found["alignment_share"] == pytest.approx(0.5 / 9)


def test_a_run_says_where_its_time_went(tmp_path: Path) -> None:
    started = time.perf_counter()
    _, _, trainer = train(tmp_path, {"lm": 1, "kd": 1, "alignment": 1}, batch=4, accumulate=2)
    wall = time.perf_counter() - started
    found = trainer.stopwatch.summary()
    parts = found["seconds_by_part"]
    for name in ("data", "teacher", "student", "alignment", "losses", "backward", "optimizer"):
        assert parts[name] > 0, name
    assert sum(parts.values()) == pytest.approx(found["seconds"]) and found["seconds"] < wall
    assert (found["timed_steps"], found["batches"]) == (1, 2)
    table = time_table(found)
    assert "alignment makes the step" in table and "tokens/s; peak" in table
    _, _, plain = train(tmp_path, {"lm": 1}, batch=4, accumulate=2)
    parts = plain.stopwatch.summary()["seconds_by_part"]
    assert "alignment" not in parts and "teacher" not in parts
