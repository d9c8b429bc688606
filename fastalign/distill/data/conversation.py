"""A conversation as token ids with labels on the answers, through the model's own processor."""

from __future__ import annotations

import bisect
from typing import Any

from ..losses import IGNORE_INDEX
from .records import MARKER, Record, SampleError

#: Templates for models that have none. ``bare`` is LLaVA's pre-training form: the texts, and the end
#: of sequence after each answer.
TEMPLATES = {
    "bare": (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}IMAGE{% else %} {{ part.text }}{% endif %}"
        "{% endfor %}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        "{% for message in messages %}{% if message.role == 'user' %}USER: "
        "{% elif message.role == 'assistant' %}ASSISTANT: {% endif %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}IMAGE\n{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ),
}


class TemplateError(ValueError):
    """A chat template that does not fit; every sample would fail."""


class Encoder:
    """Turns records and their decoded images into token ids, labels and what else the model needs.

    Args:
        processor: the student's transformers processor (a fast tokenizer inside).
        template: a name of ``TEMPLATES``, a Jinja template, or None: the processor's own.
        max_length: tokens; what lies behind is cut off, if it is no image token.
    """

    def __init__(self, processor: Any, template: str | None = None, max_length: int = 1536) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = getattr(processor, "image_token", None) or MARKER
        if template is not None:
            template = TEMPLATES.get(template, template).replace("IMAGE", self.image_token)
            if "{" not in template:
                raise TemplateError(
                    f"template is {template!r}; allowed: {', '.join(TEMPLATES)}, a Jinja template, or "
                    "null (the processor's own)"
                )
        elif not getattr(processor, "chat_template", None):
            raise TemplateError(
                f"template is null and the processor has none; allowed: {', '.join(TEMPLATES)} or a "
                "Jinja template"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise TemplateError(
                "the tokenizer is a slow one, which does not say where its tokens lie in the text; "
                "allowed: a fast tokenizer"
            )
        self.template = template
        self.max_length = max_length

    def encode(self, record: Record, images: list[Any]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels`` as lists, and the processor's tensors.

        Raises:
            SampleError: too long for its images or its first answer.
            TemplateError: the template does not render answers behind their prompts.
        """
        return self.cut(self.whole(record, images), record.where)

    def whole(self, record: Record, images: list[Any]) -> dict[str, Any]:
        """The same before it is cut to ``max_length``."""
        text, spans = self._render(record)
        bos = self.tokenizer.bos_token
        arguments: dict[str, Any] = {"text": [text]}
        if images:
            arguments["images"] = images
        out = self.processor(
            **arguments,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets = out.pop("offset_mapping")[0]
        replaced = (out.pop("text_replacement_offsets", None) or [[]])[0]
        ids = [int(i) for i in out["input_ids"][0]]
        labels = [IGNORE_INDEX] * len(ids)
        ends = [r["span"][1] for r in replaced]
        gained = [0] + [r["new_span"][1] - r["span"][1] for r in replaced]
        for span in spans:
            first, last = (c + gained[bisect.bisect_right(ends, c)] for c in span)
            for i, (start, end) in enumerate(offsets):
                if start < last and end > first:
                    labels[i] = ids[i]
        item = {name: _single(value, len(ids)) for name, value in out.items()}
        item["labels"] = labels
        item["input_ids"] = ids
        return item

    def _render(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        """The whole text and the answers' places in it."""
        messages = [{"role": role, "content": _parts(text)} for role, text in record.turns]
        whole = self._apply(messages, False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._apply(messages[:i], True), self._apply(messages[: i + 1], False)
            if not (after.startswith(before) and whole.startswith(after.rstrip())):
                raise TemplateError(
                    "the chat template renders a conversation's beginning differently when it goes on, "
                    "so that answers cannot be found in it; allowed: a template that appends"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _apply(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        return text

    def cut(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        """A whole sample without what lies behind ``max_length``.

        Raises:
            SampleError: too long for its images or its first answer.
        """
        length, most = len(item["input_ids"]), self.max_length
        if length > most:
            image = self.tokenizer.convert_tokens_to_ids(self.image_token)
            if image in item["input_ids"][most:]:
                raise SampleError(where, f"has {length} tokens, images beyond the limit {most}")
            item = {
                name: value[:most] if isinstance(value, list) and len(value) == length else value
                for name, value in item.items()
            }
        if all(label == IGNORE_INDEX for label in item["labels"][1:]):
            raise SampleError(where, f"has no answer within the limit of {most} tokens")
        return item


def _parts(text: str) -> list[dict[str, str]]:
    """LLaVA's text with markers as a list of images and texts; line breaks at a marker go."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n") if MARKER in text else piece})
    return parts


def _single(value: Any, length: int) -> Any:
    """Per-token lists of the one text as flat lists; all else as tensors over the images."""
    import torch

    if isinstance(value, list) and len(value) == 1 and hasattr(value[0], "__len__"):
        inner = value[0]
        if len(inner) == length and not hasattr(inner, "shape"):
            return list(inner)
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    import numpy as np

    return torch.as_tensor(np.asarray(value))
