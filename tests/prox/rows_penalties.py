"""Rows of the penalties."""

import numpy as np
from rows import WEIGHTS, Row, diagonal, rows, total

from odljax import prox

SORTED = np.array([0.9, 0.6, 0.5, 0.1])  # equal ones are a kink
GROUPS = {"overlapping": [[0, 1], [1, 2, 3]], "nested": [[0, 1, 2], [2, 1], [3]]}


def positive(x, parameter):
    return np.maximum(x, 1e-300)


def huber(x, parameter):
    lam, delta = parameter
    return total(lam * np.where(np.abs(x) <= delta, x**2 / 2, delta * (np.abs(x) - delta / 2)))


def relative_entropy(x, parameter):
    lam, q = parameter
    return total(lam * (x * np.log(x / q) - x + q))


def scad(x, parameter):
    (lam, a), x = parameter, np.abs(x)
    middle = (2 * a * lam * x - x**2 - lam**2) / (2 * (a - 1))
    return total(np.where(x <= lam, lam * x, np.where(x <= a * lam, middle, lam**2 * (a + 1) / 2)))


def mcp(x, parameter):
    (lam, gamma), x = parameter, np.abs(x)
    return total(np.where(x <= gamma * lam, lam * x - x**2 / (2 * gamma), gamma * lam**2 / 2))


def sorted_sum(x, weights):
    return total(weights * -np.sort(-np.abs(x), axis=-1))


def groups(name):
    def penalty(x, lam):
        return sum(np.sum(lam * rows(x[..., group]), axis=-1) for group in GROUPS[name])

    return penalty


PENALTIES = [
    Row(
        prox.non_negative_l1,
        WEIGHTS,
        lambda v, p, s: diagonal(v > s * p),
        penalty=lambda x, p: total(p * x),
        feasible=lambda x, p: np.maximum(x, 0),
    ),
    Row(
        prox.non_negative_ridge,
        WEIGHTS,
        lambda v, p, s: diagonal((v > 0) / (1 + s * p)),
        penalty=lambda x, p: total(p * x**2 / 2),
        feasible=lambda x, p: np.maximum(x, 0),
    ),
    Row(
        prox.huber,
        (WEIGHTS, np.array(0.5)),
        lambda v, p, s: diagonal(np.where(np.abs(v) < (1 + s * p[0]) * p[1], 1 / (1 + s * p[0]), 1)),
        penalty=huber,
    ),
    Row(
        prox.log_barrier,
        WEIGHTS,
        lambda v, p, s: diagonal((1 + v / np.sqrt(v**2 + 4 * s * p)) / 2),
        penalty=lambda x, p: -total(p * np.log(x)),
        feasible=positive,
    ),
    Row(prox.entropy, WEIGHTS, penalty=lambda x, p: total(p * x * np.log(x)), feasible=positive),
    Row(prox.kullback_leibler, (np.array(0.6), WEIGHTS), penalty=relative_entropy, feasible=positive),
    Row(prox.l0, WEIGHTS, penalty=lambda x, p: total(p * (x != 0)), convex=False),
    Row(prox.lq, (WEIGHTS, np.array(0.45)), penalty=lambda x, p: total(p[0] * np.abs(x) ** p[1]), convex=False),
    Row(prox.scad, (WEIGHTS, np.array(2.5)), penalty=scad, convex=False),
    Row(prox.mcp, (WEIGHTS, np.array(1.5)), penalty=mcp, convex=False),
    Row(prox.mcp, (WEIGHTS, np.array(0.3)), penalty=mcp, convex=False, name="mcp that jumps"),
    Row(
        prox.top_k,
        None,
        penalty=lambda x, p: np.where(np.all(np.sum(x != 0, axis=-1) <= 2, axis=-1), 0, np.inf),
        convex=False,
        full=lambda p: 2,
    ),
    Row(prox.linf, np.array([0.8, 1.5]), penalty=lambda x, p: np.sum(p * np.max(np.abs(x), axis=-1), axis=-1)),
    Row(
        prox.k_largest,
        np.array([0.8, 0.4]),
        penalty=lambda x, p: np.sum(p * np.sum(np.sort(np.abs(x), axis=-1)[..., -2:], axis=-1), axis=-1),
        full=lambda p: (p, 2),
    ),
    Row(prox.slope, SORTED[None], penalty=sorted_sum),
    Row(prox.nuclear, np.array(0.6), penalty=lambda x, p: p * np.sum(np.linalg.svd(x, compute_uv=False), axis=-1)),
    *[
        Row(
            prox.overlapping_group_lasso,
            np.array(0.6),
            penalty=groups(name),
            full=lambda p, name=name: (p, GROUPS[name]),
            lengths="groups name the entries of a row",
            name=f"{name} groups",
        )
        for name in GROUPS
    ],
]
