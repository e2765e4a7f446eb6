"""A report as the output of a notebook cell: the first rows and the most important facts.

`cell.html.j2` contains the markup. All style is inline, because a style sheet would affect other
cells and some viewers remove it. Colors are inherited from the light or dark notebook.
"""

from __future__ import annotations

from wellcond.report.page import Page, environment

_ROWS = 20
_FACTS = 8


def render_cell(page: Page) -> str:
    """Returns HTML with at most 20 rows, without style sheets and scripts."""
    rows = [*page.rows.values()][:_ROWS]
    # A cell is narrow: omit columns that are empty in these rows.
    columns = [one for one in page.columns if any(row.cells[one.key] for row in rows)]
    return (
        environment()
        .get_template("cell.html.j2")
        .render(
            page=page,
            rows=rows,
            columns=columns or page.columns[:1],
            hidden=len(page.rows) - len(rows),
            facts=page.facts[:_FACTS],
            more_facts=len(page.facts[_FACTS:]),
        )
    )
