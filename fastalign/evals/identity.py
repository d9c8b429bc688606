"""What a run depends on, as digests: the model's numbers, the processor's files, the questions asked.

A resumed run compares them; replies of another model, other data or another wording are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .images import Picture
from .protocols import Ask


def model_digest(model: Any) -> str:
    """Over the configuration and every parameter and buffer: name, type, shape and bytes."""
    config = _without_places(model.config.to_dict())
    sha = hashlib.sha256(json.dumps(config, default=str, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(memoryview(plain.view(torch.uint8).numpy()))
    return sha.hexdigest()


def _without_places(value: Any) -> Any:
    """The configuration without the folder that it was read from."""
    if isinstance(value, dict):
        return {k: _without_places(v) for k, v in value.items() if k != "_name_or_path"}
    return value


def processor_digest(processor: Any) -> str:
    """Over the files that it saves: vocabulary, chat template, the pictures' preparation."""
    sha = hashlib.sha256()
    # The last call's padding would be saved, too; every call sets it anew.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.tokenizer.backend_tokenizer.no_truncation()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def questions_digest(asks: Iterable[tuple[str, Ask]]) -> str:
    """Over all asks with their keys: texts, options, pictures (see ``Picture.identity``).

    Raises:
        SampleError: a picture that is not there.
    """
    sha = hashlib.sha256()
    known: dict[int, Sequence[str | int]] = {}
    for key, ask in asks:
        content: list[Any] = []
        for part in ask.content:
            if isinstance(part, Picture):
                identity = known.get(id(part)) or part.identity()
                known[id(part)] = identity
                content.append(list(identity))
            else:
                content.append(part)
        line = [key, content, list(ask.options), ask.most]
        sha.update(json.dumps(line).encode() + b"\n")
    return sha.hexdigest()
