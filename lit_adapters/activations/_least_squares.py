"""Nonlinear least squares for one rational function, in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ITERATIONS = 150


@dataclass(frozen=True)
class Solution:
    """A fitted function.

    Attributes:
        loss: The weighted square error.
        a: The coefficients of the numerator (m+1,).
        b: The coefficients of the denominator (n,).
    """

    loss: float
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Problem:
    """Minimise sum (root_weight (R - y))^2 over a and b, R = (a @ powers) / Q, Q = 1 + |b @ denominator_powers|.

    Attributes:
        y: The target (N,).
        root_weight: The square roots of the weights (N,).
        powers: z^0..z^m (m+1, N).
        denominator_powers: z^1..z^n, or |z|^1..|z|^n for "sum-of-abs" (n, N).
    """

    y: Tensor
    root_weight: Tensor
    powers: Tensor
    denominator_powers: Tensor

    def best_numerator(self, b: Tensor) -> Tensor:
        """The optimal a (m+1,) for a given b (n,), by linear least squares."""
        rows = self.powers * (self.root_weight / (1 + (b @ self.denominator_powers).abs()))
        return torch.linalg.lstsq(rows.T, (self.root_weight * self.y)[:, None], driver="gelsd").solution[:, 0]

    def solve(self, b: Tensor, free: Tensor, bounded: bool) -> Solution:
        """Minimise over a and part of b by Levenberg-Marquardt.

        Args:
            b: The starting value (n,).
            free: Which elements of b may change (n,).
            bounded: Whether to keep b >= 0.
        """
        a = self.best_numerator(b)
        theta, split = torch.cat([a, b]), len(a)
        loss, residual, value, q = self._evaluate(theta)
        damping = 1e-3
        for _ in range(_ITERATIONS):
            jacobian = torch.cat([self.powers / q.abs(), self.denominator_powers * (-value / q)]) * self.root_weight
            gradient = jacobian @ residual
            # A coefficient at its bound stays there if the step would take it below.
            moving = free & ~(bounded & (theta[split:] <= 0) & (gradient[split:] > 0))
            active = torch.cat([torch.ones(split, dtype=torch.bool), moving]).nonzero()[:, 0]
            normal = (jacobian @ jacobian.T)[active][:, active]
            scale = normal.diagonal().sqrt().clamp_min(1e-150)
            normal, right = normal / scale / scale[:, None], gradient[active] / scale
            previous = loss
            while damping < 1e8:
                damped = normal + damping * torch.eye(len(active), dtype=normal.dtype)
                trial = theta.index_add(0, active, torch.linalg.solve(damped, right) / scale, alpha=-1)
                if bounded:
                    trial[split:].clamp_min_(0)
                evaluated = self._evaluate(trial)
                if evaluated[0] < loss:
                    theta, (loss, residual, value, q) = trial, evaluated
                    damping = max(damping / 5, 1e-10)
                    break
                damping *= 5
            if loss > previous * (1 - 1e-10):
                break
        b = theta[split:]
        a = self.best_numerator(b)
        a = torch.where(a.abs() > 1e-12 * a.abs().max(), a, 0.0)  # coefficients that are 0 by symmetry become exactly 0
        return Solution(self._evaluate(torch.cat([a, b]))[0], a, b)

    def _evaluate(self, theta: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """The loss, the weighted residual (N,), R (N,), and Q (N,) with the sign of the sum inside its bars."""
        split = len(self.powers)
        inner = theta[split:] @ self.denominator_powers
        q = torch.where(inner >= 0, 1 + inner, inner - 1)
        value = theta[:split] @ self.powers / q.abs()
        residual = self.root_weight * (value - self.y)
        return residual.dot(residual).item(), residual, value, q
