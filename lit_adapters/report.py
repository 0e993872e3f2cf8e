"""What `attach` did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterReport:
    """Result of `attach`; `print(report)` shows it as a table.

    Attributes:
        adapters: (qualified name, method, trainable parameters) of every adapter.
        trained: qualified names of the base parameters that train as well, with their sizes.
        trained_head: how many of `trained` belong to the prediction head.
        total: parameters of the model, adapters included.
    """

    adapters: list[tuple[str, str, int]]
    trained: dict[str, int] = field(default_factory=dict)
    trained_head: int = 0
    total: int = 0

    @property
    def adapter_parameters(self) -> int:
        """Trainable parameters of the adapters alone."""
        return sum(n for _, _, n in self.adapters)

    @property
    def trainable(self) -> int:
        """All trainable parameters, head included."""
        return self.adapter_parameters + sum(self.trained.values())

    @property
    def trainable_without_head(self) -> int:
        """Trainable parameters apart from those of the head."""
        return self.trainable - self.trained_head

    def __str__(self) -> str:
        lines = []
        for method in dict.fromkeys(m for _, m, _ in self.adapters):
            rows = [(name, n) for name, m, n in self.adapters if m == method]
            names = f"{rows[0][0]} ... {rows[-1][0]}" if len(rows) > 1 else rows[0][0]
            lines.append(f"{method:<10} {len(rows):>4} modules {sum(n for _, n in rows):>12,} parameters   {names}")
        rest = sum(self.trained.values()) - self.trained_head
        if self.trained_head:
            lines.append(f"{'head':<10} {'':>12} {self.trained_head:>12,} parameters")
        if rest:
            names = [n for n in self.trained]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{'base':<10} {'':>12} {rest:>12,} parameters   {shown}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable  {self.trainable:,} of {self.total:,} ({share:.2f}%); "
            f"{self.trainable_without_head:,} without the head"
        )
        return "\n".join(lines)
