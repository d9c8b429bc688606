"""Pruning: what does nothing can go unseen, scores are what they say, checkpoints are standard ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from fastalign.commands import build_app
from fastalign.distill.prune import PruneError, Sizes, Structure, choose, cut, measure
from fastalign.distill.recipe import load_recipe
from fastalign.distill.run import run_recipe
from fastalign.evals.shapes.models import build_teacher
from fastalign.evals.shapes.tokenizer import build_processor

from ..models import tiny, zoo
from . import worlds

FAMILIES = {
    "LLaVA-1.5, llama text": "llama",
    "LLaVA-1.5, qwen2 text": "qwen2",
    "LLaVA-1.5, qwen3 text": "qwen3",
    "LLaVA-1.5, mistral text": "mistral",
    "LLaVA-NeXT": "llava_next",
    "LLaVA-OneVision": "llava_onevision",
    "Qwen2-VL, sliding": "qwen2_vl",
    "Qwen2.5-VL": "qwen2_5_vl",
}
STAYS = {
    "layers": [0, 1, 3],
    "hidden": sorted(torch.randperm(32, generator=torch.Generator().manual_seed(3))[:16].tolist()),
    "heads": [2, 3],  # the second of two groups
    "mlp": list(range(1, 32, 2)),
}
EVERYTHING = Sizes(layers=3, hidden=16, heads=2, kv_heads=1, mlp=16)


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model in float64 whose norms have no epsilon to speak of, and a batch."""
    case = next(case for case in zoo.CASES if case.name == name)
    model = case.model(0).double()
    for module in model.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-30
    batch = case.batch(model, left=False)
    batch.pop("labels")
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    return model, batch


def rows(tensor: torch.Tensor, stay: list[int]) -> None:
    """Zero the rows that do not stay."""
    gone = torch.ones(len(tensor), dtype=torch.bool)
    gone[stay] = False
    tensor[gone] = 0


