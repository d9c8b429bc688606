"""Rows of published benchmark files: json, jsonl, tsv, parquet. Every row knows where it stands.

Nothing in a file is trusted. A file that cannot be read at all is a ``SourceError``; a row that lacks
something, or has something else in its place, is a ``SampleError`` that names the file and the line
(or the sample, where a format has no lines).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.data.records import SampleError, SourceError

SUFFIXES = (".json", ".jsonl", ".tsv", ".parquet")


@dataclass(frozen=True)
class Encoded:
    """An image inside a data file: ``read`` gives the bytes of a PNG, JPEG, ..."""

    read: Callable[[], bytes]


@dataclass(frozen=True)
class Row:
    """One entry of a file.

    Attributes:
        where: file and line or sample, for messages.
        key: the entry's key where the file is a mapping, else its position.
        values: its fields. Images inside the file are ``Encoded``.
    """

    where: str
    key: str
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The field's text; several names are spellings of one field.

        Raises:
            SampleError: it is missing, no text, or blank.
        """
        value = self.value(*names)
        if not isinstance(value, str):
            raise SampleError(self.where, f"{names[0]!r} is {shown(value)}; allowed: a text")
        if not value.strip():
            raise SampleError(self.where, f"{names[0]!r} is blank; allowed: a text")
        return value

    def optional(self, *names: str) -> str:
        """The field's text, or "" where it is missing or empty (``nan``, as pandas writes it)."""
        value = next((self.values[n] for n in names if n in self.values), None)
        if value is None or (isinstance(value, float) and value != value):
            return ""
        return "" if str(value).strip().lower() in ("nan", "none") else str(value)

    def number(self, *names: str) -> int:
        """The field as a whole number; text is read as one (tsv has nothing else)."""
        value = self.value(*names)
        try:
            if isinstance(value, (int, str)) and not isinstance(value, bool):
                return int(value)
        except ValueError:
            pass
        raise SampleError(self.where, f"{names[0]!r} is {shown(value)}; allowed: a whole number")

    def choice(self, allowed: Sequence[str], *names: str) -> str:
        """The field in lower case, one of ``allowed``."""
        value = self.text(*names)
        if value.strip().lower() not in allowed:
            raise SampleError(
                self.where, f"{names[0]!r} is {shown(value)}; allowed: {', '.join(allowed)}"
            )
        return value.strip().lower()

    def value(self, *names: str) -> Any:
        """Raises: SampleError: no such field."""
        for name in names:
            if name in self.values:
                return self.values[name]
        raise SampleError(
            self.where,
            f"lacks {names[0]!r}; it has: {', '.join(map(str, self.values)) or 'nothing'}",
        )


def shown(value: Any) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def data_files(path: Path, *patterns: str) -> list[Path]:
    """``path`` itself, or the files in it that match, in order of their names.

    Raises:
        SourceError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path} does not exist; allowed: a file, or a folder of {patterns}")
    found = sorted({f for pattern in patterns for f in path.glob(pattern) if f.is_file()})
    if not found:
        raise SourceError(f"{path} holds none of {', '.join(patterns)}")
    return found


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, by its suffix.

    ``.json``: a list, a mapping from keys to entries, a mapping with the list under ``data``, or one
    object a line (some benchmarks call that .json). ``.parquet``: image columns stay in the file until
    they are asked for.

    Raises:
        SourceError: it cannot be read, or is of another format.
        SampleError: a line of it is broken.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".tsv": _tsv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SourceError(f"{path}; allowed: a file with one of the suffixes {', '.join(SUFFIXES)}")
    try:
        rows = reader(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no text in UTF-8: {error}") from error
    if not rows:
        raise SourceError(f"{path} is empty")
    return rows


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object a line
            return _jsonl(path)
        raise SourceError(f"{path}, line {error.lineno}: no json: {error.msg}") from error
    except RecursionError as error:
        raise SourceError(f"{path} is no json: nested too deeply") from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    if isinstance(whole, list):
        entries = [(str(number), value) for number, value in enumerate(whole)]
    elif isinstance(whole, dict):
        entries = list(whole.items())
    else:
        raise SourceError(f"{path} holds {shown(whole)}; allowed: a list or a mapping")
    return [_row(f"{path}, sample {key!r}", key, value) for key, value in entries]


def _jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SampleError(where, f"no json: {error}") from error
            rows.append(_row(where, str(number), value))
    return rows


def _row(where: str, key: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise SampleError(where, f"is {shown(value)}; allowed: a mapping")
    return Row(where, key, value)


def _tsv(path: Path) -> list[Row]:
    rows: list[Row] = []
    limit = csv.field_size_limit(sys.maxsize)  # images stand in the fields
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for start, values in _records(csv.reader(lines, delimiter="\t"), path):
                rows.append(Row(f"{path}, line {start}", str(len(rows)), values))
    finally:
        csv.field_size_limit(limit)
    return rows


def _records(reader: Any, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(first line, fields) of each record; a record may go over several lines."""
    names: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            if names is None:
                names = fields
            elif fields:
                if len(fields) != len(names):
                    raise SampleError(
                        f"{path}, line {start}",
                        f"has {len(fields)} fields; allowed: {len(names)}, as the header",
                    )
                yield start, dict(zip(names, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise SampleError(f"{path}, line {start}", f"no tsv: {error}") from error


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        file = pq.ParquetFile(path)
        kinds = {field.name: field.type for field in file.schema_arrow}
        images = {n: _Images(file, n) for n, kind in kinds.items() if _is_image(kind)}
        plain = file.read(columns=[n for n in kinds if n not in images]).to_pylist()
        count = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is no parquet: {error}") from error
    rows = []
    for number in range(count):
        where = f"{path}, row {number}"
        values: dict[str, Any] = dict(plain[number]) if plain else {}
        values |= {name: column.cell(number, where) for name, column in images.items()}
        rows.append(Row(where, str(number), values))
    return rows


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class _Images:
    """An image column; holds one row group of it at a time."""

    def __init__(self, file: Any, name: str) -> None:
        self.file = file
        self.name = name
        self.starts = [0]
        for group in range(file.num_row_groups):
            self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)
        self.held: tuple[int, list[Any]] = (-1, [])

    def cell(self, row: int, where: str) -> Encoded:
        return Encoded(lambda: self._bytes(row, where))

    def _bytes(self, row: int, where: str) -> bytes:
        import bisect

        import pyarrow as pa

        group = bisect.bisect_right(self.starts, row) - 1
        if self.held[0] != group:
            try:
                values = self.file.read_row_group(group, columns=[self.name])[self.name].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise SampleError(where, f"{self.name!r} cannot be read: {error}") from error
            self.held = (group, values)
        value = self.held[1][row - self.starts[group]]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise SampleError(where, f"{self.name!r} is {shown(value)}; allowed: an image's bytes")
        return value
