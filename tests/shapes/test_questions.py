"""Questions: right, answerable, balanced, and true minimal pairs."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fastalign.evals.shapes.dataset import draw_questions, evaluation_set
from fastalign.evals.shapes.questions import COMPOSITION, STRATA, TYPES, Question, ask_any, chance
from fastalign.evals.shapes.world import Scene, Thing, make_scenes
from tests.shapes import oracle


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Question]]:
    rng = random.Random(0)
    scenes = make_scenes("validation", 400) + make_scenes("validation", 100, things=(2, 3))
    found = [(s, ask_any(t, s, rng)) for s in scenes for t in TYPES for _ in range(3)]
    return [(scene, question) for scene, question in found if question is not None]


def test_every_answer_is_the_oracles(asked: list[tuple[Scene, Question]]) -> None:
    assert {question.type for _, question in asked} == set(TYPES)
    for scene, question in asked:
        assert oracle.answer(scene, question.text) == question.answer, (scene, question)


def test_twins_have_the_other_answer_and_differ_in_a_word_or_a_swap(
    asked: list[tuple[Scene, Question]],
) -> None:
    kinds = Counter(question.kind for _, question in asked)
    assert set(kinds) == {
        None,
        "replace_att",
        "replace_obj",
        "swap_att",
        "swap_obj",
        "replace_rel",
    }
    for scene, question in asked:
        yes_no = question.answer in ("yes", "no")
        assert yes_no == (question.twin is not None) == (question.kind is not None)
        if question.twin is None:
            continue
        assert oracle.answer(scene, question.twin) == {"yes": "no", "no": "yes"}[question.answer]
        words, others = question.text.split(), question.twin.split()
        if question.kind == "swap_obj":
            assert sorted(w.strip("?") for w in words) == sorted(w.strip("?") for w in others)
        elif question.kind == "replace_rel":
            assert [w for w in words if w not in others] != words
            assert [t for t in scene.things if t.name in question.text] == [
                t for t in scene.things if t.name in question.twin
            ]
        else:
            assert sum(a != b for a, b in zip(words, others, strict=True)) == 1


def test_false_bindings_recombine_what_is_in_the_picture(
    asked: list[tuple[Scene, Question]],
) -> None:
    for scene, question in asked:
        if question.type == "binding":
            for text in (question.text, question.twin or ""):
                colour, shape = text.removeprefix("is there a ").removesuffix("?").split()
                assert colour in {t.colour for t in scene.things}
                assert shape in {t.shape for t in scene.things}


@pytest.mark.parametrize("type", TYPES)
def test_the_evaluation_set_is_balanced(type: str) -> None:
    per_type = 8 * len(STRATA[type])
    data = evaluation_set("validation", per_type, types=[type])
    assert len(data.items) == per_type
    answers = Counter(item.question.answer for item in data.items)
    guess = "nothing" if type in ("neighbour", "at") else max(answers, key=answers.__getitem__)
    assert answers[guess] / per_type == pytest.approx(chance(type), abs=0.03)
    details = Counter(item.question.detail for item in data.items)
    assert max(details.values()) - min(details.values()) <= 0.1 * per_type
    for item in data.items:
        assert oracle.answer(data.scenes[item.scene], item.question.text) == item.question.answer


def test_chance_levels() -> None:
    assert {t: chance(t) for t in TYPES} == {
        "recognise": 1 / 2,
        "binding": 1 / 2,
        "relation": 1 / 2,
        "neighbour": 1 / 8,
        "count": 1 / 4,
        "where": 1 / 9,
        "at": 1 / 8,
    }
    assert set(COMPOSITION) < set(TYPES)


def test_relation_words_do_not_give_the_answer_away() -> None:
    data = evaluation_set("validation", 800, types=["relation"])
    answers = Counter((i.question.detail, i.question.answer) for i in data.items)
    assert set(answers.values()) == {100}
    kinds = Counter((i.question.kind, i.question.answer) for i in data.items)
    assert min(kinds.values()) > 150


def test_a_scene_that_offers_nothing_is_passed_over() -> None:
    alone = Scene((Thing("red", "circle", 1, 1),))
    rng = random.Random(0)
    assert ask_any("binding", alone, rng) is None
    assert ask_any("relation", alone, rng) is None
    question = ask_any("neighbour", alone, rng)
    assert question is not None
    assert question.answer == "nothing"


def test_a_conversation_asks_nothing_twice() -> None:
    scene = make_scenes("train", 1)[0]
    questions = draw_questions(scene, random.Random(0), 12, dict.fromkeys(TYPES, 1.0))
    assert len({q.text for q in questions}) == len(questions) == 12
