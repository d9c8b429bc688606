"""``fastalign init``: a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TEMPLATE = """\
# fastalign distill {name}     (first: fastalign check {name})
# Every entry that is left out has the default that docs/distillation.md lists.

models:
  teacher: {teacher}
  student: {student}
  taf: {taf}            # linear | mlp: read the image through the teacher's projector; null: do not
  teacher_dtype: bfloat16
  # teacher_bits: 4        # 8 or 4, needs bitsandbytes
  # cache: {{path: targets, top_k: 64}}   # targets that `fastalign cache` recorded, instead of the teacher

output: {output}
seed: 0

data:
  path: {data}   # LLaVA json or jsonl, a folder, or a dataset saved by `datasets`
  # image_root: images     # default: the folder that path lies in; nothing outside of it is read
  # template: vicuna       # default: the processor's own chat template
  max_length: 1536
  on_error: skip           # or raise: a bad sample ends the run
  # streaming: true        # a jsonl larger than memory; needs group_batches: false, and steps in the stages
  workers: 4

defaults:                  # for every stage
  precision: bf16
  gradient_checkpointing: true
  save_every: 500

stages:
  - preset: dpt            # projector; LM + KD
    # data: {{path: captions.json}}
  - preset: dft            # language model (LoRA r128) + projector; LM + KD + attention alignment
    # losses: {{lm: 1, kd: 1, alignment: 1, alignment_spec: compodistill}}
    # lora: null           # train in full
  - preset: sft            # LM alone
"""


def init(
    student: Annotated[str, typer.Option(help="Folder or hub name of the student.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub name of the teacher.")],
    data: Annotated[str, typer.Option(help="The conversations.")] = "data.json",
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    taf: Annotated[bool, typer.Option(help="Fetch the teacher's projector (LLaVA only).")] = False,
    force: Annotated[bool, typer.Option(help="Write over an existing file.")] = False,
) -> None:
    """Write a commented recipe: the paper's three stages for a student and a teacher."""
    import yaml

    if out.exists() and not force:
        typer.echo(f"{out} exists; allowed: another --out, or --force", err=True)
        raise typer.Exit(2)

    def quoted(text: str) -> str:
        return yaml.safe_dump(text, default_style='"').strip()

    text = _TEMPLATE.format(
        name=out,
        student=quoted(student),
        teacher=quoted(teacher),
        data=quoted(data),
        taf="linear" if taf else "null",
        output=quoted(f"out/{out.stem}"),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    except OSError as error:
        typer.echo(f"{out} cannot be written: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"wrote {out}; next: fastalign check {out}")
