"""Which teacher layers each student layer is compared with.

Every rule works on the layers that have softmax attention, in order; a hybrid model's linear layers
do not count. Its depth is then the ordinal among those layers. Indices are 0-based.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

#: student layer -> the teacher layers whose maps are averaged to be its target
Matching = dict[int, tuple[int, ...]]
#: A callable receives the two lists of layer indices and returns such a mapping.
Mapped = Mapping[int, int | Sequence[int]]
Rule = str | Mapped | Callable[[list[int], list[int]], Mapped]

NAMES = ("compodistill", "compodistill_code", "uniform", "last", "all")

#: How many layers the released code of CompoDistill aligns, whatever the depth.
CODE_LAYERS = 7


def match_layers(rule: Rule, student: Sequence[int], teacher: Sequence[int]) -> Matching:
    """Student layers and the teacher layers of each.

    Args:
        rule: a name, a mapping, or a callable.
            ``"compodistill"``: the layers whose middle lies within 30-70 % of the depth of their
            model, k of the student and m of the teacher; student layer j of the band is compared
            with the mean of the n = m - k + 1 consecutive teacher layers that begin at layer j of
            the teacher's band. If k > m, m of the k student layers, evenly spread, one to one.
            ``"compodistill_code"``: the released code's table (``code_band``).
            ``"uniform"``: student layer i with teacher layer ceil((i + 1) N_t / N_s) - 1, so that
            the last meets the last; ``"uniform:4"``: only 4 student layers, evenly spread.
            ``"last"``: the last layers; ``"last:3"``: the last three, one to one.
            ``"all"``: one to one, equal depths.
            A mapping ``{student layer: teacher layer or layers}``.
        student, teacher: the indices of the layers with softmax attention, ascending.

    Raises:
        ValueError: an unknown name, a layer that does not exist, depths that the rule cannot match.
        TypeError: a rule of another type.
    """
    student, teacher = list(student), list(teacher)
    if not student or not teacher:
        which = "student" if not student else "teacher"
        raise ValueError(f"layers: the {which} has no softmax attention layer; allowed: at least 1")
    if isinstance(rule, str):
        pairs = _by_name(rule, len(student), len(teacher))
        return {student[i]: tuple(teacher[j] for j in group) for i, group in pairs.items()}
    if callable(rule):
        rule = rule(list(student), list(teacher))
    if isinstance(rule, Mapping):
        return _explicit(rule, student, teacher)
    raise TypeError(
        f"layers is {type(rule).__name__}; allowed: one of {', '.join(map(repr, NAMES))}, a "
        "mapping {student layer: [teacher layers]} or a callable that returns one"
    )


def _by_name(rule: str, student: int, teacher: int) -> dict[int, list[int]]:
    name, _, argument = rule.partition(":")
    if name not in NAMES or (argument and name not in ("uniform", "last")):
        raise ValueError(
            f"layers is {rule!r}; allowed: {', '.join(map(repr, NAMES))}, 'uniform:<count>', "
            "'last:<count>', a mapping or a callable"
        )
    if name == "compodistill":
        return _windows(band(student), band(teacher))
    if name == "compodistill_code":
        (first_s, _), (first_t, window) = code_band(student), code_band(teacher)
        count = min(CODE_LAYERS, student - first_s, teacher - first_t - window + 1)
        return {first_s + j: list(range(first_t + j, first_t + j + window)) for j in range(count)}
    if name == "all":
        if student != teacher:
            raise ValueError(
                f"layers is 'all' with {student} student and {teacher} teacher layers; allowed: "
                "equal numbers (or 'uniform', 'compodistill', a mapping)"
            )
        return {i: [i] for i in range(student)}
    count = _count(rule, argument, student if name == "uniform" else 1, min(student, teacher))
    if name == "last":
        return {student - j: [teacher - j] for j in range(count, 0, -1)}
    chosen = [-(-(i + 1) * student // count) - 1 for i in range(count)]
    return {i: [-(-(i + 1) * teacher // student) - 1] for i in chosen}


def _count(rule: str, argument: str, default: int, most: int) -> int:
    if not argument:
        return default
    if not argument.isdecimal() or not 1 <= int(argument) <= most:
        raise ValueError(f"layers is {rule!r}; allowed: a count from 1 to {most}")
    return int(argument)


def band(depth: int) -> list[int]:
    """The layers whose middle, (i + 1/2) / depth, lies within 30-70 % of the depth (at least one).

    In whole numbers, so that no rounding of 0.3 decides. 24 layers: 7-16; 28: 8-19; 32: 10-21;
    40: 12-27.
    """
    inside = [i for i in range(depth) if 3 * depth <= 5 * (2 * i + 1) <= 7 * depth]
    return inside or [depth // 2]


def _windows(student: list[int], teacher: list[int]) -> dict[int, list[int]]:
    """k student layers, m >= k teacher layers, windows of n = m - k + 1 with stride 1."""
    k, m = len(student), len(teacher)
    if k > m:
        student = [student[(2 * j + 1) * k // (2 * m)] for j in range(m)]
        k = m
    width = m - k + 1
    return {layer: teacher[j : j + width] for j, layer in enumerate(student)}


def code_band(depth: int) -> tuple[int, int]:
    """(first layer, teacher window) as the released code has them.

    Its table, 24: (8, 2), 28: (9, 3), 32: (11, 3), 40: (13, 5), is first = round(depth / 3) and
    window = depth / 2 - 2 - first. That is the rule here for the depths that it lacks, with a
    window of at least 1; where seven layers do not fit, fewer are aligned.
    """
    first = (2 * depth + 3) // 6
    return first, max(1, depth // 2 - 2 - first)


def _explicit(rule: Mapped, student: list[int], teacher: list[int]) -> Matching:
    matching: Matching = {}
    for layer, group in rule.items():
        group = (group,) if isinstance(group, int) else tuple(group)
        _check_layer("student", layer, student)
        if not group:
            raise ValueError(
                f"layers maps student layer {layer} to nothing; allowed: teacher layers"
            )
        for other in group:
            _check_layer("teacher", other, teacher)
        if len(set(group)) < len(group):
            raise ValueError(
                f"layers maps student layer {layer} to {group}; allowed: no repetition"
            )
        matching[layer] = group
    if not matching:
        raise ValueError("layers is an empty mapping; allowed: at least one student layer")
    return dict(sorted(matching.items()))


def _check_layer(who: str, layer: object, allowed: list[int]) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer not in allowed:
        raise ValueError(
            f"layers names {who} layer {layer!r}; allowed: {who} layers with softmax attention, "
            f"{allowed} (0-based)"
        )
