"""MME (Fu et al., arXiv 2306.13394): two yes/no questions an image; acc and acc+ by category.

A category's points are 100 acc + 100 acc+, where acc counts answers and acc+ images whose two answers
are both right. Perception sums ten categories (at most 2,000), cognition four (at most 800).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...distill.data.records import SampleError, SourceError
from ..benchmark import Benchmark, Verdict, mean, unique
from ..files import data_files, read_rows, shown
from ..images import Picture, named_picture, picture
from ..protocols import Ask, Reply, Wording, said_yes, yes_no

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_SUFFIXES = (".jpg", ".png")


@dataclass(frozen=True)
class Question:
    """One of an image's two questions; ``pair`` names the image."""

    id: str
    where: str
    category: str
    pair: str
    image: Picture
    question: str
    yes: bool


def read(data: Path, images: Path | None) -> list[Question]:
    """The released folder (a folder a category, with a text file an image), or the parquet files."""
    if data.is_dir() and any((data / name).is_dir() for name in PERCEPTION + COGNITION):
        samples = [q for name in PERCEPTION + COGNITION for q in _category(data / name, images)]
    else:
        samples = list(_parquet(data, images))
    counts = Counter(sample.pair for sample in samples)
    for sample in samples:
        if counts[sample.pair] != 2:
            raise SampleError(
                sample.where, f"{counts[sample.pair]} questions about {sample.pair}; allowed: 2"
            )
    return unique(samples)


def _category(folder: Path, images: Path | None) -> Iterator[Question]:
    """Text files of two lines, question <tab> Yes or No; images beside them or in images/."""
    if not folder.is_dir():
        return
    split = folder / "questions_answers_YN"
    texts = sorted((split if split.is_dir() else folder).glob("*.txt"))
    if not texts:
        raise SourceError(f"{folder} holds no .txt files")
    root = folder.parent if images is None else images
    inner = f"{folder.name}/images" if split.is_dir() else folder.name
    for path in texts:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            question, tab, answer = line.partition("\t")
            answer = answer.strip().lower()
            if not tab or answer not in ("yes", "no"):
                raise SampleError(where, f"is {shown(line)}; allowed: question <tab> Yes or No")
            pair = f"{folder.name}/{path.stem}"
            yield Question(
                id=f"{pair}/{number}",
                where=where,
                category=folder.name,
                pair=pair,
                image=named_picture(where, f"{inner}/{path.stem}", root, _SUFFIXES),
                question=question.strip(),
                yes=answer == "yes",
            )


def _parquet(data: Path, images: Path | None) -> Iterator[Question]:
    seen: Counter[str] = Counter()
    for path in data_files(data, "*.parquet"):
        for row in read_rows(path):
            category = row.text("category")
            if category not in PERCEPTION + COGNITION:
                allowed = ", ".join(PERCEPTION + COGNITION)
                raise SampleError(row.where, f"'category' is {category!r}; allowed: {allowed}")
            pair = f"{category}/{row.text('question_id')}"
            seen[pair] += 1
            yield Question(
                id=f"{pair}/{seen[pair]}",
                where=row.where,
                category=category,
                pair=pair,
                image=picture(row, "image", root=images),
                question=row.text("question").strip(),
                yes=row.choice(("yes", "no"), "answer") == "yes",
            )


def ask(sample: Question, wording: Wording) -> list[Ask]:
    """The questions end with "Please answer yes or no."; an instruction of the user's replaces that."""
    question = sample.question
    if wording.instruction is not None:
        question = question.replace("Please answer yes or no.", "").strip()
    return [yes_no("answer", sample.image, question, wording, "", "\n")]


def reads_as_yes(answer: str) -> bool | None:
    """MME's rule: yes or no as the whole answer, or within its first four characters."""
    said = answer.strip().lower().replace(".", "")
    if said in ("y", "n"):
        return said == "y"
    if "yes" in said[:4]:
        return True
    return False if "no" in said[:4] else None


def judge(sample: Question, replies: Mapping[str, Reply]) -> Verdict:
    reply = replies["answer"]
    yes = said_yes(reply) if reply.scores else reads_as_yes(reply.text)
    return {
        "category": sample.category,
        "pair": sample.pair,
        "said_yes": yes,
        "right": yes == sample.yes,
        "unread": int(yes is None),
    }


def score(samples: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    categories: dict[str, Any] = {}
    for name in PERCEPTION + COGNITION:
        pairs: dict[str, list[bool]] = {}
        for verdict in verdicts:
            if verdict["category"] == name:
                pairs.setdefault(verdict["pair"], []).append(verdict["right"])
        if pairs:
            acc = mean(right for two in pairs.values() for right in two)
            # a pair cut in half by a limit is no pair
            plus = mean(len(two) == 2 and all(two) for two in pairs.values())
            categories[name] = {"acc": acc, "acc_plus": plus, "points": 100 * (acc + plus)}
    scores: dict[str, Any] = {"categories": categories}
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(m in categories for m in members):
            scores[f"{name}_points"] = sum(categories[m]["points"] for m in members)
    return scores


MME = Benchmark(
    name="mme",
    title="MME",
    source="arXiv 2306.13394",
    files="the released folder (existence/, count/, ...), or the parquet files",
    methods=("generate", "options"),
    lmms_eval="mme",
    read=read,
    ask=ask,
    judge=judge,
    score=score,
)
