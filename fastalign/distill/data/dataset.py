"""Samples for the trainer: records, images and tokens put together, bad ones passed over or fatal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from .content import content_digest
from .conversation import Encoder
from .images import MAX_PIXELS, load_image
from .records import Record, SampleError, parse_record

OnError = Literal["skip", "raise"]
Key = TypeVar("Key")


class Conversations(Generic[Key]):
    """Encoded conversations by their keys; images are decoded where one is asked for (in a worker).

    Args:
        source: its name, for messages.
        encoder: see ``Encoder``.
        image_root: see ``load_image``.
        on_error: ``"skip"``: the next good sample takes a bad one's place, and says so in its
            ``skipped_samples``, which the trainer counts. ``"raise"``: a bad sample ends the run.
        recorded: the numbers of samples in a cache of the teacher's targets, by their content
            (``content_digest``); each sample then has its own as ``recorded``.
    """

    def __init__(
        self,
        source: str,
        encoder: Encoder,
        image_root: Path,
        *,
        on_error: OnError = "skip",
        max_pixels: int = MAX_PIXELS,
        recorded: Mapping[str, int] | None = None,
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.image_root = image_root
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.recorded = recorded

    def record(self, key: Key) -> Record:
        """Raises: SampleError: it is malformed."""
        raise NotImplementedError

    def candidates(self, key: Key) -> Iterable[Key]:
        """The sample itself and those that may take its place, in order."""
        raise NotImplementedError

    def where(self, key: Key) -> int:
        """The sample's number in its source."""
        raise NotImplementedError

    def load(self, key: Key) -> dict[str, Any]:
        """The sample itself.

        Raises:
            SampleError: it cannot be used.
        """
        record = self.record(key)
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

    def __getitem__(self, key: Key) -> dict[str, Any]:
        skipped: list[str] = []
        for candidate in self.candidates(key):
            try:
                item = self.load(candidate)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                skipped.append(str(error))
                continue
            if self.recorded is not None:
                item["recorded"] = self._number(item, self.where(candidate))
            return {**item, "skipped_samples": skipped} if skipped else item
        raise SampleError(
            self.source, f"none of {len(skipped)} samples can be used; the first: {skipped[0]}"
        )

    def _number(self, item: Mapping[str, Any], number: int) -> int:
        assert self.recorded is not None
        found = self.recorded.get(content_digest(item))
        if found is None:
            raise ValueError(
                f"{self.source}, sample {number} is not in the cache of the teacher's targets (its text, "
                "image, template or length is another); allowed: the data that were recorded"
            )
        return found


class ConversationDataset(Conversations[int]):
    """Conversations that are all at hand, by their numbers.

    Args:
        raw: records as ``read_records`` gives them, or a ``datasets`` dataset.
        limit: only that many records.
        others: see ``Conversations``.
    """

    def __init__(
        self, raw: Sequence[Any], *arguments: Any, limit: int | None = None, **others: Any
    ) -> None:
        super().__init__(*arguments, **others)
        self.raw = raw
        self.length = len(raw) if limit is None else min(limit, len(raw))

    def __len__(self) -> int:
        return self.length

    def record(self, key: int) -> Record:
        return parse_record(self.raw[key], self.source, key)

    def candidates(self, key: int) -> Iterable[int]:
        return ((key + step) % len(self) for step in range(len(self)))

    def where(self, key: int) -> int:
        return key

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
