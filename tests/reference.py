"""The option tables of ``docs/commands.md``, made from the commands: ``make docs`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

from vitviz.cli.app import build_app
from vitviz.methods.table import METHODS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

_BLOCK = re.compile(r"(<!-- options: (\S+) -->\n).*?(<!-- end of options -->)", re.DOTALL)
_DEFAULT = re.compile(r" Default: (.+)\.$")  # in the help, where it is not just a value
_Row = tuple[str, str, str, str]  # group, option, meaning, default


def commands() -> dict[str, Any]:
    """Return the commands as typer has them, by name."""
    group: Any = typer.main.get_command(build_app())
    return dict(group.commands)


def program_parameters() -> list[Any]:
    """Return what ``vitviz`` takes without a command."""
    return list(typer.main.get_command(build_app()).params)


def options_of(parameters: Iterable[Any]) -> set[str]:
    """Return the options as they are typed, ``-o`` and ``--output``."""
    options = (each for each in parameters if each.param_type_name == "option")
    return {name for each in options for name in (*each.opts, *each.secondary_opts)}


def tables() -> dict[str, str]:
    """Return the tables by name.

    ``images`` has what all commands that read images share, ``maps`` what those that draw share
    beyond that, ``vitviz`` what comes before a command, and each command's what only it has.
    """
    rows = {name: [_row(each) for each in command.params] for name, command in commands().items()}
    reading = {name: each for name, each in rows.items() if _reads_images(name)}
    drawing = {name: each for name, each in rows.items() if name in METHODS}
    images = _shared(reading.values())
    maps = [row for row in _shared(drawing.values()) if row not in images]
    own = {
        name: [row for row in each if not (name in reading and row in images)]
        for name, each in rows.items()
    }
    own.update({name: [row for row in own[name] if row not in maps] for name in drawing})
    program = [_row(each) for each in program_parameters()]
    return {
        name: _table(each)
        for name, each in {"vitviz": program, **own, "maps": maps, "images": images}.items()
    }


def updated(page: str) -> str:
    """Return the page with its tables as the commands are now.

    Raises:
        ValueError: The page has other tables than there are.
    """
    made = tables()
    places = [name for _, name, _ in _BLOCK.findall(page)]
    if sorted(places) != sorted(made):
        raise ValueError(
            f"{PAGE.name} has places for the tables {', '.join(sorted(places))}; "
            f"expected {', '.join(sorted(made))}, each once"
        )
    return _BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n{found[3]}", page)


def _reads_images(command: str) -> bool:
    return any(each.name == "sources" for each in commands()[command].params)


def _shared(rows: Iterable[Sequence[_Row]]) -> list[_Row]:
    """Return the rows that are in all lists, in the order of the first."""
    first, *others = rows
    return [row for row in first if all(row in other for other in others)]


def _row(parameter: Any) -> _Row:
    names = sorted(parameter.opts, key=len) + parameter.secondary_opts
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    elif parameter.metavar:
        names[-1] += f" {parameter.metavar}"
    return (
        getattr(parameter, "rich_help_panel", None) or "",
        ", ".join(f"`{_escaped(name)}`" for name in names),
        _escaped(_DEFAULT.sub("", parameter.help or "")).replace("*", r"\*"),
        _default(parameter),
    )


def _default(parameter: Any) -> str:
    value = parameter.default
    if told := _DEFAULT.search(parameter.help or ""):
        return _escaped(told[1])
    if not parameter.show_default or value is None or value is False:
        return ""
    several = value if isinstance(value, (list, tuple)) else [value]
    words = (str(each.value if isinstance(each, Enum) else each) for each in several)
    return ", ".join(f"`{_escaped(word)}`" for word in words)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _table(rows: Sequence[_Row]) -> str:
    """Write rows as tables, one a group, the groups in the order of the help."""
    groups = dict.fromkeys(row[0] for row in rows)
    return "\n".join(
        f"| {group or 'Options'} | | Default |\n|---|---|---|\n"
        + "".join(f"| {' | '.join(row[1:])} |\n" for row in rows if row[0] == group)
        for group in groups
    )


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
