"""Write the shapes world as a LLaVA data set, and an untrained student, for ``shapes.yaml``.

    python -m examples.recipes.shapes_data --out out/shapes

Makes ``train.jsonl`` with one picture and several questions a line, ``images/``, and ``student/``: a
decoder half as wide as the shipped teacher's, with its vision tower.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from examples.shapes.demo import TEACHER, load_teacher
from fastalign.evals.shapes.dataset import draw_questions
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.questions import TYPES
from fastalign.evals.shapes.render import render
from fastalign.evals.shapes.tokenizer import build_processor
from fastalign.evals.shapes.world import make_scene


def write(out: Path, scenes: int, questions: int, seed: int, teacher: Path = TEACHER) -> None:
    """The data set and the student; a function of the arguments alone."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"shapes data/{seed}")
    weights = dict.fromkeys(TYPES, 1.0)
    with (out / "train.jsonl").open("w") as lines:
        for index in range(scenes):
            scene = make_scene("train", index, seed=seed)
            name = f"images/{index:06d}.png"
            render(scene).save(out / name)
            turns = []
            for number, question in enumerate(draw_questions(scene, rng, questions, weights)):
                marker = "" if number else "<image>\n"
                turns.append({"from": "human", "value": marker + question.text})
                turns.append({"from": "gpt", "value": question.answer})
            record = {"id": str(index), "image": name, "conversations": turns}
            lines.write(json.dumps(record) + "\n")
    build_student(seed, load_teacher(teacher)).save_pretrained(out / "student")
    build_processor().save_pretrained(out / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description="The shapes world as files for shapes.yaml.")
    parser.add_argument("--out", type=Path, default=Path("out/shapes"))
    parser.add_argument("--scenes", type=int, default=6400)
    parser.add_argument("--questions", type=int, default=10, help="a scene")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.scenes, arguments.questions, arguments.seed)
    print(f"wrote {arguments.scenes} scenes and an untrained student to {arguments.out}")


if __name__ == "__main__":
    main()
