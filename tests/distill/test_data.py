"""Data: what is read, where labels lie, what is refused, and that nothing else gets through."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.distill.data import (
    Collator,
    ConversationDataset,
    Encoder,
    SampleError,
    TemplateError,
    read_records,
)
from fastalign.distill.data.records import SourceError, parse_record
from fastalign.distill.data.sampler import GroupedSampler
from fastalign.evals.shapes.dataset import pack
from fastalign.evals.shapes.questions import Question
from fastalign.evals.shapes.tokenizer import build_processor

from . import worlds


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_processor(), "bare", 256)


def dataset(path: Path, encoder: Encoder, **options: Any) -> ConversationDataset:
    source, raw = read_records(path)
    return ConversationDataset(raw, source, encoder, path.parent, **options)


def test_tokens_and_labels_are_those_of_the_world_itself(tmp_path: Path, encoder: Encoder) -> None:
    data = dataset(worlds.write_llava(tmp_path), encoder)
    questions = [
        Question(type="where", text="where is the red circle?", answer="at left"),
        Question(type="count", text="how many blue things?", answer="one"),
    ]
    item = data[0]
    expected = pack([questions], len(item["input_ids"]))
    assert item["input_ids"] == expected["input_ids"][0].tolist()
    assert item["labels"] == expected["labels"][0].tolist()
    assert item["pixel_values"].shape == (1, 3, 48, 48)
    assert "pixel_values" not in data[2]


def test_batches_hold_every_output_on_either_side(tmp_path: Path, encoder: Encoder) -> None:
    data = dataset(worlds.write_llava(tmp_path), encoder)
    for side in ("right", "left"):
        batch = Collator(0, side)([data[1], data[2]])
        assert batch["pixel_values"].shape[0] == 1
        pad = batch["attention_mask"] == 0
        assert pad.sum() == 36  # the text-only sample lacks the image's tokens
        assert (batch["labels"][pad] == -100).all() and (batch["input_ids"][pad] == 0).all()
        assert pad[1, 0 if side == "left" else -1]


def test_two_images_in_different_turns(tmp_path: Path, encoder: Encoder) -> None:
    path = worlds.write_llava(tmp_path)
    records = json.loads(path.read_text())
    records[0]["image"] = ["0.png", "1.png"]
    records[0]["conversations"][2]["value"] = "<image>\nhow many blue things?"
    path.write_text(json.dumps(records))
    item = dataset(path, encoder)[0]
    tokenizer = encoder.tokenizer
    answers = tokenizer.decode([i for i in item["labels"] if i != -100])
    assert answers.split() == ["at", "left</s>", "one</s>"]
    assert item["pixel_values"].shape[0] == 2


def test_sources(tmp_path: Path) -> None:
    path = worlds.write_llava(tmp_path / "a")
    records = json.loads(path.read_text())
    lines = tmp_path / "a" / "data.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in records) + "\n{broken\n")
    _, raw = read_records(lines)
    assert [parse_record(r, "x", i) for i, r in enumerate(raw[:-1])] == [
        parse_record(r, "x", i) for i, r in enumerate(records)
    ]
    with pytest.raises(SampleError, match="sample 6: no json"):
        parse_record(raw[-1], "x", 6)
    (tmp_path / "a" / "0.txt").write_text("a caption")
    _, folder = read_records(tmp_path / "a")
    assert parse_record(folder[0], "x", 0).turns[1] == ("assistant", "a caption")
    with pytest.raises(SampleError, match=r"no caption for 1\.png"):
        parse_record(folder[1], "x", 1)
    for name, text, message in (
        ("b.json", "{", "is no json"),
        ("c.json", "{}", "holds a dict"),
        ("d.txt", "", r"allowed: a \.json or \.jsonl file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=message):
            read_records(tmp_path / name)
    with pytest.raises(SourceError, match="cannot be read"):
        read_records(tmp_path / "missing.json")


def test_a_saved_dataset(tmp_path: Path, encoder: Encoder) -> None:
    import datasets

    records = json.loads(worlds.write_llava(tmp_path / "a").read_text())[:2]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    source, raw = read_records(tmp_path / "saved")
    data = ConversationDataset(raw, source, encoder, tmp_path / "a")
    assert data[0]["pixel_values"].shape == (1, 3, 48, 48)


BAD = {
    "missing image": ({"image": "none.png"}, "is not a file in"),
    "path leaves the root": ({"image": "../secret.png"}, "lies outside the image root"),
    "absolute path": ({"image": "/etc/hostname"}, "lies outside the image root"),
    "link leaves the root": ({"image": "link.png"}, "lies outside the image root"),
    "truncated": ({"image": "truncated.png"}, "cannot be decoded"),
    "no image": ({"image": "text.png"}, "cannot be decoded"),
    "bomb": ({"image": "bomb.png"}, "has 9000 x 9000 pixels"),
    "null byte": ({"image": "a\0.png"}, "image"),
    "more markers": (
        {
            "conversations": [
                {"from": "human", "value": "<image><image>x"},
                {"from": "gpt", "value": "y"},
            ]
        },
        "has 2 <image> markers and 1 images",
    ),
    "no markers": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "has 0 <image> markers and 1 images",
    ),
    "marker in an answer": (
        {
            "conversations": [
                {"from": "human", "value": "<image>x"},
                {"from": "gpt", "value": "<image>"},
            ]
        },
        "outside a human's turn",
    ),
    "wrong order": (
        {"conversations": [{"from": "gpt", "value": "y"}, {"from": "human", "value": "<image>x"}]},
        "turn 0 is from 'gpt'; allowed here: user",
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "<image>x"}]}, "without an answer"),
    "empty answer": (
        {"conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": " "}]},
        "is empty",
    ),
    "no list": ({"conversations": "hello"}, "conversations is str"),
    "text is a number": (
        {"conversations": [{"from": "human", "value": 3}]},
        "has a int as its text",
    ),
    "image is a number": ({"image": 3}, "image is a int"),
    "too long": (
        {
            "conversations": [
                {"from": "human", "value": "<image>" + "x" * 999},
                {"from": "gpt", "value": "y"},
            ]
        },
        "no answer within the limit",
    ),
}


def prepare_bad(folder: Path) -> None:
    from PIL import Image

    whole = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder.parent / "secret.png").write_bytes(whole)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_by_name_and_passed_over_in_training(
    tmp_path: Path, encoder: Encoder, case: str
) -> None:
    path = worlds.write_llava(tmp_path / "root")
    prepare_bad(tmp_path / "root")
    change, message = BAD[case]
    records = json.loads(path.read_text())
    records[0].update(change)
    path.write_text(json.dumps(records))
    data = dataset(path, encoder)
    with pytest.raises(SampleError, match=message) as caught:
        data.load(0)
    assert "data.json, sample 0 (id 's0')" in str(caught.value)
    item = data[0]  # the next one takes its place
    assert item["input_ids"] == data[1]["input_ids"]
    assert item["skipped_samples"] == [str(caught.value)]
    with pytest.raises(SampleError):
        dataset(path, encoder, on_error="raise")[0]


def test_only_bad_samples_end_with_a_message(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "data.json"
    path.write_text("[1, 2]")
    with pytest.raises(SampleError, match="none of 2 samples can be used; the first"):
        dataset(path, encoder)[0]


def mutate(rng: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
        elif kind == 3:
            data[at:at] = rng.choice(
                (
                    b"[" * 50,
                    b"../",
                    b"<image>",
                    b"\x00",
                    b"null",
                    b"1e999",
                )
            )
        elif kind == 4:  # where a path stands, one that leads out
            out = rng.choice((b'"../secret.png"', b'"/etc/hostname"', b'"../root/../secret.png"'))
            data = data.replace(rng.choice((b'"0.png"', b'"1.png"')), out)
        else:
            del data[at:]
    return bytes(data)


#: Paths that Python opened, while somebody watches. An audit hook stays for the life of the process.
OPENED: list[set[str]] = []
HOOKED: list[bool] = []


def watch_opened() -> set[str]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if OPENED and event == "open" and isinstance(arguments[0], (str, bytes)):
            OPENED[-1].add(os.path.realpath(os.fsdecode(arguments[0])))

    if not HOOKED:
        sys.addaudithook(hook)
        HOOKED.append(True)
    OPENED.append(set())
    return OPENED[-1]


class Hang(BaseException):
    """One mutation took ten seconds; no Exception, which the code under test may turn into a message."""


def too_long(*arguments: Any) -> None:
    raise Hang


@pytest.mark.parametrize(("kind", "count"), [("json", 1200), ("image", 800)])
def test_fuzzed_files_give_samples_or_messages(
    tmp_path: Path, encoder: Encoder, kind: str, count: int
) -> None:
    """Mutations end as a good sample or as an error that names the file; nothing outside is opened.

    What is opened is what Python's audit events say, whoever opens it. None may take ten seconds.
    """
    from PIL import Image

    folder = tmp_path / "root"
    path = worlds.write_llava(folder, 2)
    Image.new("RGB", (48, 48), (9, 9, 9)).save(folder / "0.jpg")
    secret = tmp_path / "secret.png"
    secret.write_bytes((folder / "0.png").read_bytes())
    opened = watch_opened()
    signal.signal(signal.SIGALRM, too_long)
    rng = random.Random(0)
    plain = path.read_bytes()
    pictures = {name: (folder / name).read_bytes() for name in ("0.png", "0.jpg")}
    good = 0
    messages: list[tuple[str, str]] = []  # what must be named, and what was said
    for number in range(count):
        if kind == "json":
            path.write_bytes(mutate(rng, plain))
        else:
            name = ("0.png", "0.jpg")[number % 2]
            records = json.loads(plain)[:1]
            records[0]["image"] = name
            path.write_text(json.dumps(records))
            (folder / name).write_bytes(mutate(rng, pictures[name]))
        signal.alarm(10)
        try:
            data = dataset(path, encoder)
        except SourceError as error:
            messages.append(("data.json", str(error)))
            continue
        for index in range(min(2, len(data))):
            try:
                item = data.load(index)
                assert len(item["input_ids"]) == len(item["labels"])
                good += 1
            except SampleError as error:
                messages.append((f"data.json, sample {index}", str(error)))
    signal.alarm(0)
    OPENED.clear()
    assert good > count // 20 and len(messages) > count // 20
    assert all(named in said for named, said in messages)
    assert {str(path), str(folder / "0.png")} <= opened  # the watch does see
    outside = {p for p in opened if p.startswith((str(tmp_path), "/etc"))}
    assert all(p.startswith(str(folder)) for p in outside)
    # The secret file is reachable, and refused: that is what the rule did.
    assert kind == "image" or any("outside the image root" in said for _, said in messages)


def test_grouped_batches_are_alike_and_repeatable() -> None:
    rng = random.Random(0)
    sizes = [(rng.random() < 0.8, rng.randrange(1, 500)) for _ in range(403)]
    sampler = GroupedSampler(sizes, 8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(403))
    mixed = [len({sizes[i][0] for i in order[n : n + 8]}) > 1 for n in range(0, 400, 8)]
    assert sum(mixed) <= 2
    spread = [
        max(sizes[i][1] for i in order[n : n + 8]) - min(sizes[i][1] for i in order[n : n + 8])
        for n in range(0, 384, 8)
    ]
    assert sum(spread) / len(spread) < 60
    assert order == list(GroupedSampler(sizes, 8, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_templates(encoder: Encoder) -> None:
    processor = build_processor()
    with pytest.raises(TemplateError, match="the processor has none"):
        Encoder(processor)
    with pytest.raises(TemplateError, match="allowed: bare, vicuna"):
        Encoder(processor, "lama")
    record = parse_record(
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        "x",
        0,
    )
    changing = "{{ messages | length }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(TemplateError, match="renders a conversation's beginning differently"):
        Encoder(processor, changing).encode(record, [])
    item = Encoder(processor, "vicuna").encode(record, [])
    answer = processor.tokenizer.decode([i for i in item["labels"] if i != -100])
    assert answer.strip() == "two</s>"
    assert torch.tensor(item["input_ids"])[0] == processor.tokenizer.bos_token_id
