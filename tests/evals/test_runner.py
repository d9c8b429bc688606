"""Runs: killed and resumed, refused where anything changed, scored from what lies on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.pope import POPE
from fastalign.evals.protocols import Ask, Reply, Wording
from fastalign.evals.runner import RunError, evaluate, read_replies

from .stubs import Told, image, number, scores, write_images

ROOT = Path(__file__).parents[2]
COUNT = 12


def write_pope(folder: Path) -> Path:
    """Twelve questions about twelve images; those about even ones are answered yes."""
    names = [f"{i}.png" for i in range(COUNT)]
    write_images(folder / "images", names)
    lines = [
        {
            "question_id": i,
            "image": n,
            "text": f"Is there a {i}?",
            "label": "no" if i % 2 else "yes",
        }
        for i, n in enumerate(names)
    ]
    path = folder / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def samples(tmp_path: Path) -> list[Any]:
    return POPE.read(write_pope(tmp_path), tmp_path / "images")


def oracle(ask: Ask) -> str:
    return "No" if number(ask.pictures[0]) % 2 else "Yes"


class Dies(Told):
    """Fails at the ``last``-th batch."""

    def __init__(self, last: int) -> None:
        super().__init__(oracle)
        self.left = last

    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return super().reply(asks)


def test_a_crash_loses_one_batch_and_nothing_is_asked_again(
    samples: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Dies(3)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(POPE, samples, first, out, batch_size=5)
    assert len(first.asked) == 10
    assert len(read_replies(out / "replies.jsonl")) == 10
    assert not (out / "scores.json").exists()
    second = Told(oracle)
    result = evaluate(POPE, samples, second, out, batch_size=5, resume=True)
    assert len(second.asked) == 2
    assert not set(first.asked) & set(second.asked)
    whole = evaluate(POPE, samples, Told(oracle), tmp_path / "whole", batch_size=7)
    assert result == whole
    for name in ("scores.json", "samples.jsonl", "run.json", "replies.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third = Told(oracle)
    assert evaluate(POPE, samples, third, out, resume=True) == whole
    assert third.asked == []


def test_each_batch_is_flushed_to_the_disk_before_the_next(
    samples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "replies.jsonl"
    flushed = []

    def fsync(descriptor: int) -> None:
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            flushed.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr("fastalign.evals.runner.os.fsync", fsync)
    evaluate(POPE, samples, Told(oracle), tmp_path / "out", batch_size=5)
    assert flushed == [5, 10, 12]


KILLED = """
import sys, time
from pathlib import Path
from fastalign.evals.benchmarks.pope import POPE
from fastalign.evals.runner import evaluate
from tests.evals.stubs import Told
from tests.evals.test_runner import oracle
class Slow(Told):
    def reply(self, asks):
        time.sleep(0.05)
        return super().reply(asks)
folder = Path(sys.argv[1])
samples = POPE.read(folder / "coco_pope_random.json", folder / "images")
evaluate(POPE, samples, Slow(oracle), folder / "out", batch_size=1)
"""


def test_a_killed_process_is_resumed(samples: list[Any], tmp_path: Path) -> None:
    """SIGKILL somewhere in the middle: no handler of Python's runs."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    path = out / "replies.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = len(read_replies(path))
    assert 3 <= there < COUNT
    told = Told(oracle)
    result = evaluate(POPE, samples, told, out, resume=True)
    assert len(told.asked) == COUNT - there
    assert result["scores"]["splits"]["random"]["accuracy"] == 1.0


