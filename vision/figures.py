"""Pictures of test results, drawn with matplotlib's object interface: no display and no global state."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

_FEW = 20  # classes that can be named and counted one by one


def confusion_figure(counts: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Rows are true classes, columns predictions; colour is the share of the row.

    Args:
        counts: Number of images by true and predicted class, shape (C, C).
        names: Names of the classes; shown, like the counts, where there are at most 20.
    """
    classes = len(counts)
    few = classes <= _FEW
    side = 2.0 + 0.5 * classes if few else 8.0
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    panel = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = panel.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    if few:
        labels = list(names) if names else [str(i) for i in range(classes)]
        panel.set_xticks(range(classes), labels, rotation=45, ha="right")
        panel.set_yticks(range(classes), labels)
        for row in range(classes):
            for column in range(classes):
                count = int(counts[row, column])
                colour = "black" if count else "0.7"
                if shares[row, column] > 0.5:
                    colour = "white"
                panel.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    panel.set_title(
        f"accuracy {counts.diagonal().sum() / counts.sum().clamp(min=1):.1%} of {int(counts.sum()):,} images"
    )
    return figure
