"""Pictures of what was measured; the only module that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from prunepath.errors import PrunePathError
from prunepath.eval.files import replacing

_MISSING = "Plots need matplotlib, which is not installed (pip install matplotlib)."


def plot_tradeoff(rows: Sequence[dict], path: str | Path, *, title: str = "") -> None:
    """Draws the rows of `prunepath.eval.tradeoff.tradeoff`; the suffix of `path` picks the picture's format.

    Bits per byte (or perplexity, where there is none) over the active fraction, and beside it the decoding
    speed where the rows have one.

    Raises:
        PrunePathError: matplotlib is not installed, or there are no rows.
    """
    if not rows:
        raise PrunePathError("Expected at least one row to plot, got none.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrunePathError(_MISSING) from error

    rows = sorted(rows, key=lambda row: row["active_fraction"])
    active = [100 * row["active_fraction"] for row in rows]
    timed = all(row["tokens_per_second"] is not None for row in rows)
    has_bytes = all(row["bits_per_byte"] is not None for row in rows)
    # Figure without pyplot: no window system, and no global state left behind.
    figure = Figure(figsize=(10 if timed else 5.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    quality = "bits_per_byte" if has_bytes else "perplexity"
    axes[0].plot(active, [row[quality] for row in rows], "o-", color="C0")
    axes[0].set_ylabel("bits per byte" if has_bytes else "perplexity")
    if timed:
        axes[1].plot(active, [row["tokens_per_second"] for row in rows], "o-", color="C0", label="sparse")
        axes[1].plot(active, [row["dense_tokens_per_second"] for row in rows], "s--", color="C7", label="dense")
        axes[1].set_ylabel("decode tokens/s")
        axes[1].set_ylim(bottom=0)
        axes[1].legend()
    for axis in axes:
        axis.set_xlabel("active fraction of FFN neurons (%)")
        axis.set_xlim(0, 103)
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=144)


def heat_map(values: Sequence[Sequence[float]], color: tuple[int, int, int]) -> bytes:
    """A PNG of one pixel a value: `color` at an opacity of 0 to 1, so that it suits any background.

    Args:
        values: rows of equal length, of numbers in [0, 1].
        color: red, green, blue, each 0 to 255.

    Raises:
        PrunePathError: matplotlib is not installed.
    """
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise PrunePathError(_MISSING) from error
    import numpy as np

    opacity = np.rint(255 * np.asarray(values, dtype=np.float64)).astype(np.uint8)
    pixels = np.empty((*opacity.shape, 4), dtype=np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = opacity
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()
