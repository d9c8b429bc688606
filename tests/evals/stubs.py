"""Images that tell who they are, files in the published formats, and models that are none."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign.evals.benchmark import Benchmark
from fastalign.evals.images import Picture
from fastalign.evals.protocols import Ask, Reply, Wording


def image(number: int) -> bytes:
    """A PNG whose colour says ``number`` (0..255)."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 40, 200)).save(out, "PNG")
    return out.getvalue()


def number(picture: Picture) -> int:
    """Whose picture it is."""
    found: int = picture.load().getpixel((0, 0))[0]
    return found


def write_images(folder: Path, names: Sequence[str]) -> Path:
    """Image i of ``names`` says i."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(index))
    return folder


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 4) -> Path:
    """As ``datasets`` writes it: an image is a struct of bytes and path; row groups are small."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = [
        {k: {"bytes": v, "path": None} if isinstance(v, bytes) else v for k, v in row.items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(plain), path, row_group_size=group)
    return path


class Told:
    """Replies with what ``say`` tells it: the likeliest option, or the text."""

    def __init__(self, say: Callable[[Ask], str]) -> None:
        self.say = say
        self.asked: list[str] = []

    def identity(self) -> dict[str, str]:
        return {"model": "told"}

    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        replies = []
        for ask in asks:
            said = self.say(ask)
            self.asked.append(ask.prompt)
            if ask.options:
                assert said in ask.options
                replies.append(
                    Reply(scores=tuple(-0.1 if o == said else -3.0 for o in ask.options))
                )
            else:
                replies.append(Reply(text=said))
        return replies


def judged(
    benchmark: Benchmark[Any],
    samples: Sequence[Any],
    replies: Mapping[str, Sequence[Reply | str]],
    wording: Wording | None = None,
) -> dict[str, Any]:
    """Scores of replies given by hand: by sample id, in the order of the sample's asks."""
    wording = Wording(benchmark.methods[0]) if wording is None else wording
    verdicts = []
    for sample in samples:
        asks = benchmark.ask(sample, wording)
        given = [Reply(text=r) if isinstance(r, str) else r for r in replies[sample.id]]
        by_part = {ask.part: r for ask, r in zip(asks, given, strict=True)}
        verdicts.append(benchmark.judge(sample, by_part))
    return benchmark.score(samples, verdicts)


def scores(*values: float) -> Reply:
    """Log-probabilities."""
    return Reply(scores=values)
