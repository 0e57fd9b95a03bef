"""Splittings: each against its formula, in its metric, at its solution, and through its derivative.

Every case solves a small problem whose answer is known from elsewhere: by enumeration of the signs and supports that
the optimality conditions leave, by a linear system, or by HiGHS.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expansions import as_matrix, pairs, squares
from scipy.optimize import linprog

import odljax as odl
from odljax import operators, prox
from odljax.operators import PrimalDual, SplitVariables
from odljax.operators._operator import displacement

RNG = np.random.default_rng(5)
M, C = RNG.standard_normal((6, 4)) + np.eye(6, 4), 2 * RNG.standard_normal(6)
D = np.diff(np.eye(4), axis=0)
E, B_E = RNG.standard_normal((2, 4)), RNG.standard_normal(2)
B, B_B = 2 * np.linalg.qr(RNG.standard_normal((3, 2)))[0], RNG.standard_normal(3)
A = RNG.standard_normal((3, 4))
H, Q = M.T @ M, M.T @ C
LIPSCHITZ = np.linalg.norm(M, 2) ** 2
THETA = 0.8
ZERO, ONES = np.zeros, np.ones
OUTER = np.array([1.0, -2.0, 0.5, 3.0])


def soft(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)


def quadratic(v, step):
    """The proximal operator of |M x - c|^2 / 2."""
    return np.linalg.solve(np.eye(4) + step * H, v + step * Q)


def least_squares(dtype):
    matrix, target = jnp.asarray(M, dtype), jnp.asarray(C, dtype)
    return lambda x, theta: 0.5 * jnp.sum((matrix @ x - target) ** 2)


def quadratic_prox(dtype):
    """The same in the eigenbasis, which compiles faster than a linear solve."""
    sizes, basis = np.linalg.eigh(H)
    sizes, basis, shift = (jnp.asarray(part, dtype) for part in (sizes, basis, basis.T @ Q))
    return lambda v, theta, step: basis @ ((basis.T @ v + step * shift) / (1 + step * sizes))


def product(matrix, dtype):
    matrix = jnp.asarray(matrix, dtype)
    return lambda x, theta: matrix @ x


def non_negative(v, theta, step_size):
    return prox.non_negative(v)


# ---- what the answers should be --------------------------------------------------------------------------------------


def fused(theta, K, non_negative=False):
    """The minimiser of |M x - c|^2 / 2 + theta |K x|_1, over x >= 0 or all x, by enumeration."""
    supports = itertools.product((True, False), repeat=4) if non_negative else [(True,) * 4]
    for support in supports:
        pinned = np.eye(4)[~np.array(support)]
        for signs in itertools.product((-1, 0, 1), repeat=len(K)):
            signs = np.array(signs)
            flat = np.vstack([K[signs == 0], pinned])
            system = np.block([[H, flat.T], [flat, np.zeros((len(flat),) * 2)]])
            right = np.concatenate([Q - theta * K.T @ signs, np.zeros(len(flat))])
            try:
                solved = np.linalg.solve(system, right)
            except np.linalg.LinAlgError:
                continue
            x, slack = solved[:4], solved[4 : 4 + np.sum(signs == 0)]
            held = solved[4 + np.sum(signs == 0) :]
            moved = (K @ x)[signs != 0]
            sound = np.all(moved * signs[signs != 0] > 0) and np.all(np.abs(slack) <= theta) and np.all(held <= 0)
            if sound and (not non_negative or np.all(x >= -1e-14)):
                return x
    raise AssertionError("no sign pattern satisfies the optimality conditions")


def lasso(theta):
    return fused(theta, np.eye(4))


def constrained(theta):
    """The minimiser of |M x - c|^2 / 2 subject to E x = theta b."""
    system = np.block([[H, E.T], [E, np.zeros((2, 2))]])
    return np.linalg.solve(system, np.concatenate([Q, theta * B_E]))[:4]


@functools.cache
def _pursuit():
    best = linprog(np.ones(8), A_eq=np.hstack([E, -E]), b_eq=B_E, bounds=(0, None), method="highs")
    return best.x[:4] - best.x[4:]


def two_blocks(theta):
    """x of the minimiser of |M x - c|^2 / 2 + theta |z|_1 subject to A x + B z = b, by enumeration."""
    for signs in itertools.product((-1, 0, 1), repeat=2):
        signs = np.array(signs)
        free = B[:, signs != 0]
        k = free.shape[1]
        top = np.hstack([H, np.zeros((4, k)), A.T])
        middle = np.hstack([np.zeros((k, 4)), np.zeros((k, k)), free.T])
        system = np.vstack([top, middle, np.hstack([A, free, np.zeros((3, 3))])])
        solved = np.linalg.solve(system, np.concatenate([Q, -theta * signs[signs != 0], B_B]))
        z, y = solved[4 : 4 + k], solved[4 + k :]
        if np.all(z * signs[signs != 0] > 0) and np.all(np.abs(B.T @ y)[signs == 0] <= theta):
            return solved[:4]
    raise AssertionError("no sign pattern satisfies the optimality conditions")


# ---- the formulas ----------------------------------------------------------------------------------------------------


def douglas_rachford_step(u, theta, gamma=0.9, stretch=1):
    x = soft(u, gamma * theta)
    return u + stretch * (quadratic(2 * x - u, gamma) - x)


def davis_yin_step(u, theta, gamma=1 / LIPSCHITZ):
    x = soft(u, gamma * theta)
    return u + np.maximum(2 * x - u - gamma * (H @ x - Q), 0) - x


def admm_step(z, y, theta, rho=0.7, alpha=1.6):
    x = quadratic(z - y / rho, 1 / rho)
    relaxed = alpha * x + (1 - alpha) * z
    new = soft(relaxed + y / rho, theta / rho)
    return new, y + rho * (relaxed - new)


def admm_metric(rho=0.7, alpha=1.6, n=4, image=None):
    image = -np.eye(n) if image is None else image
    cross = -(1 - alpha) * image
    return np.block([[rho * image.T @ image, cross.T], [cross, np.eye(len(image)) / rho]])


def admm_of_image_step(z, y, theta, rho=0.5, alpha=1.5):
    x = np.linalg.solve(H / rho + D.T @ D, D.T @ (z - y / rho) + Q / rho)
    relaxed = alpha * D @ x + (1 - alpha) * z
    new = soft(relaxed + y / rho, theta / rho)
    return new, y + rho * (relaxed - new)


def admm_of_blocks_step(z, y, theta, rho=1.3, alpha=0.6):
    x = np.linalg.solve(H / rho + A.T @ A, A.T @ (B_B - B @ z - y / rho) + Q / rho)
    s = alpha * A @ x - (1 - alpha) * (B @ z - B_B) + y / rho
    new = soft(-B.T @ (s - B_B) / 4, theta / rho / 4)
    return new, rho * (s + B @ new - B_B)


def consensus_step(z, y, theta, rho=0.6, alpha=1.3):
    local = [M[2 * i : 2 * i + 2] for i in range(3)]
    x = [
        np.linalg.solve(np.eye(4) + m.T @ m / rho, z - y[i] / rho + m.T @ C[2 * i : 2 * i + 2] / rho)
        for i, m in enumerate(local)
    ]
    relaxed = alpha * np.array(x) + (1 - alpha) * z
    new = soft(np.mean(relaxed + y / rho, axis=0), theta / (3 * rho))
    return new, y + rho * (relaxed - new)


WEIGHTS = np.array([0.5, 1.0, 0.2, 0.7])


def proximal_alm_step(x, y, theta, beta=1.4):
    new = np.linalg.solve(H + beta * E.T @ E + np.diag(WEIGHTS), Q - E.T @ y + beta * theta * E.T @ B_E + WEIGHTS * x)
    return new, y + beta * (E @ new - theta * B_E)


R_ALM = 1.05 * 1.4 * np.linalg.norm(E, 2) ** 2


def linearized_alm_step(x, y, theta, beta=1.4):
    new = soft(x - E.T @ (y + beta * (E @ x - theta * B_E)) / R_ALM, 1 / R_ALM)
    return new, y + beta * (E @ new - theta * B_E)


def chambolle_pock_step(x, y, theta, s=0.3):
    new = quadratic(x - theta * D.T @ y, theta)
    return new, np.clip(y + s * D @ (2 * new - x), -theta, theta)


STEPS = 0.9 / (0.5 * LIPSCHITZ + 0.4 * np.linalg.norm(D, 2) ** 2) * np.array([1.0, 0.8, 0.9, 0.7])


def condat_vu_step(x, y, theta, s=0.4):
    new = np.maximum(x - STEPS * (H @ x - Q + D.T @ y), 0)
    return new, np.clip(y + s * D @ (2 * new - x), -theta, theta)


def primal_dual_metric(t, s):
    return np.block([[np.diag(1 / np.broadcast_to(t, 4)), -D.T], [-D, np.eye(3) / s]])


PRECONDITIONER = 0.55 * np.abs(H).sum(axis=1)  # above half of H, by diagonal dominance


def tseng_step(x, theta, gamma=0.8 / LIPSCHITZ):
    p = soft(x - gamma * (H @ x - Q), gamma * theta)
    return p - gamma * H @ (p - x)


# ---- the cases -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An operator at a dtype, its start, its formula and metric in NumPy, and the answer of its problem."""

    build: Callable[..., Any]
    start: Any
    step: Callable[..., Any]
    answer: Callable[[float], np.ndarray]
    metric: np.ndarray | None = None
    firm: bool = False
    num_steps: int = 1500


