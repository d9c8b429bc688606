"""A report as one HTML file: the pictures are inside, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:right}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
    "p.note{color:#555;max-width:50rem}h2{margin-top:2.5rem}"
)


@dataclass
class Page:
    """Built from top to bottom; texts are escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def line(cells: Sequence[str], tag: str) -> str:
            inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inside}</tr>"

        body = "".join(line(row, "td") for row in rows)
        self.parts.append(f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>")

    def picture(self, figure: Figure, description: str) -> None:
        """``description`` is what the picture shows, for readers who cannot see it."""
        file = io.BytesIO()
        figure.savefig(file, dpi=110, format="png")
        data = base64.b64encode(file.getvalue()).decode()
        self.parts.append(
            f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
        )

    def text(self) -> str:
        title = html.escape(self.title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
