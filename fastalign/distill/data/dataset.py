"""Samples for the trainer: records, images and tokens put together, bad ones passed over or fatal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .content import content_digest
from .conversation import Encoder
from .images import MAX_PIXELS, load_image
from .records import Record, SampleError, parse_record

OnError = Literal["skip", "raise"]


class ConversationDataset:
    """Encoded conversations by index; images are decoded where it is indexed (in a worker).

    Args:
        raw: records as ``read_records`` gives them, or a ``datasets`` dataset.
        source: its name, for messages.
        encoder: see ``Encoder``.
        image_root: see ``load_image``.
        on_error: ``"skip"``: the next good sample takes a bad one's place, and says so in its
            ``skipped_samples``, which the trainer counts. ``"raise"``: a bad sample ends the run.
        limit: only that many records.
        recorded: the numbers of samples in a cache of the teacher's targets, by their content
            (``content_digest``); each sample then has its own as ``recorded``.
    """

    def __init__(
        self,
        raw: Sequence[Any],
        source: str,
        encoder: Encoder,
        image_root: Path,
        *,
        on_error: OnError = "skip",
        max_pixels: int = MAX_PIXELS,
        limit: int | None = None,
        recorded: Mapping[str, int] | None = None,
    ) -> None:
        self.raw = raw
        self.source = source
        self.encoder = encoder
        self.image_root = image_root
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.recorded = recorded
        self.length = len(raw) if limit is None else min(limit, len(raw))

    def __len__(self) -> int:
        return self.length

    def record(self, index: int) -> Record:
        """Raises: SampleError: it is malformed."""
        return parse_record(self.raw[index], self.source, index)

    def load(self, index: int) -> dict[str, Any]:
        """The sample itself.

        Raises:
            SampleError: it cannot be used.
        """
        record = self.record(index)
        return self.encoder.encode(record, self.images(record))

    def images(self, record: Record) -> list[Any]:
        """Its images, decoded.

        Raises:
            SampleError: one cannot be.
        """
        return [
            load_image(image, self.image_root, record.where, self.max_pixels)
            for image in record.images
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[str] = []
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                item = self.load(place)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                skipped.append(str(error))
                continue
            if self.recorded is not None:
                item["recorded"] = self._number(item, place)
            return {**item, "skipped_samples": skipped} if skipped else item
        raise SampleError(
            self.source, f"none of {len(self)} samples can be used; the first: {skipped[0]}"
        )

    def _number(self, item: Mapping[str, Any], index: int) -> int:
        assert self.recorded is not None
        number = self.recorded.get(content_digest(item))
        if number is None:
            raise ValueError(
                f"{self.source}, sample {index} is not in the cache of the teacher's targets (its text, "
                "image, template or length is another); allowed: the data that were recorded"
            )
        return number

    def sizes(self) -> list[tuple[bool, int]]:
        """(has an image, characters) of each sample, without decoding: what batches are grouped by."""
        found = []
        for index in range(len(self)):
            try:
                record = self.record(index)
            except SampleError:
                found.append((False, 0))
                continue
            found.append((bool(record.images), sum(len(text) for _, text in record.turns)))
        return found