def filtered(dtype):
    sizes, basis = (jnp.asarray(part, dtype) for part in np.linalg.eigh(D.T @ D))
    return lambda v, theta: basis @ (basis.T @ v / (1 + theta * sizes))


def local_prox(v, theta, step_size, data):
    matrix, target = data
    system = jnp.eye(v.size, dtype=v.dtype) + step_size * matrix.T @ matrix
    return jnp.linalg.solve(system, v + step_size * matrix.T @ target)


def argmin_of_blocks(dtype):
    image = jnp.asarray(B, dtype)
    return lambda v, theta, step_size: prox.l1(image.T @ v / 4, theta, step_size / 4)


CASES = {
    "douglas_rachford": Case(
        lambda dtype: operators.douglas_rachford(quadratic_prox(dtype), prox.l1, 0.9),
        ZERO(4), douglas_rachford_step, lasso, firm=True,
    ),
    "peaceman_rachford": Case(
        lambda dtype: operators.peaceman_rachford(quadratic_prox(dtype), prox.l1, lambda theta: theta),
        ZERO(4), lambda u, theta: douglas_rachford_step(u, theta, theta, 2), lasso,
    ),
    "davis_yin": Case(
        lambda dtype: operators.davis_yin(least_squares(dtype), non_negative, prox.l1, 1 / LIPSCHITZ),
        ZERO(4), davis_yin_step, lambda theta: fused(theta, np.eye(4), non_negative=True),
    ),
    "admm": Case(
        lambda dtype: operators.admm(quadratic_prox(dtype), prox.l1, penalty=0.7, relaxation=1.6),
        SplitVariables(ZERO(4), ZERO(4)), admm_step, lasso, admm_metric(),
    ),
    "admm of an image": Case(
        lambda dtype: operators.admm(
            operators.quadratic_argmin(least_squares(dtype), product(D, dtype), jax.ShapeDtypeStruct((4,), dtype)),
            prox.l1, linear_x=product(D, dtype), penalty=0.5, relaxation=1.5,
        ),
        SplitVariables(ZERO(3), ZERO(3)), admm_of_image_step, lambda theta: fused(theta, D), admm_metric(0.5, 1.5, 3),
    ),
    "admm of two blocks": Case(
        lambda dtype: operators.admm(
            operators.quadratic_argmin(least_squares(dtype), product(A, dtype), jax.ShapeDtypeStruct((4,), dtype)),
            argmin_of_blocks(dtype), linear_x=product(A, dtype), linear_z=product(B, dtype),
            observation=jnp.asarray(B_B, dtype), penalty=1.3, relaxation=0.6,
        ),
        SplitVariables(ZERO(2), ZERO(3)), admm_of_blocks_step, two_blocks, admm_metric(1.3, 0.6, image=B),
    ),
    "consensus_admm": Case(
        lambda dtype: operators.consensus_admm(
            local_prox, (jnp.asarray(M.reshape(3, 2, 4), dtype), jnp.asarray(C.reshape(3, 2), dtype)), prox.l1,
            penalty=0.6, relaxation=1.3,
        ),
        SplitVariables(ZERO(4), ZERO((3, 4))), consensus_step, lasso,
        admm_metric(0.6, 1.3, image=-np.tile(np.eye(4), (3, 1))),
    ),
    "proximal_alm": Case(
        lambda dtype: operators.proximal_alm(
            least_squares(dtype), product(E, dtype), lambda theta: theta * jnp.asarray(B_E, dtype), penalty=1.4,
            proximal_weight=jnp.asarray(WEIGHTS, dtype), linear_solver=odl.linear.dense(),
        ),
        PrimalDual(ZERO(4), ZERO(2)), proximal_alm_step, constrained,
        np.diag(np.concatenate([WEIGHTS, np.full(2, 1 / 1.4)])), firm=True,
    ),
    "linearized_alm": Case(
        lambda dtype: operators.linearized_alm(
            lambda v, theta, step_size: prox.l1(v, 1.0, step_size), product(E, dtype),
            lambda theta: theta * jnp.asarray(B_E, dtype), penalty=1.4, proximal_weight=R_ALM,
        ),
        PrimalDual(ZERO(4), ZERO(2)), linearized_alm_step, lambda theta: theta * _pursuit(),
        np.block([[R_ALM * np.eye(4) - 1.4 * E.T @ E, np.zeros((4, 2))], [np.zeros((2, 4)), np.eye(2) / 1.4]]),
        firm=True,
    ),
    "chambolle_pock": Case(
        lambda dtype: operators.chambolle_pock(
            quadratic_prox(dtype), prox.l1, product(D, dtype), step_size=lambda theta: theta, dual_step_size=0.3
        ),
        PrimalDual(ZERO(4), ZERO(3)), chambolle_pock_step, lambda theta: fused(theta, D),
        primal_dual_metric(THETA, 0.3), firm=True,
    ),
    "condat_vu": Case(
        lambda dtype: operators.condat_vu(
            least_squares(dtype), non_negative, prox.l1, product(D, dtype), step_size=STEPS, dual_step_size=0.4
        ),
        PrimalDual(ZERO(4), ZERO(3)), condat_vu_step, lambda theta: fused(theta, D, non_negative=True),
        primal_dual_metric(STEPS, 0.4),
    ),
    "preconditioned_forward_backward": Case(
        lambda dtype: operators.preconditioned_forward_backward(
            least_squares(dtype), prox.l1, jnp.asarray(PRECONDITIONER, dtype)
        ),
        ZERO(4), lambda x, theta: soft(x - (H @ x - Q) / PRECONDITIONER, theta / PRECONDITIONER), lasso,
        np.diag(PRECONDITIONER),
    ),
    "forward_backward_forward": Case(
        lambda dtype: operators.forward_backward_forward(
            jax.grad(least_squares(dtype)), prox.l1, step_size=0.8 / LIPSCHITZ
        ),
        ZERO(4), tseng_step, lasso,
    ),
    "plug_and_play": Case(
        lambda dtype: operators.plug_and_play(least_squares(dtype), filtered(dtype), 1.5 / LIPSCHITZ),
        ZERO(4), lambda x, theta: np.linalg.solve(np.eye(4) + theta * D.T @ D, x - 1.5 / LIPSCHITZ * (H @ x - Q)),
        lambda theta: np.linalg.solve(theta * D.T @ D + 1.5 / LIPSCHITZ * H, 1.5 / LIPSCHITZ * Q),
    ),
    "red": Case(
        lambda dtype: operators.red(least_squares(dtype), filtered(dtype), 1.5 / (LIPSCHITZ + 5.0), 2.5),
        ZERO(4),
        lambda x, theta: x - 1.5 / (LIPSCHITZ + 5) * (H @ x - Q + 2.5 * (
            x - np.linalg.solve(np.eye(4) + theta * D.T @ D, x))),
        lambda theta: np.linalg.solve(H + 2.5 * (np.eye(4) - np.linalg.inv(np.eye(4) + theta * D.T @ D)), Q),
    ),
}  # fmt: skip