@torch.no_grad()
def silence(model: Any, *what: str) -> None:
    """Make everything outside ``STAYS`` do nothing."""
    text = model.model.language_model
    for i, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if "heads" in what:
            out = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))
            rows(out.transpose(0, 1), STAYS["heads"])
        if "mlp" in what:
            rows(mlp.gate_proj.weight, STAYS["mlp"])
        for linear in (attention.o_proj, mlp.down_proj):
            if "hidden" in what:
                rows(linear.weight, STAYS["hidden"])
            if "layers" in what and i not in STAYS["layers"]:
                linear.weight.zero_()
    if "hidden" not in what:
        return
    rows(text.embed_tokens.weight.T, STAYS["hidden"])
    inner = model.model
    if hasattr(inner, "multi_modal_projector"):
        first, last = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
        for tensor in (first.weight, first.bias):
            rows(tensor, list(range(16)))
    else:
        last = inner.visual.merger.mlp[2]
    for tensor in (last.weight, last.bias):
        rows(tensor, STAYS["hidden"])
    if hasattr(inner, "image_newline"):
        rows(inner.image_newline, STAYS["hidden"])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def prune(model: Any, batch: dict[str, Any], sizes: Sizes, score: Any = "contribution") -> Any:
    importance = measure(model, [batch])
    made = cut(model, choose(model, sizes, importance, score), importance)
    for module in made.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-30
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_what_does_nothing_can_go_from_every_family(name: str, tmp_path: Path) -> None:
    model, batch = build(name)
    before = model(**batch).logits
    silence(model, "layers", "hidden", "heads", "mlp")
    expected = model(**batch).logits
    assert not torch.allclose(before, expected)
    made = prune(model, batch, EVERYTHING)
    assert type(made) is type(model)
    assert difference(made(**batch).logits, expected) < 1e-5  # its norms compute in float32
    made.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    loaded.eval()
    fresh = AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert (fresh.num_hidden_layers, fresh.hidden_size, fresh.intermediate_size) == (3, 16, 16)
    for ours, theirs in zip(made.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for module, other in zip(made.modules(), loaded.modules(), strict=True):
        if hasattr(module, "variance_epsilon"):
            other.variance_epsilon = module.variance_epsilon
    # The weights are the same bits; where they lie in memory may decide the last bit of a product.
    assert difference(loaded(**batch).logits, made(**batch).logits) < 1e-6
    tokens = [m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (made, loaded)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("what", "sizes", "exactly"),
    [
        ("mlp", Sizes(mlp=16), True),
        ("heads", Sizes(heads=2, kv_heads=1), True),
        ("layers", Sizes(layers=3), True),
        ("hidden", Sizes(hidden=16), False),
    ],
)
def test_each_axis_alone(what: str, sizes: Sizes, exactly: bool) -> None:
    model, batch = build("LLaVA-1.5, llama text")
    silence(model, what)
    made = prune(model, batch, sizes)
    error = difference(made(**batch).logits, model(**batch).logits)
    assert error < (1e-12 if exactly else 1e-5)
    kept = choose(model, sizes, measure(model, [batch]), "contribution")
    found = {
        "mlp": kept.mlp[0],
        "heads": kept.heads[0],
        "layers": kept.layers,
        "hidden": kept.hidden,
    }
    assert found[what] == STAYS[what]
    other = model.state_dict()
    left = {n for n, v in made.state_dict().items() if n in other and v.shape == other[n].shape}
    assert "model.vision_tower.post_layernorm.weight" in left


def test_equal_heads_from_each_group() -> None:
    """Two key heads of two query heads each; one query head of each goes."""
    model, batch = build("LLaVA-1.5, llama text")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight[:, 0:8] = 0
            layer.self_attn.o_proj.weight[:, 24:32] = 0
    importance = measure(model, [batch])
    kept = choose(model, Sizes(heads=2), importance, "contribution")
    assert kept.heads == [[1, 2]] * 4 and kept.kv_heads == [[0, 1]] * 4
    made = cut(model, kept, importance)
    for module in made.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-30
    torch.testing.assert_close(made(**batch).logits, model(**batch).logits, rtol=1e-12, atol=1e-13)


def test_scores_by_hand() -> None:
    """Every score a second time, from the model's own intermediate results, token by token."""
    model, batch = build("LLaVA-1.5, qwen2 text")
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str, inputs: bool) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            seen.setdefault(name, []).append(arguments[0] if inputs else output)

        return hook

    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_hook(note(f"mlp{i}", True))
        layer.self_attn.o_proj.register_forward_hook(note(f"heads{i}", True))
        for n, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            norm.register_forward_hook(note(f"norm{i}.{n}", False))
        layer.input_layernorm.register_forward_hook(note(f"stream{i}", True))
    model.model.language_model.norm.register_forward_hook(note("norm.last", False))
    model.model.language_model.norm.register_forward_hook(note("stream4", True))
    model.model.multi_modal_projector.linear_2.register_forward_hook(note("projector", True))
    found = measure(model, [batch])
    mask = batch["attention_mask"].bool()

    def score(pick: Any) -> float:
        """2-norm over samples of the mean over their valid tokens."""
        means = []
        for b in range(2):
            at = [i for i in range(mask.shape[1]) if mask[b, i]]
            means.append(sum(float(pick(b, i)) for i in at) / len(at))
        return math.sqrt(sum(m**2 for m in means))

    mlp, heads = (seen[f"{n}1"][0] for n in ("mlp", "heads"))
    for channel in (0, 7):
        expected = score(lambda b, i, c=channel: abs(mlp[b, i, c]))
        assert float(found.mlp[1, channel]) == pytest.approx(expected, rel=1e-12)
    for head in range(4):
        expected = score(lambda b, i, h=head: heads[b, i, 8 * h : 8 * h + 8].norm())
        assert float(found.heads[1, head]) == pytest.approx(expected, rel=1e-12)
    norms = [seen[name][0] for name in seen if name.startswith("norm")]
    assert len(norms) == 9
    for dimension in (0, 31):
        expected = sum(score(lambda b, i, x=x, d=dimension: abs(x[b, i, d])) for x in norms)
        assert float(found.hidden[dimension]) == pytest.approx(expected, rel=1e-12)
    projector = seen["projector"][0]  # [images, patches, units]
    means = [sum(float(abs(x[p, 5])) for p in range(9)) / 9 for x in projector]
    assert float(found.projector[5]) == pytest.approx(
        math.sqrt(sum(m**2 for m in means)), rel=1e-12
    )
    for i in range(4):
        total, count = 0.0, 0
        x, y = seen[f"stream{i}"][0], seen[f"stream{i + 1}"][0]
        for b, t in mask.nonzero().tolist():
            total += float(x[b, t] @ y[b, t] / (x[b, t].norm() * y[b, t].norm()))
            count += 1
        assert float(found.influence[i]) == pytest.approx(1 - total / count, rel=1e-10)
    assert (found.samples, found.tokens) == (2, int(mask.sum()))


