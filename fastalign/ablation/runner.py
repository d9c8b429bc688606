"""Runs what a study lacks, in pieces, and repeats a run from its record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .records import (
    Record,
    environment,
    new_record,
    read_record,
    read_records,
    record_path,
    save_record,
    sources_digest,
    weights_digest,
)
from .study import Study, StudyError
from .task import Task, find_task, settings_from

Say = Callable[[str], None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Progress:
    """Runs that are finished, and that remain."""

    done: int
    left: int


def run_study(
    study: Study,
    *,
    checkpoints: Path,
    minutes: float | None = None,
    only: Iterable[tuple[str, int]] | None = None,
    say: Say = print,
    clock: Clock = time.monotonic,
) -> Progress:
    """Make the runs that have no record yet, in the study's order.

    Args:
        checkpoints: folder for what unfinished runs need to go on; finished ones leave it.
        minutes: stop at the first checkpoint after this time. None: when all is done.
        only: these runs. None: all.

    Raises:
        StudyError: records that cannot be compared with what would be run now.
    """
    task = find_task(study)
    read_records(study, task)
    until = None if minutes is None else clock() + 60 * minutes
    wanted = study.runs() if only is None else list(only)
    left = [run for run in wanted if not record_path(study, *run).exists()]
    done = len(wanted) - len(left)
    for condition, seed in list(left):
        if until is not None and clock() >= until:
            break
        record = _go_on(study, task, condition, seed, checkpoints, until, clock)
        if record is None:
            say(f"{condition}-{seed}: stopped at a checkpoint")
            break
        done += 1
        left.remove((condition, seed))
        outcome = study.measures[0]
        say(
            f"{record.name}: {outcome} {record.final.get(outcome, float('nan')):.4f}, "
            f"{record.cpu_seconds:.0f} CPU seconds"
        )
    return Progress(done, len(left))


def repeat(study: Study, condition: str, seed: int) -> list[str]:
    """Make a run again from its record alone; what came out differently (nothing: bit for bit equal).

    Raises:
        StudyError: no record, or one of other code or of another environment.
    """
    task = find_task(study)
    before = read_record(record_path(study, condition, seed))
    if before.sources_digest != sources_digest(task.SOURCES):
        raise StudyError(
            f"{before.name} was made by other code of {task.SOURCES}; allowed: the same"
        )
    if before.environment != environment():
        raise StudyError(
            f"{before.name} was made with {before.environment}, this is {environment()}; allowed: the same"
        )
    again = Record(
        **{
            **asdict(before),
            "losses": [],
            "curve": [],
            "final": {},
            "weights": "",
            "cpu_seconds": 0.0,
            "wall_seconds": 0.0,
            "scoring_seconds": 0.0,
        }
    )
    training = task(settings_from(task, again.config), seed)
    train(training, again, 0, study)
    differences = [
        name
        for name in ("losses", "final", "weights")
        if getattr(before, name) != getattr(again, name)
    ]
    scores = [[(e["step"], e["scores"]) for e in r.curve] for r in (before, again)]
    return differences + ["curve"] * (scores[0] != scores[1])


def _go_on(
    study: Study,
    task: type[Task],
    condition: str,
    seed: int,
    checkpoints: Path,
    until: float | None,
    clock: Clock,
) -> Record | None:
    """The finished run's record, saved; None if the time was up at a checkpoint."""
    record = new_record(study, task, condition, seed)
    training = task(settings_from(task, record.config), seed)
    path = checkpoints / study.name / f"{record.name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        before = Record(**state["record"])
        same = ("config_digest", "sources_digest", "environment")
        if all(getattr(before, name) == getattr(record, name) for name in same):
            training.load_state(state["training"])
            record, start = before, state["step"]
        else:
            raise StudyError(
                f"{path} is a checkpoint of other settings, code or environment than this run's; "
                "allowed: the same, or no such file"
            )
    record.pieces += 1

    def stop_at(step: int) -> bool:
        if step % study.checkpoint_every == 0:
            _save(path, {"training": training.state(), "record": asdict(record), "step": step})
            return until is not None and clock() >= until
        return False

    if not train(training, record, start, study, stop_at):
        return None
    save_record(study, record)
    path.unlink(missing_ok=True)
    return record


def train(
    training: Task,
    record: Record,
    start: int,
    study: Study,
    stop_at: Callable[[int], bool] = lambda step: False,
) -> bool:
    """Steps from ``start`` to the end, noted in ``record``; False if ``stop_at`` said so."""
    sums: dict[str, float] = {}
    since = 0
    for number in range(start, training.steps):
        cpu, wall = time.process_time(), time.monotonic()
        noted = training.step(number)
        record.cpu_seconds += time.process_time() - cpu
        record.wall_seconds += time.monotonic() - wall
        since += 1
        for name, value in noted.items():
            sums[name] = sums.get(name, 0.0) + value
        done = number + 1
        last = done == training.steps
        if done % study.score_every == 0 or last:
            means = {name: value / since for name, value in sums.items()}
            record.losses.append({"step": done, **means})
            sums, since = {}, 0
            cpu = time.process_time()
            scores = training.score(final=False)
            record.scoring_seconds += time.process_time() - cpu
            record.curve.append(
                {"step": done, "cpu_seconds": round(record.cpu_seconds, 3), "scores": scores}
            )
        if not last and done % study.score_every == 0 and stop_at(done):
            return False
    cpu = time.process_time()
    record.final = training.score(final=True)
    record.scoring_seconds += time.process_time() - cpu
    record.weights = weights_digest(training.weights())
    for name in ("cpu_seconds", "wall_seconds", "scoring_seconds"):
        setattr(record, name, round(getattr(record, name), 3))
    return True


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
