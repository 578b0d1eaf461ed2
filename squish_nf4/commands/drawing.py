"""What pictures have in common: colours, a style, matplotlib without its noise, and the error to expect of NF4.

The benchmarks draw with it too.
"""

from __future__ import annotations

import warnings
from typing import Any

# Okabe and Ito's colours: told apart with every kind of colour vision, and in grey.
BLUE, ORANGE, GREY, FAINT, INK = "#0072B2", "#D55E00", "#8C8C8C", "#E4E4E4", "#222222"
GAUSSIAN_ERROR = {8: 0.0716, 16: 0.0808, 32: 0.0873, 64: 0.0920}  # relative RMS of NF4 on normal weights, by group size

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 22,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def quiet_matplotlib() -> tuple[Any, Any]:
    """The module matplotlib and its Figure, imported without the warnings of its dependencies about each other.

    Not pyplot: no backend is chosen, and nothing global is touched.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib
        from matplotlib.figure import Figure
    return matplotlib, Figure
