"""Operators: their values, their fixed points, and the metric in which each is non-expansive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expansions import as_matrix, pairs, picard, squares
from scipy.optimize import linprog

import odljax as odl
from odljax import operators, prox
from odljax.operators import ADMMVariables, Operator
from odljax.operators._operator import displacement, natural_residual

RNG = np.random.default_rng(0)
A = RNG.standard_normal((5, 4))
B = RNG.standard_normal(5)
LIPSCHITZ = np.linalg.norm(A, 2) ** 2


def least_squares(x, theta):
    return 0.5 * jnp.sum((A @ x - B) ** 2) + 0.5 * theta * jnp.sum(x**2)


def slope(x, theta):
    return A.T @ (A @ x - B) + theta * x


def soft(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)


def l1(v, theta, step_size):
    return prox.l1(v, theta, step_size)


# ---- gradient --------------------------------------------------------------------------------------------------------


def test_gradient_against_the_formula():
    x = RNG.standard_normal(4)
    T = operators.gradient(least_squares, step_size=0.03)
    np.testing.assert_allclose(T(jnp.asarray(x), 0.4), x - 0.03 * slope(x, 0.4), rtol=0, atol=1e-14)
    assert (T.symmetric, T.metric, T.name) == (True, None, "gradient")
    of_theta = operators.gradient(least_squares, step_size=lambda theta: 0.1 * theta)
    np.testing.assert_allclose(of_theta(jnp.asarray(x), 0.4), x - 0.04 * slope(x, 0.4), rtol=0, atol=1e-14)
    # That of an iteration with a schedule takes the step of k = 0.
    scheduled = odl.gradient_descent(least_squares, step_size=lambda k: 0.05 / (k.astype(float) + 1)).operator
    np.testing.assert_allclose(scheduled(jnp.asarray(x), 0.4), x - 0.05 * slope(x, 0.4), rtol=0, atol=1e-14)


def test_gradient_rests_where_the_gradient_vanishes():
    T = operators.gradient(least_squares, step_size=1 / (LIPSCHITZ + 0.4))
    x = picard(T, jnp.zeros(4), 0.4, 3000)
    np.testing.assert_allclose(x, np.linalg.solve(A.T @ A + 0.4 * np.eye(4), A.T @ B), rtol=0, atol=1e-12)


def test_gradient_is_non_expansive_up_to_two_over_the_lipschitz_constant():
    for scale, bound in ((1.0, 1.0), (2.0, 1.0), (2.2, 1.2)):
        T = operators.gradient(least_squares, step_size=scale / (LIPSCHITZ + 0.0))
        images, sources = pairs(T, jnp.zeros(4), 0.0)
        assert (squares(images) <= bound**2 * squares(sources) + 1e-12).all()
    top = np.linalg.svd(A)[2][0]
    stretched = T(jnp.asarray(top), 0.0) - T(jnp.zeros(4), 0.0)  # the last one, at 2.2, expands
    np.testing.assert_allclose(np.linalg.norm(stretched), 1.2, rtol=1e-12)
    # Baillon and Haddad: at 1/L the step is firmly non-expansive.
    images, sources = pairs(operators.gradient(least_squares, step_size=1 / LIPSCHITZ), jnp.zeros(4), 0.0)
    assert (squares(images) + squares(sources - images) <= squares(sources) + 1e-12).all()


def test_gradient_displacement_keeps_the_digits_that_the_plain_difference_loses():
    curvature = jnp.asarray(np.geomspace(1e-6, 1.0, 8), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32)
    T = operators.gradient(lambda x, theta: 0.5 * jnp.sum(theta * x**2), step_size=0.5)
    want = 0.5 * np.asarray(curvature, float) * np.asarray(x, float)
    kept = np.asarray(displacement(T, x, curvature), float)
    plain = np.asarray(x - T(x, curvature), float)
    np.testing.assert_allclose(kept, want, rtol=3e-7)
    np.testing.assert_allclose(plain, want, rtol=0, atol=1e-6)  # the same to rounding of x ...
    assert np.max(np.abs(plain / want - 1)) > 1e-2  # ... and hardly a digit in the flat directions
    jacobian = np.asarray(jax.jacobian(lambda x: displacement(T, x, curvature))(x), float)
    np.testing.assert_allclose(jacobian, np.diag(0.5 * np.asarray(curvature, float)), rtol=3e-7, atol=1e-14)


# ---- forward-backward ------------------------------------------------------------------------------------------------


def test_forward_backward_against_the_formula():
    x = RNG.standard_normal(4)
    for step_size, gamma in ((0.03, 0.03), (lambda theta: 0.1 * theta, 0.04)):
        T = operators.forward_backward(least_squares, l1, step_size=step_size)
        want = soft(x - gamma * slope(x, 0.4), gamma * 0.4)
        np.testing.assert_allclose(T(jnp.asarray(x), 0.4), want, rtol=0, atol=1e-14)
        np.testing.assert_allclose(displacement(T, jnp.asarray(x), 0.4), x - want, rtol=0, atol=1e-14)
    assert (T.symmetric, T.metric, T.name) == (False, None, "forward_backward")


def test_forward_backward_rests_at_the_minimiser():
    """Optimality of ``f + theta |x|_1``: minus the gradient is a subgradient."""
    theta = 1.0

    def smooth(x, theta):
        return 0.5 * jnp.sum((A @ x - B) ** 2)

    x = picard(operators.forward_backward(smooth, l1, step_size=1 / LIPSCHITZ), jnp.zeros(4), theta, 5000)
    gradient = A.T @ (A @ x - B)
    on = x != 0
    assert on.any()
    assert not on.all()
    np.testing.assert_allclose(gradient[on], -theta * np.sign(x[on]), rtol=0, atol=1e-11)
    assert (np.abs(gradient[~on]) < theta).all()


@pytest.mark.parametrize("scale", [1.0, 1.9])
def test_forward_backward_is_averaged(scale):
    """Averaged with constant 2 / (4 - gamma L), Combettes and Yamada (2015), proposition 4.4."""
    T = operators.forward_backward(lambda x, theta: least_squares(x, 0.0), l1, step_size=scale / LIPSCHITZ)
    images, sources = pairs(T, jnp.zeros(4), 0.3)
    alpha = 2 / (4 - scale)
    assert (squares(images) <= squares(sources) + 1e-12).all()
    assert (squares(images) + (1 - alpha) / alpha * squares(sources - images) <= squares(sources) + 1e-12).all()


def test_forward_backward_displacement_keeps_digits_on_the_support():
    curvature = jnp.asarray(np.geomspace(1e-6, 1.0, 8), jnp.float32)
    x = jnp.asarray(1.0 + np.random.default_rng(1).random(8), jnp.float32)
    T = operators.forward_backward(
        lambda x, theta: 0.5 * jnp.sum(theta * x**2), lambda v, theta, step_size: prox.non_negative(v), step_size=0.5
    )
    want = 0.5 * np.asarray(curvature, float) * np.asarray(x, float)
    np.testing.assert_allclose(np.asarray(displacement(T, x, curvature), float), want, rtol=3e-7)
    plain = np.asarray(x - T(x, curvature), float)
    assert np.max(np.abs(plain / want - 1)) > 1e-2
    # At a kink of the prox, where T is not the identity step, the displacement is still x - T(x).
    x = -x
    np.testing.assert_allclose(displacement(T, x, curvature), x - T(x, curvature), rtol=0, atol=3e-7)


# ---- linearised ADMM -------------------------------------------------------------------------------------------------

SHAPE = ADMMVariables(jnp.zeros(4), jnp.zeros(5), jnp.zeros(5))
PENALTY, WEIGHT = 0.7, 1.1 * 0.7 * LIPSCHITZ


def shrink_z(v, theta, step_size):
    return prox.l1(v, theta, step_size)


def shrink_e(v, theta, step_size):
    return prox.l1(v, 1.0, step_size)


def admm(proximal_weight=WEIGHT, penalty=PENALTY, observation=B, matrix=A, prox_e=shrink_e):
    return operators.linearized_admm(
        lambda z, theta: jnp.asarray(matrix) @ z,
        shrink_z,
        prox_e,
        jnp.asarray(observation),
        penalty=penalty,
        proximal_weight=proximal_weight,
    )


def admm_step(z, e, y, theta, r=WEIGHT, beta=PENALTY, b=B):
    new_z = soft(z - A.T @ (A @ z + e - b + y / beta) * beta / r, theta / r)
    new_e = soft(b - A @ new_z - y / beta, 1 / beta)
    return new_z, new_e, y + beta * (A @ new_z + new_e - b)


def admm_metric(r=WEIGHT, beta=PENALTY):
    top = np.diag(np.broadcast_to(r, 4)) - beta * A.T @ A
    return np.block(
        [
            [top, np.zeros((4, 10))],
            [np.zeros((5, 4)), beta * np.eye(5), np.zeros((5, 5))],
            [np.zeros((5, 9)), np.eye(5) / beta],
        ]
    )


DIAGONAL = WEIGHT * np.array([1.0, 1.5, 2.0, 1.2])


@pytest.mark.parametrize(
    ("r", "given"),
    [
        (WEIGHT, WEIGHT),
        (DIAGONAL, jnp.asarray(DIAGONAL)),
        (0.3 + WEIGHT, lambda theta: theta + WEIGHT),
        (0.3 + DIAGONAL, lambda theta: theta + jnp.asarray(DIAGONAL)),
    ],
    ids=["number", "array", "function", "function to array"],
)
def test_linearized_admm_and_its_metric_against_the_formula(r, given):
    theta = 0.3
    z, e, y = (RNG.standard_normal(size) for size in (4, 5, 5))
    T = admm(given)
    got = T(ADMMVariables(*map(jnp.asarray, (z, e, y))), theta)
    assert isinstance(got, ADMMVariables)
    for part, want in zip(got, admm_step(z, e, y, theta, r), strict=True):
        np.testing.assert_allclose(part, want, rtol=0, atol=1e-13)
    gap = displacement(T, ADMMVariables(*map(jnp.asarray, (z, e, y))), theta)
    for part, before, after in zip(gap, (z, e, y), got, strict=True):
        np.testing.assert_allclose(part, before - np.asarray(after), rtol=0, atol=1e-13)
    assert T.answer(got, theta) is got.z
    G = as_matrix(lambda v: T.metric(v, theta), SHAPE)
    np.testing.assert_allclose(G, admm_metric(r), rtol=0, atol=1e-12)
    np.testing.assert_allclose(G, G.T, rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(G).min() > 0
    assert (T.symmetric, T.name) == (False, "linearized_admm")


def test_the_penalty_and_the_observation_may_depend_on_theta():
    z, e, y = (RNG.standard_normal(size) for size in (4, 5, 5))
    T = operators.linearized_admm(
        lambda z, theta: theta * (A @ z),
        shrink_z,
        shrink_e,
        lambda theta: theta * B,
        penalty=lambda theta: 2 * theta,
        proximal_weight=lambda theta: 9.0 * theta,
    )
    new_z, new_e, new_y = T(ADMMVariables(*map(jnp.asarray, (z, e, y))), 0.5)
    half = 0.5 * A
    want_z = soft(z - 1.0 / 4.5 * half.T @ (half @ z + e - 0.5 * B + y), 0.5 / 4.5)
    want_e = soft(0.5 * B - half @ want_z - y, 1.0)
    np.testing.assert_allclose(new_z, want_z, rtol=0, atol=1e-13)
    np.testing.assert_allclose(new_e, want_e, rtol=0, atol=1e-13)
    np.testing.assert_allclose(new_y, y + half @ want_z + want_e - 0.5 * B, rtol=0, atol=1e-13)


def test_the_metric_is_definite_exactly_above_the_bound():
    for scale, definite in ((1.001, True), (0.999, False)):
        G = as_matrix(lambda v: admm(scale * PENALTY * LIPSCHITZ).metric(v, 0.3), SHAPE)
        assert (np.linalg.eigvalsh(G).min() > 0) == definite


@pytest.mark.parametrize("r", [WEIGHT, DIAGONAL], ids=["number", "array"])
def test_linearized_admm_is_non_expansive_in_its_metric(r):
    T, theta, G = admm(r if np.ndim(r) == 0 else jnp.asarray(r)), 0.8, admm_metric(r)
    images, sources = pairs(T, SHAPE, theta)
    assert (squares(images, G) <= squares(sources, G) * (1 + 1e-12)).all()
    # Not firmly so; but from its own outcomes towards a fixed point it is, and so it converges without relaxation.
    assert (squares(images, G) + squares(sources - images, G) > squares(sources, G)).any()
    flat, unravel = jax.flatten_util.ravel_pytree(SHAPE)
    fixed = np.concatenate(picard(T, SHAPE, theta, 20000))
    points = 3.0 * np.random.default_rng(8).standard_normal((200, flat.size))

    def twice(v):
        once = T(unravel(v), theta)
        return jax.flatten_util.ravel_pytree(once)[0], jax.flatten_util.ravel_pytree(T(once, theta))[0]

    once, again = (np.asarray(part) for part in jax.jit(jax.vmap(twice))(points))
    gain = squares(once - fixed, G) - squares(again - fixed, G) - squares(once - again, G)
    assert (gain >= -1e-9 * squares(once - fixed, G)).all()


def test_linearized_admm_is_not_non_expansive_in_the_identity():
    """One dimension, A = 1/2, beta = 1, r = 0.3, no thresholds: a pair that moves apart, and nearer in the metric."""
    T = operators.linearized_admm(
        lambda z, theta: 0.5 * z,
        lambda v, theta, step_size: v,
        lambda v, theta, step_size: v,
        jnp.zeros(()),
        proximal_weight=0.3,
    )
    zero = ADMMVariables(*(jnp.zeros(()),) * 3)
    other = ADMMVariables(jnp.zeros(()), jnp.ones(()), jnp.ones(()))
    before = np.array(other) - np.array(zero)
    after = np.array(T(other, None)) - np.array(T(zero, None))
    np.testing.assert_allclose(after, [-10 / 3, 2 / 3, 0.0], rtol=0, atol=1e-15)
    assert np.linalg.norm(after) > 2.4 * np.linalg.norm(before)
    G = as_matrix(lambda v: T.metric(v, None), zero)
    np.testing.assert_allclose(G, np.diag([0.05, 1.0, 1.0]), rtol=0, atol=1e-15)
    np.testing.assert_allclose([before @ G @ before, after @ G @ after], [2.0, 1.0], rtol=1e-14)
    images, sources = pairs(admm(), SHAPE, 0.3)
    assert (squares(images) > squares(sources)).any()


def test_linearized_admm_against_a_linear_programme():
    """min theta |z|_1 + |e|_1 subject to A z + e = b."""
    theta = 0.8
    z, e, y = picard(admm(), SHAPE, theta, 20000)
    cost = np.concatenate([np.full(8, theta), np.ones(10)])
    equal = np.hstack([A, -A, np.eye(5), -np.eye(5)])
    best = linprog(
        cost, A_eq=equal, b_eq=B, bounds=(0, None), method="highs", options={"primal_feasibility_tolerance": 1e-10}
    )
    np.testing.assert_allclose(A @ z + e, B, rtol=0, atol=1e-10)
    np.testing.assert_allclose(theta * np.abs(z).sum() + np.abs(e).sum(), best.fun, rtol=1e-9)
    np.testing.assert_allclose(z, best.x[:4] - best.x[4:8], rtol=0, atol=1e-8)
    # The multiplier: -y is a subgradient of |e|_1 and -A'y one of theta |z|_1.
    assert np.abs(y).max() <= 1 + 1e-9
    np.testing.assert_allclose(-y[np.abs(e) > 1e-6], np.sign(e[np.abs(e) > 1e-6]), rtol=0, atol=1e-9)
    assert np.abs(A.T @ y).max() <= theta + 1e-9
    np.testing.assert_allclose(-(A.T @ y)[np.abs(z) > 1e-6], theta * np.sign(z[np.abs(z) > 1e-6]), rtol=0, atol=1e-9)


def test_linearized_admm_in_closed_form():
    """A = c I and h = |.|^2 / 2: the answer is a soft threshold."""
    c, theta, b = 1.7, 0.6, np.array([2.0, -0.2, 1.0, -3.0])
    T = operators.linearized_admm(
        lambda z, theta: c * z,
        l1,
        lambda v, theta, step_size: prox.ridge(v, 1.0, step_size),
        jnp.asarray(b),
        proximal_weight=3.5,
    )
    start = ADMMVariables(*(jnp.zeros(4),) * 3)
    z, e, y = picard(T, start, theta, 3000)
    want = soft(b / c, theta / c**2)
    assert (want == 0).any()
    np.testing.assert_allclose(z, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(e, b - c * want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(y, c * want - b, rtol=0, atol=1e-12)  # minus the gradient of h at e


@pytest.mark.parametrize("relaxation", [0.5, 0.8])
def test_the_rate_of_krasnoselskii_and_mann(relaxation):
    theta = 0.8
    T = admm()
    fixed = picard(T, SHAPE, theta, 20000)
    start = ADMMVariables(*(jnp.asarray(RNG.standard_normal(size)) for size in (4, 5, 5)))

    def body(u, _):
        image = T(u, theta)
        gap = jax.tree.map(jnp.subtract, u, image)
        return jax.tree.map(lambda a, g: a - relaxation * g, u, gap), jax.flatten_util.ravel_pytree(gap)[0]

    gaps = np.asarray(jax.jit(lambda u: jax.lax.scan(body, u, None, length=300)[1])(start))
    G = admm_metric()
    away = np.concatenate([np.asarray(a) - b for a, b in zip(start, fixed, strict=True)])
    bound = np.sqrt(away @ G @ away) / np.sqrt(relaxation * (1 - relaxation) * np.arange(1, 301))
    sizes = np.sqrt(squares(gaps, G))
    assert (sizes <= bound * (1 + 1e-9)).all()
    assert (np.diff(sizes) <= 1e-12).all()  # and it falls


def test_linearized_admm_on_pytrees_with_mixed_dtypes():
    def linear(z, theta):
        return {"fit": A @ z["code"] + z["offset"].astype(jnp.float64)}

    u = ADMMVariables(
        {"code": jnp.ones(4), "offset": jnp.ones((), jnp.float32)}, {"fit": jnp.zeros(5)}, {"fit": jnp.zeros(5)}
    )
    T = operators.linearized_admm(linear, shrink_z, shrink_e, {"fit": jnp.asarray(B)}, proximal_weight=20.0)
    for got in (T(u, 0.3), T.metric(u, 0.3), displacement(T, u, 0.3)):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), got) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), u
        )
    # offset is one more column of A, and every part sees the others
    wide = np.hstack([A, np.ones((5, 1))])
    want = soft(np.ones(5) - wide.T @ (wide @ np.ones(5) - B) / 20, 0.3 / 20)
    new = T(u, 0.3).z
    np.testing.assert_allclose(new["code"], want[:4], rtol=0, atol=1e-13)
    np.testing.assert_allclose(new["offset"], want[4], rtol=3e-7)


# ---- natural residuals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda s: operators.gradient(least_squares, s), "gradient"),
        (lambda s: operators.gradient(least_squares, lambda theta: s + 0 * theta), "gradient"),
        (lambda s: operators.averaged(operators.gradient(least_squares, s), 1.7), "gradient"),
        (lambda s: operators.averaged(Operator(lambda x, theta: x - slope(x, theta)), s), "gradient of x"),
        (lambda s: operators.forward_backward(least_squares, lambda v, t, s: v, s), "gradient"),
        (lambda s: operators.forward_backward(least_squares, l1, s), "map"),
    ],
)
def test_the_natural_residual_is_free_of_step_and_relaxation(build, kind):
    """The gradient, or the prox-gradient map, whatever the step size; compared with x only where it has x's unit."""
    x, theta = np.array([1.3, -0.7, 0.4, -2.1]), 0.4
    for size in (1e-7, 0.05, 1.0):
        (part,) = natural_residual(build(size), jnp.asarray(x), theta)
        want = slope(x, theta)
        if kind == "map":
            want = (x - soft(x - size * want, size * theta)) / size
        np.testing.assert_allclose(part.value, want, rtol=1e-9, atol=1e-15 / size)  # x and T(x) were rounded
        assert (part.scale is None) == (kind != "gradient of x")
        if part.scale is not None:
            np.testing.assert_array_equal(part.scale[0], x)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_part_of_a_natural_residual_meets_the_tolerance(order):
    """Two numbers in units a million million apart: neither hides the other, whichever comes first."""
    goals, rates = np.array([1e6, 1e-6]), np.array([0.5, 0.9])

    def parts(x, theta):
        each = [operators.Residual(x[i] - goals[i], (x[i],)) for i in (0, 1)]
        return tuple(each[i] for i in order)

    T = Operator(lambda x, theta: goals + rates * (x - goals), natural_residual=parts)
    solution = jax.jit(odl.until_converged(odl.fixed_point(T), tol=0.0, relative_tol=1e-4, max_steps=200))(
        jnp.zeros(2), None
    )
    steps = np.arange(200)[:, None]
    x = goals * (1 - rates**steps)
    first = np.argmax(np.all(np.abs(x - goals) <= 1e-4 * np.abs(x), axis=1))
    assert (int(solution.num_steps), int(solution.status)) == (first, odl.Status.CONVERGED)
    np.testing.assert_allclose(solution.x, x[first], rtol=1e-12)


