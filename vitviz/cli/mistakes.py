"""What was typed wrongly → one line that names what may have been meant; never leaves by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from vitviz.cli.evaluation_options import EvaluationRun
from vitviz.cli.options import RunOptions
from vitviz.errors import OptionError
from vitviz.methods.features import Features, Similarity
from vitviz.methods.table import METHODS
from vitviz.options import Word

__all__ = ["describe_mistake", "refuse_one_dash"]


def describe_mistake(error: Any, typed: Sequence[str]) -> str:
    """Say what is wrong with what was typed, in words of ours where the parser's help nobody.

    Args:
        error: The parser's error.
        typed: The words of the command line.
    """
    said = str(error.format_message()).strip()
    name, context = type(error).__name__, error.ctx
    if name == "MissingParameter" and context is not None:
        return said + _usage(context)
    if name == "NoSuchOption" and context is not None:
        return _elsewhere(error.option_name, context) or said
    if name == "BadParameter" and getattr(error, "param", None) is not None:
        return _value(error, typed) or said
    return said


def refuse_one_dash(words: Sequence[str], options: Sequence[str]) -> None:
    """Make sure that no option is typed with one dash, which would be read letter by letter.

    Raises:
        OptionError: One is.
    """
    for word in words:
        option = f"-{word.partition('=')[0]}"
        if word == "--":
            return
        if len(option) > 3 and option in options and not word.startswith("--"):
            raise OptionError(f"{word} has one dash; did you mean {option}?")


def _usage(context: Any) -> str:
    """Say how a command is used to which something is missing."""
    command = context.command_path
    taken = next(each.metavar for each in context.command.params if each.nargs == -1)
    example = (context.command.epilog or "").split("\n\n")[1].strip()
    return f" Usage: {command} [OPTIONS] {taken}...; for example: {example}; options: {command} -h"


def _elsewhere(option: str, context: Any) -> str:
    """Name the commands that do have an option."""
    commands = getattr(getattr(context.parent, "command", None), "commands", {})
    having = [name for name, each in commands.items() if option in _flags(each)]
    if not having:
        return ""
    return f"{context.info_name} has no {option}; it is an option of {', '.join(having)}"


def _flags(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts}


def _value(error: Any, typed: Sequence[str]) -> str:
    """Say what values an option takes that was given another."""
    kind, flag = _kind(error.param.name), error.param.opts[-1]
    value = _typed_value(error, typed)
    if kind is None or value is None:
        return ""
    if issubclass(kind, Word):
        return f"{flag}: {kind.refusal(value)}"
    return f"{flag} is {value!r}; give a {'whole number' if kind is int else 'number'}"


def _typed_value(error: Any, typed: Sequence[str]) -> str | None:
    """Find the value that was refused: in what the parser says, else behind its option."""
    if quoted := re.search(r"'(.*)' is not ", error.message, re.DOTALL):
        return quoted[1]
    for word, following in zip(typed, [*typed[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag in error.param.opts:
            return value if equals else following
    return None


def _kind(name: str | None) -> type | None:
    """Find what values an option takes that has one of a few words, or a number."""
    for owner in (RunOptions, EvaluationRun, Features, Similarity, *METHODS.values()):
        if name in {field.name for field in fields(owner)}:
            hint = get_type_hints(owner)[name]
            for each in (hint, *get_args(hint)):
                if isinstance(each, type) and issubclass(each, (Word, int, float)):
                    return each
    return None
