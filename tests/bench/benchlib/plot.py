# SPDX-License-Identifier: Apache-2.0
"""Draws the medians as bars with their quartiles, one panel a case, as SVG."""

from xml.sax.saxutils import escape

COLOURS = ["#2a6fbb", "#d1702c", "#c9a227", "#5b9a50", "#8a8a8a", "#b0b0b0", "#8d5fa8"]
COLUMNS = 3
PANEL_WIDTH = 410
BAR = 18
LABEL = 160
MARGIN = 20
HEAD = 34


def _number(value):
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e3:
        return f"{value / 1e3:.1f}k"
    return f"{value:.1f}"


class _Drawing:
    def __init__(self, width, height):
        self._parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
                       f'height="{height}" font-family="sans-serif" font-size="11">',
                       f'<rect width="{width}" height="{height}" fill="white"/>']

    def rect(self, x, y, w, h, fill):
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0.5):.1f}" '
                           f'height="{h:.1f}" fill="{fill}"/>')

    def line(self, x1, y1, x2, y2):
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
                           'stroke="black" stroke-width="1"/>')

    def text(self, x, y, text, anchor="start", weight="normal"):
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
                           f'font-weight="{weight}">{escape(text)}</text>')

    def done(self):
        return "\n".join(self._parts + ["</svg>\n"])


def _panel(drawing, x, y, case, row, colours):
    unit = next(iter(row.values())).unit
    drawing.text(x, y + 14, f"{case} ({unit})", weight="bold")
    most = max(max(s.median, s.high) for s in row.values()) or 1
    room = PANEL_WIDTH - LABEL - MARGIN - 45
    for i, (entry, s) in enumerate(row.items()):
        top = y + HEAD - 10 + i * BAR
        drawing.text(x + LABEL - 6, top + 11, entry, anchor="end")
        drawing.rect(x + LABEL, top, room * s.median / most, BAR - 5, colours[entry])
        low, high = (x + LABEL + room * v / most for v in (s.low, s.high))
        middle = top + (BAR - 5) / 2
        drawing.line(low, middle, high, middle)
        drawing.line(low, middle - 3, low, middle + 3)
        drawing.line(high, middle - 3, high, middle + 3)
        end = x + LABEL + room * max(s.median, s.high) / most
        drawing.text(end + 4, top + 11, _number(s.median))


def draw(table, title):
    """`table` is {case: {entry: Summary}}; returns the SVG text."""
    entries = list(dict.fromkeys(e for row in table.values() for e in row))
    colours = {e: COLOURS[i % len(COLOURS)] for i, e in enumerate(entries)}
    cases = list(table.items())
    heights = [HEAD + max(len(row) for _, row in cases[i:i + COLUMNS]) * BAR + 12
               for i in range(0, len(cases), COLUMNS)]
    drawing = _Drawing(COLUMNS * PANEL_WIDTH + MARGIN, sum(heights) + 60)
    drawing.text(MARGIN, 26, title, weight="bold")
    drawing.text(MARGIN, 42, "Bars: median. Whiskers: first and third quartile.")
    y = 54
    for number, height in enumerate(heights):
        for column, (case, row) in enumerate(cases[number * COLUMNS:(number + 1) * COLUMNS]):
            _panel(drawing, MARGIN + column * PANEL_WIDTH, y, case, row, colours)
        y += height
    return drawing.done()
