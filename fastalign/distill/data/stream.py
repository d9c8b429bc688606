"""Conversations from a jsonl file that need not fit into memory, in an order that can be had again.

Lines come from a ``datasets`` stream with its shuffle buffer; a *sampler* reads them, in the main process,
and hands each on to be parsed and decoded where batches are made. So the order is a function of file, seed
and buffer alone: not of workers, processes (each takes every n-th batch) or bad samples. To go on in the
middle, the Trainer skips batches of the sampler, which reads their lines and decodes nothing. (The stream's
own saved state would not do: it lacks what is in the shuffle buffer.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from .dataset import ConversationDataset, Conversations
from .records import Record, SampleError, SourceError, parse_line, parse_record

#: Lines behind a bad sample of which the first good one takes its place.
SPARE = 8


class Line(NamedTuple):
    """One line of the file, not parsed, and which sample it is (empty lines do not count)."""

    number: int
    text: bytes


class ConversationStream(Conversations[tuple[Line, ...]]):
    """Conversations by their lines. A key holds the sample's line and the ``SPARE`` lines that follow it.

    Args:
        path: a .jsonl file.
        buffer: samples that are held to draw the next one from; 1: the file's order.
        limit: only the file's first so many samples.
        others: see ``Conversations``.

    Raises:
        SourceError: there is no such file.
    """

    def __init__(
        self, path: Path, *arguments: Any, buffer: int, limit: int | None = None, **others: Any
    ) -> None:
        super().__init__(str(path), *arguments, **others)
        if not path.is_file():
            raise SourceError(f"{path} cannot be read: no such file")
        self.path, self.buffer, self.limit = path, buffer, limit

    def record(self, key: tuple[Line, ...]) -> Record:
        return parse_record(parse_line(key[0].text), self.source, key[0].number)

    def candidates(self, key: tuple[Line, ...]) -> Iterable[tuple[Line, ...]]:
        return ((line,) for line in key)

    def where(self, key: tuple[Line, ...]) -> int:
        return key[0].number

    def beginning(self, count: int) -> ConversationDataset:
        """The file's first samples, to be looked at by number."""
        lines = [parse_line(row["line"]) for row in islice(_rows([str(self.path)], None), count)]
        return ConversationDataset(
            lines,
            self.source,
            self.encoder,
            self.image_root,
            on_error=self.on_error,
            max_pixels=self.max_pixels,
        )

    def passes(self, seed: int) -> Iterator[Line]:
        """The file's lines again and again, each pass in an order of its own.

        Raises:
            SampleError: the file has no line.
        """
        from datasets import IterableDataset

        rows = IterableDataset.from_generator(
            _rows, gen_kwargs={"files": [str(self.path)], "limit": self.limit}
        )
        if self.buffer > 1:
            rows = rows.shuffle(seed=seed, buffer_size=self.buffer)
        epoch = 0
        while True:
            rows.set_epoch(epoch)
            line = None
            for row in rows:
                line = Line(row["number"], row["line"])
                yield line
            if line is None:
                raise SampleError(self.source, "holds no sample")
            epoch += 1


class StreamSampler(Sampler[tuple[Line, ...]]):
    """``length`` keys of a stream, as many passes over it as that takes."""

    def __init__(self, stream: ConversationStream, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Line, ...]]:
        lines = self.stream.passes(self.seed)
        ahead: deque[Line] = deque(islice(lines, SPARE))
        for _ in range(self.length):
            ahead.append(next(lines))
            yield tuple(ahead)
            ahead.popleft()


def _rows(files: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """Each line that is not empty; ``files`` is a list because that is what ``datasets`` splits."""
    for file in files:
        with open(file, "rb") as lines:
            full = (line for line in lines if line.strip())
            for number, line in enumerate(islice(full, limit)):
                yield {"number": number, "line": line}