TSENG = "forward_backward_forward"
IN_ITS_METRIC = [name for name in CASES if name != TSENG]


@functools.cache
def built(name):
    """The operator in float64, and its image and displacement, compiled once."""
    operator = CASES[name].build(jnp.float64)
    return operator, jax.jit(lambda u, theta: (operator(u, theta), displacement(operator, u, theta)))


def start_of(name):
    return jax.tree.map(jnp.asarray, CASES[name].start)


@functools.cache
def fixed(name):
    operator, _ = built(name)
    walk = jax.jit(lambda u, theta: jax.lax.fori_loop(0, CASES[name].num_steps, lambda _, u: operator(u, theta), u))
    return walk(start_of(name), THETA)


def flat(u):
    return np.concatenate([np.ravel(part) for part in jax.tree.leaves(u)])


def random_point(name, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(2 * rng.standard_normal(leaf.shape)), start_of(name))


@pytest.mark.parametrize("name", CASES)
def test_one_application_and_its_displacement_against_the_formula(name):
    operator, apply = built(name)
    u = random_point(name)
    parts = tuple(map(np.asarray, jax.tree.leaves(u)))
    want = CASES[name].step(*parts, THETA)
    got, gap = apply(u, THETA)
    assert type(got) is type(u)
    np.testing.assert_allclose(flat(got), flat(want), rtol=0, atol=1e-12)
    np.testing.assert_allclose(flat(gap), flat(u) - flat(want), rtol=0, atol=1e-12)
    assert operator.name == name.split(" of ")[0]
    assert not operator.symmetric


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].metric is not None])
def test_the_metric_and_its_inverse_against_the_formula(name):
    operator, _ = built(name)
    G = as_matrix(lambda v: operator.metric(v, THETA), start_of(name))
    np.testing.assert_allclose(G, CASES[name].metric, rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(G).min() > 0
    if operator.metric_inverse is not None:
        inverse = as_matrix(lambda v: operator.metric_inverse(v, THETA), start_of(name))
        np.testing.assert_allclose(inverse @ G, np.eye(len(G)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", IN_ITS_METRIC)
def test_non_expansive_in_its_metric(name):
    case, (operator, _) = CASES[name], built(name)
    images, sources = pairs(operator, start_of(name), THETA, count=100)
    G = case.metric
    assert (squares(images, G) <= squares(sources, G) * (1 + 1e-10)).all()
    if case.firm:
        assert (squares(images, G) + squares(sources - images, G) <= squares(sources, G) * (1 + 1e-10)).all()


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_krasnoselskii_and_mann(name):
    """The bound where T is non-expansive; of Tseng's operator, without relaxation, its own."""
    case, (_, apply) = CASES[name], built(name)
    G, goal = case.metric, flat(fixed(name))
    u = random_point(name, seed=2)
    away = squares((flat(u) - goal)[None], G)[0]
    relaxation = 1.0 if name == TSENG else 0.5
    sizes = []
    for _ in range(40):
        image, gap = apply(u, THETA)
        sizes.append(squares(flat(gap)[None], G)[0])
        u = jax.tree.map(lambda a, b: a + relaxation * (b - a), u, image)
    count = np.arange(1, 41)
    if name == TSENG:
        # |x - T x| <= (1 + gamma L) |x - p|, and the squares of |x - p| sum to at most dist^2 / (1 - (gamma L)^2).
        assert (np.minimum.accumulate(sizes) <= 1.8**2 * away / (1 - 0.8**2) / count).all()
    else:
        assert (np.array(sizes) <= away / (0.25 * count) * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", CASES)
def test_the_answer_and_its_derivatives(name):
    """At the fixed point, against the enumeration; the derivative against differences of the enumeration."""
    case, (operator, apply) = CASES[name], built(name)
    solver = odl.for_steps(odl.fixed_point(operator), case.num_steps)
    u = start_of(name)

    def outer(solver, theta):
        answer = operator.answer(solver(u, theta).x, theta)
        return OUTER @ answer, answer

    def all_of_it(theta):
        gradient, answer = jax.grad(lambda theta: outer(odl.implicit(solver), theta), has_aux=True)(theta)
        _, unrolled = jax.jvp(lambda theta: outer(solver, theta)[0], (theta,), (jnp.ones(()),))
        return answer, gradient, unrolled

    answer, gradient, unrolled = jax.jit(all_of_it)(jnp.asarray(THETA))
    np.testing.assert_allclose(answer, case.answer(THETA), rtol=0, atol=1e-9)
    h = 1e-5
    want = OUTER @ (case.answer(THETA + h) - case.answer(THETA - h)) / (2 * h)
    assert abs(want) > 1e-2
    np.testing.assert_allclose(unrolled, want, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(gradient, want, rtol=1e-8, atol=1e-8)
    _, gap = apply(fixed(name), THETA)
    np.testing.assert_allclose(flat(gap), np.zeros_like(flat(u)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_float32_stays_float32(name):
    operator = CASES[name].build(jnp.float32)
    u = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), start_of(name))
    theta = jax.ShapeDtypeStruct((), jnp.float32)
    for function in (operator, functools.partial(displacement, operator)):
        assert jax.eval_shape(function, u, theta) == u
    if operator.metric is not None:
        assert jax.eval_shape(operator.metric, u, theta) == u
    if operator.metric_inverse is not None:
        assert jax.eval_shape(operator.metric_inverse, u, theta) == u
    assert jax.eval_shape(operator.answer, u, theta) == jax.ShapeDtypeStruct((4,), jnp.float32)


# ---- sharp bounds ----------------------------------------------------------------------------------------------------
# With projections on subspaces for proximal operators T is linear, and where it has fixed points its norm in the metric
# is one, exactly. What is stated is then an equality between numbers, not a sample.

SUBSPACES = [np.eye(4) - np.outer(a, a) / (a @ a) for a in RNG.standard_normal((4, 4))]
RING = np.eye(4) - np.roll(np.eye(4), 1, axis=1)
SLOPED = np.eye(3) - np.outer([1, 2, -1], [1, 2, -1]) / 6
RHO = 0.4


def onto(projector):
    return lambda v, theta, step_size: jnp.asarray(projector) @ v


def bowl(x, theta):
    """Of curvature theta along one direction, flat along the others."""
    return 0.5 * theta * jnp.sum(x[:1] ** 2)


def dot(matrix):
    return lambda x, theta: jnp.asarray(matrix) @ x


SHARP = {
    "admm, under-relaxed": (
        lambda: operators.admm(onto(SUBSPACES[0]), onto(SUBSPACES[1]), penalty=RHO, relaxation=0.2),
        SplitVariables(ZERO(4), ZERO(4)), True,
    ),
    "admm, over-relaxed": (
        lambda: operators.admm(onto(SUBSPACES[0]), onto(SUBSPACES[1]), relaxation=1.95),
        SplitVariables(ZERO(4), ZERO(4)), True,
    ),
    "admm, plain": (
        lambda: operators.admm(onto(SUBSPACES[0]), onto(SUBSPACES[1])), SplitVariables(ZERO(4), ZERO(4)), False,
    ),
    "consensus_admm": (
        lambda: operators.consensus_admm(
            lambda v, theta, step_size, P: P @ v, jnp.asarray(SUBSPACES[:3]), onto(SUBSPACES[3]), relaxation=1.7
        ),
        SplitVariables(ZERO(4), ZERO((3, 4))), True,
    ),
    "linearized_alm": (
        lambda: operators.linearized_alm(
            onto(SUBSPACES[0]), dot(RING), 0.0, penalty=2.0, proximal_weight=2.02 * np.linalg.norm(RING, 2) ** 2
        ),
        PrimalDual(ZERO(4), ZERO(4)), True,
    ),
    "proximal_alm": (
        lambda: operators.proximal_alm(
            bowl, dot(RING), 0.0, penalty=0.05, proximal_weight=0.1, linear_solver=odl.linear.dense()
        ),
        PrimalDual(ZERO(4), ZERO(4)), True,
    ),
    "chambolle_pock": (
        lambda: operators.chambolle_pock(
            onto(SUBSPACES[0]), onto(SLOPED), dot(D), step_size=0.99 / np.linalg.norm(D, 2) ** 2, dual_step_size=1.0
        ),
        PrimalDual(ZERO(4), ZERO(3)), True,
    ),
    "condat_vu": (  # at its bound, 1/t - s |D|^2 = L/2
        lambda: operators.condat_vu(
            bowl, onto(SUBSPACES[0]), onto(SLOPED), dot(D), dual_step_size=0.7,
            step_size=lambda theta: 1 / (theta / 2 + 0.7 * np.linalg.norm(D, 2) ** 2),
        ),
        PrimalDual(ZERO(4), ZERO(3)), True,
    ),
    "preconditioned_forward_backward": (  # at its bound, P = H / 2 along the steep direction
        lambda: operators.preconditioned_forward_backward(
            bowl, lambda v, theta, step_size: v @ jnp.diag(jnp.asarray([1.0, 1.0, 1.0, 0.0])),
            lambda theta: theta / 2 * jnp.asarray([1.0, 0.5, 0.1, 3.0]),
        ),
        ZERO(4), False,
    ),
    "douglas_rachford": (
        lambda: operators.douglas_rachford(onto(SUBSPACES[0]), onto(SUBSPACES[1]), 1.0), ZERO(4), False,
    ),
    "peaceman_rachford": (
        lambda: operators.peaceman_rachford(onto(SUBSPACES[0]), onto(SUBSPACES[1]), 1.0), ZERO(4), False,
    ),
    "davis_yin": (  # at its bound, gamma = 2 / L
        lambda: operators.davis_yin(bowl, onto(SUBSPACES[0]), onto(SUBSPACES[1]), lambda theta: 2 / theta),
        ZERO(4), False,
    ),
    "red": (  # at its bound, with D = -I: gamma = 2 / (L + 2 weight)
        lambda: operators.red(bowl, lambda v, theta: -v, lambda theta: 2 / (theta + 6), 3.0), ZERO(4), False,
    ),
}  # fmt: skip


def norms(operator, like, theta=2.0):
    """Of a linear operator, in its metric and in the identity."""
    like = jax.tree.map(jnp.asarray, like)
    T = as_matrix(lambda v: operator(v, theta), like)
    G = np.eye(len(T)) if operator.metric is None else as_matrix(lambda v: operator.metric(v, theta), like)
    root = np.linalg.cholesky(G).T
    return np.linalg.norm(root @ T @ np.linalg.inv(root), 2), np.linalg.norm(T, 2)


@pytest.mark.parametrize("name", SHARP)
def test_the_norm_in_the_metric_is_one_and_in_the_identity_above(name):
    build, like, expands = SHARP[name]
    in_metric, in_identity = norms(build(), like)
    np.testing.assert_allclose(in_metric, 1.0, rtol=1e-9)
    assert (in_identity > 1.01) == expands


def test_just_beyond_their_bounds_they_expand():
    """Without terms that hide it: a curvature alone."""
    identity = lambda v, theta, step_size: v
    steep = lambda x, theta: 0.5 * jnp.sum(x**2)
    point = PrimalDual(jnp.zeros(1), jnp.zeros(1))
    one = lambda x, theta: x
    for scale, bound in ((1.0, True), (1.01, False)):
        single = jnp.zeros(1)
        zero = lambda v, theta, step_size: 0 * v
        T = operators.condat_vu(steep, identity, identity, one, step_size=scale / (0.5 + 1e-3), dual_step_size=1e-3)
        assert (norms(T, point)[0] <= 1 + 1e-9) == bound
        T = operators.preconditioned_forward_backward(steep, identity, 0.5 / scale)
        assert (norms(T, single)[0] <= 1 + 1e-9) == bound
        T = operators.davis_yin(steep, identity, identity, 2 * scale)
        assert (norms(T, single)[0] <= 1 + 1e-9) == bound
        T = operators.red(steep, lambda v, theta: -v, 2 * scale / 5, 2.0)
        assert (norms(T, single)[0] <= 1 + 1e-9) == bound
    # The metrics of the others cease to be definite.
    size = np.linalg.norm(D, 2) ** 2
    for scale, definite in ((0.999, True), (1.001, False)):
        T = operators.linearized_alm(identity, dot(D), 0.0, penalty=0.5, proximal_weight=0.5 * size / scale)
        G = as_matrix(lambda v: T.metric(v, None), PrimalDual(jnp.zeros(4), jnp.zeros(3)))
        assert (np.linalg.eigvalsh(G).min() > 0) == definite
        T = operators.chambolle_pock(zero, zero, dot(D), step_size=scale / (2 * size), dual_step_size=2.0)
        G = as_matrix(lambda v: T.metric(v, None), PrimalDual(jnp.zeros(4), jnp.zeros(3)))
        assert (np.linalg.eigvalsh(G).min() > 0) == definite


def test_tseng_nears_every_solution_but_is_not_non_expansive():
    """The sum of two half-parabolas, at a point where both are active and whose forward point sees only one."""
    slope = np.array([-0.6, 0.8])

    def field(x, theta):
        return jnp.asarray(slope) * jnp.maximum(slope @ x, 0.0) + jnp.asarray([1.0, 0.0]) * jnp.minimum(x[0], 0.0)

    gamma = 0.99 / 1.6
    T = operators.forward_backward_forward(field, step_size=gamma)
    x = jnp.asarray([-0.1, 10.0])
    direction = np.linalg.svd(np.asarray(jax.jacobian(lambda x: T(x, None))(x)))[2][0]
    moved = np.asarray(T(x + 1e-3 * direction, None) - T(x, None))
    assert np.linalg.norm(moved) > 1.05e-3
    # The solutions are x1 >= 0, 0.8 x2 <= 0.6 x1.
    points = 4 * np.random.default_rng(3).standard_normal((200, 2))
    images = np.asarray(jax.vmap(lambda x: T(x, None))(jnp.asarray(points)))
    middle = points - gamma * np.asarray(jax.vmap(lambda x: field(x, None))(jnp.asarray(points)))
    for solution in ([0.0, 0.0], [1.0, -3.0]):
        gain = squares(points - solution) - squares(images - solution)
        assert (gain >= (1 - 0.99**2) * squares(points - middle) - 1e-12).all()


# ---- real problems ---------------------------------------------------------------------------------------------------


@functools.cache
def diabetes():
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True)
    return features / features.std(axis=0), (target - target.mean()) / target.std()


def solved(operator, u, num_steps, theta=None):
    walk = jax.jit(lambda u: jax.lax.fori_loop(0, num_steps, lambda _, u: operator(u, theta), u))
    u = walk(jax.tree.map(jnp.asarray, u))
    return np.asarray(operator.answer(u, theta))


def test_admm_solves_the_lasso_of_scikit_learn():
    from sklearn.linear_model import Lasso

    features, target = diabetes()
    gram, moment = features.T @ features / 442, features.T @ target / 442
    T = operators.admm(
        operators.quadratic_argmin(lambda x, theta: 0.5 * x @ (gram @ x) - moment @ x), prox.l1, relaxation=1.7
    )
    x = solved(T, SplitVariables(ZERO(10), ZERO(10)), 300, 0.1)
    want = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(features, target).coef_
    assert 0 < np.sum(want == 0) < 10
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-9)


def test_admm_solves_the_least_absolute_deviations_of_scikit_learn():
    """min |A x - b|_1 with the whole of it in the second term; the minimisation over x is a least-squares fit."""
    from sklearn.linear_model import QuantileRegressor

    features, target = (part[:30] for part in diabetes())
    features = features[:, :5]
    inverse = np.linalg.pinv(features)
    T = operators.admm(
        lambda v, theta, step_size: inverse @ v,
        lambda v, theta, step_size: target + prox.l1(v - target, 1.0, step_size),
        linear_x=lambda x, theta: features @ x,
        penalty=5.0,
    )
    x = solved(T, SplitVariables(ZERO(30), ZERO(30)), 1000)
    want = QuantileRegressor(quantile=0.5, alpha=0.0, fit_intercept=False, solver="highs").fit(features, target).coef_
    met = np.argsort(np.abs(features @ want - target))[:5]  # a vertex, which HiGHS knows to 1e-7: five residuals vanish
    want = np.linalg.solve(features[met], target[met])
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-9)


def test_consensus_solves_the_ridge_regression_of_scikit_learn():
    """Four workers hold different numbers of patients, padded with empty rows."""
    from sklearn.linear_model import Ridge

    features, target = diabetes()
    sizes = (100, 120, 130, 92)
    ends = np.cumsum(sizes)
    rows, targets = np.zeros((4, 130, 10)), np.zeros((4, 130))
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        rows[i, :size], targets[i, :size] = features[end - size : end], target[end - size : end]
    T = operators.consensus_admm(
        lambda v, theta, step_size, d: local_prox(v, theta, step_size, (d["rows"], d["target"])),
        {"rows": jnp.asarray(rows), "target": jnp.asarray(targets)},
        prox.ridge,
        penalty=60.0,
        relaxation=1.6,
    )
    x = solved(T, SplitVariables(ZERO(10), ZERO((4, 10))), 400, 30.0)
    want = Ridge(alpha=30.0, fit_intercept=False, tol=1e-14).fit(features, target).coef_
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-9)


def test_preconditioned_steps_solve_the_sparse_logistic_regression_of_scikit_learn():
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    features, labels = load_breast_cancer(return_X_y=True)
    features = (features[:80, :8] - features[:80, :8].mean(axis=0)) / features[:80, :8].std(axis=0)
    features *= np.geomspace(0.1, 10, 8)  # what a scalar step would suffer from
    signs = 2.0 * labels[:80] - 1
    gram = features.T @ features / 4
    T = operators.preconditioned_forward_backward(
        lambda x, theta: jnp.sum(jnp.logaddexp(0.0, -signs * (features @ x))),
        prox.l1,
        jnp.asarray(0.5 * np.sqrt(np.diag(gram)) * np.sum(np.abs(gram) / np.sqrt(np.diag(gram)), axis=1)),
    )
    x = solved(T, ZERO(8), 4000, 2.0)
    fit = LogisticRegression(
        l1_ratio=1.0, C=0.5, fit_intercept=False, solver="liblinear", tol=1e-12, max_iter=100_000
    ).fit(features, labels[:80])
    assert 0 < np.sum(np.abs(x) < 1e-12) < 8
    np.testing.assert_allclose(x, fit.coef_[0], rtol=0, atol=2e-6)


def test_davis_yin_solves_a_portfolio():
    """Mean and variance on the simplex, no share above 0.3; the columns of diabetes stand for returns."""
    from scipy.optimize import minimize

    returns = diabetes()[0][:40] @ np.diag(np.geomspace(0.5, 2, 10))
    mean, covariance = returns.mean(axis=0), np.cov(returns.T)

    def risk(x):
        return 0.5 * x @ (covariance @ x) - 0.3 * mean @ x

    T = operators.davis_yin(
        lambda x, theta: risk(x),
        lambda v, theta, step_size: prox.simplex(v),
        lambda v, theta, step_size: prox.box(v, (0.0, 0.3)),
        1.5 / np.linalg.norm(covariance, 2),
    )
    x = solved(T, np.full(10, 0.1), 3000)
    want = minimize(
        risk,
        np.full(10, 0.1),
        jac=lambda x: covariance @ x - 0.3 * mean,
        bounds=[(0, 0.3)] * 10,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    ).x
    assert np.sum(want < 1e-9) > 0
    assert np.sum(want > 0.3 - 1e-9) > 0
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-7)


