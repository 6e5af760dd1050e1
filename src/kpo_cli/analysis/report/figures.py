"""The figures, as PNG and SVG, from analysis.json and a few responses of the sample."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kpo_cli.analysis.statistics.analyse import Analysis
from kpo_cli.analysis.statistics.series import RAW, Series
from kpo_cli.runs.ratios import Ratios

INK = "#262626"
"""Of text and axes; becomes the page's own colour inside the report."""
COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, told apart by the colour-blind, and visible on white and on black; raw is grey."""
TRACES = 3
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kpo",
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """Our style, whatever the user's matplotlib is set to."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        yield


def draw_all(analysis: Analysis) -> dict[str, Figure]:
    """Every figure that there is something to draw for, by file name."""
    found = analysis.found
    if not found["filters"] or not found["filters"][RAW]["std"]["value"]:
        return {}
    with styled():
        return {
            "traces": traces(analysis),
            "run_lengths": run_lengths(found),
            **({"spectrum": spectrum(found)} if _has_spectrum(found) else {}),
            "autocorrelation": autocorrelation(found),
        }


def _has_spectrum(found: dict[str, Any]) -> bool:
    """Constant and short responses have no spectrum, and nothing has no place on a logarithmic axis."""
    powers = [entry["spectrum"]["relative_to_white_noise"] for entry in found["filters"].values()]
    return bool((np.array(powers, float) > 0).any())


def save(figures: dict[str, Figure], folder: Path) -> dict[str, str]:
    """Write each as PNG and SVG into `folder`; returns the SVG texts."""
    folder.mkdir(exist_ok=True)
    texts = {}
    with styled():
        for name, figure in figures.items():
            FigureCanvasAgg(figure).print_png(str(folder / f"{name}.png"))
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            texts[name] = buffer.getvalue()
            (folder / f"{name}.svg").write_text(texts[name], "utf-8")
    return texts


def inline(svg: str, name: str) -> str:
    """The SVG as a part of a page: in the page's colour, without a fixed size, its identifiers its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return body.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def colour_of(names: list[str]) -> Callable[[str], str]:
    return lambda name: COLOURS[names.index(name) % len(COLOURS)]


def main_filter(found: dict[str, Any]) -> str:
    """The filter that is drawn beside raw: the run's own, or else the first."""
    others = [name for name in found["filters"] if name != RAW]
    return "recorded" if "recorded" in others else (others or [RAW])[0]


def _panels(count: int, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=150)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def available(series: list[Series], batch: Ratios) -> list[Series]:
    """Those that can be computed for `batch`: a series that was only recorded may be missing from some files."""
    return [each for each in series if each.ratio_filter is not None or batch.filtered_log_ratio is not None]


def longest(sample: Ratios, count: int) -> Ratios:
    """The longest responses of the sample: those where a filter has most to do."""
    return sample.rows(np.argsort(-sample.lengths, kind="stable")[:count])


def _legend(figure: Figure, axis: Any) -> None:
    """One legend for all panels, above them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)


def traces(analysis: Analysis) -> Figure:
    """z of a few responses, raw and filtered, on an axis that is linear near 0 and logarithmic beyond."""
    chosen = longest(analysis.sample, TRACES)
    names = [series.name for series in analysis.series]
    colour = colour_of(names)
    figure = Figure(figsize=(8, 2.1 * len(chosen)), dpi=150)
    axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    values = {series.name: series.of(chosen) for series in available(analysis.series, chosen)}
    sizes = np.abs(values[RAW][chosen.mask])
    threshold = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1e-6
    for row, axis in enumerate(axes):
        place = np.flatnonzero(chosen.mask[row])
        for name, x in values.items():
            # Gaps in the mask are gaps in the line.
            line = np.where(chosen.mask[row], x[row], np.nan)[: place[-1] + 1]
            style = {"linewidth": 0.8, "marker": ".", "markersize": 3} if name == RAW else {"linewidth": 1.2}
            axis.plot(np.arange(1, len(line) + 1), line, color=colour(name), label=name, **style)
        axis.set_yscale("symlog", linthresh=threshold)
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.set_title(f"step {int(chosen.step[row])}, {len(place)} tokens", loc="left")
        axis.set_ylabel("log-ratio")
    axes[-1].set_xlabel("token")
    _legend(figure, axes[0])
    return figure


def _values(series: Series, batch: Ratios) -> Any:
    return (
        series.of(batch) if batch.filtered_log_ratio is not None or series.ratio_filter is not None else batch.log_ratio
    )


def run_lengths(found: dict[str, Any]) -> Figure:
    """How often runs have each length, with the nulls, for raw and the main filter."""
    names = list(dict.fromkeys([RAW, main_filter(found)]))
    figure, axes = _panels(len(names), 8, 3)
    for name, axis in zip(names, axes, strict=True):
        entry = found["filters"][name]
        counts = {int(length): count for length, count in entry["run_lengths"]["counts"].items()}
        total, top = sum(counts.values()), max(counts)
        axis.bar(list(counts), [count / total for count in counts.values()], color=COLOURS[name != RAW], width=0.8)
        for kind, style in (("null_shuffled", "-"), ("null_sign_flipped", ":")):
            if kind in entry["curves"]:
                curve = np.array(entry["curves"][kind]["run_lengths"])[: top + 1]
                drawn = np.flatnonzero(curve)
                axis.plot(drawn, curve[drawn], style, color=INK, linewidth=1, label=kind.replace("_", " "))
        axis.set(yscale="log", xlabel="run length, tokens", ylabel="share of runs")
        axis.set_title(name, loc="left")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    return figure


def spectrum(found: dict[str, Any]) -> Figure:
    """Mean periodogram relative to white noise; dashed: the same with tokens shuffled."""
    figure, (axis,) = _panels(1, 8, 3.2)
    colour = colour_of(list(found["filters"]))
    for name, entry in found["filters"].items():
        frequency = entry["spectrum"]["frequency"]
        power = np.array(entry["spectrum"]["relative_to_white_noise"], float)
        axis.plot(frequency, power, color=colour(name), label=name)
        if "null_shuffled" in entry["curves"]:
            null = np.array(entry["curves"]["null_shuffled"]["spectrum"], float)
            axis.plot(frequency, null, "--", color=colour(name), linewidth=0.8)
    axis.axvline(found["settings"]["cutoff"], color=INK, linewidth=0.5)
    axis.set(yscale="log", xlabel="cycles per token", ylabel="power, white noise = 1")
    _legend(figure, axis)
    return figure


def autocorrelation(found: dict[str, Any]) -> Figure:
    """Of z and of its sign, by distance; dashed: the same with tokens shuffled."""
    figure, axes = _panels(2, 8, 3.2)
    colour = colour_of(list(found["filters"]))
    for axis, kind, null in zip(axes, ("z", "sign"), ("autocorrelation", "sign_autocorrelation"), strict=True):
        for name, entry in found["filters"].items():
            values = entry["autocorrelation_by_lag"][kind]
            lags = np.arange(1, len(values) + 1)
            axis.plot(lags, values, color=colour(name), label=name)
            if "null_shuffled" in entry["curves"]:
                axis.plot(lags, entry["curves"]["null_shuffled"][null], "--", color=colour(name), linewidth=0.8)
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.set(xlabel="distance, tokens", ylabel=f"autocorrelation of {kind}")
    _legend(figure, axes[0])
    return figure
