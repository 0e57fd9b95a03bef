"""Rows of the projections whose sets live on [2, N]."""

import numpy as np
from rows import WEIGHTS, N, Row, diagonal, row_by_row, rows, total

from odljax import prox

NORMAL = np.array([[1.0, -0.5, 0.3, 0.0], [0.7, 0.2, -1.1, 0.4]])
UNIT = NORMAL.ravel() / np.linalg.norm(NORMAL)
CAPPED = (-WEIGHTS, np.array([0.9, 0.6, np.inf, 1.2]), NORMAL + 0.25, np.array([0.3, -0.2]))


def onto_l1_ball(x, radius):
    size = np.abs(x)
    low, high = np.zeros(x.shape[:-2]), size.max((-2, -1))
    for _ in range(100):
        tau = (low + high) / 2
        above = total(np.maximum(size - tau[..., None, None], 0)) > radius
        low, high = np.where(above, tau, low), np.where(above, high, tau)
    shrunk = np.sign(x) * np.maximum(size - high[..., None, None], 0)
    return np.where((total(size) <= radius)[..., None, None], x, shrunk)


def l1_ball_jacobian(v, radius, step):
    y = onto_l1_ball(v, radius).ravel()
    sign = np.sign(y) * (np.abs(y) > 1e-12)
    return np.eye(2 * N) if total(np.abs(v)) < radius else np.diag(sign**2) - np.outer(sign, sign) / np.sum(sign**2)


def onto_plane(x, parameter):
    a, b = parameter
    return x - a * ((total(a * x) - b) / np.sum(a * a))[..., None, None]


def onto_slice(x, parameter):
    lower, upper, w, goal = parameter
    low, high = np.full((*x.shape[:-1], 1), -1e3), np.full((*x.shape[:-1], 1), 1e3)
    for _ in range(100):
        tau = (low + high) / 2
        above = np.sum(w * np.clip(x + tau * w, lower, upper), -1, keepdims=True) > goal[:, None]
        low, high = np.where(above, low, tau), np.where(above, tau, high)
    return np.clip(x + high * w, lower, upper)


def variation(x, lam):
    return np.sum(lam * np.sum(np.abs(np.diff(x, axis=-1)), axis=-1), axis=-1)


def second_order_jacobian(v, parameter, step):
    t, x = v[0], v[1:]
    length, unit = np.linalg.norm(x), x / np.linalg.norm(x)
    if length <= abs(t):
        return np.eye(N) * (t > 0)
    block = (1 + t / length) * np.eye(N - 1) - t / length * np.outer(unit, unit)
    return np.block([[np.ones((1, 1)), unit[None]], [unit[:, None], block]]) / 2


PROJECTIONS = [
    Row(prox.hypercube, WEIGHTS, lambda v, p, s: diagonal((v > 0) & (v < p)), feasible=lambda x, p: np.clip(x, 0, p)),
    Row(prox.linf_ball, WEIGHTS, lambda v, p, s: diagonal(np.abs(v) < p), feasible=lambda x, p: np.clip(x, -p, p)),
    Row(prox.l1_ball, np.array(2.1), l1_ball_jacobian, feasible=onto_l1_ball, leafwise=False),
    Row(
        prox.hyperplane,
        (NORMAL, np.array(0.4)),
        lambda v, p, s: np.eye(2 * N) - np.outer(UNIT, UNIT),
        feasible=onto_plane,
        leafwise=False,
    ),
    Row(
        prox.halfspace,
        (NORMAL, np.array(-0.4)),
        lambda v, p, s: np.eye(2 * N) - (np.sum(p[0] * v) > p[1]) * np.outer(UNIT, UNIT),
        feasible=lambda x, p: np.where((total(p[0] * x) > p[1])[..., None, None], onto_plane(x, p), x),
        leafwise=False,
    ),
    Row(
        prox.span,
        NORMAL,
        lambda v, p, s: np.outer(UNIT, UNIT),
        feasible=lambda x, p: p * (total(p * x) / np.sum(p * p))[..., None, None],
        leafwise=False,
    ),
    Row(prox.box_section, CAPPED, feasible=onto_slice),
    Row(prox.isotonic, None, feasible=lambda x, p: np.sort(x, axis=-1)),
    Row(
        prox.second_order_cone,
        None,
        row_by_row(second_order_jacobian),
        feasible=lambda x, p: np.concatenate([np.maximum(x[..., :1], rows(x[..., 1:])[..., None]), x[..., 1:]], -1),
    ),
    Row(prox.total_variation_1d, np.array([0.4, 0.9]), penalty=variation),
]
# Tested in test_projections: sets on matrices, with vectors of a fixed length, or not convex.
ELSEWHERE = ["affine_set", "birkhoff", "exponential_cone", "kl_birkhoff", "kl_transport", "l1_sphere", "l2_sphere"]
ELSEWHERE += ["polyhedron", "psd_cone", "sparse_simplex", "total_variation_2d", "transport"]
