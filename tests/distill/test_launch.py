"""Two processes through ``accelerate launch`` (gloo, CPU): what one process gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastalign.distill.recipe import load_recipe
from fastalign.distill.recording import record_recipe
from fastalign.distill.run import run_recipe
from fastalign.distill.targets import Progress

from . import launched, worlds
from .test_run import load, world
from .test_trainer import difference


@contextmanager
def no_bar(name: str) -> Iterator[Progress]:
    yield lambda done, total: None


def launch(logs: Path, *arguments: str) -> str:
    """On two CPU processes. ``--multi_gpu`` is accelerate's word for one machine with several processes.

    Without a folder for their logs torch makes one that nobody removes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    command += ["--log_dir", str(logs), "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_of_two_processes_is_that_of_one(kind: str, tmp_path: Path) -> None:
    """Loss and gradients of 8 samples, 4 on each process; float64 tells a wrong factor from rounding."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        name = str(dtype).removeprefix("torch.")
        launch(tmp_path / "logs", "tests.distill.launched", kind, name, str(tmp_path / name))
        found = load_file(tmp_path / name)
        expected, logs, _ = launched.step(dtype, 1, tmp_path / "one")
        gradients = {n: g for n, g in found.items() if not n.startswith("loss")}
        assert difference(gradients, expected) < tolerance
        assert float(found["loss"]) == pytest.approx(logs["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "recorded_stream",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["plain", "recorded stream"],
)
def test_a_recipe_on_two_processes(tmp_path: Path, recorded_stream: bool) -> None:
    """The command itself: files of one process, losses and weights as one process has them.

    Also from a stream, with the teacher's targets from a cache.
    """
    stages: list[Any] = [
        {"preset": "dpt"},
        {"preset": "dft", "lora": None, "learning_rate": 0.02, "optimizer": "sgd"},
    ]
    defaults = {"global_batch": 4, "steps": 2, "save_every": 1, "log_every": 1}
    results = {}
    for name, micro in (("one", 4), ("two", 2)):
        shared = {"defaults": {**defaults, "micro_batch": micro}, "stages": stages}
        world(tmp_path / name, **shared)
        # Whole batches: accelerate fills the last one of an epoch up with samples seen before.
        worlds.write_llava(tmp_path / name, 8)
        recipe = tmp_path / name / "recipe.yaml"
        values = yaml.safe_load(recipe.read_text())
        values["data"]["group_batches"] = False
        if recorded_stream:
            records = json.loads((tmp_path / name / "data.json").read_text())
            (tmp_path / name / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
            values["data"] |= {"path": "data.jsonl", "streaming": True, "shuffle_buffer": 4}
            values["models"]["cache"] = {"path": "targets", "top_k": 10_000, "dtype": "float32"}
        recipe.write_text(yaml.safe_dump(values))
        if recorded_stream:
            record_recipe(load_recipe(recipe), plan=False, say=lambda _: None, bar=no_bar)
        if name == "one":
            run_recipe(load_recipe(recipe), say=lambda _: None)
        else:
            said = launch(tmp_path / "logs", "fastalign", "distill", str(recipe))
            assert said.count("the student is in") == 1  # one process speaks
        run = tmp_path / name / "run"
        assert not list(run.glob("**/.saving"))
        results[name] = load(run / "final")
        results[name + " losses"] = yaml.safe_load((run / "summary.json").read_text())
    start = load(tmp_path / "one" / "student")
    for ours, theirs in zip(
        results["one losses"]["stages"], results["two losses"]["stages"], strict=True
    ):
        for loss, value in ours["last_losses"].items():
            assert theirs["last_losses"][loss] == pytest.approx(value, rel=1e-5), loss
    wrong = sum(float((results["two"][n] - w).square().sum()) for n, w in results["one"].items())
    moved = sum(
        float((w - start[n]).square().sum()) for n, w in results["one"].items() if n in start
    )
    assert moved > 0 and (wrong / moved) ** 0.5 < 1e-4


LEAVE = """
import atexit, torch
from fastalign.distill.run import leave_processes

class Reducer:
    def __del__(self):
        print("destructor")

kept = Reducer()
atexit.register(print, "at exit")
leave_processes()  # alone: nothing to leave
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
print("before")
leave_processes()
print("after")
"""


def test_a_process_over_gloo_ends_without_destructors() -> None:
    """They may wait for a thread of gloo that waits for the interpreter's lock."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == ["before", "at exit", ""]
