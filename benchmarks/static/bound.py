"""A bound from machine code: instructions per pipe over the pipe's rate, loop by loop.

For every innermost loop that holds matrix products the instructions of one pass are counted by the pipe
that executes them; the pipe that needs the most clocks bounds the loop. What lies between those loops
is counted the same way and spread over the work between. Latency, dependencies and memory are left out:
this is a bound on the time, never the time. Shared-memory traffic is reported beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from .compiling import Compiled

#: Lanes per clock and multiprocessor; an instruction of a warp has 32.
_SPECIAL, _INTEGER, _ISSUE = 16, 64, 128
_FLOAT = {"sm_80": 64}  # GA100 has 64 FP32 lanes, later ones 128
_FLOP_PER_CLOCK = {
    "sm_80": 2048,
    "sm_86": 1024,
    "sm_89": 1024,
    "sm_90": 4096,
    "sm_100": 8192,
    "sm_120": 1024,
    "gfx942": 2048,
    "gfx950": 4096,
}
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Za-z0-9_.]*)(.*)$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMP = re.compile(r"`\((\.L_x_\d+)\)")
_FLOATS = re.compile(r"^(?:FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|FSWZADD)")
_MULTIPLY = re.compile(r"^IMAD")
_ALU = re.compile(
    r"^(?:IADD|LOP|ISETP|FSETP|FSEL|SEL|FMNMX|FMN|IMNMX|VIMNMX|SHF|PRMT|LEA|F2FP|PLOP|MOV|IABS|FCHK|I2FP|"
    r"ISCADD|VIADD|FADD3|BMSK|SGXT|R2P|P2R|LEPC|POPC)"
)
_XU = re.compile(r"^(?:MUFU|F2F(?!P)|F2I|I2F|BREV|FLO)")
_SHARED = re.compile(r"^(LDSM|LDS|STS|STSM|LDGSTS)")


def tensor_flops(opcode: str) -> float | None:
    """FLOP of one instruction of one warp (HGMMA: a warp's quarter); None if its name does not say."""
    if opcode.startswith("HMMA"):
        k = {"16816": 16, "1688": 8, "16832": 32}[re.search(r"HMMA\.(\d+)", opcode).group(1)]  # type: ignore[union-attr]
        return 2.0 * 16 * 8 * k
    shape = re.search(r"GMMA\.64x(\d+)x(\d+)", opcode)
    if shape:
        return 2.0 * 64 * int(shape.group(1)) * int(shape.group(2)) / 4
    return None


@dataclass
class Work:
    """Clocks per pipe of a stretch of code, for all warps of a program."""

    clocks: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    shared_bytes: float = 0.0
    tensor: int = 0  # matrix instructions
    ex2: int = 0

    def bound(self) -> float:
        """Clocks of the pipe that needs the most."""
        return max(self.clocks.values(), default=0.0)

    def limiter(self) -> str:
        """That pipe."""
        return max(self.clocks, key=self.clocks.__getitem__) if self.clocks else "none"

    def add(self, other: Work, times: float) -> None:
        """Add ``times`` passes of other."""
        for pipe, clocks in other.clocks.items():
            self.clocks[pipe] += clocks * times
        self.shared_bytes += other.shared_bytes * times
        self.tensor += round(other.tensor * times)
        self.ex2 += round(other.ex2 * times)


def _parse(code: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if found := _LABEL.match(line.strip()):
            labels[found.group(1)] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append((found.group(1), found.group(2)))
    return instructions, labels


def loops_of(code: str, tensor: str) -> tuple[list[range], range, list[tuple[str, str]]]:
    """(innermost loops that hold matrix products, the loop around all of them, all instructions).

    Where no loop surrounds them, the second is the whole program.
    """
    instructions, labels = _parse(code)
    loops = set()
    for place, (opcode, rest) in enumerate(instructions):
        jump = _JUMP.search(rest)
        before = [opcode for opcode, _ in instructions[max(place - 2, 0) : place]]
        if before[-1:] == ["BRA"] and before[0].startswith("SYNCS"):
            continue  # the way back from a wait that lies behind the program: no loop
        if opcode.startswith("BRA") and jump and labels.get(jump.group(1), place + 1) <= place:
            body = range(labels[jump.group(1)], place + 1)
            if any(re.match(tensor, instructions[i][0]) for i in body) and len(body) > 8:
                loops.add(body)
    # by size: what overlaps a smaller loop by more than half of it goes around it (a rotated loop
    # need not contain it)
    inner: list[range] = []
    outer: list[range] = []
    for loop in sorted(loops, key=len):
        around = any(
            2 * len(range(max(loop.start, b.start), min(loop.stop, b.stop))) > len(b) for b in inner
        )
        (outer if around else inner).append(loop)
    inner.sort(key=lambda r: r.start)
    whole = range(len(instructions))
    for loop in outer:
        joined = range(
            min([loop.start, *(b.start for b in inner)]), max([loop.stop, *(b.stop for b in inner)])
        )
        if all(min(loop.stop, b.stop) > max(loop.start, b.start) for b in inner):
            return inner, joined, instructions
    return inner, whole, instructions


def work_of(
    compiled: Compiled, instructions: list[tuple[str, str]], flops_each: float = 0.0
) -> Work:
    """Clocks per pipe of a stretch of instructions; flops_each: of a tcgen05 product."""
    work = Work()
    name, warps = compiled.target.name, compiled.warps
    lanes = 32 * warps
    for opcode, _ in instructions:
        work.clocks["issue"] += lanes / _ISSUE
        if re.match(compiled.target.tensor_core, opcode):
            work.tensor += 1
            flops = tensor_flops(opcode)
            # every warp executes an HMMA or HGMMA line, one thread of the program a tcgen05 line
            total = flops_each if flops is None else flops * warps
            work.clocks["tensor"] += total / _FLOP_PER_CLOCK[name]
        elif _XU.match(opcode):
            work.ex2 += opcode.startswith("MUFU.EX2")
            work.clocks["special"] += lanes / _SPECIAL
        elif _FLOATS.match(opcode):
            work.clocks["float"] += lanes / _FLOAT.get(name, 128)
        elif _MULTIPLY.match(opcode):
            work.clocks["float"] += lanes / 64
        elif _ALU.match(opcode):
            work.clocks["integer"] += lanes / _INTEGER
        elif _SHARED.match(opcode):
            wide = re.search(r"\.(128|64)\b", opcode)
            size = int(wide.group(1)) // 8 if wide else 4
            if opcode.startswith("LDSM"):
                found = re.search(r"\.M[0-9T]*\.([124])\b|\.([124])$", opcode)
                size = 4 * int(found.group(1) or found.group(2)) if found else 4
            work.shared_bytes += lanes * size
    return work


@dataclass(frozen=True)
class Job:
    """What one launch has to do, for the parts that code alone does not tell.

    Attributes:
        passes: how often each inner loop runs, in the order of the code: for one program, or for one
            turn of the loop around them. ``flops``, ``exps``: of the matrix products and the
            exponentials of one pass.
        elements: score elements that these passes are about. flops_floor, exps_floor: what the
            mathematics needs per element.
        turns: of the loop around, for one program; 0 if there is none.
    """

    passes: tuple[float, ...]
    flops: float
    exps: float
    elements: float
    flops_floor: float
    exps_floor: float
    turns: float = 0.0


@dataclass(frozen=True)
class Bound:
    """Clocks per element: all code, the inner loops alone, and the floor; what limits the inner loops."""

    clocks: float
    inner: float
    floor: float
    limiter: str
    shared_clocks: float

    @property
    def ratio(self) -> float:
        """Bound over floor."""
        return self.clocks / self.floor


def floor_of(target: str, flops: float, exps: float) -> float:
    """Clocks that a target needs at least for so many FLOP and exponentials."""
    return max(flops / _FLOP_PER_CLOCK[target], exps / _SPECIAL)


def bound_of(compiled: Compiled, job: Job) -> Bound:
    """The static bound of a launch.

    Every loop is bounded by its own busiest pipe, and so is what lies between; the bounds are added up.
    Pipelining peels passes off a loop, which then turns less often: by as many passes as lie outside
    with all their products and exponentials.

    Raises:
        ValueError: the code has other loops or products than the job says: it cannot be read.
    """
    target = compiled.target
    inner, around, instructions = loops_of(compiled.code, target.tensor_core)
    if len(inner) != len(job.passes):
        raise ValueError(f"{len(inner)} loops with matrix products, {len(job.passes)} expected")
    if not job.turns:
        around = range(len(instructions))
    elif len(around) == len(instructions):
        raise ValueError("no loop around the inner ones")
    inside = {i for loop in inner for i in loop}
    rate = _FLOP_PER_CLOCK[target.name]
    works = []
    for loop in inner:
        part = [instructions[i] for i in loop]
        count = sum(bool(re.match(target.tensor_core, opcode)) for opcode, _ in part)
        # tcgen05 names no shape: the products of a loop share what one pass of it computes
        works.append(work_of(compiled, part, job.flops / count))
    each = job.flops / max(work.tensor for work in works)
    rest = work_of(compiled, [instructions[i] for i in around if i not in inside], each)
    outside = [x for i, x in enumerate(instructions) if i not in around and i not in inside]
    once = work_of(compiled, outside, each)  # code of a program that no turn repeats
    peeled = rest.clocks["tensor"] * rate / job.flops
    if job.exps:
        peeled = min(peeled, rest.ex2 * 32 * compiled.warps / job.exps)
    share = 1 - peeled / sum(job.passes)
    if share <= 0:
        raise ValueError("the passes outside the loops are more than the job has")
    total, clocks = Work(), 0.0
    for work, passes in zip(works, job.passes, strict=True):
        # a loop whose body the compiler doubled makes two passes a turn
        turns = share * passes * job.flops / rate / work.clocks["tensor"]
        total.add(work, turns)
        clocks += work.bound() * turns
    between = rest.bound() + (once.bound() / job.turns if job.turns else 0.0)
    return Bound(
        clocks=(clocks + between) / job.elements,
        inner=clocks / (share * job.elements),
        floor=floor_of(target.name, job.flops_floor, job.exps_floor),
        limiter=total.limiter(),
        shared_clocks=(total.shared_bytes + rest.shared_bytes) / 128 / job.elements,
    )
