"""Recorded targets: the loss without the teacher is the loss with it; what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign import AlignSpec
from fastalign.models import AttentionAlignment, TeacherCache, match_layers, record_teacher
from fastalign.models.cache import fingerprint
from fastalign.models.record import Recorder, ShardWriter
from tests.models import eager, tiny
from tests.models.test_llava import step

LAYERS = {1: (1, 2), 3: (3,)}
ROW = AlignSpec(compare="row", divergence="kl", normalize="visual")
POOLED = AlignSpec(compare="pooled", divergence="mse", rows="text")


def data() -> list[dict[str, Any]]:
    return [tiny.batch(seed=1), tiny.batch(seed=2, images=(2, 1), lengths=(24, 18), left=True)]


def record(path: Path, teacher: Any, **changes: Any) -> TeacherCache:
    return record_teacher(path, teacher, data(), matching=LAYERS, **changes)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [("compodistill", None), ("compodistill", "response"), (ROW, "text"), (POOLED, None)],
    ids=["map", "map response", "row", "pooled"],
)
def test_training_from_a_cache_is_training_with_the_teacher(
    tmp_path: Path, spec: Any, rows: str | None
) -> None:
    """Samples come back in another order, in another batch, padded on the other side."""
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2).train()
    record(tmp_path / "targets", teacher, spec=spec, rows=rows, shard_samples=3)
    cache = TeacherCache(tmp_path / "targets", teacher=teacher)
    assert len(cache) == 4
    first, second = data()
    ids = torch.cat([second["input_ids"][1:], torch.zeros(1, 6, dtype=torch.long)], dim=1)
    mixed = {
        "input_ids": torch.nn.functional.pad(second["input_ids"], (5, 0)),
        "labels": torch.nn.functional.pad(second["labels"], (5, 0), value=-100),
        "pixel_values": second["pixel_values"],
    }
    mixed["attention_mask"] = (mixed["input_ids"] != tiny.PAD).long()
    assert ids.shape[1] == 30
    for inputs, samples in ((first, [0, 1]), (mixed, [2, 3])):
        losses = []
        live = AttentionAlignment(student, teacher, spec, LAYERS, rows)
        out = step(live, student, teacher, inputs)
        (0 * out.logits.sum() + live.loss()).backward()
        losses.append((live.loss().detach(), eager.gradients(student)))
        student.zero_grad()
        offline = AttentionAlignment(student, cache, spec)
        with offline.step(inputs, samples=samples):
            out = student(**inputs)
        (0 * out.logits.sum() + offline.loss()).backward()
        losses.append((offline.loss().detach(), eager.gradients(student)))
        student.zero_grad()
        assert losses[0][0] > 1e-4
        torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-4, atol=1e-6)
        assert eager.relative_error(losses[1][1], losses[0][1]) < 1e-3


def test_sparse_and_half_precision_targets_come_near(tmp_path: Path) -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    inputs = data()[0]
    losses = {}
    for name, changes in (
        ("dense", {}),
        ("all entries", {"entries": 18}),
        ("few", {"entries": 6}),
        ("half", {"dtype": torch.float16}),
    ):
        cache = record(tmp_path / name, teacher, **changes)
        alignment = AttentionAlignment(student, cache)
        with alignment.step(inputs, samples=[0, 1]):
            student(**inputs)
        losses[name] = alignment.loss().item()
    assert losses["all entries"] == pytest.approx(losses["dense"], rel=1e-6)
    assert losses["half"] == pytest.approx(losses["dense"], rel=1e-2)
    assert losses["few"] == pytest.approx(losses["dense"], rel=0.2)
    assert losses["few"] != losses["dense"]
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors"))
        for n in ("dense", "half")
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_sampled_rows_are_recorded_with_their_weights(tmp_path: Path) -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    cache = record(tmp_path / "t", teacher, spec=ROW, rows="all:4")
    inputs = data()[0]
    alignment = AttentionAlignment(student, cache, ROW)
    with alignment.step(inputs, samples=[0, 1]) as running:
        student(**inputs)
    assert running.rows.positions.shape == (2, 4)
    assert running.rows.weight is not None
    after_image = inputs["attention_mask"].sum(-1) - 2  # every image begins at the third token
    torch.testing.assert_close(running.rows.weight[:, 0], after_image / 4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_and_the_rest_are_the_teachers(tmp_path: Path, temperature: float) -> None:
    teacher = tiny.llava(seed=1).eval()
    cache = record(tmp_path / "t", teacher, logits=3, temperature=temperature)
    inputs = data()[0]
    with torch.no_grad():
        log_p = (teacher(**inputs).logits / temperature).log_softmax(-1)
    found = cache.answer_logits([1, 0], [5, 5])
    wanted = torch.cat(
        [log_p[b, (inputs["labels"][b] != -100).nonzero()[:, 0] - 1] for b in (1, 0)]
    )
    values, index = wanted.topk(3, dim=-1)
    torch.testing.assert_close(found.log_probs, values)
    assert torch.equal(found.tokens, index)
    rest = 1 - values.double().exp().sum(-1)
    torch.testing.assert_close(found.rest.double().exp(), rest, atol=1e-6, rtol=0)
    with pytest.raises(
        ValueError, match=r"sample 0 was recorded at 5 positions .* the batch has 4"
    ):
        cache.answer_logits([0], [4])
    with pytest.raises(ValueError, match="the cache holds no logits"):
        record(tmp_path / "none", teacher).answer_logits([0], [5])


def test_a_recording_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """What is on the disk stays; a half-written shard does not count; another recording is refused."""
    teacher = tiny.llava(seed=1).eval()
    whole = record(tmp_path / "whole", teacher, logits=2, shard_samples=1)
    recorder = Recorder(teacher, LAYERS, whole.spec, logits=2)
    facts = {"teacher": fingerprint(teacher), **recorder.facts()}
    path = tmp_path / "cut"
    writer = ShardWriter(path, facts, 1)
    records = [one for batch in data() for one in recorder.record(batch)]
    for number, (tokens, tensors) in enumerate(records[:2]):
        writer.add(tokens, tensors, content=f"c{number}")
        assert writer.full
        writer.flush(mark=10 * number)
    writer.add(*records[2])  # held, and lost
    (path / "shard-00002.safetensors.part").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"which has no manifest\.json"):
        TeacherCache(path)
    with pytest.raises(ValueError, match="was recorded with entries None, and 4 is asked for"):
        ShardWriter(path, {**facts, "entries": 4}, 1)
    again = ShardWriter(path, facts, 1)
    assert (again.mark, len(again.hashes), again.contents) == (10, 2, {"c0": 0, "c1": 1})
    for tokens, tensors in records[2:]:
        again.add(tokens, tensors)
    cut = again.finish()
    assert cut.hashes == whole.hashes and cut.numbers == {"c0": 0, "c1": 1}
    for sample in range(4):
        for name in ("rows", "layer_1/values", "logits/log_probs", "logits/rest"):
            ours, theirs = cut.read(sample, name), whole.read(sample, name)
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    assert not list(path.glob("*.part")) and not (path / "recording.json").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    cache = record(tmp_path / "t", teacher)
    inputs = data()[0]
    alignment = AttentionAlignment(student, cache)

    def run(samples: Any) -> None:
        with alignment.step(inputs, samples=samples):
            student(**inputs)

    for samples, message in (
        (None, "samples is None; allowed with a TeacherCache"),
        ([0], "samples has 1 entries and the batch 2"),
        ([0, 9], "samples holds 9; allowed: 0 to 3"),
        ([1, 0], "sample 1 was recorded of other tokens than the batch's sample 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(samples)
    with pytest.raises(ValueError, match="recorded for"):
        AttentionAlignment(student, cache, "tunix")
    with pytest.raises(ValueError, match="layers or rows is given with a TeacherCache"):
        AttentionAlignment(student, cache, layers="all")
    with pytest.raises(ValueError, match="targets of student layer 3; allowed"):
        AttentionAlignment(tiny.llava(layers=2), cache)
    with pytest.raises(ValueError, match=r"weights_sha256"):
        TeacherCache(tmp_path / "t", teacher=tiny.llava(seed=5))
    with pytest.raises(ValueError, match="config_sha256"):
        TeacherCache(tmp_path / "t", teacher=tiny.llava(layers=2))
    with pytest.raises(ValueError, match=r"which has no manifest.json"):
        TeacherCache(tmp_path)
    with pytest.raises(ValueError, match="which holds files; allowed: a new directory"):
        record(tmp_path / "t", teacher)
    with pytest.raises(ValueError, match=r"entries is 0; allowed: at least 1"):
        record(tmp_path / "u", teacher, entries=0)
    with pytest.raises(ValueError, match=r"spec has sink_sigma=1.0"):
        record(tmp_path / "u", teacher, spec="compodistill_code")


def test_names_tell_apart_what_has_the_same_tokens(tmp_path: Path) -> None:
    """Two samples of one text and other pictures: by name each gets its own target."""
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    inputs = tiny.batch(images=(1, 1), lengths=(20, 20))
    for name in ("input_ids", "labels"):
        inputs[name][1] = inputs[name][0]

    def names(batch: Any) -> list[str]:
        return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in batch["pixel_values"]]

    cache = record_teacher(tmp_path / "t", teacher, [inputs], matching=LAYERS, names=names)
    assert cache.hashes[0] == cache.hashes[1] and len(cache.numbers) == 2
    turned = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    losses = []
    for samples in ([0, 1], names(turned), [1, 0]):
        alignment = AttentionAlignment(student, cache)
        with alignment.step(turned, samples=samples):
            student(**turned)
        losses.append(alignment.loss().item())
    assert losses[1] == losses[2] != losses[0]
    with (
        pytest.raises(ValueError, match=r"samples holds 'cat'; allowed: .* \(2 were\)"),
        alignment.step(turned, samples=["cat", "dog"]),
    ):
        pass
    with pytest.raises(ValueError, match="names gives 'x' twice"):
        record_teacher(
            tmp_path / "u", teacher, [inputs], matching=LAYERS, names=lambda batch: ["x", "x"]
        )
    with pytest.raises(ValueError, match="names gives 1 names for 2 samples"):
        record_teacher(
            tmp_path / "v", teacher, [inputs], matching=LAYERS, names=lambda batch: ["x"]
        )


def test_damage_is_found(tmp_path: Path) -> None:
    teacher = tiny.llava(seed=1).eval()
    record(tmp_path / "t", teacher)
    shard = tmp_path / "t" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is missing or does not have"):
        TeacherCache(tmp_path / "t")
    manifest = tmp_path / "t" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["samples"].reverse()
    manifest.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="order_sha256"):
        TeacherCache(tmp_path / "t", verify=False)
    manifest.write_text(json.dumps({**facts, "format": 3}))
    with pytest.raises(ValueError, match="the cache has format 3; allowed: 2"):
        TeacherCache(tmp_path / "t")


def test_the_matching_of_a_rule_can_be_recorded(tmp_path: Path) -> None:
    teacher = tiny.llava(seed=1).eval()
    matching = match_layers("compodistill", range(4), range(4))
    cache = record_teacher(tmp_path / "t", teacher, data()[:1], matching=matching)
    assert cache.matching == {1: (1,), 2: (2,)}
