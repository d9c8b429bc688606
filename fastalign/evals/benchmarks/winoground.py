"""Winoground (Thrush et al., arXiv 2204.03162): two captions of the same words, two images.

Text score: both images find their caption. Image score: both captions find their image. Group score:
both of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import Row, data_files, read_rows
from ..images import picture
from . import two_by_two
from .two_by_two import Square

_SUFFIXES = (".png", ".jpg", "")


def read(data: Path, images: Path | None) -> list[Square]:
    samples: list[Square] = []
    for path in data_files(data, "*.parquet", "examples.jsonl"):
        root = path.parent / "images" if images is None else images
        samples += [_sample(row, root) for row in read_rows(path)]
    return unique(samples)


def _sample(row: Row, root: Path) -> Square:
    return Square(
        id=str(row.number("id")),
        where=row.where,
        images=(
            picture(row, "image_0", root=root, suffixes=_SUFFIXES),
            picture(row, "image_1", root=root, suffixes=_SUFFIXES),
        ),
        captions=(row.text("caption_0"), row.text("caption_1")),
        group=row.optional("collapsed_tag"),
    )


def score(samples: Sequence[Square], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    scores: dict[str, Any] = _scores(verdicts)
    groups = dict.fromkeys(s.group for s in samples if s.group)
    scores["tags"] = {name: _scores([v for v in verdicts if v["group"] == name]) for name in groups}
    return scores


def _scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {
        "text": mean(all(v["to_text"]) for v in verdicts),
        "image": mean(all(v["to_image"]) for v in verdicts),
        "group": mean(v["both"] for v in verdicts),
    }


WINOGROUND = Benchmark(
    name="winoground",
    title="Winoground",
    source="arXiv 2204.03162",
    files="examples.jsonl with the folder images beside it, or the parquet files",
    methods=("match", "options", "generate"),
    lmms_eval=None,
    read=read,
    ask=two_by_two.ask,
    judge=two_by_two.judge,
    score=score,
)
