"""Replies of real models: what a batch gives is what each question alone gives, computed plainly."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.distill.data.conversation import TemplateError
from fastalign.evals.loading import load
from fastalign.evals.protocols import Ask
from fastalign.evals.vlm import VisionLanguageModel

from .models import PAIRS, Pair, picture

QUESTIONS = (
    "is there a red circle?",
    "how many blue things? one, two or three things?",
    "where?",
    "what is just left of the green square at top?",
    "is there something yellow?",
)
OPTIONS = (
    ("yes", "no"),  # a token each
    ("a red circle", "a blue square at left", "nothing"),  # of different lengths
    ("left", "top left"),
    ("one", "two", "three"),
    ("yes", "nothing at all"),
)


def asks(options: bool) -> list[Ask]:
    """Prompts of different lengths and images of different shapes; the last has two images."""
    made = []
    for i, question in enumerate(QUESTIONS):
        image = picture(i, (32, 48) if i % 2 else (32, 32))
        content = (image, question) if i < 4 else (image, picture(9), question)
        made.append(Ask(str(i), content, OPTIONS[i] if options else (), most=5))
    return made


@pytest.fixture(scope="module", params=sorted(PAIRS))
def pair(request: pytest.FixtureRequest) -> Pair:
    made = PAIRS[request.param]()
    return dataclasses.replace(made, model=made.model.double())


def plainly(pair: Pair, ask: Ask, option: str) -> float:
    """One text, no padding, all logits: the sum over the tokens that the option adds."""
    content = [
        {"type": "image"} if not isinstance(p, str) else {"type": "text", "text": p}
        for p in ask.content
    ]
    messages = [{"role": "user", "content": content}]
    prompt = pair.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    images = [[p.load() for p in ask.pictures]]
    short = pair.processor(text=[prompt], images=images, return_tensors="pt")
    # the template puts a space before an answer
    inputs = pair.processor(text=[f"{prompt} {option}"], images=images, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    start = short["input_ids"].shape[1]
    ids = inputs["input_ids"][0]
    assert ids[:start].tolist() == short["input_ids"][0].tolist()
    with torch.no_grad():
        logits = pair.model(**inputs, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_log_probabilities_are_those_of_each_option_alone(pair: Pair) -> None:
    vlm = VisionLanguageModel(pair.model, pair.processor)
    together = vlm.reply(asks(options=True))
    for ask, reply in zip(asks(options=True), together, strict=True):
        expected = [plainly(pair, ask, option) for option in ask.options]
        assert list(reply.scores) == pytest.approx(expected, rel=0, abs=1e-9)
        assert len(set(reply.scores)) == len(reply.scores)  # the options differ to the model


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_batch_size_changes_nothing(pair: Pair, size: int) -> None:
    vlm = VisionLanguageModel(pair.model, pair.processor)
    for options in (True, False):
        every = asks(options)
        whole = vlm.reply(every)
        parts = [r for i in range(0, len(every), size) for r in vlm.reply(every[i : i + size])]
        assert [r.text for r in parts] == [r.text for r in whole]
        for one, other in zip(parts, whole, strict=True):
            assert one.scores == pytest.approx(other.scores, rel=0, abs=1e-9)


def test_replies_depend_on_question_and_image(pair: Pair) -> None:
    """Else the tests above would compare equal with equal."""
    vlm = VisionLanguageModel(pair.model, pair.processor)
    every = asks(options=False)
    assert len({reply.text for reply in vlm.reply(every)}) >= 2
    ask = asks(options=True)[0]
    other = dataclasses.replace(ask, content=(picture(5), *ask.content[1:]))
    first, second = vlm.reply([ask, other])
    assert abs(first.scores[0] - second.scores[0]) > 1e-6


@pytest.fixture(scope="module")
def llava() -> Pair:
    return PAIRS["llava"]()


def test_generation_is_greedy_whatever_the_checkpoint_says(llava: Pair) -> None:
    vlm = VisionLanguageModel(llava.model, llava.processor)
    before = vlm.reply(asks(options=False))
    own = llava.model.generation_config
    kept = own.to_dict()
    try:
        own.update(do_sample=True, temperature=3.0, top_k=3, repetition_penalty=5.0, max_length=7)
        assert vlm.reply(asks(options=False)) == before
    finally:
        own.update(**{n: kept.get(n) for n in ("do_sample", "temperature", "top_k", "max_length")})
        own.repetition_penalty = kept.get("repetition_penalty")


def test_each_ask_gets_its_own_number_of_tokens(llava: Pair) -> None:
    vlm = VisionLanguageModel(llava.model, llava.processor)
    short, long = (dataclasses.replace(asks(False)[1], part=str(n), most=n) for n in (2, 6))
    together = vlm.reply([short, long])
    assert together[0] == vlm.reply([short])[0]
    assert together[1].text.startswith(together[0].text[:3])


def test_options_and_generation_do_not_mix(llava: Pair) -> None:
    vlm = VisionLanguageModel(llava.model, llava.processor)
    with pytest.raises(ValueError, match="allowed: one kind"):
        vlm.reply([asks(True)[0], asks(False)[1]])


def test_a_prompt_whose_end_joins_the_option_scores_the_same(llava: Pair) -> None:
    """With a space at the prompt's end the tokenizer makes another last token of it than of " yes"."""
    usual = llava.processor.chat_template
    spaced = usual.replace("assistant:{% endif %}", "assistant: {% endif %}")
    assert spaced != usual
    ask = asks(options=True)[0]
    double = dataclasses.replace(llava, model=PAIRS["llava"]().model.double())
    vlm = VisionLanguageModel(double.model, double.processor, spaced)
    expected = [plainly(double, ask, option) for option in ask.options]
    assert list(vlm.reply([ask])[0].scores) == pytest.approx(expected, rel=0, abs=1e-9)