SOURCE, TARGET = np.array([0.3, 0.2, 0.4, 0.1]), np.array([0.25, 0.15, 0.2, 0.3, 0.1])
PLACES = np.random.default_rng(4).standard_normal((9, 2))
COST = np.sum((PLACES[:4, None] - PLACES[None, 4:]) ** 2, axis=2)


def marginals(plan, theta):
    return plan.sum(axis=1), plan.sum(axis=0)


def wanted(theta):
    """The marginals; theta moves mass between two sources and between two targets."""
    return (
        jnp.asarray(SOURCE) + theta * jnp.asarray([1.0, -1.0, 0.0, 0.0]),
        jnp.asarray(TARGET) + theta * jnp.asarray([0.0, 0.0, 1.0, 0.0, -1.0]),
    )


def transport_plan(theta):
    rows = np.kron(np.eye(4), np.ones(5))
    columns = np.kron(np.ones(4), np.eye(5))
    right = np.concatenate([np.asarray(part) for part in wanted(theta)])
    best = linprog(COST.ravel(), A_eq=np.vstack([rows, columns]), b_eq=right, bounds=(0, None), method="highs")
    return best.x.reshape(4, 5)


def shifted_non_negative(v, theta, step_size):
    """The proximal operator of the cost on non-negative plans."""
    return prox.non_negative(v - step_size * COST)


