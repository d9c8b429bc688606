"""A few samples for pictures: evenly spread over the data, not picked by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .dataset import ConversationDataset
from .images import load_image
from .records import MARKER, SampleError

#: How many samples are looked at for each that is wanted.
TRIES = 64


@dataclass(frozen=True)
class Shown:
    """One image (decoded), the first question about it (and how many more), the encoded sample."""

    image: Any
    question: str
    item: dict[str, Any]


def samples_to_show(data: ConversationDataset, count: int) -> list[Shown]:
    """At most ``count`` usable samples with one image each: the first of each equal part of the data."""
    found = []
    count = min(count, len(data))
    for number in range(count):
        start, stop = number * len(data) // count, (number + 1) * len(data) // count
        for index in range(start, min(stop, start + TRIES)):
            shown = _show(data, index)
            if shown is not None:
                found.append(shown)
                break
    return found


def _show(data: ConversationDataset, index: int) -> Shown | None:
    try:
        record = data.record(index)
        if len(record.images) != 1:
            return None
        image = load_image(record.images[0], data.image_root, record.where, data.max_pixels)
        first, *others = [text for role, text in record.turns if role == "user"]
        question = first.replace(MARKER, "").strip() + (
            f" (and {len(others)} more)" if others else ""
        )
        return Shown(image, question, data.load(index))
    except SampleError:
        return None  # bad samples are counted where they are trained on
