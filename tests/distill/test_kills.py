"""Runs that are cut off: kill -9 at any moment, also in a save; a disk that takes no more."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastalign.commands import build_app
from fastalign.distill.checkpoints import STAGING, SaveError, last_checkpoint, retire, whole_folder
from fastalign.distill.recipe import load_recipe
from fastalign.distill.run import run_recipe
from fastalign.distill.trainer import DistillTrainer

from .test_run import world


def start_process(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastalign", "distill", str(folder / "recipe.yaml"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def check_readable(run: Path) -> None:
    """Everything that is called a checkpoint can be read in full."""
    for folder in run.glob("0*/checkpoint-*"):
        assert load_file(folder / "model.safetensors")
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == int(folder.name.rpartition("-")[2])
        for name in ("optimizer.pt", "scheduler.pt"):
            assert torch.load(folder / name, weights_only=True)
        assert (folder / "rng_state.pth").stat().st_size > 0


def open_saves(run: Path) -> list[Path]:
    """Checkpoints that are being written; a folder that is renamed away while one looks holds none."""
    try:
        return list(run.glob(f"0*/{STAGING}/checkpoint-*"))
    except FileNotFoundError:
        return []


def kill_once(folder: Path, in_a_save: bool, rng: random.Random) -> bool:
    """Go on with the run, kill it after its first new checkpoint; whether a save was under way."""
    process = start_process(folder, *(["--resume"] if (folder / "run").exists() else []))
    run = folder / "run"
    before = set(run.glob("0*/checkpoint-*"))
    while process.poll() is None and not set(run.glob("0*/checkpoint-*")) - before:
        time.sleep(0.005)
    if in_a_save:
        while process.poll() is None and not open_saves(run):
            pass
        time.sleep(rng.random() * 0.01)
    else:
        time.sleep(rng.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()[-2000:]
    return bool(open_saves(run))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)], ids=["2", "20"])
def test_killed_and_resumed_gives_the_same_weights(tmp_path: Path, kills: int) -> None:
    """kill -9, every other time aimed at a save: no broken checkpoint, and the same bits at the end."""
    stages = [{"preset": "dft", "lora": None, "steps": 30 * kills}]
    for name in ("whole", "killed"):
        world(tmp_path / name, stages=stages)
    run_recipe(load_recipe(tmp_path / "whole" / "recipe.yaml"), say=lambda _: None)
    rng = random.Random(kills)
    folder = tmp_path / "killed"
    in_saves = 0
    for number in range(kills):
        in_saves += kill_once(folder, number % 2 == 1, rng)
        check_readable(folder / "run")
    print(f"{kills} kills, {in_saves} of them in a save")
    assert in_saves >= kills // 4
    process = start_process(folder, "--resume")
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()[-2000:]
    a, b = (load_file(tmp_path / n / "run/final/model.safetensors") for n in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list((folder / "run").glob(f"**/{STAGING}"))


@contextmanager
def disk_full_after(limit: int) -> Iterator[None]:
    """The kernel refuses writes beyond ``limit`` bytes of a file, in the middle of one.

    It stands in for a full disk, which a test without root cannot mount: the same write() fails half
    way, with EFBIG in ENOSPC's place.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint fails: a clear message, exit code 1, and --resume goes on from the first."""
    world(tmp_path, stages=[{"preset": "dft", "lora": None, "steps": 3}])
    size = (tmp_path / "student" / "model.safetensors").stat().st_size
    save = DistillTrainer._save_checkpoint

    def second_fails(self: DistillTrainer, *arguments: object) -> None:
        if self.state.global_step < 2:
            return save(self, *arguments)
        with disk_full_after(int(share * size)):
            return save(self, *arguments)

    monkeypatch.setattr(DistillTrainer, "_save_checkpoint", second_fails)
    command = ["distill", str(tmp_path / "recipe.yaml")]
    result = CliRunner().invoke(build_app(), command)
    stage = tmp_path / "run" / "01-dft"
    assert result.exit_code == 1, result.output
    assert "checkpoint-2 could not be written" in result.output
    assert f"the last whole checkpoint is {stage / 'checkpoint-1'}" in result.output
    assert last_checkpoint(stage) == stage / "checkpoint-1"
    assert not (stage / STAGING).exists()
    check_readable(tmp_path / "run")
    monkeypatch.setattr(DistillTrainer, "_save_checkpoint", save)
    result = CliRunner().invoke(build_app(), [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_full_disk_at_the_end_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """final/ is whole or not there, and what refused is named."""
    world(tmp_path, stages=[{"preset": "dft", "lora": None, "steps": 1}])
    train = DistillTrainer.train

    def then_full(self: DistillTrainer, *arguments: object, **keywords: object) -> object:
        out = train(self, *arguments, **keywords)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return out

    monkeypatch.setattr(DistillTrainer, "train", then_full)
    command = ["distill", str(tmp_path / "recipe.yaml")]
    with disk_full_after(resource.RLIM_INFINITY):
        result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 1, result.output
    stage = tmp_path / "run" / "01-dft"
    assert f"{stage / 'final'} could not be written" in result.output
    assert not (stage / "final").exists() and not (stage / STAGING).exists()
    check_readable(tmp_path / "run")
    monkeypatch.setattr(DistillTrainer, "train", train)
    assert CliRunner().invoke(build_app(), [*command, "--resume"]).exit_code == 0


def test_old_checkpoints_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps, not by name; a death in the middle of the deletion leaves no half one under its name."""
    for step in (2, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()

    def names() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir())

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *a, **k: None)  # the process dies here
        retire(tmp_path, 2, [tmp_path / "checkpoint-2"])
        assert names() == [STAGING, *(f"checkpoint-{n}" for n in (10, 11, 2, "x"))]
    retire(tmp_path, 1)
    assert names() == ["checkpoint-11", "checkpoint-x"]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with whole_folder(target) as folder:
        (folder / "a").write_text("old")

    def refused() -> None:
        with whole_folder(target) as folder:
            (folder / "a").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"final could not be written: .*No space left"):
        refused()
    assert (target / "a").read_text() == "old" and not (tmp_path / STAGING).exists()
    with pytest.raises(KeyError), whole_folder(target) as folder:
        raise KeyError("a bug is no full disk")
    assert (target / "a").read_text() == "old"
    (tmp_path / STAGING / "final").mkdir(parents=True)  # what a killed process left
    (tmp_path / STAGING / "final" / "b").write_text("half")
    with whole_folder(target) as folder:
        (folder / "a").write_text("new")
    assert [p.name for p in target.iterdir()] == ["a"] and (target / "a").read_text() == "new"
