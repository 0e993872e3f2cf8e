"""What `attach` did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterReport:
    """Result of `attach`; `print(report)` shows it as a table.

    Attributes:
        adapters: (qualified name, method, trainable parameters) of every adapter.
        trained: qualified names of the base parameters that train as well, with their sizes; without the head's.
        head: the same for parameters of the prediction head.
        total: parameters of the model, adapters included.
    """

    adapters: list[tuple[str, str, int]]
    trained: dict[str, int] = field(default_factory=dict)
    head: dict[str, int] = field(default_factory=dict)
    total: int = 0

    @property
    def adapter_parameters(self) -> int:
        """Trainable parameters of the adapters alone."""
        return sum(n for _, _, n in self.adapters)

    @property
    def trainable(self) -> int:
        """All trainable parameters, head included."""
        return self.trainable_without_head + sum(self.head.values())

    @property
    def trainable_without_head(self) -> int:
        """Trainable parameters apart from those of the head."""
        return self.adapter_parameters + sum(self.trained.values())

    def __str__(self) -> str:
        lines = []
        for method in dict.fromkeys(m for _, m, _ in self.adapters):
            rows = [(name, n) for name, m, n in self.adapters if m == method]
            names = f"{rows[0][0]} ... {rows[-1][0]}" if len(rows) > 1 else rows[0][0]
            lines.append(f"{method:<10} {len(rows):>4} modules {sum(n for _, n in rows):>12,} parameters   {names}")
        for label, sizes in (("head", self.head), ("base", self.trained)):
            if sizes:
                shown = ", ".join(list(sizes)[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
                lines.append(f"{label:<10} {'':>12} {sum(sizes.values()):>12,} parameters   {shown}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable  {self.trainable:,} of {self.total:,} ({share:.2f}%); "
            f"{self.trainable_without_head:,} without the head"
        )
        return "\n".join(lines)
