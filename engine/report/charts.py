"""Charts as inline SVG: lines, bars and points, with few ticks, in colours that the style sheet names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 230  # the units of the picture, which is scaled to its column
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 36
NUM_COLOURS = 8  # of style.py
MAX_POINTS = 300  # of a line
LOG_RATIO = 50.0  # from here on, positive values have a logarithmic axis
FEW_POINTS = 40  # with marks
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart. colour: its number. kind: "" (solid), "dashed", "faint". bars: (low, high) of each point."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    kind: str = ""
    bars: Sequence[tuple[float, float]] = field(default=())
    listed: bool = True  # whether the legend names it


@dataclass(frozen=True)
class Axes:
    """The ranges of a chart, whether y is logarithmic, and whether it is a count."""

    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool = False
    is_count: bool = False

    def at_x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        """Return the vertical place of a value."""
        low, high, value = (math.log10(v) for v in (*self.y, value)) if self.is_log else (*self.y, value)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> Sequence[Point]:
    """Return at most `limit` points: the lowest and the highest of each of equal stretches, so that spikes stay."""
    if len(points) <= limit:
        return points
    count = limit // 2
    kept = []
    for i in range(count):
        stretch = range(i * len(points) // count, (i + 1) * len(points) // count)
        ends = {min(stretch, key=lambda j: points[j][1]), max(stretch, key=lambda j: points[j][1])}
        kept += [points[j] for j in sorted(ends)]
    return kept


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """Return the exponential moving average over about `span` points, without a bias at the start."""
    decay, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    found = []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        found.append((step, total / weight))
    return found


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers from low to high."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shown_number(value: float) -> str:
    """Return a number as text of at most about six characters."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _range(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        return low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    return low - pad * (high - low), high + pad * (high - low)


