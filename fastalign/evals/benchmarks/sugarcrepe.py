"""SugarCrepe (Hsieh et al., arXiv 2306.14610): which of two captions fits; 7 kinds of hard negatives.

Each caption pair is asked in both orders. Accuracy is the mean over the orders, and the overall
accuracy is the unweighted mean over the seven subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SourceError
from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import Row, data_files, read_rows
from ..images import Picture, picture
from ..protocols import ORDERS, Ask, Reply, Wording, read_pair, which_caption

SUBSETS = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)


@dataclass(frozen=True)
class Captions:
    """An image, its caption and a negative one."""

    id: str
    where: str
    subset: str
    image: Picture
    caption: str
    negative: str


def read(data: Path, images: Path | None) -> list[Captions]:
    samples: list[Captions] = []
    for path in data_files(data, *(f"{name}.json" for name in SUBSETS)):
        if path.stem not in SUBSETS:
            raise SourceError(f"{path} is no subset; allowed names: {', '.join(SUBSETS)}")
        samples += [_sample(path.stem, row, images) for row in read_rows(path)]
    return unique(samples)


def _sample(subset: str, row: Row, images: Path | None) -> Captions:
    return Captions(
        id=f"{subset}/{row.key}",
        where=row.where,
        subset=subset,
        image=picture(row, "filename", root=images),
        caption=row.text("caption"),
        negative=row.text("negative_caption"),
    )


def ask(sample: Captions, wording: Wording) -> list[Ask]:
    return which_caption("", sample.image, sample.caption, sample.negative, wording)


def judge(sample: Captions, replies: Mapping[str, Reply]) -> Verdict:
    pair = read_pair(replies[ORDERS[0]], replies[ORDERS[1]], (sample.caption, sample.negative))
    return {
        "subset": sample.subset,
        "right": list(pair.right),
        "chose_first": list(pair.first),
        "wins": pair.wins,
        "unread": pair.unread,
    }


def score(samples: Sequence[Captions], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    subsets = {}
    for name in SUBSETS:
        chosen = [v for s, v in zip(samples, verdicts, strict=True) if s.subset == name]
        if chosen:
            subsets[name] = {
                "accuracy": mean(right for v in chosen for right in v["right"]),
                "both_orders": mean(all(v["right"]) for v in chosen),
                "unbiased": mean(v["wins"] for v in chosen),
                "chose_first": mean(first for v in chosen for first in v["chose_first"]),
                "samples": len(chosen),
            }
    scores: dict[str, Any] = {"subsets": subsets}
    if len(subsets) == len(SUBSETS):  # a mean of fewer would be another number under the same name
        for key in ("accuracy", "both_orders", "unbiased", "chose_first"):
            scores[key] = mean(subset[key] for subset in subsets.values())
    return scores


SUGARCREPE = Benchmark(
    name="sugarcrepe",
    title="SugarCrepe",
    source="arXiv 2306.14610",
    files="a folder of add_att.json, ..., swap_obj.json (or one of them); images: COCO val2017",
    methods=("options", "generate"),
    lmms_eval=None,
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
