"""The tokenizer and the processor: one token a word, lossless, the same on every build."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from fastalign.evals.shapes.dataset import (
    IGNORE,
    VISUAL_TOKENS,
    draw_questions,
    encode,
    pack,
    pixel_values,
    prompt_batch,
)
from fastalign.evals.shapes.questions import TYPES
from fastalign.evals.shapes.render import render
from fastalign.evals.shapes.tokenizer import IMAGE, build_processor, build_tokenizer
from fastalign.evals.shapes.world import make_scenes


def conversations(count: int) -> list:
    rng = random.Random(0)
    weights = dict.fromkeys(TYPES, 1.0)
    return [draw_questions(s, rng, 10, weights) for s in make_scenes("train", count)]


def test_every_word_is_one_token_and_decoding_gives_the_text_back() -> None:
    tokenizer = build_tokenizer()
    for questions in conversations(60):
        for question in questions:
            for text in (question.text, question.answer):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert len(ids) == len(text.replace("?", " ?").split()), text
                assert tokenizer.decode(ids).strip() == text


def test_any_text_survives_a_round_trip() -> None:
    tokenizer = build_tokenizer()
    text = "Is there a grey heptagon, déjà vu? 7 × 8"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text


def test_training_the_tokenizer_is_deterministic() -> None:
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_the_processor_gives_what_the_dataset_gives(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    build_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    scenes = make_scenes("train", 2)
    texts = ["where is the red circle?", "how many blue things?"]
    theirs = processor(
        images=[render(scene) for scene in scenes],
        text=[IMAGE + text for text in texts],
        return_tensors="pt",
        padding=True,
    )
    ours = prompt_batch(texts)
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["attention_mask"], ours["attention_mask"])
    assert torch.allclose(theirs["pixel_values"], pixel_values(scenes), atol=1e-6)


def test_packing_labels_the_answers_and_nothing_else() -> None:
    tokenizer = build_tokenizer()
    questions = conversations(1)[0]
    batch = pack([questions], 200)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    assert ids[0] == tokenizer.bos_token_id
    assert (ids == image).nonzero().flatten().tolist() == list(range(1, 1 + VISUAL_TOKENS))
    marked = labels != IGNORE
    assert torch.equal(ids[marked], labels[marked])
    told = tokenizer.decode(labels[marked]).split(tokenizer.eos_token)
    assert [part.strip() for part in told] == [q.answer for q in questions] + [""]
    said = tokenizer.decode(ids[1 + VISUAL_TOKENS :]).split(tokenizer.eos_token)
    assert [part.strip() for part in said[: len(questions)]] == [
        f"{q.text} {q.answer}" for q in questions
    ]


def test_packing_leaves_out_what_does_not_fit() -> None:
    questions = conversations(1)[0]
    length = 1 + VISUAL_TOKENS + len(encode(questions[0].text)) + len(encode(questions[0].answer))
    assert (pack([questions[:1]], length)["labels"] == IGNORE).all()
    assert (pack([questions[:1]], length + 1)["labels"] != IGNORE).any()