TRANSPORT = {
    "linearized_alm": lambda: operators.linearized_alm(
        shifted_non_negative, marginals, wanted, penalty=1.0, proximal_weight=9.1
    ),
    "chambolle_pock": lambda: operators.chambolle_pock(
        shifted_non_negative, lambda v, theta, step_size: wanted(theta), marginals, step_size=0.2, dual_step_size=0.5
    ),
}


@pytest.mark.parametrize("name", TRANSPORT)
def test_optimal_transport_and_its_derivative_although_the_multipliers_are_not_unique(name):
    """The marginals have one total, so that the multipliers are free by a constant and I - T' is singular."""
    T = TRANSPORT[name]()
    u = PrimalDual(jnp.zeros((4, 5)), (jnp.zeros(4), jnp.zeros(5)))
    solver = odl.implicit(odl.for_steps(odl.fixed_point(T), 6000))
    weights = np.random.default_rng(5).standard_normal((4, 5))

    def outer(theta):
        plan = T.answer(solver(u, theta).x, theta)
        return jnp.sum(weights * plan), plan

    (_, plan), gradient = jax.jit(jax.value_and_grad(outer, has_aux=True))(0.01)
    np.testing.assert_allclose(plan, transport_plan(0.01), rtol=0, atol=1e-9)
    want = np.sum(weights * (transport_plan(0.02) - transport_plan(0.0))) / 0.02
    np.testing.assert_allclose(gradient, want, rtol=1e-7)
    along = PrimalDual(jnp.zeros((4, 5)), (jnp.ones(4), -jnp.ones(5)))
    shifted = jax.tree.map(jnp.add, u, along)
    for a, b in zip(jax.tree.leaves(T(shifted, 0.01)), jax.tree.leaves(T(u, 0.01)), strict=True):
        assert np.ptp(np.asarray(a - b)) < 1e-12  # the constant stays, and nothing else sees it


