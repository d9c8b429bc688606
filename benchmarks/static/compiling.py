"""Ahead-of-time compilation of a recorded launch, specialised as the launch itself would be."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .record import Launch


@dataclass(frozen=True)
class Target:
    """A GPU architecture and its launch limits.

    Attributes:
        smem_limit: bytes of shared memory a program may use. tensor_core: the instruction that its
            matrix products must become. registers: 32-bit registers of a block's file.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    smem_limit: int
    tensor_core: str
    registers: int = 65536

    def triton(self) -> GPUTarget:
        """The compiler's name for it."""
        return GPUTarget(self.backend, self.arch, self.warp)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, "HMMA"),
        Target("sm_86", "cuda", 86, 32, 99 * 1024, "HMMA"),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, "HMMA"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, "HGMMA"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, "UTC[A-Z]*MMA"),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, "HMMA"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, "v_mfma"),
        Target("gfx950", "hip", "gfx950", 64, 160 * 1024, "v_mfma"),
    )
}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """Machine code and what it occupies; ``code``: SASS, or AMD assembly.

    ``atomics``: those that the kernel asks for. The SASS of tcgen05 has some of its own, on the flags by
    which programs share tensor memory; no data is in them, and PTX does not show them. ``products``:
    matrix products that the kernel asks for, in triton's own code, without those whose result nobody reads.
    """

    target: Target
    code: str
    registers: int
    stack_bytes: int
    spills: int
    smem_bytes: int
    warps: int
    atomics: int
    products: int


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(signature, constants, attributes) by triton's rules for a call with these arguments.

    An integer 1, None and every ``tl.constexpr`` are constants; integers and addresses that 16 divides
    say so.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = _TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Machine code of a launch for a target."""
    source = ASTSource(launch.kernel, *signature_of(launch))
    compiled = triton.compile(source, target=target.triton(), options=launch.tile.options())
    smem = compiled.metadata.shared
    products = compiled.asm["ttir"].count("tt.dot")
    if target.backend == "hip":
        return _amd(compiled.asm["amdgcn"], target, smem, launch.tile.warps, products)
    asked = len(re.findall(r"(?<![\w.])(?:atom|red)\.", compiled.asm["ptx"]))
    return _nvidia(compiled.asm["cubin"], target, smem, launch.tile.warps, asked, products)


def _nvidia(
    cubin: bytes, target: Target, smem: int, warps: int, asked: int, products: int
) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    on_memory = len(re.findall(r"\b(?:REDG?|ATOMG?)\b", code))
    atomics = max(asked, on_memory)
    return Compiled(target, code, registers, stack, spills, smem, warps, atomics, products)


def _amd(code: str, target: Target, smem: int, warps: int, products: int) -> Compiled:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found.group(1))

    registers = number("vgpr_count")
    stack = number("private_segment_fixed_size")
    atomics = len(re.findall(r"\b\w+_atomic_\w+", code))
    return Compiled(
        target, code, registers, stack, number("vgpr_spill_count"), smem, warps, atomics, products
    )


def _run(*command: Any) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout
