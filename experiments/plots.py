"""Plots as PNG files, legible at 800 by 500 pixels, with a colour-blind-safe palette.

Figures are plain objects; without `pyplot` there is no global state and no display.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.text
import matplotlib.ticker
import numpy as np
from etils import epath

from lm.devices import processes

# Palette of Okabe and Ito (2008), without its yellow, which is too pale on white.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# Line styles for the second and later cycles through the colours.
STYLES = ('-', '--', ':', '-.')
MARKERS = 'osD^vPX'
_LEADER = {'arrowstyle': '-', 'color': '#888888', 'linewidth': 0.7, 'shrinkA': 0, 'shrinkB': 5}


class Point(NamedTuple):
    """A labelled point; points of one `group` share colour and marker."""

    label: str
    x: float
    y: float
    group: str = ''


def scatter(
    path: epath.PathLike,
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Saves a scatter plot whose labels overlap neither each other nor the points.

    Raises:
      ValueError: there are no points, or a coordinate is not finite (on a log axis: not positive).
    """
    if not points:
        raise ValueError(f'{path}: no points to plot')
    for point in points:
        _check(path, point.label, [point.x], [point.y], log_x, log_y)
    figure, axes = _figure(title, x_label, y_label, log_x, log_y)
    groups = list(dict.fromkeys(point.group for point in points))
    for i, group in enumerate(groups):
        xs, ys = zip(*((p.x, p.y) for p in points if p.group == group), strict=True)
        axes.plot(
            xs,
            ys,
            linestyle='none',
            marker=MARKERS[i % len(MARKERS)],
            color=COLORS[i % len(COLORS)],
            markersize=8,
            label=group,
        )
    axes.margins(0.12)
    if len(groups) > 1:
        figure.legend(loc='outside lower center', ncols=len(groups), frameon=False)
    _place_labels(figure, axes, points)
    save(path, figure)


