"""POPE (Li et al., arXiv 2305.10355): is there such an object? Accuracy, precision, recall, F1, yes ratio.

An answer is read as POPE's own script does: if its first sentence has the word no, No or not, it is a
no; all else is a yes. The yes ratio is that of the *predictions* (of the labels it would be 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import data_files, read_rows
from ..images import Picture, picture
from ..protocols import SHORT, Ask, Reply, Wording, said_yes, yes_no

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """``yes``: the object is there."""

    id: str
    where: str
    split: str
    image: Picture
    question: str
    yes: bool


def read(data: Path, images: Path | None) -> list[Question]:
    samples = []
    for path in data_files(data, *(f"*{s}*.json" for s in SPLITS), "*.jsonl", "*.parquet"):
        named = next((s for s in SPLITS if s in path.stem), path.stem)
        for row in read_rows(path):
            split = row.optional("category") or named
            samples.append(
                Question(
                    id=f"{split}/{row.value('question_id')}",
                    where=row.where,
                    split=split,
                    image=picture(row, "image", root=images),
                    question=row.text("text", "question").strip(),
                    yes=row.choice(("yes", "no"), "label", "answer") == "yes",
                )
            )
    return unique(samples)


def ask(sample: Question, wording: Wording) -> list[Ask]:
    return [yes_no("answer", sample.image, sample.question, wording, SHORT, "\n")]


def reads_as_yes(answer: str) -> bool:
    """POPE's rule."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in words for word in ("No", "not", "no"))


def judge(sample: Question, replies: Mapping[str, Reply]) -> Verdict:
    reply = replies["answer"]
    if reply.scores:
        yes, unread = said_yes(reply), int(reply.best is None)
    else:
        yes = reads_as_yes(reply.text)
        unread = int(not {"yes", "no", "not"} & set(reply.text.lower().replace(".", " ").split()))
    return {"split": sample.split, "label": sample.yes, "said_yes": yes, "unread": unread}


def score(samples: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    splits = dict.fromkeys(sample.split for sample in samples)
    by_split = {s: _scores([v for v in verdicts if v["split"] == s]) for s in splits}
    scores: dict[str, Any] = {"splits": by_split}
    if set(splits) == set(SPLITS):
        scores |= {key: mean(s[key] for s in by_split.values()) for key in by_split[SPLITS[0]]}
    return scores


def _scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """A quotient by nothing is 0, as lmms-eval has it; POPE's script would stop."""
    pairs = [(v["said_yes"], v["label"]) for v in verdicts]
    true_yes = pairs.count((True, True))
    said = sum(yes is True for yes, _ in pairs)
    there = sum(label for _, label in pairs)
    precision = true_yes / said if said else 0.0
    recall = true_yes / there if there else 0.0
    total = precision + recall
    return {
        "accuracy": mean(yes == label for yes, label in pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "yes_ratio": said / len(pairs),
    }


POPE = Benchmark(
    name="pope",
    title="POPE",
    source="arXiv 2305.10355",
    files="coco_pope_{random,popular,adversarial}.json, or one of them; images: COCO val2014",
    methods=("generate", "options"),
    lmms_eval="pope",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
