"""The teacher's model card, written from the numbers in its ``scores.json``.

python -m examples.shapes.card examples/shapes/teacher
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.evals.shapes.questions import COMPOSITION

CARD = """\
# The teacher of the shapes world

A LLaVA-type model (`LlavaForConditionalGeneration`) that answers questions about small images of
coloured shapes: the teacher of this repository's demo and tests. It is made by the repository, from
random weights and rendered images, and good for nothing else.

| part | size |
|---|---|
| vision | SigLIP tower, 48 x 48 pixels, patches of 8: 36 visual tokens; width 64, 3 layers, 4 heads |
| projector | LLaVA's two-layer MLP |
| text | Llama decoder, width {width}, {layers} layers, {heads} heads |
| vocabulary | {vocabulary}, byte-level BPE |
| parameters | {parameters:,}, float32 |

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("examples/shapes/teacher")
model = LlavaForConditionalGeneration.from_pretrained("examples/shapes/teacher")
inputs = processor(
    images=image, text="<image>what is just above the red circle?", return_tensors="pt"
)
processor.decode(
    model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
)
```

## How it was made

    {command}

Seed {seed}. Tower: {tower_steps:,} steps on per-patch labels, then frozen. Projector: {projector_steps}
steps towards the word embeddings of what is in each cell. Decoder and projector: {steps:,} steps of
{batch_size} conversations with {questions} questions each, loss on the answers only, Muon and Adam.
Data: {scenes:,} rendered training scenes of 3 to 6 things (and {easy:,} of 2 or 3 for the first
steps), drawn from the seed; nothing is downloaded.
It took {minutes:.0f} minutes on 2 CPU cores that were shared with other work.

## What it scores

{asked:,} questions per type on {test_scenes:,} test scenes of 4 to 6 things, one question per
sequence, the whole answer exactly right under greedy decoding. The layouts of the
test scenes occur in neither training nor validation (a layout's hash decides its split), and
nothing was chosen on them. Answers are balanced; chance is the score of the best constant answer.

{types}

Composition score, the mean of {composition_types}: **{composition:.3f}** (chance {composition_chance:.3f}).

{details}

Whole minimal pairs, both twins right:

{pairs}

## Limits

It knows {vocabulary} tokens and the question forms of `fastalign.evals.shapes.questions` word for word;
scenes with fewer than 2 or more than 6 things, two things of one name, or other colours are outside
its training. A count above three has no word.
"""


def model_card(facts: dict[str, Any], config: dict[str, Any], parameters: int) -> str:
    """The card's text from ``scores.json``, ``config.json`` and the parameter count."""
    settings, test, text = facts["settings"], facts["test"], config["text_config"]
    chance = test["chance"]
    rows = [(name, f"{value:.3f}", f"{chance[name]:.3f}") for name, value in test["types"].items()]
    return CARD.format(
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        vocabulary=text["vocab_size"],
        parameters=parameters,
        command=facts["command"],
        seed=settings["seed"],
        tower_steps=settings["tower_steps"],
        projector_steps=settings["projector_steps"],
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        questions=settings["questions"],
        scenes=settings["scenes"],
        easy=settings["scenes"] // 4,
        minutes=facts["minutes"],
        asked=settings["test_per_type"],
        test_scenes=facts["test_scenes"],
        types=_table(("type", "accuracy", "chance"), rows),
        composition_types=", ".join(COMPOSITION),
        composition=test["composition"],
        composition_chance=sum(chance[t] for t in COMPOSITION) / len(COMPOSITION),
        details=_table(
            ("type/detail", "accuracy"),
            [(k, f"{v:.3f}") for k, v in sorted(test["details"].items())],
        ),
        pairs=_table(("kind", "accuracy"), [(k, f"{v:.3f}") for k, v in test["pairs"].items()]),
    )


def write_card(folder: Path) -> Path:
    """Write README.md beside the weights; it appears complete or not at all."""
    from safetensors.torch import load_file

    parameters = sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())
    facts = json.loads((folder / "scores.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    part = folder / "README.part"
    part.write_text(model_card(facts, config, parameters))
    os.replace(part, folder / "README.md")
    return folder / "README.md"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(write_card(Path(sys.argv[1])))
