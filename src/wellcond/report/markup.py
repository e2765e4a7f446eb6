"""Text and lists as HTML, and a page around them that needs neither network nor script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_markup

from wellcond.report.style import STYLE
from wellcond.text import shown


def escape(text: str) -> str:
    """As text that is neither markup nor anything else that a browser obeys."""
    return escape_markup(shown(text))


def breakable(name: str) -> str:
    """A name that is broken, if it must be, after a dot and not within a word."""
    return re.sub(r"([.:/_])", r"\1<wbr>", escape(name))


def linked(name: str, link: str = "") -> str:
    """A name that leads to the row of that id."""
    return f'<a href="#{link}">{breakable(name)}</a>' if link else breakable(name)


def listed(items: Mapping[str, str]) -> str:
    """Names and what there is to say of each."""
    lines = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items())
    return f"<dl>{''.join(lines)}</dl>"


def folded(summary: str, content: str) -> str:
    """One line that unfolds into content, which is markup."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def section(heading: str, *content: str) -> str:
    """Markup under a heading; nothing if there is none."""
    return "\n".join([f"<h2>{escape(heading)}</h2>", *content]) if any(content) else ""


def paragraphs(lines: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def document(title: str, content: Sequence[str]) -> str:
    """The page as text."""
    body = "\n".join(part for part in content if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
