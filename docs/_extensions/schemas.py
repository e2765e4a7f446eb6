"""Serves the JSON Schemas of docs/schemas with the pages, and shows their fields as tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils.nodes import Node
    from sphinx.application import Sphinx

FOLDER = Path(__file__).parents[1] / "schemas"


def fields(schema: dict[str, Any], root: dict[str, Any], above: str = "") -> Iterator[list[str]]:
    """Yields the name, type and meaning of every field; lists each kind of object once."""
    for name, field in schema.get("properties", {}).items():
        optional = "" if name in schema["required"] else " (optional)"
        inner = _resolved(field, root)
        meaning = field.get("description", inner.get("description", ""))
        yield [f"`{above}{name}`{optional}", _kind(inner, root), meaning]
        if inner.get("type") == "array":
            inner = _resolved(inner.get("items") or {}, root)
            yield from fields(inner, root, f"{above}{name}[].")
        else:
            yield from fields(inner, root, f"{above}{name}.")


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    if not schema["$ref"].startswith("#"):  # another schema, which has its own table
        return {"type": "object"}
    found: dict[str, Any] = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return found


def _kind(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return ", ".join(_of(one, root) for one in schema["anyOf"])
    if "prefixItems" in schema:
        return "two numbers"
    return str(schema["type"])


def _of(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """The kind of a schema as one of several in a cell; an object is given by its name."""
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    inner = _resolved(schema, root)
    return f"a {name}" if inner.get("type") == "object" else _kind(inner, root)


def table(name: str) -> list[str]:
    """The fields of a schema as a Markdown table."""
    schema = json.loads((FOLDER / f"{name}.json").read_text())
    rows = [["field", "type", "meaning"], ["---"] * 3, *fields(schema, schema)]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]


def setup(app: Sphinx) -> dict[str, bool]:
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class Fields(SphinxDirective):
        required_arguments = 1

        def run(self) -> list[Node]:
            (name,) = self.arguments
            self.env.note_dependency(str(FOLDER / f"{name}.json"))
            return self.parse_text_to_nodes(StringList(table(name), source=name))

    def serve(app: Sphinx, error: Exception | None) -> None:
        if error is None and app.builder.format == "html":
            shutil.copytree(FOLDER, app.outdir / "schemas", dirs_exist_ok=True)

    app.add_directive("schema-fields", Fields)
    app.connect("build-finished", serve)
    return {"parallel_read_safe": True}