# ---- averaged and compose --------------------------------------------------------------------------------------------


def test_averaged_keeps_fixed_points_metric_and_digits():
    T = admm()
    theta = 0.8
    half = operators.averaged(T, relaxation=0.4)
    u = ADMMVariables(*(jnp.asarray(RNG.standard_normal(size)) for size in (4, 5, 5)))
    for got, x, image in zip(half(u, theta), u, T(u, theta), strict=True):
        np.testing.assert_allclose(got, 0.6 * x + 0.4 * image, rtol=0, atol=1e-14)
    fixed = picard(T, SHAPE, theta, 20000)
    for part in displacement(half, ADMMVariables(*map(jnp.asarray, fixed)), theta):
        np.testing.assert_allclose(part, 0.0, rtol=0, atol=1e-12)
    assert half.metric is T.metric
    assert (half.symmetric, half.name) == (False, "averaged(linearized_admm)")

    given = Operator(
        lambda x, theta: x / 2, metric=lambda v, t: 4 * v, metric_inverse=lambda v, t: v / 4, symmetric=True
    )
    kept = operators.averaged(given, relaxation=lambda theta: theta)
    assert kept.metric_inverse is given.metric_inverse
    assert kept.symmetric
    np.testing.assert_allclose(kept(jnp.asarray(8.0), 0.25), 7.0, rtol=1e-15)

    curvature = jnp.asarray(np.geomspace(1e-6, 1.0, 8), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32)
    descent = operators.averaged(operators.gradient(lambda x, t: 0.5 * jnp.sum(t * x**2), step_size=0.5), 0.5)
    want = 0.25 * np.asarray(curvature, float) * np.asarray(x, float)
    np.testing.assert_allclose(np.asarray(displacement(descent, x, curvature), float), want, rtol=5e-7)


def test_averaging_tames_a_rotation():
    turn = jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])
    half = operators.averaged(lambda x, theta: turn @ x)
    images, sources = pairs(half, jnp.zeros(2), None)
    assert (squares(images) + squares(sources - images) <= squares(sources) + 1e-12).all()
    assert np.abs(picard(lambda x, theta: turn @ x, jnp.ones(2), None, 101)).min() == 1.0
    np.testing.assert_allclose(picard(half, jnp.ones(2), None, 101), 0.0, rtol=0, atol=1e-12)


def test_compose_applies_the_last_first():
    T = operators.compose(
        lambda x, theta: x + theta, lambda x, theta: 2 * x, Operator(lambda x, theta: x - 1, name="less")
    )
    assert float(T(5.0, 10.0)) == 18.0
    assert T.name == "compose(<lambda>, <lambda>, less)"
    assert (T.metric, T.metric_inverse, T.symmetric) == (None, None, False)
    assert float(operators.compose(lambda x, theta: 3 * x)(2.0, None)) == 6.0
    metric, inverse = (lambda v, theta: 2 * v), (lambda v, theta: v / 2)
    T = operators.compose(lambda x, theta: x, metric=metric, metric_inverse=inverse)
    assert (T.metric, T.metric_inverse) == (metric, inverse)
    # A non-symmetric product of symmetric factors: the declaration is not handed on.
    factor = Operator(lambda x, theta: x, symmetric=True)
    assert not operators.compose(factor, factor).symmetric