def test_tseng_solves_a_matrix_game():
    payoff = np.array([[3.0, -1.0, 2.0, 0.5], [-2.0, 4.0, -1.0, 1.0], [1.0, 0.0, -3.0, 2.0]])
    T = operators.forward_backward_forward(
        lambda u, theta: (payoff @ u[1], -payoff.T @ u[0]),
        lambda v, theta, step_size: jax.tree.map(prox.simplex, v),
        step_size=0.9 / np.linalg.norm(payoff, 2),
    )
    x, y = jax.jit(lambda u: jax.lax.fori_loop(0, 4000, lambda _, u: T(u, None), u))(
        (jnp.full(3, 1 / 3), jnp.full(4, 0.25))
    )
    # min t subject to payoff' x <= t, x on the simplex.
    best = linprog(
        [0, 0, 0, 1],
        A_ub=np.hstack([payoff.T, -np.ones((4, 1))]),
        b_ub=np.zeros(4),
        A_eq=[[1, 1, 1, 0]],
        b_eq=[1],
        bounds=[(0, None)] * 3 + [(None, None)],
    )
    np.testing.assert_allclose(x, best.x[:3], rtol=0, atol=1e-9)
    np.testing.assert_allclose([np.max(payoff.T @ x), np.min(payoff @ y)], best.fun, rtol=0, atol=1e-9)


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_quadratic_argmin_against_the_linear_system_with_derivatives():
    """In v, theta and the step, forward and reverse, with and without A."""
    matrix, target = jnp.asarray(M), jnp.asarray(C)
    objective = lambda x, theta: 0.5 * theta * jnp.sum((matrix @ x["a"] - target) ** 2)
    like = {"a": jax.ShapeDtypeStruct((4,), jnp.float64)}
    image = lambda x, theta: theta * (jnp.asarray(RING) @ x["a"])
    v = jnp.asarray(RNG.standard_normal(4))
    for argmin, scale in (
        (lambda v, theta, step: operators.quadratic_argmin(objective)({"a": v}, theta, step)["a"], None),
        (lambda v, theta, step: operators.quadratic_argmin(objective, image, like)(v, theta, step)["a"], 1.0),
    ):

        def direct(v, theta, step, scale=scale):
            A = jnp.eye(4) if scale is None else theta * jnp.asarray(RING)
            return jnp.linalg.solve(step * theta * jnp.asarray(H) + A.T @ A, step * theta * jnp.asarray(Q) + A.T @ v)

        def looked_at(function, scale=scale):
            loss = lambda *args: jnp.asarray(OUTER) @ function(*args)
            point, tangent = (v, 0.7, 0.3), (jnp.cos(v), 0.2, -1.1)
            if scale is None:
                return jax.jvp(function, point, tangent)
            return function(*point), *jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), point, tangent)

        got, want = jax.jit(lambda: (looked_at(argmin), looked_at(direct)))()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    # A system that conjugate gradients cannot solve is not passed off as solved.
    assert np.isnan(operators.quadratic_argmin(lambda x, theta: -jnp.sum(x**2))(v, None, 1.0)).all()


