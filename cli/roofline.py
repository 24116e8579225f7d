"""The roofline of a profile: a layout of lines, dots and texts, drawn as SVG by itself and as PNG with matplotlib."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from salekit.errors import SalekitError
from salekit.written_files import write, writing

SUFFIXES = (".svg", ".png")
WIDTH = 1120
_TOP, _HEIGHT = 92, 470  # of the panels
_LEFT, _LEFT_WIDTH = 70, 215  # of the panel of kernels that multiply nothing
_RIGHT, _RIGHT_WIDTH = 360, 400
_LEGEND = 790
_LINE = 19  # pixels from one entry of the legend to the next
_STAGES = {  # colours that differ in lightness, too
    "quantize": "#3b6fd4",
    "anchors": "#2a9d74",
    "estimate": "#e07a10",
    "attend": "#b8336a",
    "pool": "#6a3fa0",
    "dense": "#555560",
}
_INK, _FAINT, _GRID, _ROOF = "#202028", "#70707a", "#e4e4ea", "#8a8a96"


@dataclass(frozen=True)
class Line:
    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    colour: str
    radius: float = 6.8


@dataclass(frozen=True)
class Text:
    """anchor: "start", "middle" or "end"; y: the base line; turned: reads upwards."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = _INK
    anchor: str = "start"
    bold: bool = False
    turned: bool = False


@dataclass
class Scene:
    """What is drawn, in pixels from the upper left corner; what comes later lies on top."""

    width: int
    height: int
    items: list[Line | Dot | Text] = field(default_factory=list)

    def add(self, *items: Line | Dot | Text) -> None:
        self.items += items


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis: values from low to high at pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def clipped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))

    def decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**exponent for exponent in range(first, last + 1)]


def layout(report: dict[str, Any]) -> Scene:
    """The picture of a report of ``salekit profile``."""
    kernels = [one for one in (*report["kernels"], *report["dense"]) if one["expression"]]  # no fills
    ceilings = report["ceilings"]
    scene = Scene(
        WIDTH, max(_TOP + _HEIGHT + 70, _TOP + _LINE * (len(kernels) + len(ceilings["operations_per_s"]) + 6))
    )
    heading = "Roofline" if not report["predicted"] else "Roofline, a prediction: nothing here was timed"
    scene.add(
        Text(20, 30, f"{heading}: {report['gpu']['name']}", 18, bold=True),
        Text(20, 52, report["title"], 12.5, _FAINT),
    )
    products = [(i, one) for i, one in enumerate(kernels, 1) if one["operations_per_s"]]
    others = [(i, one) for i, one in enumerate(kernels, 1) if not one["operations_per_s"]]
    _products_panel(scene, products, ceilings)
    _bytes_panel(scene, others, ceilings["bytes_per_s"])
    _legend(scene, kernels, report["predicted"])
    return scene


def _products_panel(scene: Scene, products: list, ceilings: dict[str, Any]) -> None:
    roofs, slope = ceilings["operations_per_s"], ceilings["bytes_per_s"]
    used = {unit for _, one in products for unit in one["operations"]}
    intensities = [one["num_operations"] / one["bytes"] for _, one in products]
    rates = [one["operations_per_s"] for _, one in products]
    ridges = [rate / slope for rate in roofs.values()]
    x = _Scale(
        10 ** math.floor(math.log10(min([*intensities, min(ridges) / 4]))),
        10 ** math.ceil(math.log10(max([*intensities, max(ridges) * 4]))),
        _RIGHT,
        _RIGHT + _RIGHT_WIDTH,
    )
    y = _Scale(
        10 ** math.floor(math.log10(min([*rates, min(roofs.values()) / 10]))),
        2 * max([*rates, *roofs.values()]),
        _TOP + _HEIGHT,
        _TOP,
    )
    _axes(scene, x, y, "operations a byte", "operations a second (of matrix products)", _tera)
    for unit, rate in sorted(roofs.items(), key=lambda item: item[1]):
        start = max(x.low, y.low / slope)
        points = ((x(start), y.clipped(start * slope)), (x(rate / slope), y(rate)), (x.end, y(rate)))
        scene.add(Line(points, _INK if unit in used else _ROOF, 1.8 if unit in used else 1.0, unit not in used))
    labels = _spread([(y(rate), unit, rate) for unit, rate in roofs.items()], 13)
    for at, unit, rate in labels:
        colour = _INK if unit in used else _FAINT
        scene.add(Text(x.end + 5, at + 4, f"{unit} {rate / 1e12:.0f}", 11, colour, bold=unit in used))
    middle = math.sqrt(max(x.low, y.low / slope) * min(ridges))
    scene.add(Text(x(middle) - 8, y.clipped(middle * slope) - 6, f"{slope / 1e12:.2f} TB/s", 11, _FAINT, "end"))
    for i, one in products:
        at = x(one["num_operations"] / one["bytes"]), y(one["operations_per_s"])
        _numbered(scene, *at, i, one)


def _bytes_panel(scene: Scene, others: list, roof: float) -> None:
    rates = [one["bytes_per_s"] for _, one in others]
    y = _Scale(10 ** math.floor(math.log10(min([*rates, roof / 10]))), 2 * max([*rates, roof]), _TOP + _HEIGHT, _TOP)
    x = _Scale(1.0, 10.0, _LEFT, _LEFT + _LEFT_WIDTH)
    _axes(scene, x, y, "", "bytes a second", _giga, is_ruled=False)
    scene.add(
        Text(_LEFT + _LEFT_WIDTH / 2, _TOP + _HEIGHT + 36, "no matrix products", 12, anchor="middle"),
        Line(((x.start, y(roof)), (x.end, y(roof))), _INK, 1.8),
        Text(x.start + 4, y(roof) - 13, f"copy {roof / 1e12:.2f} TB/s", 11, bold=True),
    )
    for place, (i, one) in enumerate(others, 1):  # side by side, in their order
        at = _LEFT + place * _LEFT_WIDTH / (len(others) + 1)
        _numbered(scene, at, y(one["bytes_per_s"]), i, one)


def _axes(scene: Scene, x: _Scale, y: _Scale, x_name: str, y_name: str, y_text: Any, is_ruled: bool = True) -> None:
    for value in x.decades() if is_ruled else ():
        scene.add(
            Line(((x(value), y.start), (x(value), y.end)), _GRID),
            Text(x(value), y.start + 16, f"{value:,.0f}" if value >= 1 else f"{value:g}", 11, _FAINT, "middle"),
        )
    for value in y.decades():
        scene.add(
            Line(((x.start, y(value)), (x.end, y(value))), _GRID),
            Text(x.start - 6, y(value) + 4, y_text(value), 11, _FAINT, "end"),
        )
    corners = ((x.start, y.end), (x.start, y.start), (x.end, y.start))
    scene.add(
        Line(corners, _INK),
        Text((x.start + x.end) / 2, y.start + 36, x_name, 12, anchor="middle"),
        Text(x.start - 56, (y.start + y.end) / 2, y_name, 12, anchor="middle", turned=True),
    )


def _numbered(scene: Scene, x: float, y: float, number: int, one: dict[str, Any]) -> None:
    """A dot with its kernel's number; where another one lies already, moved aside, with a line to its place."""
    taken = [(item.x, item.y) for item in scene.items if isinstance(item, Dot)]
    at = x, y
    for step in range(1, 40):
        if all(math.hypot(at[0] - other[0], at[1] - other[1]) >= 13.5 for other in taken):
            break
        at = x + 9 * step * (-1 if step % 2 else 1) / 2, y + 5 * step
    if at != (x, y):
        scene.add(Line(((x, y), at), _STAGES[one["stage"]]))
    scene.add(
        Dot(*at, _STAGES[one["stage"]]),
        Text(at[0], at[1] + 3.3, str(number), 9, "#ffffff", "middle", bold=True),
    )


