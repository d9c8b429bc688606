"""Write test questions of the shapes world as LLaVA json, for ``fastalign analyze``.

    python -m examples.shapes.analysis_data --out out/shapes-test

One question a line about one test scene, types in turn: no answer leaks into another question.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastalign.evals.shapes.dataset import evaluation_set
from fastalign.evals.shapes.questions import COMPOSITION
from fastalign.evals.shapes.render import render


def write(out: Path, per_type: int, types: tuple[str, ...], seed: int = 0) -> Path:
    """``test.jsonl`` and ``images/``; a function of the arguments alone."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    data = evaluation_set("test", per_type, seed=seed, types=types)
    in_turn = [
        item for group in zip(*(data.of_type(t) for t in types), strict=True) for item in group
    ]
    with (out / "test.jsonl").open("w") as lines:
        for number, item in enumerate(in_turn):
            name = f"images/{item.scene:06d}.png"
            render(data.scenes[item.scene]).save(out / name)
            record = {
                "id": f"{item.question.type}-{number}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\n" + item.question.text},
                    {"from": "gpt", "value": item.question.answer},
                ],
            }
            lines.write(json.dumps(record) + "\n")
    return out / "test.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/shapes-test"))
    parser.add_argument("--per-type", type=int, default=100)
    parser.add_argument("--types", nargs="+", default=list(COMPOSITION))
    arguments = parser.parse_args()
    print(f"wrote {write(arguments.out, arguments.per_type, tuple(arguments.types))}")


if __name__ == "__main__":
    main()
