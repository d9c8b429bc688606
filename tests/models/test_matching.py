"""Layer matching against the tables of the paper's notes, by hand."""

from __future__ import annotations

import pytest

from fastalign.models import match_layers
from fastalign.models.matching import band, code_band


def depth(n: int) -> list[int]:
    return list(range(n))


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [
        (1, 0, 0),
        (2, 1, 1),
        (3, 1, 1),
        (4, 1, 2),
        (24, 7, 16),
        (28, 8, 19),
        (32, 10, 21),
        (40, 12, 27),
    ],
)
def test_the_band_is_30_to_70_percent(layers: int, first: int, last: int) -> None:
    assert band(layers) == list(range(first, last + 1))
    for i in band(layers) if layers > 2 else []:
        assert 0.3 <= (i + 0.5) / layers <= 0.7


def test_windows_of_the_paper() -> None:
    """24 -> 40 layers: k = 10, m = 16, n = 7 consecutive teacher layers, stride 1."""
    matching = match_layers("compodistill", depth(24), depth(40))
    assert list(matching) == list(range(7, 17))
    assert matching[7] == tuple(range(12, 19))
    assert matching[16] == tuple(range(21, 28))
    assert {len(group) for group in matching.values()} == {7}


def test_a_student_deeper_than_its_teacher() -> None:
    matching = match_layers("compodistill", depth(24), depth(8))  # k = 10, m = 4
    assert matching == {8: (2,), 10: (3,), 13: (4,), 15: (5,)}


@pytest.mark.parametrize(
    ("layers", "first", "window"), [(24, 8, 2), (28, 9, 3), (32, 11, 3), (40, 13, 5)]
)
def test_the_table_of_the_released_code(layers: int, first: int, window: int) -> None:
    assert code_band(layers) == (first, window)


def test_the_released_code_s_matching_and_its_rule_for_other_depths() -> None:
    matching = match_layers("compodistill_code", depth(24), depth(40))
    assert matching == {8 + j: tuple(range(13 + j, 18 + j)) for j in range(7)}
    assert code_band(36) == (12, 4)
    shallow = match_layers("compodistill_code", depth(4), depth(6))
    assert shallow == {1: (2,), 2: (3,), 3: (4,)}


def test_uniform_last_and_all() -> None:
    assert match_layers("uniform", depth(3), depth(12)) == {0: (3,), 1: (7,), 2: (11,)}
    assert match_layers("uniform:2", depth(4), depth(12)) == {1: (5,), 3: (11,)}
    assert match_layers("last", depth(3), depth(12)) == {2: (11,)}
    assert match_layers("last:2", depth(3), depth(12)) == {1: (10,), 2: (11,)}
    assert match_layers("all", depth(2), depth(2)) == {0: (0,), 1: (1,)}


def test_hybrid_models_count_their_attention_layers_only() -> None:
    student, teacher = [3, 7, 11, 15], depth(4)
    assert match_layers("compodistill", student, teacher) == {7: (1,), 11: (2,)}
    assert match_layers({7: 2}, student, teacher) == {7: (2,)}


def test_mappings_and_callables() -> None:
    assert match_layers({2: [0, 1], 0: 3}, depth(4), depth(4)) == {0: (3,), 2: (0, 1)}
    rule = lambda student, teacher: {student[-1]: teacher[-2:]}  # noqa: E731
    assert match_layers(rule, depth(2), depth(5)) == {1: (3, 4)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("some", "layers is 'some'; allowed: 'compodistill'"),
        ("all:2", "layers is 'all:2'; allowed"),
        ("last:0", "layers is 'last:0'; allowed: a count from 1 to 4"),
        ("last:5", "layers is 'last:5'; allowed: a count from 1 to 4"),
        ("all", "layers is 'all' with 4 student and 6 teacher layers"),
        ({4: 0}, r"layers names student layer 4; allowed: .*\[0, 1, 2, 3\]"),
        ({0: [1, 6]}, "layers names teacher layer 6"),
        ({0: True}, "layers names teacher layer True"),
        ({0: []}, "maps student layer 0 to nothing"),
        ({0: [1, 1]}, "allowed: no repetition"),
        ({}, "an empty mapping"),
    ],
)
def test_what_is_refused(rule: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_layers(rule, depth(4), depth(6))  # type: ignore[arg-type]


def test_other_types_and_models_without_attention() -> None:
    with pytest.raises(TypeError, match="layers is int; allowed: one of 'compodistill'"):
        match_layers(3, depth(2), depth(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the teacher has no softmax attention layer"):
        match_layers("all", depth(2), [])