def curves(
    path: epath.PathLike,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
) -> None:
    """Saves `lines`, name -> (x, y); the legend lists them in the order of their last values.

    Raises:
      ValueError: there are no lines; or a line is empty, has x and y of different lengths, or a
        coordinate that is not finite (on a log axis: not positive).
    """
    if not lines:
        raise ValueError(f'{path}: no lines to plot')
    for name, (x, y) in lines.items():
        _check(path, name, x, y, log_x, log_y)
    figure, axes = _figure(title, x_label, y_label, log_x, log_y)
    drawn = []
    for i, (name, (x, y)) in enumerate(lines.items()):
        (line,) = axes.plot(
            x,
            y,
            STYLES[i // len(COLORS) % len(STYLES)],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)] if markers else None,
            linewidth=1.8,
            label=name,
        )
        drawn.append((y[-1], line))
    # Same top-to-bottom order as the line ends, so that the legend reads straight across.
    drawn.sort(key=lambda pair: -pair[0])
    figure.legend(handles=[line for _, line in drawn], loc='outside right center', frameon=False)
    save(path, figure)


def bars(
    path: epath.PathLike, groups: Mapping[str, Mapping[str, float]], *, title: str, y_label: str
) -> None:
    """Saves a bar chart, group -> name -> height; a name has the same colour in all groups.

    Raises:
      ValueError: there are no groups.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise ValueError(f'{path}: no bars to plot')
    figure, axes = _figure(title, '', y_label, False, False)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        here = [(at, group[name]) for at, group in enumerate(groups.values()) if name in group]
        x = [at + (i - (len(names) - 1) / 2) * width for at, _ in here]
        axes.bar(
            x, [height for _, height in here], width, color=COLORS[i % len(COLORS)], label=name
        )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(visible=False, axis='x')
    figure.legend(loc='outside lower center', ncols=min(len(names), 4), frameon=False)
    save(path, figure)


def _check(
    path: epath.PathLike,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    log_x: bool,
    log_y: bool,
) -> None:
    if len(x) != len(y) or not len(x):
        raise ValueError(f'{path}: {name!r} has {len(x)} x and {len(y)} y: expected equal, not 0')
    for axis, values, log in (('x', x, log_x), ('y', y, log_y)):
        array = np.asarray(values, np.float64)
        bad = array[~np.isfinite(array) | (log & (array <= 0))]
        if bad.size:
            raise ValueError(f'{path}: {name!r} has {axis} = {bad[0]:g}, which cannot be plotted')


def _figure(
    title: str, x_label: str, y_label: str, log_x: bool, log_y: bool
) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=150, layout='constrained')
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc='left', fontsize=13, fontweight='bold')
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.set_xscale('log' if log_x else 'linear')
    axes.set_yscale('log' if log_y else 'linear')
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            axis.set_major_formatter(lambda value, _: _short(value))
            axis.set_minor_formatter(lambda value, _: _short(value) if _is_labelled(value) else '')
        else:
            axis.set_major_formatter(_LinearFormatter())
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#dddddd', linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _short(value: float) -> str:
    """Returns 1500 as '1.5k' and 2e9 as '2G'."""
    for scale, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= scale:
            return f'{value / scale:g}{letter}'
    return f'{value:g}'


def _is_labelled(value: float) -> bool:
    # Label 2, 3 and 5 between powers of ten: enough on a short axis, legible on a long one.
    return f'{value:e}'[0] in '235'


class _LinearFormatter(matplotlib.ticker.ScalarFormatter):
    """Formats small numbers as matplotlib does (equal decimals per axis), large by `_short`."""

    def __call__(self, x, pos=None):
        assert self.axis is not None
        large = max(map(abs, self.axis.get_view_interval())) >= 2000
        return _short(x) if large else super().__call__(x, pos)


def _place_labels(
    figure: matplotlib.figure.Figure, axes: matplotlib.axes.Axes, points: Sequence[Point]
) -> None:
    """Puts each label at the nearest free position around its point."""
    figure.draw_without_rendering()  # fixes the axis limits, so that pixel positions are valid
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dots_xy = axes.transData.transform([(p.x, p.y) for p in points])
    taken: list[Sequence[float]] = [(x - 9, y - 9, x + 9, y + 9) for x, y in dots_xy]
    frame = axes.get_window_extent(renderer).extents
    near = [(9, 0), (-9, 0), (0, 11), (0, -11), (8, 9), (-8, 9), (8, -9), (-8, -9)]
    far = [(ring * dx, ring * dy) for ring in (2, 3, 4, 6) for dx, dy in near]
    for point in points:
        candidates: list[tuple[float, matplotlib.text.Annotation, Sequence[float]]] = []
        for dx, dy in near + far:
            text = axes.annotate(
                point.label,
                (point.x, point.y),
                xytext=(dx, dy),
                textcoords='offset points',
                ha='left' if dx > 0 else 'right' if dx < 0 else 'center',
                va='bottom' if dy > 0 else 'top' if dy < 0 else 'center',
                fontsize=10,
                arrowprops=None if (dx, dy) in near else _LEADER,
            )
            text.set_in_layout(False)  # otherwise the axes move, and with them the positions
            text.update_positions(renderer)
            # The extent of the text alone: its connecting line may cross other labels.
            box = matplotlib.text.Text.get_window_extent(text, renderer).extents
            outside = _area(box, box) - _area(box, frame)
            cost = outside + sum(_area(box, other) for other in taken)
            candidates.append((cost, text, box))
            if cost <= 0:
                break
        best = min(candidates, key=lambda candidate: candidate[0])
        for candidate in candidates:
            if candidate is not best:
                candidate[1].remove()
        taken.append(best[2])


def _area(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the overlap of two boxes `(left, bottom, right, top)`, in square pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def save(path: epath.PathLike, figure: matplotlib.figure.Figure) -> None:
    """Writes a figure as PNG, atomically.

    In a multi-process run, only process 0 writes.
    """
    if not processes.is_first():
        return
    file = epath.Path(path)
    partial = file.parent / f'.{file.name}.{os.getpid()}.partial'
    try:
        with partial.open('wb') as f:
            figure.savefig(f, format='png')
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
