"""Converts docstrings, which are plain text with code in `backticks`, to reStructuredText.

Text between backticks is code. If the code begins with a public name (`Regularizer`,
`wellcond.audit`) or is a member of the documented class (`attach`), it is a reference, which must
have a target. Everything else is text: except for *emphasis*, `*`, `|` and `_` are literal.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

import wellcond
import wellcond.report
import wellcond.rules

# The place where each public name is documented; for a name of several modules, the last of them.
PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (wellcond.rules, wellcond.report, wellcond)
    for name in module.__all__
}
_DOTTED = re.compile(r"(?:wellcond\.|wc\.)?([A-Za-z]\w*)((?:\.\w+)*)(?:\(.*\))?")
# Code, examples and emphasis remain unchanged.
_KEPT = re.compile(
    r"(`[^`]*`|^ *(?:>>>|\.\.\.) .*(?:\n *\S.*)*|(?<!\S)\*\w[^*]*\w\*(?![\w*]))", re.MULTILINE
)
_RETURNS = re.compile(r"(?<=^Returns:\n)(?:\s+\S.*\n?)*?(?=\n|\Z)", re.MULTILINE)
# Napoleon would take the text before a colon for a type, so the colon is hidden behind this letter.
_COLON = "\ue000"


class CodeOrName(SphinxRole):
    """The role of single backticks."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        code = nodes.literal(self.text, self.text)
        target = self._target()
        if target is None:
            return [code], []
        attributes = {"refdomain": "py", "reftype": "obj", "reftarget": target}
        reference = pending_xref(self.text, code, refexplicit=True, **attributes)
        self.set_source_info(reference)
        return [reference], []

    def _target(self) -> str | None:
        """The full name of the public name at the start of the code, or None."""
        found = _DOTTED.fullmatch(self.text)
        if found is None:
            return None
        first, *rest = f"{found[1]}{found[2]}".split(".")
        if first in wellcond._PACKAGES and rest:
            first, *rest = rest
        if first in PUBLIC:
            return ".".join([PUBLIC[first], *rest])
        within = PUBLIC.get(str(self.env.ref_context.get("py:class")), "")
        module, _, name = within.rpartition(".")
        member = getattr(getattr(sys.modules.get(module), name, None), first, None)
        if not rest and (callable(member) or isinstance(member, property)):
            return f"{within}.{first}"
        return None


def before_napoleon(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> None:
    """Escapes literal text, and hides colons from Napoleon."""
    lines: list[str] = rest[-1]
    text = "\n".join(lines)
    parts = _KEPT.split(text)
    # Underscores within a name need no escape.
    parts[::2] = [re.sub(r"[\\*|]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [p.replace(":", _COLON) if p.startswith("`") else p for p in parts[1::2]]
    text = _RETURNS.sub(lambda found: found[0].replace(":", _COLON), "".join(parts))
    lines[:] = text.split("\n")
    if what == "property":
        lines[0] = lines[0].replace(":", _COLON)


def after_napoleon(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> None:
    """Restores the colons, and moves the type of an attribute next to its name."""
    lines: list[str] = rest[-1]
    written: list[str] = []
    for line in lines:
        if line.lstrip().startswith(":type: "):
            above = max(i for i, other in enumerate(written) if ".. attribute:: " in other)
            written.insert(above + 1, line)
        else:
            written.append(line.replace(_COLON, ":"))
    lines[:] = written


def signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, str] | None:
    """Hides the signatures of classes that users do not construct: records and private classes."""
    if what != "class":
        return None
    record = dataclasses.is_dataclass(obj) and "Attributes:" in (obj.__doc__ or "")
    private = name not in PUBLIC.values() and not name.startswith("wellcond.integrations.")
    return ("", "") if record or private else None


def dashes(app: Sphinx, tree: nodes.document) -> None:
    """Replaces the two hyphens between a name and its description by a dash."""
    for text in [*tree.findall(nodes.Text)]:
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("code_or_name", CodeOrName())
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("doctree-read", dashes)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
