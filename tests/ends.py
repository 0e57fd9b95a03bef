"""Where the estimators that do not aim at the minimiser end on ``odl.problems.finite_sum``: closed forms, in NumPy.

Each gradient is affine in theta there, and the end is its root.
"""

import numpy as np


class Parts:
    """The matrices of the problem: Hessians and solutions ``B theta + z`` of all rows together and of each row."""

    def __init__(self, problem):
        numbers = lambda leaf: np.asarray(leaf, np.float64)
        r, b, self.c = (
            numbers(problem.inner_data["r"]),
            numbers(problem.inner_data["b"]),
            numbers(problem.outer_data["c"]),
        )
        theta = numbers(problem.theta)
        self.z = numbers(problem.solution(np.zeros_like(theta)))
        self.B = np.stack([numbers(problem.solution(e)) - self.z for e in np.eye(len(theta))], axis=1)
        one = np.eye(r.shape[1])
        self.H = one + r.T @ r / len(r)
        self.H_rows = one + r[:, :, None] * r[:, None, :]
        self.z_rows = np.linalg.solve(self.H_rows, (r * b[:, None])[..., None])[..., 0]


def root(gradient, size):
    """Where an affine map vanishes."""
    shift = gradient(np.zeros(size))
    return np.linalg.solve(np.stack([gradient(e) - shift for e in np.eye(size)], axis=1), -shift)


def finite_difference(problem):
    """The step stands for the inverse Hessian: g = theta + a B'H (x - c)."""
    p, a = Parts(problem), problem.step_size
    return root(lambda w: w + a * p.B.T @ p.H @ (p.B @ w + p.z - p.c.mean(0)), len(problem.theta))


def task_start(problem):
    """The start of the tasks, ``theta -> x``, as a matrix: the entries of theta, and the first of them again."""
    size = np.asarray(problem.x0).size
    return np.concatenate([np.eye(2), np.eye(2)[:1]])[:size]


def meta(problem, name, num_steps, penalty=1.0):
    """Each row is a task: x_K = x_i + (I - a H_i)^K (S theta - x_i), x_i = B theta + z_i."""
    p, a, S = Parts(problem), problem.step_size, task_start(problem)
    one = np.eye(len(p.z))
    shrink = np.stack([np.linalg.matrix_power(one - a * H, num_steps) for H in p.H_rows])
    if name == "imaml":
        shrink = np.stack([penalty * np.linalg.inv(H + penalty * one) for H in p.H_rows])
    moves = p.B + shrink @ (S - p.B)

    def gradient(w):
        x = p.B @ w + p.z_rows
        x = x + (shrink @ (S @ w - x)[..., None])[..., 0]
        if name == "reptile":
            return S.T @ (S @ w - x.mean(0))
        carried = np.broadcast_to(S, moves.shape) if name == "fomaml" else moves
        return w + np.einsum("nij,ni->j", carried, x - p.c) / len(x)

    return root(gradient, len(problem.theta))


def alternating(problem):
    """The partial derivative of F in theta is theta itself."""
    return np.zeros(len(problem.theta))


def value_gap(problem, penalty):
    """x minimises F + gamma f: x = B theta + z + d, (I + gamma H) d = -(B theta + z - c)."""
    p = Parts(problem)
    one = np.eye(len(p.z))

    def gradient(w):
        d = np.linalg.solve(one + penalty * p.H, p.c.mean(0) - p.B @ w - p.z)
        return w - penalty * p.B.T @ p.H @ d

    return root(gradient, len(problem.theta))


def envelope(problem, penalty, smoothing=1.0):
    """x minimises F / c + f - v, and f - v is d'M d / 2, d the distance of x to the inner solution."""
    p = Parts(problem)
    one = np.eye(len(p.z))
    M = p.H - p.H @ np.linalg.inv(one + smoothing * p.H)  # f(x) - f(w) has slope H d - H (I + gamma H)^-1 d

    def gradient(w):
        d = np.linalg.solve(one / penalty + M, (p.c.mean(0) - p.B @ w - p.z) / penalty)
        return w / penalty - p.B.T @ M @ d

    return root(gradient, len(problem.theta))


def neumann(problem, num_terms):
    """The adjoint is a series of num_terms: v = -(I - (I - a H)^n) H^-1 (x - c)."""
    p, a = Parts(problem), problem.step_size
    one = np.eye(len(p.z))
    series = (one - np.linalg.matrix_power(one - a * p.H, num_terms)) @ np.linalg.inv(p.H)
    return root(lambda w: w + p.B.T @ p.H @ series @ (p.B @ w + p.z - p.c.mean(0)), len(problem.theta))
