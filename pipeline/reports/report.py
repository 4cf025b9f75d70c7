"""The report of an artifact: one HTML file that needs nothing else, and the same numbers as JSON.

The only jinja2 and matplotlib door; both are loaded when a report is made. No script, no link, no text of the corpus: a
content security policy says so to the browser too. Plots are SVG in the colours of the page, light and dark.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts.artifact import describe_bytes, verify_file
from pipeline.errors import VerificationError
from pipeline.reports.account import Account
from pipeline.root import layout
from pipeline.root.manifest import ArtifactManifest, DataFile, Histogram, parse, to_bytes
from pipeline.root.storage import Storage

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.axes import Axes

    from pipeline.reports.comparison import Comparison
    from pipeline.reports.compression import Compression

HTML, JSON = "report.html", "report.json"
TEMPLATE, COMPARISON, COMPRESSION = "report.html.jinja", "comparison.html.jinja", "compression.html.jinja"
HEAD = "page_head.html.jinja"
"""It is in all of them."""
INCHES = (4.6, 2.7)
"""441 pixels wide: letters of 10 points are still 10 pixels high on a phone of 390."""
INK, SERIES, CHOSEN, GRID = "#010203", "#040506", "#070809", "#0a0b0c"
"""Colours that stand for those of the page."""
COLOURS = {INK: "currentColor", SERIES: "var(--series)", CHOSEN: "var(--chosen)", GRID: "var(--grid)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vecmill",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": GRID,
    "grid.color": GRID,
}
SECONDS_SHOWN = 100


def put_report(storage: Storage, account: Account) -> dict[str, DataFile]:
    """Write the report of an artifact in the making beside its files."""
    made = {HTML: render(account), JSON: to_bytes(account)}
    for name, data in made.items():
        storage.put(f"{layout.artifact(account.artifact)}/{name}", data)
    return {name: describe_bytes(name, data) for name, data in made.items()}


def stored_account(storage: Storage, manifest: ArtifactManifest) -> Account:
    """The account of a published artifact with its last measurement; VerificationError where it has none or a damaged one."""
    path = f"{layout.artifact(manifest.version)}/{JSON}"
    if JSON not in manifest.report:
        raise VerificationError(f"{storage.at(path)}: artifacts had no report when this was made; run vecmill index --rebuild")
    verify_file(storage, path, manifest.report[JSON])
    return parse(Account, storage.read(path), storage.at(path)).model_copy(update={"evaluation": manifest.evaluation})


def render(account: Account) -> bytes:
    """The page, UTF-8."""
    import markupsafe

    plots = {name: markupsafe.Markup(svg) for name, svg in _plots(account).items()}  # noqa: S704 - drawn here, from numbers
    return _template().render(account=account, plots=plots).encode()


def render_comparison(comparison: "Comparison") -> bytes:
    """The page of a comparison, UTF-8. The texts of some of its queries are on it."""
    return _page(COMPARISON, comparison, lambda axes: _quality(axes, comparison))


def render_compression(compression: "Compression") -> bytes:
    """The page of what bytes buy, UTF-8."""
    return _page(COMPRESSION, compression, lambda axes: _front(axes, compression))


def _page(template: str, found: Any, draw: "Callable[[Axes], None]") -> bytes:
    import markupsafe

    plot = markupsafe.Markup(_svg(draw))  # noqa: S704 - drawn here, from numbers
    return _template(template).render(found=found, plot=plot).encode()


@cache
def _template(name: str = TEMPLATE) -> "Template":
    """Compiled once: that takes longer than all else of a small page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bytes": in_bytes, "seconds": in_seconds, "words": _words}
    return environment.get_template(name)


def in_bytes(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def in_seconds(seconds: float) -> str:
    """Seconds for people."""
    if seconds < SECONDS_SHOWN:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 60 * SECONDS_SHOWN else f"{seconds / 3600:,.1f} h"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plots(account: Account) -> dict[str, str]:
    """SVG by name."""
    found = {"tokens": _svg(lambda axes: _bars(axes, account.lengths.tokens, "tokens of a passage", "passages"))}
    found["recall"] = _svg(lambda axes: _recall(axes, account))
    health = account.evaluation.health
    if health and health.sizes:
        sizes = health.sizes
        found["lists"] = _svg(lambda axes: _bars(axes, sizes, "vectors in a list", "lists"))
    return found


def _bars(axes: "Axes", found: Histogram, what: str, of: str) -> None:
    from matplotlib.ticker import MaxNLocator

    widths = [end - start for start, end in zip(found.edges, found.edges[1:], strict=False)]
    axes.bar(found.edges[:-1], found.counts, widths, align="edge", color=SERIES)
    axes.set_xlabel(what)
    axes.set_ylabel(of)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _recall(axes: "Axes", account: Account) -> None:
    from matplotlib.ticker import LogLocator

    measured, chosen = account.evaluation.points, account.evaluation.point
    points = sorted(measured, key=lambda point: point.latency_ms)
    axes.plot([point.latency_ms for point in points], [point.recall for point in points], "o", color=SERIES, markersize=4)
    axes.plot([chosen.latency_ms], [chosen.recall], "D", color=CHOSEN, markersize=9)
    said = f"in use: {chosen.recall:.4f}, {chosen.latency_ms:.2f} ms"
    axes.text(0.98, 0.05, said, transform=axes.transAxes, ha="right", color=CHOSEN)  # nothing measured is slow and poor
    axes.axhline(account.target_recall, color=CHOSEN, linewidth=1, linestyle="--")
    axes.set_xscale("log", subs=range(2, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("milliseconds per query, one thread")
    axes.set_ylabel(f"recall@{account.evaluation.k}")


def _quality(axes: "Axes", comparison: "Comparison") -> None:
    for number, each in enumerate(comparison.artifacts):
        colour = SERIES if number else CHOSEN
        axes.plot([each.bytes_per_vector], [each.metrics["ndcg@10"]], "D" if number == 0 else "o", color=colour, markersize=8)
        axes.annotate(str(number + 1), (each.bytes_per_vector, each.metrics["ndcg@10"]), (7, 4), textcoords="offset points")
    axes.margins(0.2)
    axes.set_xlabel("bytes per vector in the index")
    axes.set_ylabel("nDCG@10")


def _front(axes: "Axes", compression: "Compression") -> None:
    for row in compression.rows:
        colour, mark = (CHOSEN, "D") if row.is_best else (SERIES, "o")
        axes.plot([row.memory_bytes], [row.worth], mark, color=colour, markersize=4)
    best = sorted((row.memory_bytes, row.worth) for row in compression.rows if row.is_best)
    axes.plot([size for size, _ in best], [worth for _, worth in best], color=CHOSEN, linewidth=1)
    axes.set_xlabel("bytes per vector in memory")
    axes.set_ylabel("nDCG@10" if compression.queries else "recall")


def _svg(draw: "Callable[[Axes], None]") -> str:
    """A plot as an SVG element in the colours of the page, without what only a file of its own would need."""
    import io
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it caches fonts, or has no home to do so, is no news
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES)
        figure.subplots_adjust(left=0.17, right=0.97, bottom=0.2, top=0.95)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _trimmed(file.getvalue())


def _trimmed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every plot of the page
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return re.sub(r"\n\s*", "\n", svg)
