"""What the denoising run shows: its table, its story and its figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
_COLOURS = {
    "hodl": "#0072B2",
    "hodl-simple": "#56B4E9",
    "dladmm-weighted": "#D55E00",
    "dladmm": "#E69F00",
    "untrained": "#7F7F7F",
    "projected": "#0072B2",
    "free": "#D55E00",
}
_LABELS = {
    "hodl": "HODL, aggregated",
    "hodl-simple": "HODL, simple",
    "dladmm-weighted": "D-LADMM + weight network",
    "dladmm": "D-LADMM",
    "untrained": "untrained",
    "projected": "projected",
    "free": "not projected",
}
_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
}


def environment() -> dict[str, Any]:
    """Device and versions, for the record."""
    packages = ("odljax", "jax", "jaxlib", "optax", "flax", "scikit-image", "scikit-learn")
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


# In words ------------------------------------------------------------------------------------------------------------


def tell(results: dict[str, Any], out: Path) -> None:
    """Prints the table and what follows from it."""
    names = list(results["rows"][0]["psnr"])
    table = Table(title="Held-out photographs, 10 % salt-and-pepper noise", title_justify="left")
    table.add_column("method")
    for name in names:
        table.add_column(f"{name}\nPSNR dB", justify="right")
    for title in ("mean\nPSNR dB", "mean\nSSIM", "training\ns", "restoring\ns", "learned\nnumbers"):
        table.add_column(title, justify="right")
    best = max(np.mean(list(row["psnr"].values())) for row in results["rows"])
    for row in results["rows"]:
        mean = np.mean(list(row["psnr"].values()))
        cells = [row["title"], *(f"{row['psnr'][name]:.2f}" for name in names), f"{mean:.2f}"]
        cells += [f"{np.mean(list(row['ssim'].values())):.3f}", _or_blank(row["training_seconds"], "{:.0f}")]
        cells += [_or_blank(row["restoring_seconds"], "{:.1f}"), _or_blank(row["parameters"], "{:,}")]
        table.add_row(*cells, style="bold" if mean == best else None, end_section=row["method"] == "biharmonic")
    # A file or a pipe has no width of its own.
    console = Console(width=None if Console().is_terminal else 120)
    console.print()
    console.print(table)
    for line in _story(results):
        console.print(line, highlight=False)
    console.print(f"\n{results['seconds']:.0f} s. Figure: {out / 'denoise.png'}; numbers: {out / 'denoise.json'}")


def _or_blank(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _story(results: dict[str, Any]) -> list[str]:
    lines = [
        "Salt and pepper is easy to recognise: the filters that repair black and white pixels only use that, and so do "
        "the weight networks."
    ]
    for key, curve in results["curves"].items():
        if key in ("untrained", "dladmm", "dladmm-weighted"):
            continue
        psnr, trained = curve["psnr"], (len(curve["psnr"]) - 1) // 4
        lines.append(
            f"{_LABELS[key]}: held-out patches reach {psnr[trained]:.2f} dB at the {trained} trained steps and hold "
            f"{psnr[-1]:.2f} dB at {len(psnr) - 1}."
        )
    for key, probe in results["probe"].items():
        lines.append(
            f"{_LABELS[key]}: |A| = {probe['norm_A']:.6f}, lambda_min(G) = {probe['smallest_metric_eigenvalue']:.4f}, "
            f"largest stretch in G at {probe['points']} points {probe['stretch']:.5f}."
        )
    for name, run in results["experiment"].items():
        norm, residual, psnr = (_plain(run[metric]) for metric in ("norm_A", "residual", "psnr"))
        lines.append(
            f"Ten times the rate, {_LABELS[name]}: |A| up to {np.nanmax(norm):.2f}, residual up to "
            f"{np.nanmax(residual):.2g}, PSNR down to {np.nanmin(psnr):.1f} dB in {len(psnr)} updates."
        )
    return lines


# In pictures ---------------------------------------------------------------------------------------------------------


def figure(results: dict[str, Any], pictures: dict[str, np.ndarray], path: Path) -> None:
    """Draws the photographs with a crop of each, and the curves below them."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=(13, 10.8), layout="constrained")
        canvas.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)  # pyright: ignore
        halves: Any = canvas.subfigures(2, 1, height_ratios=[6.8, 3.7])
        upper, lower = halves
        _photographs(upper, results, pictures)
        panels = lower.add_gridspec(1, 4)
        _steps(lower.add_subplot(panels[0]), results)
        _inner(lower.add_subplot(panels[1]), results)
        _outer(lower.add_subplot(panels[2]), results)
        pair = panels[3].subgridspec(2, 1)
        top = lower.add_subplot(pair[0])
        _blow_up(top, lower.add_subplot(pair[1], sharex=top), results)
        canvas.savefig(path, dpi=120)


