"""What is kept of a run, and which runs may be compared."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distill.plain import RecipeError, to_plain
from .study import Study, StudyError
from .task import Task, config_of, settings_from

FORMAT = 1


@dataclass
class Record:
    """One finished run.

    Attributes:
        config: every setting, defaults included; config_digest: of it.
        sources_digest: of the code that the task names.
        environment: versions and what else may change the arithmetic.
        losses: step -> mean of each noted value over the steps since the entry before.
        curve: scores along the way: step, cpu_seconds (training alone, so far), scores.
        final: scores in the end.
        cpu_seconds, wall_seconds: of the training steps, all pieces; scoring_seconds: CPU, of all
            scoring.
        pieces: in how many the run was made. weights: digest of the trained weights.
    """

    study: str
    condition: str
    seed: int
    config: dict[str, Any]
    config_digest: str
    sources_digest: str
    environment: dict[str, Any]
    losses: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    scoring_seconds: float = 0.0
    pieces: int = 0
    weights: str = ""
    format: int = FORMAT

    @property
    def name(self) -> str:
        return f"{self.condition}-{self.seed}"


def new_record(study: Study, task: type[Task], condition: str, seed: int) -> Record:
    """A record of a run that has not begun."""
    config = config_of(study, task, condition)
    return Record(
        study=study.name,
        condition=condition,
        seed=seed,
        config=config,
        config_digest=digest(config),
        sources_digest=sources_digest(task.SOURCES),
        environment=environment(),
    )


def environment() -> dict[str, Any]:
    """What may change the arithmetic beside the code."""
    import transformers

    from ..backends.cpu import unavailable

    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "threads": torch.get_num_threads(),
        "kernels": "tiled" if unavailable() else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def digest(values: Any) -> str:
    """Of plain values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        found.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()[:16]


def sources_digest(names: Sequence[str]) -> str:
    """Of modules and packages as parsed: comments, layout and docstrings do not count."""
    found = hashlib.sha256()
    for name in sorted(names):
        for path in _files(name):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):  # texts that stand alone are documentation
                    node.body = [  # type: ignore[attr-defined]
                        x
                        for x in body
                        if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))
                    ]
            found.update(f"{name}/{path.name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()[:16]


def _files(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StudyError(f"SOURCES names {name!r}; allowed: modules and packages with a file")
    origin = Path(spec.origin)
    if spec.submodule_search_locations:
        return sorted(origin.parent.rglob("*.py"))
    return [origin]


# ------------------------------------------------------------------------------ files


def record_path(study: Study, condition: str, seed: int) -> Path:
    return study.records_folder / f"{condition}-{seed}.json"


def write_json(path: Path, values: Any) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(part, path)


def save_record(study: Study, record: Record) -> Path:
    path = record_path(study, record.condition, record.seed)
    write_json(path, asdict(record))
    return path


def read_record(path: Path) -> Record:
    """Raises: StudyError: the file is not a record."""
    try:
        values = json.loads(path.read_text())
        record = Record(**values)
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"{path} is not a run record: {error}") from None
    if record.format != FORMAT:
        raise StudyError(f"{path} has format {record.format}; allowed: {FORMAT}")
    return record


def read_records(study: Study, task: type[Task]) -> list[Record]:
    """The finished runs of a study, in its order, after ``check_comparable``."""
    paths = [record_path(study, *run) for run in study.runs()]
    records = [read_record(path) for path in paths if path.exists()]
    check_comparable(study, task, records)
    return records


def _filled(task: type[Task], record: Record) -> dict[str, Any]:
    """The record's configuration; a setting that its code did not know yet has its default."""
    try:
        filled: dict[str, Any] = to_plain(settings_from(task, record.config))
    except RecipeError as error:
        raise StudyError(
            f"{record.name} has settings that the task does not know: {error}"
        ) from None
    return filled


def check_comparable(study: Study, task: type[Task], records: Sequence[Record]) -> None:
    """Refuse runs that differ in anything that the study does not name.

    Raises:
        StudyError: a record of another study, whose settings are not those of its condition, or that
            was made by other code or in another environment than the first; with what differs.
    """
    for record in records:
        if record.study != study.name:
            raise StudyError(
                f"{record.name} is a run of study {record.study!r}; allowed: {study.name!r}"
            )
        if record.condition not in study.conditions:
            raise StudyError(f"{record.name}: the study has no condition {record.condition!r}")
        ours = config_of(study, task, record.condition)
        theirs = _filled(task, record)
        differing = [
            f"{name}: run {theirs.get(name)!r}, study {ours.get(name)!r}"
            for name in sorted({*ours, *theirs})
            if digest(theirs.get(name)) != digest(ours.get(name))
        ]
        if differing or record.config_digest != digest(record.config):
            what = "; ".join(differing) or "its digest is not that of its configuration"
            raise StudyError(
                f"{record.name} cannot be compared, its settings are not the study's: {what}"
            )
    for record in records[1:]:
        first = records[0]
        if record.sources_digest != first.sources_digest:
            raise StudyError(
                f"{record.name} cannot be compared with {first.name}: the code of {task.SOURCES} "
                f"differs ({record.sources_digest}, {first.sources_digest}); allowed: runs of the same "
                "code"
            )
        for name in sorted({*first.environment, *record.environment} - {*study.may_differ}):
            here, there = record.environment.get(name), first.environment.get(name)
            if here != there:
                raise StudyError(
                    f"{record.name} cannot be compared with {first.name}: environment.{name} is "
                    f"{here!r} and {there!r}; allowed: the same, or {name!r} in may_differ"
                )
