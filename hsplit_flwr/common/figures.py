"""How every picture here is begun and written: matplotlib without pyplot, as PNG.

pyplot's global state and its choice of a window system have no place in a server. matplotlib is imported when drawn.
"""

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart with every common colour blindness: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, VERMILION, YELLOW = "#0072B2", "#E69F00", "#D55E00", "#F0E442"
# The rest of theirs.
GREEN, SKY, PURPLE, GREY = "#009E73", "#56B4E9", "#CC79A7", "#999999"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Write `figure` as a PNG to `path`; its folder is made if need be."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=150)