def _photographs(canvas: Any, results: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
    first = next(iter(results["rows"][0]["psnr"]))
    rows = {row["method"]: row for row in results["rows"]}
    shown = {"clean": None, "noisy": "noisy", "median": "median"}
    titles = {"clean": f"{first}, held out", "noisy": "noisy", "median": "3 × 3 median"}
    if "restored" in pictures:
        shown["restored"] = key = next(reversed(results["training"]))
        titles["restored"] = _LABELS[key]
    else:
        shown["switching"], titles["switching"] = "switching", "median where black or white"
    h, w = pictures["clean"].shape
    size = min(h, w) // 4
    top, left = round(0.16 * h), round(0.36 * w)
    axes = canvas.subplots(2, 4)
    for (name, key), column in zip(shown.items(), axes.T, strict=True):
        image = pictures[name]
        crop = image[top : top + size, left : left + size]
        for ax, pixels in zip(column, (image, crop), strict=True):
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[:].set_visible(ax is column[1])
            ax.spines[:].set(color="#E69F00", linewidth=1.6)
        column[0].add_patch(Rectangle((left, top), size, size, fill=False, edgecolor="#E69F00", linewidth=1.6))
        psnr = "" if key is None else f"   {rows[key]['psnr'][first]:.2f} dB"
        column[0].set_title(titles[name] + psnr, fontsize=12)


def _empty(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, color="#7F7F7F")
    ax.set(xticks=[], yticks=[])


def _steps(ax: Axes, results: dict[str, Any]) -> None:
    ax.set(title="Beyond the trained steps", xlabel="inner steps", ylabel="PSNR of held-out patches [dB]")
    if not results["curves"]:
        return _empty(ax, "no method was run")
    lengths = [len(curve["psnr"]) - 1 for curve in results["curves"].values()]
    for rank, key in enumerate(key for key in _COLOURS if key in results["curves"]):
        psnr = _plain(results["curves"][key]["psnr"])
        ax.plot(psnr, color=_COLOURS[key], label=_LABELS[key], zorder=3 - rank / 10)
        if "dladmm" in key:
            ax.plot(len(psnr) - 1, psnr[-1], "o", color=_COLOURS[key], markersize=5)
    trained = min(min(lengths), max(lengths) // 4)
    ax.axvline(trained, color="#7F7F7F", linewidth=1, linestyle=":")
    ax.annotate(
        "trained", (trained, 0.02), (3, 0), ("data", "axes fraction"), "offset points", color="#7F7F7F", fontsize=8.5
    )
    highest = max(np.nanmax(_plain(curve["psnr"])) for curve in results["curves"].values())
    ax.set(xlim=(0, max(lengths) + 1), ylim=(15, highest + 1))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.06))


def _inner(ax: Axes, results: dict[str, Any]) -> None:
    ax.set(title="Inner convergence", xlabel="inner step k", ylabel="residual ‖u − D(u)‖, per patch")
    key = next((key for key in ("hodl", "hodl-simple") if key in results["training"]), None)
    if key is None:
        return _empty(ax, "HODL was not trained")
    import matplotlib

    training = results["training"][key]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(training["marks"])))
    for t, row, shade in zip(training["marks"], training["curves"], shades, strict=True):
        ax.semilogy(_plain(row), color=shade, label=f"training, update {t + 1}")
    alone = _plain(results["curves"][key]["residual"])
    ax.semilogy(alone, color="#000000", linestyle="--", linewidth=1.3, label="restoring, held out")
    ax.set_xlim(0, len(alone) - 1)
    ax.legend(loc="upper right")


def _outer(ax: Axes, results: dict[str, Any]) -> None:
    # Divided by the rate: the change alone falls with the schedule, whatever θ does.
    ax.set(title="Outer steps", xlabel="update t", ylabel="relative change of θ per unit of rate")
    tied = [key for key in ("hodl-simple", "hodl") if key in results["training"]]
    if not tied:
        return _empty(ax, "HODL was not trained")
    for key in tied:
        change, rate = (_plain(results["training"][key][metric]) for metric in ("change", "rate"))
        walked = change / rate
        ax.plot(np.arange(1, len(walked) + 1), walked, color=_COLOURS[key], label=_LABELS[key], linewidth=1.2)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")


def _blow_up(top: Axes, bottom: Axes, results: dict[str, Any]) -> None:
    top.set(title="Why θ is projected", ylabel="‖A‖₂")
    bottom.set(xlabel="update, at ten times the rate", ylabel="residual")
    if not results["experiment"]:
        _empty(top, "not run")
        return _empty(bottom, "")
    top.tick_params(labelbottom=False)
    for name, run in results["experiment"].items():
        for ax, metric in ((top, "norm_A"), (bottom, "residual")):
            values = _plain(run[metric])
            ax.semilogy(np.arange(1, len(values) + 1), values, color=_COLOURS[name], label=_LABELS[name])
    top.legend(loc="center right")


def _plain(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