def test_half_a_line_at_the_end_is_cut_off(samples: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(POPE, samples, Told(oracle), out)
    path = out / "replies.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    told = Told(oracle)
    evaluate(POPE, samples, told, out, resume=True)
    assert len(told.asked) == 1
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(samples: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(POPE, samples, Told(oracle), out)
    lines = (out / "replies.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = b'{"key": 3\n'
    (out / "replies.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=r"replies.jsonl, line 5: no reply"):
        evaluate(POPE, samples, Told(oracle), out, resume=True)


class Other(Told):
    def identity(self) -> dict[str, str]:
        return {"model": "another"}


def test_what_changed_is_refused_by_name(samples: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(POPE, samples, Told(oracle), out)
    with pytest.raises(RunError, match="holds a run already; allowed: --resume"):
        evaluate(POPE, samples, Told(oracle), out)

    def again(told: Told | None = None, wording: Wording | None = None) -> None:
        fresh = POPE.read(tmp_path / "coco_pope_random.json", tmp_path / "images")
        evaluate(POPE, fresh, told or Told(oracle), out, wording=wording, resume=True)

    again()
    with pytest.raises(RunError, match="with another model; allowed"):
        again(Other(oracle))
    with pytest.raises(RunError, match="with another method and another questions"):
        again(wording=Wording("options"))
    with pytest.raises(RunError, match="with another questions"):
        again(wording=Wording(instruction="Yes or no?"))
    picture = tmp_path / "images" / "5.png"
    kept = picture.read_bytes()
    picture.write_bytes(image(5) + b" ")
    with pytest.raises(RunError, match="with another questions"):
        again()
    picture.write_bytes(kept)
    data = tmp_path / "coco_pope_random.json"
    data.write_text(data.read_text().replace("Is there a 7?", "Is there a 70?"))
    with pytest.raises(RunError, match="with another questions"):
        again()


def test_a_limit_says_so_and_is_extended(samples: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = evaluate(POPE, samples, Told(oracle), out, limit=5)
    assert (result["samples"], result["of"]) == (5, 12)
    assert len((out / "samples.jsonl").read_text().splitlines()) == 5
    told = Told(oracle)
    result = evaluate(POPE, samples, told, out, resume=True)
    assert (result["samples"], len(told.asked)) == (12, 7)


def test_every_sample_has_a_line(samples: list[Any], tmp_path: Path) -> None:
    evaluate(POPE, samples, Told(oracle), tmp_path / "out")
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert lines[3] == {
        "id": "random/3",
        "where": f"{tmp_path / 'coco_pope_random.json'}, line 4",
        "split": "random",
        "label": False,
        "said_yes": False,
        "unread": 0,
    }


def test_log_probabilities_that_are_no_numbers_are_an_error(
    samples: list[Any], tmp_path: Path
) -> None:
    class Broken(Told):
        def reply(self, asks: Sequence[Ask]) -> list[Reply]:
            return [scores(float("nan"), -1.0)] * len(asks)

    with pytest.raises(RunError, match="random/0#answer: the model's log-probabilities are"):
        evaluate(POPE, samples, Broken(oracle), tmp_path / "out", wording=Wording("options"))


def test_settings_that_cannot_be(samples: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="method is 'match'; allowed for pope: generate, options"):
        evaluate(POPE, samples, Told(oracle), tmp_path / "out", wording=Wording("match"))
    with pytest.raises(RunError, match="batch_size is 0"):
        evaluate(POPE, samples, Told(oracle), tmp_path / "out", batch_size=0)


def test_images_stay_below_their_root(samples: list[Any], tmp_path: Path) -> None:
    """A path out of the root is refused before anything is asked, also through a link."""
    data = tmp_path / "coco_pope_random.json"
    text = data.read_text()
    (tmp_path / "secret.png").write_bytes(image(1))
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "missing.png",
        "a\\u0000b",
    ):
        data.write_text(text.replace('"4.png"', f'"{name}"'))
        told = Told(oracle)
        with pytest.raises(SampleError, match=r"coco_pope_random.json, line 5: image"):
            evaluate(POPE, POPE.read(data, tmp_path / "images"), told, tmp_path / "out2")
        assert told.asked == []
    with pytest.raises(
        SampleError, match=r"line 1: names an image file, .*give the images' folder"
    ):
        evaluate(POPE, POPE.read(data, None), Told(oracle), tmp_path / "out2")


def test_an_image_that_is_none_ends_the_run_and_keeps_the_replies(
    samples: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "images" / "8.png").write_bytes(b"no image")
    fresh = POPE.read(tmp_path / "coco_pope_random.json", tmp_path / "images")
    with pytest.raises(SampleError, match=r"line 9: image '8.png' cannot be decoded"):
        evaluate(POPE, fresh, Told(oracle), tmp_path / "out", batch_size=4)
    assert len(read_replies(tmp_path / "out" / "replies.jsonl")) == 8
