"""Frozen dataclasses from and to plain data: one strict reader for YAML, JSON and checkpoints. No torch."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gsa.errors import UsageError, unknown

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain data: dicts, lists, numbers, strings."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """A `cls` from plain data. An unknown key or a wrong type is an error that names the place and the known keys."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise UsageError(f"{where or cls.__name__} must be a mapping, not {data!r}.")
    for key in data:
        if key not in known:
            raise unknown(f"setting in {where or cls.__name__}", key, known)
    try:
        return cls(**{k: _typed(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()})
    except TypeError as error:  # a required key is missing
        raise UsageError(f"{where or cls.__name__}: {error}.") from None


def load(cls: type[C], path: str | Path) -> C:
    """A `cls` from a YAML or JSON file."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    return from_dict(cls, data if data is not None else {}, str(path))


def save(config: Any, path: str | Path) -> None:
    """Writes the config as YAML that `load` reads back to an equal one."""
    import yaml

    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        return _typed(next((a for a in options if type(value) is a), options[0]), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is typing.Literal:
        if value not in args:
            raise unknown(where, value, args)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where} must be a list, not {value!r}.")
        inner = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) != len(value):
            raise UsageError(f"{where} needs {len(inner)} values, not {len(value)}.")
        return tuple(_typed(a, v, where) for a, v in zip(inner, value, strict=True))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} must be a mapping, not {value!r}.")
        return {k: _typed(args[1], v, f"{where}.{k}") for k, v in value.items()} if args else dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UsageError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return Path(value) if hint is Path else value
