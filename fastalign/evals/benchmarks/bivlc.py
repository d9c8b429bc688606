"""BiVLC (Miranda et al., arXiv 2406.09952): SugarCrepe's captions with an image for the negative, too.

I2T: both images find their caption. T2I: both captions find their image. Group: both of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import data_files, read_rows
from ..images import picture
from . import two_by_two
from .two_by_two import Square


def read(data: Path, images: Path | None) -> list[Square]:
    samples: list[Square] = []
    for path in data_files(data, "*.parquet", "*.jsonl"):
        for row in read_rows(path):
            samples.append(
                Square(
                    id=str(len(samples)),  # the published rows have none
                    where=row.where,
                    images=(
                        picture(row, "image", root=images),
                        picture(row, "negative_image", root=images),
                    ),
                    captions=(row.text("caption"), row.text("negative_caption")),
                    group=f"{row.text('type')}/{row.text('subtype')}".lower(),
                )
            )
    return unique(samples)


def score(samples: Sequence[Square], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    scores: dict[str, Any] = _scores(verdicts)
    types: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        types.setdefault(verdict["group"].partition("/")[0], []).append(verdict)
        types.setdefault(verdict["group"], []).append(verdict)
    scores["types"] = {name: _scores(types[name]) for name in sorted(types)}
    return scores


def _scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {
        "i2t": mean(all(v["to_text"]) for v in verdicts),
        "t2i": mean(all(v["to_image"]) for v in verdicts),
        "group": mean(v["both"] for v in verdicts),
        "positive_image_to_text": mean(v["to_text"][0] for v in verdicts),
        "negative_image_to_text": mean(v["to_text"][1] for v in verdicts),
        "positive_text_to_image": mean(v["to_image"][0] for v in verdicts),
        "negative_text_to_image": mean(v["to_image"][1] for v in verdicts),
    }


BIVLC = Benchmark(
    name="bivlc",
    title="BiVLC",
    source="arXiv 2406.09952",
    files="the parquet files (images inside), or jsonl with the same fields and image names",
    methods=("match", "options", "generate"),
    lmms_eval=None,
    read=read,
    ask=two_by_two.ask,
    judge=two_by_two.judge,
    score=score,
)
