"""Checking what a configuration was given against the types of its fields."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
import reprlib
from collections.abc import Sequence, Set
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from draftattn.errors import InputError

# a value of each type, and several
_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    NoneType: ("None", "None"),
}


def checked_options(config: Any) -> dict[str, Any]:
    """The values of a dataclass by field, each of its field's type.

    A list becomes a tuple, a path text, and a number of numpy Python's own; a whole number may stand for any number,
    while ``True`` is none. Types other than numbers, bool, str, Literal, unions and tuples of them are not checked.

    Raises:
        InputError: if a value is of another type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     layers: tuple[int, ...] = ()
    >>> checked_options(Settings([0, -1]))
    {'layers': (0, -1)}
    >>> checked_options(Settings(0))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    draftattn.errors.InputError: layers is 0; it must be a list of whole numbers
    """
    types, values = _types_of(type(config)), {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value, kind = getattr(config, field.name), types.get(field.name, Any)
        try:
            values[field.name] = _converted(value, kind)
        except TypeError:
            wanted = _described(kind)
            rule = f"choose {wanted}" if get_origin(kind) is Literal else f"it must be {wanted}"
            raise InputError(f"{field.name} is {reprlib.repr(value)}; {rule}") from None
    return values


def _types_of(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # names that exist for a type checker only: what the class inherits is still checked
        return _types_of(kind.__base__ or object)


def _converted(value: Any, kind: Any) -> Any:
    """The value as one of a type; TypeError if it is not."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in members:
            with contextlib.suppress(TypeError):
                return _converted(value, member)
        raise TypeError
    if origin is tuple:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | Set):
            raise TypeError
        return tuple(_converted(x, _element(members)) for x in value)
    if origin is Literal:
        allowed = any(type(value) is type(member) and value == member for member in members)
    elif kind is int:
        allowed = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        value = int(value) if allowed else value
    elif kind is float:
        allowed = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value  # not nan
        value = float(value) if allowed and not isinstance(value, int) else value
    elif kind is str:
        allowed = isinstance(value, str | os.PathLike)
        value = str(value) if allowed else value
    else:
        allowed = kind not in _NAMES or isinstance(value, kind)
    if not allowed:
        raise TypeError
    return value


def _element(members: tuple[Any, ...]) -> Any:
    """What the items of a tuple may be; how many there must be is for the configuration to say."""
    return Union[tuple(member for member in members if member is not ...)]  # noqa: UP007


def _described(kind: Any, several: bool = False) -> str:
    """What a value of a type is in words, or several of them."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return (" or " if several else ", or ").join(_described(member, several) for member in members)
    if origin is tuple:
        return f"a list of {_described(_element(members), several=True)}"
    if origin is Literal:
        return " or ".join(str(member) for member in members)
    return _NAMES[kind][several]
