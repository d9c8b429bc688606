"""Folders that are either whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says which one is still whole."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; at the end it is flushed to the disk and takes ``target``'s place at once.

    A process that dies inside leaves ``target`` as it was; what it had written lies in a ``.saving``
    folder beside it, which the next use removes.

    Raises:
        SaveError: the disk (or whoever writes to it) refused; ``target`` is as it was.
    """
    from safetensors import SafetensorError

    staging = target.parent / STAGING / target.name
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        put_in_place(staging, target)
    # torch's writer raises RuntimeError where the disk is full, safetensors its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging.parent, ignore_errors=True)
        raise SaveError(f"{target} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(staging.parent, ignore_errors=True)
        raise


def put_in_place(staging: Path, target: Path) -> None:
    """Flush ``staging`` and rename it to ``target``; an older ``target`` goes."""
    for folder, _, files in os.walk(staging):
        for name in files:
            _flush(Path(folder) / name)
        _flush(Path(folder))
    if target.exists():  # only one that is written again; the new one is whole already
        old = staging.parent / f"{target.name}.old"
        os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old)
    else:
        os.replace(staging, target)
    _flush(target.parent)
    shutil.rmtree(staging.parent, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """In the order of their steps."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def retire(folder: Path, keep: int, spared: Iterable[Path] = ()) -> None:
    """Delete all but the ``keep`` latest checkpoints; one that is being deleted is no checkpoint any more.

    A process that dies here leaves none that is half there: each is renamed away first.
    """
    staging = folder / STAGING
    for path in _checkpoints(folder)[:-keep]:
        if path in spared:
            continue
        staging.mkdir(exist_ok=True)
        os.replace(path, staging / f"old-{path.name}")
    shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
