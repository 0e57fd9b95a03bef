"""The rows of the operators' table, and what describes one. A new operator is one more row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from odljax import prox

N = 4  # v is [..., 2, N]
STEP = 0.7
WEIGHTS = np.array([[0.3, 0.8, 0.5, 0.4], [0.9, 0.2, 0.6, 0.7]])


def total(x):
    return np.sum(x, axis=(-2, -1))


def rows(x):
    return np.linalg.norm(x, axis=-1)


def diagonal(values):
    return np.diag(np.broadcast_to(values, (2, N)).ravel())


def simplex_by_bisection(x, scale):
    scale = np.broadcast_to(scale, 2)[:, None]
    low, high = x.min(-1, keepdims=True) - scale, x.max(-1, keepdims=True)
    for _ in range(100):
        tau = (low + high) / 2
        above = np.maximum(x - tau, 0).sum(-1, keepdims=True) > scale
        low, high = np.where(above, tau, low), np.where(above, high, tau)
    return np.maximum(x - high, 0)


def ball(x, radius):
    return x * np.minimum(1, radius / np.sqrt(total(x**2)))[..., None, None]


def ball_jacobian(v, radius, step):
    v, length = v.ravel(), np.linalg.norm(v)
    return np.eye(2 * N) if length < radius else radius / length * (np.eye(2 * N) - np.outer(v, v) / length**2)


def row_by_row(jacobian):
    def whole(v, parameter, step):
        blocks = np.zeros((2, N, 2, N))
        for i in range(2):
            blocks[i, :, i, :] = jacobian(v[i], np.broadcast_to(parameter, 2)[i], step)
        return blocks.reshape(2 * N, 2 * N)

    return whole


def group_jacobian(v, lam, step):
    length, unit = np.linalg.norm(v), v / np.linalg.norm(v)
    ratio = step * lam / length
    return (ratio < 1) * ((1 - ratio) * np.eye(N) + ratio * np.outer(unit, unit))


def simplex_jacobian(v, scale, step):
    support = simplex_by_bisection(np.stack([v, v]), scale)[0] > 1e-12
    return np.diag(support) - np.outer(support, support) / support.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    prox: Callable
    parameter: Any
    jacobian: Callable | None = None  # (v, parameter, step) -> d prox / d v, an [8, 8] matrix; None: no closed form
    penalty: Callable = lambda x, parameter: total(0 * x)  # h on its domain, for x [..., 2, N]
    feasible: Callable = lambda x, parameter: x  # the projection onto the domain of h, for x [..., 2, N]
    convex: bool = True  # whether h is convex: the operator is then firmly non-expansive and has a Moreau identity
    leafwise: bool = True  # whether the leaves of a tree do not know each other
    full: Callable = lambda parameter: parameter  # the parameter with what is static: k, groups
    lengths: str = ""  # why it does not take rows of any length
    name: str = ""

    def __str__(self):
        return self.name or self.prox.__name__

    def operator(self, v, parameter, step):
        return self.prox(v, self.full(parameter), step)


BASIC = [
    Row(prox.identity, None, lambda v, p, s: diagonal(1.0)),
    Row(prox.non_negative, None, lambda v, p, s: diagonal(v > 0), feasible=lambda x, p: np.maximum(x, 0)),
    Row(
        prox.box,
        (-WEIGHTS, np.array(0.6)),
        lambda v, p, s: diagonal((v > p[0]) & (v < p[1])),
        feasible=lambda x, p: np.clip(x, *p),
    ),
    Row(
        prox.l1,
        WEIGHTS,
        lambda v, p, s: diagonal(np.abs(v) > s * p),
        penalty=lambda x, p: total(p * np.abs(x)),
    ),
    Row(
        prox.ridge,
        WEIGHTS[0],
        lambda v, p, s: diagonal(1 / (1 + s * p)),
        penalty=lambda x, p: total(p * x**2 / 2),
    ),
    Row(
        prox.elastic_net,
        (np.array(0.6), WEIGHTS),
        lambda v, p, s: diagonal((np.abs(v) > s * p[0]) / (1 + s * p[0] * p[1])),
        penalty=lambda x, p: total(p[0] * np.abs(x) + p[0] * p[1] * x**2 / 2),
    ),
    Row(
        prox.group_lasso,
        np.array([0.8, 1.5]),
        row_by_row(group_jacobian),
        penalty=lambda x, p: np.sum(p * rows(x), axis=-1),
    ),
    Row(prox.l2_ball, np.array(1.3), ball_jacobian, feasible=ball, leafwise=False),
    Row(prox.simplex, np.array([1.0, 0.4]), row_by_row(simplex_jacobian), feasible=simplex_by_bisection),
]
