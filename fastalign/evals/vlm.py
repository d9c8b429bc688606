"""Asks answered by a Hugging Face vision-language model, in batches that change no result.

Generation pads on the left, so that every row goes on where its prompt ends; transformers takes the
positions from the attention mask. Log-probabilities pad on the right: there is nothing to go on with,
and each row stands at the positions that it has alone, whatever the positional encoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distill.data.conversation import Encoder, TemplateError
from .identity import model_digest, processor_digest
from .images import Picture
from .protocols import Ask, Reply

#: Models whose attention is causal only behind a marked prefix.
_PREFIX = ("paligemma",)


@dataclass(frozen=True)
class _Row:
    """A text to run, and whose log-probabilities are wanted: ``tokens`` after its end, or its last ones.

    Attributes:
        ask: index of the ask. first: index of the first option that it is about.
        inside: the tokens are the text's last ones; else each is a candidate for the next token.
    """

    ask: int
    first: int
    text: str
    tokens: list[int]
    inside: bool


class VisionLanguageModel:
    """Replies of ``model``, greedily and without a sampling setting of its generation_config.

    Args:
        model: an image-text-to-text model; put into eval mode.
        processor: its processor, with a fast tokenizer.
        template: as in ``fastalign.distill.data.Encoder``: a name, a Jinja template, or None, the
            processor's own.

    Raises:
        TemplateError: no template, or a slow tokenizer.
    """

    def __init__(self, model: Any, processor: Any, template: str | None = None) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = Encoder(processor, template).template
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise TemplateError("the tokenizer has neither a pad token nor an end of sequence")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def identity(self) -> dict[str, str]:
        """Digests of what its replies depend on."""
        return {
            "model": model_digest(self.model),
            "processor": processor_digest(self.processor),
            "template": self.template or "the processor's own",
        }

    @torch.inference_mode()
    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        """One reply an ask; all have options, or none has.

        Raises:
            TemplateError: the chat template changes an option, so that it cannot be found; or the
                model reads its input in both directions (PaliGemma) and an option has several tokens.
            SampleError: a picture that cannot be read.
        """
        if all(ask.options for ask in asks):
            return self._compare(asks)
        if any(ask.options for ask in asks):
            raise ValueError("asks mixes some with and some without options; allowed: one kind")
        return self._generate(asks)

    # -------------------------------------------------------------------- generation

    def _generate(self, asks: Sequence[Ask]) -> list[Reply]:
        from transformers import GenerationConfig

        inputs = self._inputs([self._prompt(ask) for ask in asks], asks, "left")
        own = self.model.generation_config
        config = GenerationConfig(
            max_new_tokens=max(ask.most for ask in asks),
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=own.eos_token_id or self.tokenizer.eos_token_id,
        )
        ids = self.model.generate(**inputs, generation_config=config)
        start = inputs["input_ids"].shape[1]
        texts = [
            self.tokenizer.decode(row[start : start + ask.most], skip_special_tokens=True)
            for row, ask in zip(ids, asks, strict=True)
        ]
        return [Reply(text=text.strip()) for text in texts]

    # ------------------------------------------------------------- log-probabilities

    def _compare(self, asks: Sequence[Ask]) -> list[Reply]:
        rows = [row for index, ask in enumerate(asks) for row in self._rows(index, ask)]
        if self.model.config.model_type in _PREFIX and any(row.inside for row in rows):
            raise TemplateError(
                f"{self.model.config.model_type} reads its whole input in both directions, so that an "
                "option of several tokens would see itself; allowed: options of one token, or generate"
            )
        scores = [[0.0] * len(ask.options) for ask in asks]
        for start in range(0, len(rows), len(asks)):
            part = rows[start : start + len(asks)]
            for row, values in zip(part, self._log_probabilities(part, asks), strict=True):
                if row.inside:
                    scores[row.ask][row.first] = float(values.sum())
                else:
                    scores[row.ask] = values.tolist()
        return [Reply(scores=tuple(each)) for each in scores]

    def _rows(self, index: int, ask: Ask) -> list[_Row]:
        """One text for all options if each is one token behind the prompt, else one an option."""
        prompt = self._prompt(ask)
        texts = [self._prompt(ask, option) for option in ask.options]
        before = self._tokens(prompt)
        ids = [self._tokens(text) for text in texts]
        # A tokenizer may join the prompt's end and the option's beginning: what they share counts not.
        shared = min(_common(before, each) for each in ids)
        rest = [each[shared:] for each in ids]
        if not all(rest):
            raise TemplateError(f"options {ask.options}: one of them adds no token to the prompt")
        if shared == len(before) and all(len(tokens) == 1 for tokens in rest):
            return [_Row(index, 0, prompt, [tokens[0] for tokens in rest], False)]
        return [
            _Row(index, number, text, tokens, True)
            for number, (text, tokens) in enumerate(zip(texts, rest, strict=True))
        ]

    def _log_probabilities(self, rows: Sequence[_Row], asks: Sequence[Ask]) -> list[Tensor]:
        """Of each row: float64 [len(tokens)]."""
        inputs = self._inputs([r.text for r in rows], [asks[r.ask] for r in rows], "right")
        lengths = inputs["attention_mask"].sum(-1).tolist()
        places = []
        for row, ids, length in zip(rows, inputs["input_ids"], lengths, strict=True):
            count = len(row.tokens) if row.inside else 0
            if row.inside and ids[length - count : length].tolist() != row.tokens:
                raise TemplateError("the processor's tokens do not end with the option's")
            places.append(list(range(length - 1 - count, length - 1)) if count else [length - 1])
        kept = sorted({place for each in places for place in each})
        index = {place: number for number, place in enumerate(kept)}
        more: dict[str, Any] = {}
        if self._keeps:
            more["logits_to_keep"] = torch.tensor(kept, device=inputs["input_ids"].device)
        logits = self.model(**inputs, use_cache=False, **more).logits
        if logits.shape[1] != len(kept):
            logits = logits[:, kept]
        found = []
        for number, (row, each) in enumerate(zip(rows, places, strict=True)):
            wanted = logits[number, [index[place] for place in each]].double().log_softmax(-1)
            tokens = torch.tensor(row.tokens, device=wanted.device)
            if row.inside:
                found.append(wanted.gather(1, tokens[:, None])[:, 0].cpu())
            else:
                found.append(wanted[0, tokens].cpu())
        return found

    # ---------------------------------------------------------------------- the texts

    def _prompt(self, ask: Ask, option: str | None = None) -> str:
        """The rendered conversation up to the model's turn, or up to the end of ``option`` in it."""
        content = [
            {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
            for part in ask.content
        ]
        messages = [{"role": "user", "content": content}]
        prompt = self._render(messages, prompt=True)
        if option is None:
            return prompt
        messages.append({"role": "assistant", "content": [{"type": "text", "text": option}]})
        whole = self._render(messages, prompt=False)
        place = whole.find(option, len(prompt)) if whole.startswith(prompt) else -1
        if place < 0:
            raise TemplateError(
                "the chat template renders an answer otherwise than behind its prompt; allowed for "
                "log-probabilities: a template that appends (or: the method generate)"
            )
        return whole[: place + len(option)]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
        )
        return text

    def _adds_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=self._adds_bos(text))["input_ids"]
        return ids

    def _inputs(self, texts: list[str], asks: Sequence[Ask], side: str) -> dict[str, Any]:
        images = [[picture.load() for picture in ask.pictures] for ask in asks]
        out = self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side=side,
            add_special_tokens=self._adds_bos(texts[0]),
            return_tensors="pt",
        )
        moved = {}
        for name, value in out.items():
            if isinstance(value, Tensor):
                value = value.to(self.model.device)
                if value.is_floating_point():
                    value = value.to(self.model.dtype)
            moved[name] = value
        return moved


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the beginning."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
