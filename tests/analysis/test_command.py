"""``fastalign analyze`` from files to files, against eager attention and ``generate``, sample by sample.

Nothing of the package makes the expected numbers: ids come from the processor, maps from transformers' own
eager attention, answers from greedy decoding, one sample at a time and so without padding.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from examples.shapes.analysis_data import write
from examples.shapes.demo import TEACHER, load_teacher
from fastalign.commands import build_app
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.tokenizer import build_processor

from .test_measure import eager_maps, metric_of

SAMPLES, BINS = 10, 2
MATCHING = {"near": {"2": [2], "3": [3]}, "new": {"0": [2], "1": [3]}}
METRICS = ("cosine", "kl", "js")


def students() -> dict[str, Any]:
    """The teacher with noise on every weight, and an untrained model of other width, heads and depth."""
    near = load_teacher()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.25 * parameter.std(correction=0) * noise
    return {"near": near, "new": build_student(seed=3, teacher=load_teacher(), layers=2)}


def data(folder: Path) -> list[dict[str, Any]]:
    """Questions about test scenes; the first has a wrong answer, the second no image."""
    path = write(folder, 3, ("binding", "relation", "neighbour", "count"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    wrong, blind = (record["conversations"] for record in records[:2])
    wrong[1]["value"] = {"yes": "no", "no": "yes"}[wrong[1]["value"]]
    blind[0]["value"] = blind[0]["value"].removeprefix("<image>\n")
    del records[1]["image"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@dataclass(frozen=True)
class Made:
    """One run of the command."""

    result: Any
    out: Path
    report: dict[str, Any]
    samples: list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("analyze")
    records = data(folder / "data")
    models = students()
    command = ["analyze", "--teacher", str(TEACHER)]
    for name, model in models.items():
        model.save_pretrained(folder / name)
        build_processor().save_pretrained(folder / name)
        command += ["--student", f"{name}={folder / name}"]
    command += ["--data", str(folder / "data" / "test.jsonl"), "--out", str(folder / "out")]
    command += ["--template", "bare", "--layers", "last:2", "--mix", "0,1", "--examples", "2"]
    command += ["--samples", str(SAMPLES), "--batch-size", "4", "--bins", str(BINS)]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 0, result.output
    known = {"teacher": load_teacher(), **models}
    samples = [look(known, record, folder / "data") for record in records[:SAMPLES]]
    report = json.loads((folder / "out" / "report.json").read_text())
    return Made(result, folder / "out", report, samples)


def look(models: dict[str, Any], record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rows, columns, each model's maps [H, L, L] of each layer, and whether it answers rightly."""
    processor = build_processor()
    question, answer = (turn["value"] for turn in record["conversations"])
    asked = {"text": question.replace("<image>\n", "<image> "), "return_tensors": "pt"}
    if "image" in record:
        asked["images"] = Image.open(folder / record["image"])
    else:
        asked["text"] = " " + question
    prompt = dict(processor(**asked))
    tokenizer = processor.tokenizer
    ending = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    ending = torch.tensor([[*ending, tokenizer.eos_token_id]])
    whole = torch.cat([prompt["input_ids"], ending], dim=1)
    batch = {**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    visual = whole == tokenizer.convert_tokens_to_ids("<image>")
    start = prompt["input_ids"].shape[1]
    predicts = torch.zeros_like(visual)
    predicts[:, start - 1 : -1] = True
    right, maps = {}, {}
    for name, model in models.items():
        said = model.generate(**prompt, max_new_tokens=ending.shape[1], do_sample=False)
        right[name] = said[:, start:].tolist() == ending.tolist()
        maps[name] = eager_maps(model, batch)
    rows = {"visual": visual, "question": ~visual & ~predicts, "answer": predicts}
    return {
        "rows": rows,
        "columns": {"visual": visual, "text": ~visual},
        "right": right,
        "maps": maps,
    }


def mean(values: list[float]) -> float:
    """Of the numbers among them."""
    known = [value for value in values if value == value]
    return sum(known) / len(known)


def over_rows(values: Tensor, rows: Tensor) -> float:
    """Mean over a sample's rows; nan where it has none that sees a column."""
    return float(values[rows].nanmean())


def test_similarities_are_those_of_eager_maps(made: Made) -> None:
    assert made.report["samples"] == SAMPLES
    assert made.report["matching"] == MATCHING
    for name, layers in MATCHING.items():
        for layer, [teacher] in layers.items():
            for column in ("visual", "text"):
                for metric in METRICS:
                    found = made.report["pairs"][name][layer]
                    values = [
                        similarity(s, name, layer, teacher, column, metric) for s in made.samples
                    ]
                    for row in ("visual", "question", "answer"):
                        chosen = [
                            over_rows(v, s["rows"][row])
                            for v, s in zip(values, made.samples, strict=True)
                        ]
                        ours = found[row][column][metric]
                        assert ours == pytest.approx(mean(chosen), abs=1e-5), (name, layer, row)
    for name, depth in (("near", 4), ("new", 2)):
        for i in range(depth):
            for j in range(4):
                chosen = [
                    over_rows(similarity(s, name, i, j, "visual", "cosine"), s["rows"]["answer"])
                    for s in made.samples
                ]
                ours = made.report["grid"][name][str(i)][str(j)]
                assert ours == pytest.approx(mean(chosen), abs=1e-5)


def similarity(
    sample: dict[str, Any], name: str, layer: int | str, teacher: int, column: str, metric: str
) -> Tensor:
    """[1, L] of the head means."""
    ours, theirs = sample["maps"][name][int(layer)], sample["maps"]["teacher"][teacher]
    return metric_of(metric, ours.mean(1), theirs.mean(1), sample["columns"][column])


def test_how_much_and_how_widely_each_model_looks(made: Made) -> None:
    for name, layers in made.report["looks"].items():
        for layer, found in layers.items():
            masses, entropies = [], []
            for sample in made.samples:
                rows, visual = sample["rows"]["answer"], sample["columns"]["visual"]
                on_image = sample["maps"][name][int(layer)].mean(1)[rows][:, visual[0]]
                masses.append(mean(on_image.sum(-1).tolist()))
                share = on_image / on_image.sum(-1, keepdim=True)
                if visual.any():
                    entropies.append(mean((-share * share.log()).sum(-1).tolist()))
            assert found["answer"]["mass"] == pytest.approx(mean(masses), abs=1e-5)
            assert found["answer"]["entropy"] == pytest.approx(mean(entropies), abs=1e-5)


def test_accuracy_is_that_of_greedy_decoding(made: Made) -> None:
    accuracy = {
        name: mean([float(sample["right"][name]) for sample in made.samples])
        for name in ("teacher", *MATCHING)
    }
    assert made.report["accuracy"] == pytest.approx(accuracy)
    # The wrong answer and the question without an image leave the teacher some, but not all.
    assert 0 < accuracy["near"] <= accuracy["teacher"] < 1
    for name, shares in made.report["mixing"].items():
        assert set(shares) == {"0", "1"}
        assert shares["0"] == pytest.approx(accuracy[name])  # nothing mixed in


def test_bins_are_the_samples_in_order_of_similarity(made: Made) -> None:
    for name, layers in MATCHING.items():
        seen = []
        for sample in made.samples:
            if not sample["columns"]["visual"].any():
                continue  # without an image there is nothing to be alike in
            values = [
                over_rows(
                    similarity(sample, name, layer, teacher, "visual", "cosine"),
                    sample["rows"]["answer"],
                )
                for layer, [teacher] in layers.items()
            ]
            seen.append((sum(values) / len(values), float(sample["right"][name])))
        seen.sort()
        assert len(seen) == SAMPLES - 1
        first = (len(seen) + 1) // BINS
        for found, part in zip(
            made.report["bins"][name], (seen[:first], seen[first:]), strict=True
        ):
            assert found["samples"] == len(part)
            assert (found["low"], found["high"]) == pytest.approx(
                (part[0][0], part[-1][0]), abs=1e-5
            )
            assert found["accuracy"] == pytest.approx(mean([right for _, right in part]))


def test_the_page_holds_its_pictures(made: Made) -> None:
    names = ["examples", "layers", "pairs", "looks", "bins", "mixing"]
    files = {*(f"{name}.png" for name in names), "report.json", "report.html"}
    assert {path.name for path in made.out.iterdir()} == files
    for file in files:
        assert f"wrote {made.out / file}" in made.result.output
    page = (made.out / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(names)
    for source, name in zip(sources, names, strict=True):
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as inside:
            inside.load()
            shape = inside.width / inside.height
        with Image.open(made.out / f"{name}.png") as beside:
            assert shape == pytest.approx(beside.width / beside.height, rel=0.01)
    assert "http" not in page and "<script" not in page and "<link" not in page
    for name, value in made.report["accuracy"].items():
        assert f"<td>{name}</td><td>{value:.3f}</td>" in page


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--student", "FOLDER"], 2, "allowed: NAME=FOLDER"),
        (["--student", "teacher=FOLDER"], 2, "allowed: NAME=FOLDER"),
        (["--mix", "half"], 2, "--mix is 'half'; allowed: numbers"),
        (["--mix", "2"], 2, "weight is 2"),
        (["--samples", "0"], 2, "allowed: at least 1"),
        (["--data", "missing.jsonl"], 1, "missing.jsonl"),
        (["--layers", "last:9"], 1, "last:9"),
        (["--template", "nothing"], 1, "nothing"),
    ],
)
def test_exit_codes_tell_wrong_usage_from_what_does_not_fit(
    tmp_path: Path, change: list[str], code: int, message: str
) -> None:
    write(tmp_path, 1, ("count",))
    option, value = change
    options = {"--student": f"twin={TEACHER}", "--data": str(tmp_path / "test.jsonl")}
    options |= {"--teacher": str(TEACHER), "--template": "bare", "--out": str(tmp_path / "out")}
    options[option] = value
    words = [word for pair in options.items() for word in pair]
    result = CliRunner().invoke(build_app(), ["analyze", *words])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()
