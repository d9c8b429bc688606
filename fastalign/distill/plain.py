"""Dataclasses from plain values (what yaml.safe_load gives) and back, with errors that say where."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the entry, what came and what is allowed.

    Attributes:
        problems: one message for each entry that is wrong; a line each of the error's text.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """A ``RecipeError`` inside ends the block and adds its problems to the list."""
    try:
        yield
    except RecipeError as error:
        problems.extend(error.problems)


def from_plain(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass ``cls``; nested dataclasses and lists of them are read too.

    A number written as text ("2e-4" is text in YAML 1.1) is accepted where a number is expected.

    Raises:
        RecipeError: an unknown or missing entry, a value of another type.
    """
    given, problems = read_entries(cls, values, where)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not has_default:
            problems.append(f"{where} lacks {name!r}; allowed entries: {', '.join(fields)}")
    if problems:
        raise RecipeError(*problems)
    try:
        return cls(**given)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def read_entries(cls: type, values: Any, where: str) -> tuple[dict[str, Any], list[str]]:
    """The entries of the dataclass ``cls`` that can be read, and what is wrong with the others.

    Raises:
        RecipeError: ``values`` is no mapping.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} is {_shown(values)}; allowed: a mapping")
    hints = typing.get_type_hints(cls)
    allowed = [f.name for f in dataclasses.fields(cls) if f.init]
    problems: list[str] = []
    given = {}
    for name, value in values.items():
        if name not in allowed:
            problems.append(f"{where} has an entry {name!r}; allowed: {', '.join(allowed)}")
            continue
        with collected(problems):
            given[name] = _convert(hints[name], value, f"{where}.{name}")
    return given, problems


def to_plain(value: Any) -> Any:
    """The dataclass as mappings, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _convert(option, value, where)
            except RecipeError as error:
                errors.append(error)
        raise (
            errors[-1]
            if len(errors) == 1
            else RecipeError(f"{where} is {_shown(value)}; allowed: {_named(hint)}")
        )
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{where} is {_shown(value)}; allowed: {', '.join(map(repr, arguments))}")
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} is {_shown(value)}; allowed: a list")
        problems: list[str] = []
        converted = []
        for i, v in enumerate(value):
            with collected(problems):
                converted.append(_convert(arguments[0], v, f"{where}[{i}]"))
        if problems:
            raise RecipeError(*problems)
        return tuple(converted) if origin is tuple else converted
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} is {_shown(value)}; allowed: a mapping")
        return {key: _convert(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(Any, hint)):
            return value
        return from_plain(cast(Any, hint), value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint in (bool, str, int) and type(value) is hint:
        return value
    raise RecipeError(f"{where} is {_shown(value)}; allowed: {_named(hint)}")


def _named(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_named(a) for a in typing.get_args(hint) if a is not type(None)]
        return " or ".join(parts + ["null"] * (type(None) in typing.get_args(hint)))
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "a mapping"
    return names.get(hint, str(hint))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