def _legend(scene: Scene, kernels: list[dict[str, Any]], is_predicted: bool) -> None:
    y = _TOP + 4
    left = _LEGEND + 55
    scene.add(
        Text(WIDTH - 62, y, "ms", 11, _FAINT, "end"),
        Text(WIDTH - 12, y, "bound" if is_predicted else "of roof", 11, _FAINT, "end"),
    )
    stage = ""
    for number, one in enumerate(kernels, 1):
        if one["stage"] != stage:
            stage = one["stage"]
            y += _LINE
            scene.add(Text(left - 8, y, stage, 12, _STAGES[stage], bold=True))
        y += _LINE
        share = ("mem" if one["bound"] == "memory" else "ops") if is_predicted else f"{one['share']:.0%}"
        scene.add(
            Dot(left, y - 4, _STAGES[stage]),
            Text(left, y - 0.7, str(number), 9, "#ffffff", "middle", bold=True),
            Text(left + 14, y, one["kernel"], 11),
            Text(WIDTH - 62, y, _short(one["ms"]), 11, anchor="end"),
            Text(WIDTH - 12, y, share, 11, anchor="end"),
        )


def _spread(labels: list[tuple], distance: float) -> list[tuple]:
    """(position, ...) moved apart to at least ``distance``, upwards from the lowest on the page."""
    placed: list[tuple] = []
    for at, *rest in sorted(labels, key=lambda label: -label[0]):
        at = min(at, placed[-1][0] - distance) if placed else at
        placed.append((at, *rest))
    return placed


def _tera(value: float) -> str:
    return f"{value / 1e12:,g} T"


def _giga(value: float) -> str:
    return f"{value / 1e12:g} TB" if value >= 1e12 else f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def _short(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}" if ms >= 0.01 else f"{ms:.4f}"


# --- files -----------------------------------------------------------------------------------------------------------
def check_drawable(path: Path) -> None:
    """SalekitError when nothing here can draw that kind of file."""
    if path.suffix.lower() == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise SalekitError(
                f'{path}: PNG needs matplotlib: pip install "salekit[plot]"; or choose a name that ends in .svg'
            ) from None


def save(scene: Scene, path: Path, title: str) -> None:
    """Write the scene as the file's suffix says: .svg or .png."""
    if path.suffix.lower() == ".png":
        _save_png(scene, path)
    else:
        write(path, encode_svg(scene, title))


def encode_svg(scene: Scene, title: str) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {scene.width} {scene.height}" width="{scene.width}" '
        f'height="{scene.height}" font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{scene.width}" height="{scene.height}" fill="white"/>',
    ]
    for item in scene.items:
        if isinstance(item, Line):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in item.points)
            dashes = ' stroke-dasharray="4 4"' if item.dashed else ""
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{item.colour}" stroke-width="{item.width}"{dashes}/>'
            )
        elif isinstance(item, Dot):
            parts.append(f'<circle cx="{item.x:.1f}" cy="{item.y:.1f}" r="{item.radius}" fill="{item.colour}"/>')
        else:
            weight = ' font-weight="bold"' if item.bold else ""
            turn = f' transform="rotate(-90 {item.x:.1f} {item.y:.1f})"' if item.turned else ""
            parts.append(
                f'<text x="{item.x:.1f}" y="{item.y:.1f}" font-size="{item.size}" fill="{item.colour}" '
                f'text-anchor="{item.anchor}"{weight}{turn}>{escape(item.text)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _save_png(scene: Scene, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    dpi = 72  # a point is a pixel of the scene
    figure = Figure((scene.width / dpi, scene.height / dpi), dpi=dpi, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    for order, item in enumerate(scene.items):
        if isinstance(item, Line):
            style = (0, (4, 4)) if item.dashed else "-"
            axes.plot(*zip(*item.points), color=item.colour, linewidth=item.width, linestyle=style, zorder=order)
        elif isinstance(item, Dot):
            axes.add_patch(Circle((item.x, item.y), item.radius, color=item.colour, linewidth=0, zorder=order))
        else:
            axes.text(
                item.x,
                item.y,
                item.text,
                fontsize=item.size * 0.9,
                color=item.colour,
                zorder=order,
                ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
                va="bottom" if item.turned else "baseline",
                weight="bold" if item.bold else "normal",
                rotation=90 if item.turned else 0,
                parse_math=False,
            )
    FigureCanvasAgg(figure)
    with writing(path) as file:
        figure.savefig(file, dpi=2 * dpi, format="png")
