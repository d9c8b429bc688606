"""One CSV schema for every result."""

from __future__ import annotations

import csv
import os
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import fastalign

#: Where committed results lie, one file a machine.
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One metric of one provider on one shape.

    Attributes:
        kernel: what is computed ("align"; "machine" for the machine's own ceilings).
        mode: a key of ``modes.MODES``.
        metric: "time_ms", "peak_mib" (tensors and workspace), "rss_mib", "roofline" (the larger of the
            machine's times for the products and for the exponentials, over the provider's), "in_turn"
            (their sum, over the provider's), "factor_over_<peer>" (rounds paired), "error", or "left_out"
            with a note.
        x: visual tokens. p20, p50, p80: percentiles over n.
    """

    kernel: str
    shape: str
    dtype: str
    provider: str
    mode: str
    metric: str
    x: int
    p20: float
    p50: float
    p80: float
    n: int
    device: str
    version: str
    note: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", newline="", dir=path.parent, delete=False) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
            )
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: it has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}; expected {COLUMNS}")
        return [
            Row(**{  # type: ignore[arg-type]
                **line,
                **{name: int(line[name]) for name in ("x", "n")},
                **{name: float(line[name]) for name in ("p20", "p50", "p80")},
            })
            for line in reader
        ]  # fmt: skip


def result_files() -> list[Path]:
    """The committed results of this schema; other benchmarks keep theirs beside them."""
    return [file for file in sorted(RESULTS.glob("*.csv")) if _header(file) == COLUMNS]


def _header(file: Path) -> tuple[str, ...]:
    with file.open(newline="") as lines:
        return tuple(next(csv.reader(lines), ()))


def device_name(device: str) -> str:
    """The processor's or the GPU's own name, and how many threads are used."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def version() -> str:
    """Ours and torch's."""
    return f"fastalign {fastalign.__version__}, torch {torch.__version__}"
