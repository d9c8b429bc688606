"""Minimal pairs in SugarCrepe's manner: one picture, a true and a false text that differ in little.

=========== =================================================================================
subset      true / false
=========== =================================================================================
swap_att    is there a red circle? / the same with the shape or colour of another thing there
swap_obj    is the A left of the B? / is the B left of the A?
replace_att is there a red circle? / the same with a colour that is nowhere in the picture
replace_obj is there a red circle? / the same with a shape that is nowhere in the picture
replace_rel is the A left of the B? / is the A right of the B?
add         is there a circle? (a red thing?) / the same with an attribute that makes it false
=========== =================================================================================

Each pair is scored twice. ``choice``: the model holds the true text for truer than the false one, by
the difference of the log-probabilities of "yes" and "no" (chance 1/2; what SugarCrepe's protocol
asks, without the two orders, as each text is asked alone). ``both``: greedy decoding says yes to the
one and no to the other (a coin: 1/4; always the same answer: 0).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastalign.evals.shapes.dataset import batches, encode, pixel_values, prompt_batch
from fastalign.evals.shapes.questions import RELATIONS, Stratum, ask
from fastalign.evals.shapes.world import COLOURS, SHAPES, Scene, Split, make_scene

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Pair:
    """A true and a false text about one scene."""

    subset: str
    scene: Scene
    true: str
    false: str


@dataclass(frozen=True)
class PairScore:
    """``choice`` and ``both`` in [0, 1] over ``asked`` pairs."""

    choice: float
    both: float
    asked: int


Texts = tuple[str, str]


def _swap_att(scene: Scene, rng: random.Random) -> Texts | None:
    question = ask("binding", scene, rng, Stratum("", "yes", 1))
    return None if question is None or question.twin is None else (question.text, question.twin)


def _relation(kind: str) -> Callable[[Scene, random.Random], Texts | None]:
    def draw(scene: Scene, rng: random.Random) -> Texts | None:
        for _ in range(50):  # the question's kind is drawn inside
            relation = rng.choice(list(RELATIONS))
            question = ask("relation", scene, rng, Stratum(relation, "yes", 1))
            if question is not None and question.kind == kind and question.twin is not None:
                return question.text, question.twin
        return None

    return draw


def _replace_att(scene: Scene, rng: random.Random) -> Texts | None:
    thing = rng.choice(scene.things)
    absent = [c for c in COLOURS if all(t.colour != c for t in scene.things)]
    if not absent:
        return None
    return f"is there a {thing.name}?", f"is there a {rng.choice(absent)} {thing.shape}?"


def _replace_obj(scene: Scene, rng: random.Random) -> Texts | None:
    thing = rng.choice(scene.things)
    absent = [s for s in SHAPES if all(t.shape != s for t in scene.things)]
    if not absent:
        return None
    return f"is there a {thing.name}?", f"is there a {thing.colour} {rng.choice(absent)}?"


def _add(scene: Scene, rng: random.Random) -> Texts | None:
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        others = {t.colour for t in scene.things if not scene.named(t.colour, thing.shape)}
        true, false = f"is there a {thing.shape}?", "is there a {} " + f"{thing.shape}?"
    else:
        others = {t.shape for t in scene.things if not scene.named(thing.colour, t.shape)}
        true, false = f"is there a {thing.colour} thing?", f"is there a {thing.colour} " + "{}?"
    if not others:
        return None
    return true, false.format(rng.choice(sorted(others)))


_DRAW: dict[str, Callable[[Scene, random.Random], Texts | None]] = {
    "swap_att": _swap_att,
    "swap_obj": _relation("swap_obj"),
    "replace_att": _replace_att,
    "replace_obj": _replace_obj,
    "replace_rel": _relation("replace_rel"),
    "add": _add,
}
SUBSETS = tuple(_DRAW)


def pair_set(split: Split, per_subset: int, *, seed: int = 0) -> list[Pair]:
    """``per_subset`` pairs of each subset, each on the next scene of the split that offers one."""
    pairs: list[Pair] = []
    for subset in SUBSETS:
        rng = random.Random(f"shapes pairs/{seed}/{split}/{subset}")
        index = found = 0
        while found < per_subset:
            scene = make_scene(split, index, seed=seed)
            index += 1
            texts = _DRAW[subset](scene, rng)
            if texts is not None:
                pairs.append(Pair(subset, scene, *texts))
                found += 1
    return pairs


@torch.no_grad()
def score_pairs(
    model: LlavaForConditionalGeneration, pairs: Sequence[Pair], *, batch_size: int = 128
) -> dict[str, PairScore]:
    """Scores by subset. The model's mode is left as it was."""
    was_training = model.training
    model.eval()
    yes, no = encode("yes")[0], encode("no")[0]
    margins, argmax = [], []
    texts = [text for pair in pairs for text in (pair.true, pair.false)]
    scenes = [pair.scene for pair in pairs for _ in range(2)]
    for part in batches(len(texts), batch_size):
        logits = model(
            **prompt_batch(texts[part]),
            pixel_values=pixel_values(scenes[part]),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        margins.append(logits[:, yes] - logits[:, no])
        argmax.append(logits.argmax(-1))
    model.train(was_training)
    margin, said = torch.cat(margins).view(-1, 2), torch.cat(argmax).view(-1, 2)
    choice = margin[:, 0] > margin[:, 1]
    both = (said[:, 0] == yes) & (said[:, 1] == no)
    scores = {}
    for subset in dict.fromkeys(pair.subset for pair in pairs):
        at = torch.tensor([pair.subset == subset for pair in pairs])
        scores[subset] = PairScore(
            choice[at].double().mean().item(), both[at].double().mean().item(), int(at.sum())
        )
    return scores
