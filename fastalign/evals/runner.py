"""Runs a benchmark: batches, replies on the disk as they come, scores at the end.

A folder holds ``run.json`` (what the run depends on), ``replies.jsonl`` (a line an ask, appended and
flushed to the disk after each batch), ``samples.jsonl`` (what each sample's replies say) and
``scores.json``. Replies are raw: the last two files are made from them anew every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .._version import __version__
from .benchmark import Benchmark, Verdict
from .identity import questions_digest
from .protocols import Ask, Reply, Wording

Say = Callable[[str], None]


class RunError(ValueError):
    """A folder or a setting that cannot be used."""


class Answerer(Protocol):
    """A model, or whatever replies in its place."""

    def identity(self) -> Mapping[str, str]:
        """What the replies depend on."""
        ...

    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        """One reply an ask, in order."""
        ...


def evaluate(
    benchmark: Benchmark[Any],
    samples: Sequence[Any],
    answerer: Answerer,
    folder: Path,
    *,
    wording: Wording | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    resume: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Ask, judge and score; returns what ``scores.json`` holds.

    Args:
        samples: all of ``benchmark.read``.
        batch_size: asks at a time. limit: only that many samples (the scores say so).
        resume: go on with the run in ``folder``: replies that it has are not computed again.

    Raises:
        RunError: the folder holds a run and resume is False, or one of another model, data or wording;
            a method that the benchmark does not have; a reply file that is damaged in the middle;
            log-probabilities that are no numbers.
        SampleError: an image that cannot be used. What was replied before is kept.
    """
    wording = Wording(benchmark.methods[0]) if wording is None else wording
    if wording.method not in benchmark.methods:
        raise RunError(
            f"method is {wording.method!r}; allowed for {benchmark.name}: {', '.join(benchmark.methods)}"
        )
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}; allowed: at least 1")
    asks = {sample.id: benchmark.ask(sample, wording) for sample in samples}
    identity = {
        "benchmark": benchmark.name,
        "method": wording.method,
        "questions": questions_digest(_keyed(asks)),
        **answerer.identity(),
    }
    claim(folder, identity, resume)
    replies = read_replies(folder / "replies.jsonl")
    wanted = list(samples[:limit])
    pending = [(k, a) for k, a in _keyed({s.id: asks[s.id] for s in wanted}) if k not in replies]
    if replies:
        say(f"{len(replies)} replies are there already, {len(pending)} to go")
    with (folder / "replies.jsonl").open("ab") as out:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            found = answerer.reply([ask for _, ask in batch])
            for (key, _), reply in zip(batch, found, strict=True):
                replies[key] = reply
                out.write(_line(key, reply))
            out.flush()
            os.fsync(out.fileno())
            done = start + len(batch)
            if done == len(pending) or (start // batch_size) % 50 == 49:
                say(f"{done} of {len(pending)} asked")
    verdicts = [
        benchmark.judge(s, {a.part: replies[reply_key(s.id, a)] for a in asks[s.id]})
        for s in wanted
    ]
    return _write(benchmark, wanted, verdicts, len(samples), identity, folder)


def reply_key(sample: str, ask: Ask) -> str:
    """An ask's name in ``replies.jsonl``."""
    return f"{sample}#{ask.part}"


def _keyed(asks: Mapping[str, Sequence[Ask]]) -> Iterator[tuple[str, Ask]]:
    for sample, several in asks.items():
        for ask in several:
            yield reply_key(sample, ask), ask


def claim(folder: Path, identity: Mapping[str, str], resume: bool) -> None:
    """The folder belongs to one run.

    Raises:
        RunError: to another, or resume is False.
    """
    path = folder / "run.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(identity))
        return
    if not resume:
        raise RunError(f"{folder} holds a run already; allowed: --resume, or another folder")
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is no json: {error}") from error
    changed = sorted(n for n in {*identity, *there} if identity.get(n) != there.get(n))
    if changed:
        raise RunError(
            f"{folder} holds a run with another {' and another '.join(changed)}; allowed: the same, or "
            "another folder"
        )


def _line(name: str, reply: Reply) -> bytes:
    if any(score != score for score in reply.scores):
        raise RunError(
            f"{name}: the model's log-probabilities are {reply.scores}; allowed: numbers"
        )
    said = {"scores": list(reply.scores)} if reply.scores else {"text": reply.text}
    return json.dumps({"key": name, **said}).encode() + b"\n"


def read_replies(path: Path) -> dict[str, Reply]:
    """Replies by key. A last line without its end, which a crash left, is cut off the file.

    Raises:
        RunError: another line is damaged.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    replies = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            value = json.loads(line)
            reply = Reply(value.get("text", ""), tuple(map(float, value.get("scores", ()))))
            replies[str(value["key"])] = reply
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunError(f"{path}, line {number}: no reply: {error}") from error
    return replies


def _write(
    benchmark: Benchmark[Any],
    samples: Sequence[Any],
    verdicts: Sequence[Verdict],
    total: int,
    identity: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    lines = [
        json.dumps({"id": s.id, "where": s.where, **v}) + "\n"
        for s, v in zip(samples, verdicts, strict=True)
    ]
    _replace(folder / "samples.jsonl", "".join(lines))
    result = {
        "benchmark": benchmark.name,
        "method": identity["method"],
        "scores": benchmark.score(samples, verdicts),
        "samples": len(samples),
        "of": total,
        "unread": sum(v.get("unread", 0) for v in verdicts),
        "run": dict(identity),
        "fastalign": __version__,
    }
    write_json(folder / "scores.json", result)
    return result


def write_json(path: Path, values: Any) -> None:
    """Written beside its place and renamed: never half a file."""
    _replace(path, json.dumps(values, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
