"""Tiny data: a processor without downloads, LLaVA files on disk, encoded samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models import tiny


def items(seed: int = 0) -> list[dict[str, Any]]:
    """Eight encoded samples of different length and number of answers; the fourth has no image."""
    found = []
    for i in range(8):
        images, length = (0 if i == 3 else 1), 14 + i
        batch = tiny.batch(images=(images,), lengths=(length,), seed=seed + i)
        item: dict[str, Any] = {
            name: batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels")
        }
        item["labels"][: -1 - i % 4] = [-100] * (length - 1 - i % 4)
        if images:
            item["pixel_values"] = batch["pixel_values"]
        found.append(item)
    return found


def write_llava(folder: Path, count: int = 6, *, size: int = 48) -> Path:
    """A LLaVA json with images of one colour and one text-only sample."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        record: dict[str, Any] = {
            "id": f"s{i}",
            "conversations": [
                {"from": "human", "value": "<image>\nwhere is the red circle?"},
                {"from": "gpt", "value": "at left"},
                {"from": "human", "value": "how many blue things?"},
                {"from": "gpt", "value": "two" if i % 2 else "one"},
            ],
        }
        if i == 2:
            record["conversations"][0]["value"] = "where is the red circle?"
        else:
            Image.new("RGB", (size, size), (40 * i % 255, 0, 90)).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def pair(**student: Any) -> tuple[Any, Any]:
    """(student, teacher) of different width, heads and depth."""
    return tiny.llava(layers=2, heads=2, **student), tiny.llava(layers=3, heads=4, seed=1)