def test_proximal_alm_by_newton():
    """The distribution of greatest entropy with a given mean: two undamped steps, and still the exact derivative."""
    values = jnp.asarray([0.0, 1.0, 3.0, 4.0])
    linear = lambda x, theta: jnp.stack([jnp.sum(x), values @ x])
    entropy = lambda x, theta: jnp.sum(x * (jnp.log(jnp.maximum(x, 1e-9)) - 1))
    observation = lambda theta: jnp.stack([jnp.ones_like(theta), theta])

    def tilted(theta):
        tilt = 0.0
        for _ in range(60):
            weights = np.exp(tilt * np.asarray(values))
            x = weights / weights.sum()
            mean = values @ x
            tilt += float((theta - mean) / (np.asarray(values) ** 2 @ x - mean**2))
        return x

    T = operators.proximal_alm(
        entropy, linear, observation, penalty=2.0, proximal_weight=lambda v, theta: 0.2 * v, num_newton_steps=2,
        linear_solver=odl.linear.dense(),
    )  # fmt: skip
    solver = odl.implicit(odl.for_steps(odl.fixed_point(T), 400))

    def outer(theta):
        x = T.answer(solver(PrimalDual(jnp.full(4, 0.25), jnp.zeros(2)), theta).x, theta)
        return jnp.asarray(OUTER) @ x, x

    (_, x), gradient = jax.jit(jax.value_and_grad(outer, has_aux=True))(jnp.asarray(1.5))
    np.testing.assert_allclose(x, tilted(1.5), rtol=0, atol=1e-10)
    want = OUTER @ (tilted(1.5 + 1e-5) - tilted(1.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, want, rtol=1e-7)
    # Away from the fixed point the number of Newton's steps counts.
    x, y, K = np.array([0.2, 0.3, 0.1, 0.4]), np.array([0.3, -0.2]), np.stack([np.ones(4), np.asarray(values)])
    z = x
    for _ in range(2):
        slope = np.log(z) + K.T @ (y + 2 * (K @ z - [1, 1.5])) + 0.2 * (z - x)
        z = z - np.linalg.solve(np.diag(1 / z) + 2 * K.T @ K + 0.2 * np.eye(4), slope)
    got = jax.jit(T)(PrimalDual(jnp.asarray(x), jnp.asarray(y)), jnp.asarray(1.5))
    np.testing.assert_allclose(flat(got), np.concatenate([z, y + 2 * (K @ z - [1, 1.5])]), rtol=0, atol=1e-12)


def test_proximal_alm_carries_a_metric_only_where_it_is_one():
    for weight, definite in ((0.0, False), (WEIGHTS, True), (np.array([1.0, 0, 2, 3]), False), (0.1, True)):
        T = operators.proximal_alm(least_squares(jnp.float64), dot(E), jnp.asarray(B_E), proximal_weight=weight)
        assert (T.metric is not None) == definite


def test_proximal_alm_by_a_minimisation_of_the_users():
    def argmin(x, v, theta, penalty):
        system = jnp.asarray(H + np.diag(WEIGHTS)) + penalty * jnp.asarray(E.T @ E)
        return jnp.linalg.solve(system, Q + penalty * E.T @ v + WEIGHTS * x)

    T = operators.proximal_alm(
        None, dot(E), lambda theta: theta * jnp.asarray(B_E), penalty=1.4, proximal_weight=WEIGHTS, argmin=argmin
    )
    u = random_point("proximal_alm")
    np.testing.assert_allclose(flat(jax.jit(T)(u, THETA)), flat(proximal_alm_step(*u, THETA)), rtol=0, atol=1e-12)


def test_a_preconditioner_may_be_any_definite_map():
    """With the Hessian itself one step is Newton's; the inverse is derived where it is not given.

    The prox, whose metric cannot be told by a step size, gets the step size 1.
    """
    hessian = jnp.asarray(H)
    shrink = lambda v, theta, step_size: prox.l1(v, 0.3, step_size)
    x = jnp.asarray(RNG.standard_normal(4))
    for inverse in (None, lambda v, theta: jnp.linalg.solve(hessian, v) / theta):
        T = operators.preconditioned_forward_backward(
            least_squares(jnp.float64), shrink, lambda v, theta: theta * (hessian @ v), preconditioner_inverse=inverse
        )
        newton = np.linalg.solve(H, Q)
        np.testing.assert_allclose(T(x, 1.0), soft(newton, 0.3), rtol=0, atol=1e-10)
        np.testing.assert_allclose(T(x, 2.0), soft((np.asarray(x) + newton) / 2, 0.3), rtol=0, atol=1e-10)
        np.testing.assert_allclose(as_matrix(lambda v: T.metric(v, 2.0), jnp.zeros(4)), 2 * H, rtol=0, atol=1e-12)
        assert (T.metric_inverse is None) == (inverse is None)


def test_a_denoiser_in_other_splittings_has_the_same_fixed_points():
    """Plug-and-play by forward-backward, Douglas-Rachford and ADMM, with one step size."""
    denoiser = filtered(jnp.float64)
    of_step = lambda v, theta, step_size: denoiser(v, theta)
    gamma = 1.5 / LIPSCHITZ
    want = CASES["plug_and_play"].answer(THETA)
    T = operators.douglas_rachford(of_step, quadratic_prox(jnp.float64), gamma)
    np.testing.assert_allclose(solved(T, ZERO(4), 2000, THETA), want, rtol=0, atol=1e-10)
    T = operators.admm(quadratic_prox(jnp.float64), of_step, penalty=1 / gamma)
    np.testing.assert_allclose(solved(T, SplitVariables(ZERO(4), ZERO(4)), 2000, THETA), want, rtol=0, atol=1e-10)


def test_the_probe_sees_which_denoisers_will_do():
    flat_loss = lambda x, theta: 0.5 * jnp.sum(x[:1] ** 2)
    probe = lambda T: jax.jit(lambda x: odl.diagnostics.expansion(T, x, None).factor)(jnp.asarray([0.3, -1.0, 2.0]))
    for stretch, sound in ((1.0, True), (1.3, False)):
        turn = lambda v, theta: stretch * jnp.asarray([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) @ v
        T = operators.red(flat_loss, turn, 2 / 3, 1.0)
        assert (probe(T) <= 1 + 1e-9) == sound
        halved = lambda v, theta: 0.5 * (v + turn(v, theta))
        T = operators.plug_and_play(flat_loss, halved, 1.0)
        assert (probe(T) <= 1 + 1e-9) == sound


def test_the_answer_is_handed_on_by_averaging_and_read_by_hypergradients():
    T, _ = built("douglas_rachford")
    half = operators.averaged(T, 0.7)
    assert half.readout is T.readout
    inside = odl.project(odl.fixed_point(built("admm")[0]), lambda u, theta: u).operator
    assert all(
        getattr(inside, name) is getattr(built("admm")[0], name) for name in ("readout", "metric", "metric_inverse")
    )
    readout = lambda x, theta: x
    assert operators.compose(T, half).readout is None
    assert operators.compose(T, half, readout=readout).readout is readout
    plain = operators.gradient(least_squares(jnp.float64), 0.1)
    x = jnp.ones(4)
    assert plain.answer(x, 1.0) is x
    solver = odl.implicit(odl.for_steps(odl.fixed_point(half), 1500))
    hyper = odl.hypergradients.through(solver, lambda u, theta: jnp.asarray(OUTER) @ half.answer(u, theta))
    theta = jnp.asarray(THETA)
    gradient, _, info = jax.jit(hyper.update)(theta, hyper.init(theta, jnp.zeros(4)))
    want = OUTER @ (lasso(THETA + 1e-5) - lasso(THETA - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, want, rtol=1e-8)
    np.testing.assert_allclose(info.value, OUTER @ lasso(THETA), rtol=1e-9)


def test_trees_of_mixed_dtypes_and_vmap():
    """x has a float64 and a float32 leaf, A x two leaves; a batch of thetas is a batch of operators."""
    x = {"a": jnp.ones(3), "b": jnp.ones((), jnp.float32)}
    linear = lambda x, theta: [x["a"][1:] - x["a"][:-1], x["b"][None] * 2]
    u = PrimalDual(x, [jnp.zeros(2), jnp.zeros(1, jnp.float32)])
    shrink = lambda v, theta, step_size: prox.l1(v, theta, step_size)
    objective = lambda x, theta: 0.5 * jnp.sum((x["a"] - 2) ** 2) + 0.5 * x["b"].astype(jnp.float64) ** 2
    built = (
        operators.chambolle_pock(shrink, shrink, linear, step_size=0.3, dual_step_size=0.5),
        operators.condat_vu(objective, shrink, shrink, linear, step_size=0.2, dual_step_size=0.5),
        operators.proximal_alm(
            objective,
            linear,
            [jnp.ones(2), jnp.ones(1, jnp.float32)],
            proximal_weight=0.1,
            linear_solver=odl.linear.dense(),
        ),
    )
    for T in built:
        for function in (T, functools.partial(displacement, T), T.metric):
            got = jax.eval_shape(function, u, 0.5)
            assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), got, u) == PrimalDual(
                {"a": True, "b": True}, [True, True]
            )
    thetas = jnp.asarray([0.1, 0.5])
    together = jax.jit(jax.vmap(built[0], in_axes=(None, 0)))(u, thetas)
    for i, theta in enumerate(thetas):
        alone = jax.jit(built[0])(u, theta)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=0, atol=1e-6)