def test_a_composition_is_non_expansive_in_the_common_metric():
    """Two ADMM steps with different thresholds share their metric."""
    T = operators.compose(lambda u, theta: admm()(u, 2 * theta), admm(), metric=admm().metric)
    images, sources = pairs(T, SHAPE, 0.3)
    G = as_matrix(lambda v: T.metric(v, 0.3), SHAPE)
    assert (squares(images, G) <= squares(sources, G) * (1 + 1e-12)).all()


def test_structure_and_dtype_are_kept_and_numbers_are_accepted():
    x = {"a": jnp.ones((), jnp.float32), "b": [jnp.ones((2, 1)), jnp.ones(3, jnp.float16)]}

    def objective(x, theta):
        return sum(jnp.sum(leaf.astype(jnp.float64) ** 2) for leaf in jax.tree.leaves(x))

    for T in (
        operators.gradient(objective, step_size=0.25),
        operators.forward_backward(objective, lambda v, theta, step_size: prox.non_negative(v), step_size=0.25),
        operators.averaged(lambda x, theta: jax.tree.map(lambda leaf: 0 * leaf, x)),
        operators.compose(lambda x, theta: jax.tree.map(lambda leaf: leaf / 2, x)),
    ):
        for got in (T(x, 1.0), displacement(T, x, 1.0)):
            assert jax.tree.structure(got) == jax.tree.structure(x)
            assert jax.tree.map(lambda g, w: g.dtype == w.dtype and g.shape == w.shape, got, x) == {
                "a": True,
                "b": [True] * 2,
            }
            for leaf in jax.tree.leaves(got):
                np.testing.assert_allclose(leaf, np.full(leaf.shape, 0.5), rtol=1e-3)
    # Python and NumPy numbers come in strongly typed.
    assert operators.as_operator(lambda x, theta: x)(2.0, None).dtype == jnp.float64
    assert operators.as_operator(lambda x, theta: x)(np.float32(2.0), None).dtype == jnp.float32
