"""Two gloo processes: gradients under DDP and FSDP2 against one process. Run by test_distributed.

``python -m tests.models.distributed ddp|fsdp|fsdp-compiled RANK FILE`` is one of the two.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.models import AttentionAlignment
from tests.models import tiny


def batches() -> list[dict[str, Tensor]]:
    """One batch a rank, of two samples each, so that means over ranks are means over samples."""
    return [
        tiny.batch(seed=seed, images=(1, 2), lengths=(29, 29), left=seed == 2) for seed in (1, 2)
    ]


def loss_of(alignment: AttentionAlignment, student: Any, teacher: Any, inputs: Any) -> Tensor:
    with alignment.step(inputs):
        with torch.no_grad():
            teacher(**inputs)
        out = student(**inputs)
    return out.loss + alignment.loss()


def models() -> tuple[Any, Any]:
    student, teacher = tiny.llava(seed=2).train(), tiny.llava(seed=1).eval()
    tiny.checkpoint_layers(student)
    return student, teacher


def single() -> dict[str, Tensor]:
    """Gradients of the mean over the two batches, in one process."""
    student, teacher = models()
    alignment = AttentionAlignment(student, teacher)
    for inputs in batches():
        (loss_of(alignment, student, teacher, inputs) / 2).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def main(kind: str, rank: int, store: str) -> None:
    """One rank; rank 0 prints the relative error of its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    expected = single()
    student, teacher = models()
    wrapped = student
    if kind == "ddp":
        for name, parameter in student.named_parameters():
            # CLIP's last norm is unused here; DDP would wait for its gradient and reduce nothing
            parameter.requires_grad_(name in expected)
        wrapped = torch.nn.parallel.DistributedDataParallel(student)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in student.get_decoder().layers:
            if kind == "fsdp-compiled":
                layer.compile(backend="aot_eager")
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
    alignment = AttentionAlignment(wrapped, teacher)
    loss_of(alignment, wrapped, teacher, batches()[rank]).backward()
    assert alignment._step is not None
    ran = {type(loss.grad_fn).__name__ for loss in alignment._step.losses.values()}
    assert ran == {"CompiledFunctionBackward" if kind == "fsdp-compiled" else "_FormedBackward"}
    difference, size = 0.0, 0.0
    for name, parameter in student.named_parameters():
        if name not in expected:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        difference += float((gradient - expected[name]).double().square().sum())
        size += float(expected[name].double().square().sum())
    if rank == 0:
        print("relative error", (difference / size) ** 0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
