"""Frozen dataclasses of plain data as JSON and back, by their annotations: no field is named twice.

JSON has no infinity and no NaN: both are written as `null`, and `null` is read as NaN where a number is expected. A
list of many small records is written with one record a line, so that two files can be compared line by line.
"""

import dataclasses
import functools as ft
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from .._errors import ShardingError


def encode(value: Any) -> Any:
    """`value` in what JSON has. A dict whose keys are tuples becomes a list of pairs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: encode(each) for key, each in value.items()}
        return [[encode(key), encode(each)] for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def decode(hint: Any, value: Any, at: str) -> Any:
    """What `encode` made of a value of the type `hint`.

    Raises:
        ShardingError: It is of another type; `at` says where.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return decode(next(each for each in args if each is not type(None)), value, at)
    if origin is typing.Literal:
        return value if value in args else _wrong(at, f"one of {', '.join(map(repr, args))}", value)
    if dataclasses.is_dataclass(hint):
        return _decode_class(hint, value, at)
    if origin is tuple:
        if not isinstance(value, list):
            return _wrong(at, "a list", value)
        hints = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(hints) != len(value):
            return _wrong(at, f"{len(hints)} values", value)
        return tuple(decode(each, item, f"{at}[{i}]") for i, (each, item) in enumerate(zip(hints, value, strict=True)))
    if origin is dict:
        return _decode_dict(args, value, at)
    if hint is float:
        if value is None:
            return math.nan
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else _wrong(at, "a number", value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return value if fits else _wrong(at, {str: "text", int: "a whole number", bool: "true or false"}[hint], value)


def dumps(fields: Mapping[str, Any]) -> str:
    """One JSON object: a field a line, and in a long list an item a line."""
    lines = [f"{_compact(name)}: {_listed(value)}" for name, value in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _decode_class(hint: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        return _wrong(at, "an object", value)
    hints = _hints(hint)
    strange = sorted(set(value) - set(hints))
    if strange:
        raise ShardingError(
            f"{at}: this version of jaxpar knows no {strange[0]!r}. Read it with the one that wrote it."
        )
    needed = [
        field.name
        for field in dataclasses.fields(hint)
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ShardingError(f"{at}: {needed[0]!r} is missing.")
    return hint(**{name: decode(hints[name], each, f"{at}.{name}") for name, each in value.items()})


def _decode_dict(args: tuple[Any, ...], value: Any, at: str) -> Any:
    if isinstance(value, dict) and (args[0] is str or not value):
        return {key: decode(args[1], each, f"{at}.{key}") for key, each in value.items()}
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return _wrong(at, "an object", value)
    return {decode(args[0], key, at): decode(args[1], each, at) for key, each in value}


@ft.cache
def _hints(hint: Any) -> dict[str, Any]:
    return typing.get_type_hints(hint)


def _wrong(at: str, wanted: str, value: Any) -> Any:
    raise ShardingError(f"{at}: expected {wanted}, found {value!r:.60}.")


def _listed(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(each, list | dict) for each in value.values()):
        return "{\n " + ",\n ".join(f"{_compact(key)}: {_listed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
        return "[\n  " + ",\n  ".join(map(_compact, value)) + "]"
    return _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
