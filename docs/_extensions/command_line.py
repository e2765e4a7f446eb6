"""The reference of the command line, generated from its parser: the directive `command`.

For a command with subcommands, it lists their common options once, and the others per subcommand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wellcond.cli.options import make_parser

if TYPE_CHECKING:
    from docutils.nodes import Node
    from sphinx.application import Sphinx

Lines = Iterator[str]
_Subcommands = argparse._SubParsersAction


def reference(command: str) -> Lines:
    """The description and the options of a command, as reStructuredText."""
    parser = subcommands(make_parser(command))[command]
    each = subcommands(parser)
    if not each:
        yield from _all_of(parser, arguments(parser))
        return
    yield from (parser.description or "", "")
    for name, said in _helps(parser).items():
        yield f"- :ref:`{name} <{_anchor(each[name])}>`: {_text(said)}"
    first, *others = ([*map(_row, arguments(one))] for one in each.values())
    common = [row for row in first if all(row in rows for rows in others)]
    yield from ("", "Common options:", "")
    yield from _options(parser, common)
    for one in each.values():
        yield from (f".. _{_anchor(one)}:", "", f".. rubric:: {one.prog}", "")
        yield from _all_of(one, [a for a in arguments(one) if _row(a) not in common])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser by name; empty if it has none."""
    return {name: one for action in _actions(parser) for name, one in action.choices.items()}


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser, except --help, --version and subcommands."""
    other = argparse._HelpAction | argparse._VersionAction | _Subcommands
    return [action for action in parser._actions if not isinstance(action, other)]


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    return (action for action in parser._actions if isinstance(action, _Subcommands))


def _helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    choices = (choice for action in _actions(parser) for choice in action._choices_actions)
    return {choice.dest: choice.help for choice in choices}


def _all_of(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> Lines:
    yield from (_text(parser.description or ""), "")
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    yield from (".. code-block:: none", "   :class: usage", "", f"   {usage}", "")
    example = (parser.epilog or "").removeprefix("example: ")
    yield from (".. code-block:: console", "", f"   $ {example}", "")
    yield from _options(parser, [*map(_row, actions)])


def _options(parser: argparse.ArgumentParser, rows: list[tuple[str, str]]) -> Lines:
    yield from (f".. program:: {parser.prog}", "")
    for written, said in rows:
        yield from (f".. option:: {written}", "", f"   {_text(said)}", "")


def _row(action: argparse.Action) -> tuple[str, str]:
    """The notation of an argument, and its help."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices:
        value = "|".join(map(str, action.choices))
    value = {0: "", "?": f"[{value}]"}.get(action.nargs, value)
    written = f"{', '.join(action.option_strings)} {value}".strip()
    said = (action.help or "") % {"default": action.default}
    default = action.default
    if default not in (None, "", False, []) and "default" not in said:
        plain = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        said = f"{said} (default {plain})".strip()
    if action.required and action.option_strings:
        said = f"{said} (required)".strip()
    return written, said


def _text(text: str) -> str:
    """The text with options as code and everything else literally."""
    text = re.sub(r"([\\*|_`])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"``\1``", text)


def _anchor(parser: argparse.ArgumentParser) -> str:
    return parser.prog.replace(" ", "-")


def setup(app: Sphinx) -> dict[str, bool]:
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class Command(SphinxDirective):
        required_arguments = 1

        def run(self) -> list[Node]:
            (command,) = self.arguments
            lines = [*reference(command)]
            return self.parse_text_to_nodes(StringList(lines, source=f"wellcond {command}"))

    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