def test_a_template_that_does_not_append_is_refused(llava: Pair) -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}"
        "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text | upper }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    vlm = VisionLanguageModel(llava.model, llava.processor, template)
    assert vlm.reply(asks(False)[:1])[0].text
    with pytest.raises(TemplateError, match="the method generate"):
        vlm.reply(asks(True)[:1])


def test_a_prefix_model_may_not_compare_longer_options(
    llava: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava.model.config, "model_type", "paligemma")
    vlm = VisionLanguageModel(llava.model, llava.processor)
    assert vlm.reply(asks(True)[:1])[0].scores  # one token each: nothing sees itself
    with pytest.raises(TemplateError, match="in both directions"):
        vlm.reply(asks(True)[1:2])


def test_identity_tells_models_and_processors_apart(llava: Pair) -> None:
    vlm = VisionLanguageModel(llava.model, llava.processor)
    first = vlm.identity()
    vlm.reply(asks(options=True))
    assert vlm.identity() == first  # what it was asked changes nothing
    weight = llava.model.get_output_embeddings().weight
    with torch.no_grad():
        weight[3, 5] += 1e-3
        changed = VisionLanguageModel(llava.model, llava.processor).identity()
        weight[3, 5] -= 1e-3
    assert {name for name in first if first[name] != changed[name]} == {"model"}
    template = llava.processor.chat_template
    llava.processor.chat_template = template + " "
    changed = VisionLanguageModel(llava.model, llava.processor).identity()
    llava.processor.chat_template = template
    assert {name for name in first if first[name] != changed[name]} == {"processor"}
    changed = VisionLanguageModel(llava.model, llava.processor, "vicuna").identity()
    assert {name for name in first if first[name] != changed[name]} == {"template"}


def test_a_taf_student_is_loaded_and_asked(llava: Pair, tmp_path: Path) -> None:
    from fastalign.distill.taf import fetch_adapter
    from fastalign.evals.shapes.models import build_teacher

    teacher = build_teacher(1)
    student = fetch_adapter(llava.model, teacher).eval()
    student.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    vlm = load(str(tmp_path), dtype="float32")
    assert vlm.model.config.model_type == "llava_taf"
    direct: Any = VisionLanguageModel(student, llava.processor)
    assert vlm.reply(asks(False)) == direct.reply(asks(False))
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert load(str(tmp_path / "moved"), dtype="float32").identity() == vlm.identity()
    with pytest.raises(ValueError, match="dtype is 'half'; allowed: auto"):
        load(str(tmp_path), dtype="half")
