"""Text beside points that hides neither another text nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
DISTANCES = (8, 13, 20, 30, 42)  # points from the marker to the text's nearest edge
DIRECTIONS = (45, 0, 315, 135, 180, 225, 90, 270)  # degrees, the favourite first
MARKER = 5.0  # half a marker's width in points
LEADER_FROM = 20  # points from which on a thin line joins text and point


@dataclass(frozen=True)
class Label:
    """A text, and the point with error bars that it belongs to (data units)."""

    text: str
    x: float
    y: float
    dx: float  # half the length of the horizontal error bar
    dy: float
    color: str


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each text near its point, at the place where it covers least of what is there already.

    Points and error bars are there first, then the texts in their order; places are tried from
    near to far.  The axes' limits must be final.
    """
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # runs the layout, after which data coordinates have their pixels
    scale = axes.figure.dpi / 72
    taken = [box for label in labels for box in _mark_boxes(axes, label, MARKER * scale)]
    inside = _edges(axes.get_window_extent())
    for label in labels:
        if not label.text:
            continue
        point = tuple(axes.transData.transform((label.x, label.y)))
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            color=label.color,
            fontsize=8.5,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=6,
        )
        left, bottom, right, top = _edges(note.get_window_extent())
        size = (right - left, top - bottom)
        boxes = {d: [_box(point, size, d * scale, a) for a in DIRECTIONS] for d in DISTANCES}
        distance, box = min(
            ((d, box) for d, around in boxes.items() for box in around),
            key=lambda place: _cost(place[1], taken, inside),
        )
        taken.append(box)
        # The text's own origin may lie inside its box, so it moves by the difference.
        note.set_position(((box[0] - left) / scale, (box[1] - bottom) / scale))
        if distance >= LEADER_FROM:
            _draw_leader(axes, point, box)


def _draw_leader(axes: Axes, point: Sequence[float], box: Box) -> None:
    """A thin line from a point to the nearest place of its far text."""
    end = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
    ends = axes.transData.inverted().transform([point, end])
    axes.plot(*zip(*ends, strict=True), color="#999999", linewidth=0.6, zorder=3)


def _edges(extent: Bbox) -> Box:
    return (extent.x0, extent.y0, extent.x1, extent.y1)


def _box(point: Sequence[float], size: tuple[float, float], distance: float, degrees: float) -> Box:
    """The text's box when its nearest edge lies at that distance and direction from the point."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = point[0] + cos * distance + _side(cos) * size[0] / 2
    y = point[1] + sin * distance + _side(sin) * size[1] / 2
    return (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)


def _side(component: float) -> int:
    return 0 if abs(component) < 1e-9 else int(math.copysign(1, component))


def _mark_boxes(axes: Axes, label: Label, half: float) -> list[Box]:
    """The pixels of a point's marker and of its two error bars."""
    left, bottom = axes.transData.transform((label.x - label.dx, label.y - label.dy))
    right, top = axes.transData.transform((label.x + label.dx, label.y + label.dy))
    x, y = axes.transData.transform((label.x, label.y))
    return [
        (x - half, y - half, x + half, y + half),
        (left, y - 1, right, y + 1),
        (x - 1, bottom, x + 1, top),
    ]


def _cost(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """The area by which the box covers others, and by which it leaves the frame."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 2 * (area - _overlap(box, inside))


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