IDENTITY = lambda v, theta, step_size: v
IMAGE = lambda x, theta: x
LOSS = lambda x, theta: jnp.sum(x**2)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: operators.admm(IDENTITY, IDENTITY, relaxation=2.0), ValueError, "admm: relaxation must lie in (0, 2)"),
        (lambda: operators.admm(IDENTITY, IDENTITY, penalty=0.0), ValueError, "admm: penalty must lie in (0, inf)"),
        (
            lambda: operators.admm(IDENTITY, IMAGE),
            TypeError,
            "admm: prox_z must be a function of (v, theta, step_size)",
        ),
        (lambda: operators.quadratic_argmin(LOSS, IMAGE), TypeError, "Pass an array (tree) like x"),
        (lambda: operators.proximal_alm(None, IMAGE, 0.0), TypeError, "neither came"),
        (lambda: operators.proximal_alm(LOSS, IMAGE, 0.0, argmin=lambda x, v, t, p: x), TypeError, "both came"),
        (lambda: operators.proximal_alm(LOSS, IMAGE, 0.0, proximal_weight=-1.0), ValueError, "must not be negative"),
        (lambda: operators.linearized_alm(IDENTITY, IMAGE, 0.0, proximal_weight=0.0), ValueError, "must be positive"),
        (
            lambda: operators.chambolle_pock(IDENTITY, IDENTITY, IMAGE, step_size=-1.0, dual_step_size=1.0),
            ValueError,
            "chambolle_pock: step_size must be positive; -1.0 came",
        ),
        (
            lambda: operators.condat_vu(IDENTITY, IDENTITY, IDENTITY, IMAGE, step_size=1.0, dual_step_size=1.0),
            TypeError,
            "condat_vu: objective must be a function of (x, theta)",
        ),
        (
            lambda: operators.preconditioned_forward_backward(LOSS, IDENTITY, 1.0, preconditioner_inverse=IMAGE),
            TypeError,
            "Leave the inverse out",
        ),
        (lambda: operators.davis_yin(LOSS, IDENTITY, IDENTITY, 0.0), ValueError, "davis_yin: step_size must lie in"),
        (lambda: operators.red(LOSS, IMAGE, 1.0, -1.0), ValueError, "red: weight must lie in [0, inf)"),
        (lambda: operators.plug_and_play(LOSS, IDENTITY, 1.0), TypeError, "denoiser must be a function of (v, theta)"),
        (
            lambda: operators.forward_backward_forward(lambda x, theta: x[0], step_size=1.0)(jnp.ones(2), None),
            TypeError,
            "monotone must keep the shapes and dtypes of x",
        ),
        (
            lambda: operators.consensus_admm(lambda v, theta, s, d: v, jnp.ones(3))(
                SplitVariables(jnp.ones(2), jnp.ones((4, 2))), None
            ),
            TypeError,
            "consensus_admm: the copies of z, one for each slice of the data, must keep the shapes and dtypes of y",
        ),
        (
            lambda: operators.consensus_admm(lambda v, theta, s, d: v, [jnp.ones(3), jnp.ones(())])(
                SplitVariables(jnp.ones(2), jnp.ones((3, 2))), None
            ),
            ValueError,
            "consensus_admm: every leaf of the data needs the leading axis of the workers",
        ),
    ],
)
def test_refusals_name_who_what_and_the_remedy(build, kind, message):
    with pytest.raises(kind) as raised:
        build()
    assert message in str(raised.value)
