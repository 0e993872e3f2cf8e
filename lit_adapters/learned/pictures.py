"""Put a figure into a file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lit_adapters.files.atomic import write_atomically

_DEFAULT = "png"


def save_figure(figure: Figure, path: Path, dpi: int) -> Path:
    """Draw a figure into a file; an earlier one stays as it is until the new one is complete.

    Args:
        figure: What to draw.
        path: Where to. Its suffix names the format; without one it gets ".png".
        dpi: Dots per inch.

    Returns:
        The path of the file.

    Raises:
        ValueError: matplotlib does not know the format.
        AdapterError: The file cannot be written, as on a full disk.
    """
    path = path if path.suffix else path.with_name(f"{path.name}.{_DEFAULT}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format=path.suffix[1:]))
    return path
