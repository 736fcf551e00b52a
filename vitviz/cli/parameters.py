"""Dataclasses of options as the parameters of Typer's commands, in named groups of the help."""

from __future__ import annotations

import inspect as introspection
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from vitviz.methods.method import Method, options_of

__all__ = [
    "EXPLAIN",
    "MODEL",
    "OUTPUT",
    "PICTURES",
    "RUNNING",
    "SCRIPTING",
    "declare",
    "method_from",
    "method_parameters",
    "with_options",
]

EXPLAIN, MODEL, PICTURES = "What to explain", "The model", "Pictures and output"
OUTPUT, RUNNING, SCRIPTING = "Output", "Running", "Scripting"
_PANELS = (EXPLAIN, MODEL, PICTURES, OUTPUT, RUNNING, SCRIPTING)


_Command = Callable[..., None]
_Method = TypeVar("_Method", bound=Method)


def declare(panel: str, *names: str, **settings: Any) -> Any:
    """Declare an option in a named group of the help."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def with_options(
    kind: type, own: list[introspection.Parameter] | None = None, *, without: str | None = None
) -> Callable[[_Command], _Command]:
    """Give a command every option of a dataclass, as its first argument, ``run``.

    Args:
        kind: The dataclass.
        own: Options of the command itself, which it gets as keywords.
        without: A field that is no option of this command, and keeps its default.
    """
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        introspection.Parameter(
            field.name,
            introspection.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=introspection.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(kind)
        if field.name != without
    ]
    names = [parameter.name for parameter in shared]

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def wrapper(**values: Any) -> None:
            run = kind(**{name: values.pop(name) for name in names})
            command(run=run, **values)

        parameters = sorted([*shared, *(own or ())], key=_place)
        wrapper.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


def _place(parameter: introspection.Parameter) -> int:
    """Say where a parameter stands: arguments first, then groups in their order."""
    *_, declared = get_args(parameter.annotation)
    panel = getattr(declared, "rich_help_panel", None)
    return _PANELS.index(panel) if panel in _PANELS else -1


def method_parameters(method: type[Method]) -> list[introspection.Parameter]:
    """Return the options of a method as parameters of its command, most used first."""
    found = {each.name: each for each in options_of(method)}
    names = sorted(found, key=lambda name: (name != "classes", name == "refine"))
    hints = get_type_hints(method)
    return [_parameter(found[name], hints[name]) for name in names]


def method_from(method: type[_Method], values: dict[str, Any]) -> _Method:
    """Make a method of what was typed."""
    declared = {each.name: each.metadata["option"] for each in options_of(method)}
    read: dict[str, Any] = {}
    for name, value in values.items():
        parse = declared[name].parse
        value = parse(value) if parse and value is not None else value
        read[name] = tuple(value) if isinstance(value, list) else value
    return method(**read)


def _parameter(declared: Field[Any], hint: Any) -> introspection.Parameter:
    option = declared.metadata["option"]
    default, typed = declared.default, hint
    if option.parse:
        typed = str | None
    elif tuple in (hint, getattr(hint, "__origin__", None)):
        typed = list[get_args(hint)[0]]  # type: ignore[misc]  # repeatable
    choices = [str(each) for each in hint] if _is_enum(hint) else []
    flag = option.flag or f"--{declared.name.replace('_', '-')}"
    default_shown = f" Default: {option.shown_default}." if option.shown_default else ""
    return introspection.Parameter(
        declared.name,
        introspection.Parameter.KEYWORD_ONLY,
        annotation=Annotated[
            typed,
            declare(
                EXPLAIN,
                flag,  # named, so that a switch gets no --no-… beside it
                metavar=option.metavar or "|".join(choices) or None,
                help=option.help + default_shown,
                show_default=not option.shown_default and default is not None,
            ),
        ],
        default=default,
    )


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