def _axes(lines: Sequence[Line], y_range: tuple[float, float] | None, from_zero: bool, has_markers: bool) -> Axes:
    """Return the axes of lines; above the lines there is room for the names of markers."""
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points] + [y for line in lines for bar in line.bars for y in bar]
    is_log = y_range is None and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    if is_log:
        y = (min(values) / 1.2, max(values) * 1.2)
    else:
        low, high = y_range or _range(values)
        if y_range is None:
            low = 0.0 if min(values) >= 0 and (low < 0 or from_zero) else low
            high += 0.08 * (high - low) if has_markers else 0.0
        y = (low, high)
    return Axes(_range(steps, 0.0), y, is_log)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    markers: Sequence[tuple[float, str]] = (),
    note: str = "",
    from_zero: bool = False,
) -> str:
    """Return a figure; "" without a point. markers: (x, what it is), as vertical lines. note: a sentence below.

    y_range: of y; None: that of the values, from_zero with 0, and logarithmic where they differ by LOG_RATIO.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    axes = _axes(lines, y_range, from_zero, bool(markers))
    body = [_frame(axes, x_label), *(_marker(axes, x, name) for x, name in markers)]
    body += [_line(axes, line) for line in lines]
    most = max(len(line.points) for line in lines)
    if most > MAX_POINTS:
        note = f"{note} {most:,} values are shown by {MAX_POINTS}.".strip()
    names = [line for line in lines if line.listed]
    return figure(title, y_label, "".join(body), legend(names) if len(names) > 1 else "", note)


def bar_chart(title: str, edges: Sequence[float], parts: Sequence[tuple[str, Sequence[int]]], x_label: str) -> str:
    """Return a histogram; parts: (name, count in each bin), one on top of the other. edges: of the bins."""
    totals = [sum(column) for column in zip(*(counts for _, counts in parts), strict=True)]
    if not any(totals):
        return ""
    axes = Axes((edges[0], edges[-1]), (0.0, max(totals) * 1.05), is_count=True)
    body = [_frame(axes, x_label)]
    below = [0] * len(totals)
    for colour, (name, counts) in enumerate(parts):
        for i, count in enumerate(counts):
            if count:
                x, y = axes.at_x(edges[i]), axes.at_y(below[i] + count)
                width, height = axes.at_x(edges[i + 1]) - x - 1, axes.at_y(below[i]) - y
                label = f"{shown_number(edges[i])} to {shown_number(edges[i + 1])}: {count:,} {name}"
                body.append(
                    f'<rect class="f{colour}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" '
                    f'height="{height:.1f}"><title>{escape(label)}</title></rect>'
                )
            below[i] += count
    names = [Line(name, [], colour) for colour, (name, _) in enumerate(parts)]
    return figure(title, "examples", "".join(body), legend(names) if len(names) > 1 else "", "")


def point_chart(
    title: str, points: Sequence[tuple[float, float, float, str]], x_label: str, y_label: str, note: str = ""
) -> str:
    """Return points (x, y, radius, what it is) beside the diagonal; "" without a point."""
    if not points:
        return ""
    ends = [value for x, y, _, _ in points for value in (x, y)]
    low, high = (0.0, 1.0) if min(ends) >= 0 and max(ends) <= 1 else _range(ends)
    axes = Axes((low, high), (low, high))
    body = [_frame(axes, x_label)]
    ends_of_line = (axes.at_x(low), axes.at_y(low), axes.at_x(high), axes.at_y(high))
    body.append('<line class="diagonal" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends_of_line))
    for x, y, radius, name in points:
        body.append(
            f'<circle class="f0 dot" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="{radius:.1f}">'
            f"<title>{escape(name)}</title></circle>"
        )
    return figure(title, y_label, "".join(body), "", note)


def figure(title: str, unit: str, body: str, legend_html: str, note: str) -> str:
    """Return a figure with its title, the unit of y, the picture, a legend and a note."""
    shown_unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption>{escape(title)}{shown_unit}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f"{legend_html}{below}</figure>"
    )


def legend(lines: Sequence[Line]) -> str:
    """Return the names of lines beside pieces of them."""
    items = [
        f'<span><svg class="key" viewBox="0 0 22 8"><line class="line s{line.colour % NUM_COLOURS} {line.kind}" '
        f'x1="1" y1="4" x2="21" y2="4"/></svg>{escape(line.name)}</span>'
        for line in lines
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _frame(axes: Axes, x_label: str) -> str:
    """Return the grid and the names of the ticks."""
    parts = []
    for y in _y_ticks(axes):
        place = axes.at_y(y)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{place:.1f}" x2="{WIDTH - RIGHT}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{shown_number(y)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
    for x in ticks(*axes.x):
        place = axes.at_x(x)
        parts.append(f'<text x="{place:.1f}" y="{base + 15}" text-anchor="middle">{shown_number(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _y_ticks(axes: Axes) -> list[float]:
    """Return the ticks of y; of a logarithmic axis powers of ten, or round numbers between them where they are few."""
    if not axes.is_log:
        return [y for y in ticks(*axes.y) if not axes.is_count or y == round(y)]
    low, high = axes.y
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 3)
    stride = max(1, len(powers) // 5)
    return [f * 10.0**p for p in powers[::stride] for f in factors if low <= f * 10.0**p <= high]


def _marker(axes: Axes, x: float, name: str) -> str:
    place = axes.at_x(x)
    is_right = place > WIDTH / 2
    anchor, shift = ("end", -4) if is_right else ("start", 4)
    return (
        f'<line class="marker" x1="{place:.1f}" y1="{TOP}" x2="{place:.1f}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{place + shift:.1f}" y="{TOP + 9}" text-anchor="{anchor}">{escape(name)}</text>'
    )


def _line(axes: Axes, line: Line) -> str:
    points = thin(line.points)
    path = " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in points)
    colour = line.colour % NUM_COLOURS
    parts = [f'<polyline class="line s{colour} {line.kind}" points="{path}"/>']
    for (x, _), (low, high) in zip(line.points, line.bars, strict=False):
        ends = (axes.at_x(x), axes.at_y(low), axes.at_y(high))
        parts.append(
            '<line class="bar s{3}" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>'.format(*ends, colour)
        )
    if len(points) <= FEW_POINTS and line.kind != "faint":
        for x, y in points:
            name = escape(f"{line.name}, {shown_number(x)}: {y:.5g}")
            parts.append(
                f'<circle class="f{colour}" cx="{axes.at_x(x):.1f}" cy="{axes.at_y(y):.1f}" r="2.6">'
                f"<title>{name}</title></circle>"
            )
    return "".join(parts)
