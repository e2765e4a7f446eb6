"""A report as the output of a notebook cell: the first rows of its page, and what to know of all.

`cell.html.j2` holds the markup. All style is inline and takes the colors of the notebook, light or
dark, because a style sheet would reach the other cells, and some viewers remove it.
"""

from __future__ import annotations

from wellcond.report.page import Page, environment

_ROWS = 20
_FACTS = 8


def render_cell(page: Page) -> str:
    """HTML without style sheet and script, of at most 20 rows."""
    rows = [*page.rows.values()][:_ROWS]
    # Columns in which these rows have nothing to say are left out of a narrow cell.
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