def test_batches_add_up_and_padding_does_not_count() -> None:
    model, batch = build("LLaVA-1.5, llama text")
    whole = measure(model, [batch])
    hooks = count_hooks(model)  # transformers has some of its own
    parts = []
    for b, images in ((0, slice(0, 1)), (1, slice(1, 3))):
        length = int(batch["attention_mask"][b].sum())
        part = {n: batch[n][b : b + 1, :length] for n in ("input_ids", "attention_mask")}
        parts.append({**part, "pixel_values": batch["pixel_values"][images]})
    done: list[int] = []
    found = measure(model, parts, done.append)
    assert done == [1, 1]
    for name in ("heads", "mlp", "hidden", "projector", "influence"):
        torch.testing.assert_close(
            getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-12
        )
    assert count_hooks(model) == hooks


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(), "those of the model; allowed: at least one smaller"),
        (Sizes(mlp=999), "mlp is 999; allowed: 1 to 64"),
        (Sizes(layers=0), "layers is 0; allowed: 1 to 4"),
        (Sizes(heads=3), "heads is 3 with kv_heads 2.*allowed with 3 heads: another number"),
        (Sizes(kv_heads=1), "allowed with 4 heads: kv_heads 2"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes: Sizes, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        sizes.resolved(Structure(tiny.llava()))


def test_what_is_not_known_is_refused() -> None:
    qwen, _ = build("Qwen2.5-VL")
    with pytest.raises(
        PruneError, match=r"hidden is 32 with 2 heads.*allowed: hidden 16 with 2 heads"
    ):
        Sizes(heads=2, kv_heads=1).resolved(Structure(qwen))
    for name, message in (
        ("Gemma 3", "model_type is 'gemma3'; allowed: llava, llava_next"),
        ("LLaVA-1.5, gemma2 text", "language model's model_type is 'gemma2'; allowed: llama"),
    ):
        case = next(case for case in zoo.CASES if case.name == name)
        with pytest.raises(PruneError, match=message):
            Structure(case.model(0))
    model = tiny.llava()
    model.model.language_model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        PruneError, match=r"a tensor 'model.language_model.layers.1.mlp.extra.weight'"
    ):
        Structure(model)
    found = measure(tiny.llava(), [without_labels(tiny.batch())])
    with pytest.raises(PruneError, match="'size'; allowed: activation, contribution"):
        choose(tiny.llava(), Sizes(mlp=2), found, "size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sample"):
        measure(tiny.llava(), [])


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_command_and_the_distillation_that_follows(tmp_path: Path) -> None:
    """prune, then SFT with the last hidden states, as a recipe: the seed's way from teacher to student."""
    worlds.write_llava(tmp_path)
    teacher = build_teacher(layers=3)
    teacher.save_pretrained(tmp_path / "teacher")
    build_processor().save_pretrained(tmp_path / "teacher")
    data = ["--data", str(tmp_path / "data.json"), "--template", "bare", "--dtype", "float32"]
    arguments = ["prune", str(tmp_path / "teacher"), str(tmp_path / "student"), *data]
    text = teacher.config.text_config
    smaller = ["--layers", "2", "--mlp", "64", "--hidden", str(text.hidden_size // 2)]
    result = CliRunner().invoke(build_app(), [*arguments, *smaller])
    assert result.exit_code == 0, result.output
    assert "dropped layers" in result.output and "parameters" in result.output
    report = json.loads((tmp_path / "student" / "prune.json").read_text())
    assert report["sizes"]["after"]["mlp"] == 64 and report["calibration"]["samples"] == 6
    assert report["parameters"]["after"] < report["parameters"]["before"]
    recipe = {
        "models": {"teacher": "teacher", "student": "student"},
        "output": "run",
        "cpu": True,
        "threads": 1,
        "data": {"path": "data.json", "template": "bare"},
        "stages": [
            {
                "preset": "sft",
                "lora": None,
                "losses": {"lm": 1, "hidden": 1},
                "global_batch": 2,
                "micro_batch": 2,
                "steps": 2,
                "log_every": 1,
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = run_recipe(load_recipe(tmp_path / "recipe.yaml"), say=lambda _: None)
    losses = summary["stages"][0]["last_losses"]
    assert losses["loss/lm"] > 0 and losses["loss/hidden"] > 0
    result = CliRunner().invoke(build_app(), [*arguments, *smaller])
    assert result.exit_code == 2 and "exists; allowed" in result.output
    arguments[2] = str(tmp_path / "other")
    for bad, code, message in (
        (["--heads", "3"], 2, "heads is 3"),
        ([], 2, "at least one smaller one"),
        (["--mlp", "8", "--data", "missing.json"], 1, "missing.json"),
        (["--mlp", "8", "--dtype", "int8"], 2, "allowed: float32"),
        (["--mlp", "8", "--device", "nowhere"], 2, "--device is 'nowhere'"),
    ):
        result = CliRunner().invoke(build_app(), [*arguments, *bad])
        assert result.exit_code == code and message in result.output, result.output
        assert not (tmp_path / "other").exists()
    result = CliRunner().invoke(build_app(), ["prune", "--help"])
    assert result.exit_code == 0 and "Minitron" in result.output
