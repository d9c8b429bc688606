"""Dataclasses from plain values (what yaml.safe_load gives) and back, with errors that say where."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the entry, what came and what is allowed."""


def from_plain(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass ``cls``; nested dataclasses and lists of them are read too.

    A number written as text ("2e-4" is text in YAML 1.1) is accepted where a number is expected.

    Raises:
        RecipeError: an unknown or missing entry, a value of another type.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} is {_shown(values)}; allowed: a mapping")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise RecipeError(f"{where} has an entry {unknown[0]!r}; allowed: {', '.join(fields)}")
    given = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in given and not has_default:
            raise RecipeError(f"{where} lacks {name!r}; allowed entries: {', '.join(fields)}")
    try:
        return cls(**given)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


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
        converted = [_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
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
