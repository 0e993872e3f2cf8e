"""The result of `attach`, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field

_WORTH_A_WORD = 0.05  # the share of a model that is left alone


@dataclass(frozen=True)
class AdapterReport:
    """Result of `attach`; `print(report)` shows it as a table.

    Attributes:
        adapters: (qualified name, method, number of trainable parameters) for every adapter.
        trained: The qualified names of the base parameters that also train, with their sizes, without the head's.
        head: The same for the parameters of the prediction head.
        total: The number of parameters of the model, adapters included.
        left: The weights that the targets do not reach, such as experts that are parameters and not linear layers.
        shared: The number of adapter parameters that several layers share, by method. They are counted once, at the
            first of these layers.
        ranks: The rank of each layer whose rank a training has allocated, as adapter files hold it.
        left_out: The names of tensors that `load_adapters` with strict="shapes" has not loaded.
    """

    adapters: list[tuple[str, str, int]]
    trained: dict[str, int] = field(default_factory=dict)
    head: dict[str, int] = field(default_factory=dict)
    total: int = 0
    left: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def adapter_parameters(self) -> int:
        """The number of trainable parameters of the adapters."""
        return sum(n for _, _, n in self.adapters)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters, head included."""
        return self.trainable_without_head + sum(self.head.values())

    @property
    def trainable_without_head(self) -> int:
        """The number of trainable parameters without those of the head."""
        return self.adapter_parameters + sum(self.trained.values())

    def __str__(self) -> str:
        lines = []
        for method in dict.fromkeys(m for _, m, _ in self.adapters):
            rows = [(name, n) for name, m, n in self.adapters if m == method]
            names = f"{rows[0][0]} ... {rows[-1][0]}" if len(rows) > 1 else rows[0][0]
            if method in self.shared:
                names += f"; {self.shared[method]:,} of the parameters are shared by several layers"
            lines.append(f"{method:<10} {len(rows):>4} modules {sum(n for _, n in rows):>12,} parameters   {names}")
        for label, sizes in (("head", self.head), ("base", self.trained)):
            if sizes:
                shown = ", ".join(list(sizes)[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
                lines.append(f"{label:<10} {'':>12} {sum(sizes.values()):>12,} parameters   {shown}")
        left = sum(self.left.values())
        if left > _WORTH_A_WORD * self.total:
            largest = sorted(self.left, key=self.left.__getitem__, reverse=True)
            shown = ", ".join(largest[:2]) + (f" and {len(largest) - 2} more" if len(largest) > 2 else "")
            lines.append(
                f"{'left alone':<10} {'':>12} {left:>12,} parameters   {shown}: {100 * left / self.total:.0f}% of the "
                "model, as these are not linear layers"
            )
        if self.ranks:
            ranks = self.ranks.values()
            lines.append(
                f"{'ranks':<10} {len(ranks):>4} modules {sum(ranks) / len(ranks):>12.2f} on average, {min(ranks)} to "
                f"{max(ranks)}, as allocated in training"
            )
        if self.left_out:
            shown = ", ".join(self.left_out[:2]) + (
                f" and {len(self.left_out) - 2} more" if len(self.left_out) > 2 else ""
            )
            lines.append(f"{'left out':<10} {len(self.left_out):>4} tensors                           {shown}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable  {self.trainable:,} of {self.total:,} ({share:.2f}%); "
            f"{self.trainable_without_head:,} without the head"
        )
        return "\n".join(lines)
