"""LLaVA's conversations from json, jsonl, folders and saved ``datasets``; nothing is trusted.

A record is {id, image?, conversations: [{from, value}]}: ``image`` a path or a list of paths, one
``<image>`` marker in a human's turn for each. A source is read without looking at its records; a
record is parsed when it is asked for, and what is wrong with it is a ``SampleError`` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class SampleError(ValueError):
    """One sample cannot be used. ``where``: file and sample; ``reason``: what is wrong with it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class SourceError(ValueError):
    """A whole file cannot be read."""


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: file and sample, for messages.
        images: paths below the image root, or decoded images (from ``datasets``).
        turns: (role, text), user and assistant in turn; markers stand in user's texts.
    """

    where: str
    images: tuple[Any, ...]
    turns: tuple[tuple[str, str], ...]


def read_records(path: Path) -> tuple[str, Sequence[Any]]:
    """(name for messages, raw records) of a source.

    ``.json``: a list. ``.jsonl``: a line each; a line that is no json becomes a record that says so.
    A folder saved by ``datasets`` (``save_to_disk``), one with a ``metadata.jsonl``, or one of images
    with captions beside them (``x.png`` and ``x.txt``).

    Raises:
        SourceError: the file is missing, or is nothing of this.
    """
    try:
        if path.is_dir():
            return str(path), _read_folder(path)
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                return str(path), [parse_line(line) for line in lines if line.strip()]
        if path.suffix == ".json":
            whole = json.loads(path.read_bytes())
            if not isinstance(whole, list):
                raise SourceError(f"{path} holds a {type(whole).__name__}; allowed: a list")
            return str(path), whole
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    # A deeply nested file overflows the parser's stack; bytes that are no UTF-8 are a ValueError.
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path} is no json: {error}") from error
    raise SourceError(f"{path}; allowed: a .json or .jsonl file or a folder")


class _Broken:
    """A line that could not be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def parse_line(line: bytes) -> Any:
    """A raw record of a jsonl line; one that is no json becomes a record that says so."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Broken(f"no json: {error}")


def _read_folder(path: Path) -> Sequence[Any]:
    if (path / "dataset_info.json").exists() or (path / "state.json").exists():
        from datasets import load_from_disk

        dataset: Sequence[Any] = load_from_disk(str(path))
        return dataset
    if (path / "metadata.jsonl").exists():
        return read_records(path / "metadata.jsonl")[1]
    images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SourceError(
            f"{path} holds neither a saved dataset nor metadata.jsonl nor images; allowed: one of them"
        )
    return [_captioned(path, image) for image in images]


def _captioned(root: Path, image: Path) -> Any:
    try:
        caption = image.with_suffix(".txt").read_text()
    except (OSError, UnicodeDecodeError) as error:
        return _Broken(f"no caption for {image.name}: {error}")
    return {
        "image": str(image.relative_to(root)),
        "conversations": [
            {"from": "human", "value": MARKER},
            {"from": "gpt", "value": caption.strip()},
        ],
    }


def parse_record(raw: Any, source: str, index: int) -> Record:
    """The record ``index`` of ``source``.

    Raises:
        SampleError: it is malformed.
    """
    where = f"{source}, sample {index}"
    if isinstance(raw, _Broken):
        raise SampleError(where, raw.reason)
    if not isinstance(raw, Mapping):
        raise SampleError(where, f"is a {type(raw).__name__}; allowed: a mapping")
    if isinstance(raw.get("id"), (str, int)):
        where += f" (id {str(raw['id'])[:80]!r})"
    images = _images(raw, where)
    turns = _turns(raw.get("conversations", raw.get("messages")), where)
    markers = sum(text.count(MARKER) for role, text in turns if role == "user")
    if markers != len(images):
        raise SampleError(where, f"has {markers} {MARKER} markers and {len(images)} images")
    if any(MARKER in text for role, text in turns if role != "user"):
        raise SampleError(where, f"has a {MARKER} marker outside a human's turn")
    return Record(where, images, turns)


def _images(raw: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    images = raw.get("image", raw.get("images"))
    if images is None:
        return ()
    if not isinstance(images, list):
        images = [images]
    for image in images:
        if not (isinstance(image, str) or hasattr(image, "convert")):
            raise SampleError(where, f"image is a {type(image).__name__}; allowed: a path")
    return tuple(images)


def _turns(conversation: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(conversation, list) or not conversation:
        came = type(conversation).__name__ if not isinstance(conversation, list) else "empty"
        raise SampleError(where, f"conversations is {came}; allowed: a list of turns")
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, Mapping):
            raise SampleError(
                where, f"turn {number} is a {type(turn).__name__}; allowed: a mapping"
            )
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise SampleError(where, f"turn {number} has a {type(text).__name__} as its text")
        if role == "system" and number == 0:
            turns.append(("system", text))
            continue
        expected = (
            "user"
            if (len(turns) - (turns[:1] != [] and turns[0][0] == "system")) % 2 == 0
            else "assistant"
        )
        if not isinstance(role, str) or ROLES.get(role) != expected:
            shown = repr(role)[:60]
            raise SampleError(where, f"turn {number} is from {shown}; allowed here: {expected}")
        if expected == "assistant" and not text.strip():
            raise SampleError(where, f"turn {number}, an answer, is empty")
        turns.append((expected, text))
    if turns[-1][0] != "assistant":
        raise SampleError(where, "ends without an answer")
    return tuple(turns)
