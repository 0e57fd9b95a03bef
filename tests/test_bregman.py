"""Mirror steps: their formula, the distance that falls, solutions from SciPy, and derivatives on the simplex."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expansions import squares
from scipy.optimize import minimize

import odljax as odl
from odljax import operators

RNG = np.random.default_rng(2)
FACTORS = RNG.standard_normal((5, 4))
COVARIANCE = FACTORS @ FACTORS.T / 8 + 0.2 * np.diag([0.5, 1.0, 1.5, 2.0, 1.0])
MEAN = np.array([0.2, -0.6, 0.15, 0.1, 0.0])
LARGEST = np.abs(COVARIANCE).max()  # the Lipschitz constant of the gradient from |.|_1 to its dual
START = np.full(5, 0.2)


def risk(x, theta):
    return 0.5 * x @ (COVARIANCE @ x) - theta * jnp.asarray(MEAN) @ x


def slope(x, theta):
    return COVARIANCE @ x - theta * MEAN


def divergence(x, y):
    """Kullback-Leibler, on the simplex."""
    on = x > 0
    return np.sum(x[on] * np.log(x[on] / y[on]))


def portfolio(theta):
    """The minimiser on the simplex from the support that SciPy finds, solved exactly, and its derivative in theta."""
    found = minimize(
        risk,
        START,
        (theta,),
        jac=slope,
        bounds=[(0, None)] * 5,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-16},
    ).x
    on = found > 1e-6
    system = np.block(
        [[COVARIANCE[np.ix_(on, on)], np.ones((on.sum(), 1))], [np.ones((1, on.sum())), np.zeros((1, 1))]]
    )
    x, move = np.zeros(5), np.zeros(5)
    x[on] = np.linalg.solve(system, np.append(theta * MEAN[on], 1.0))[:-1]
    move[on] = np.linalg.solve(system, np.append(MEAN[on], 0.0))[:-1]
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-6)
    return x, move, on


@functools.cache
def entropic(gamma=1 / LARGEST):
    T = operators.entropic(risk, step_size=gamma)
    return T, jax.jit(T)


def test_entropic_against_the_formula():
    x = RNG.dirichlet(np.ones(5))
    T = operators.entropic(risk, step_size=lambda theta: 2 * theta, scale=lambda theta: 3 * theta)
    weights = 3 * x * np.exp(-1.0 * slope(3 * x, 0.5))
    want = 1.5 * weights / weights.sum()
    got = jax.jit(T)(jnp.asarray(3 * x), 0.5)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert (T.name, T.symmetric, T.metric) == ("entropic", False, None)
    # Rows of a tree, each a distribution of its own; a leaf without axes is one.
    tree = {"rows": jnp.asarray(RNG.dirichlet(np.ones(3), 2)), "one": jnp.asarray(1.0, jnp.float32)}
    T = operators.entropic(lambda x, theta: jnp.sum(x["rows"] ** 2) + 0.0 * jnp.float64(x["one"]), 1.0)
    got = jax.jit(T)(tree, None)
    for row, new in zip(np.asarray(tree["rows"]), np.asarray(got["rows"]), strict=True):
        np.testing.assert_allclose(new, row * np.exp(-2 * row) / np.sum(row * np.exp(-2 * row)), rtol=1e-13)
    assert got["one"] == 1.0
    assert got["one"].dtype == jnp.float32
    # Half precision is summed in single.
    uniform = jnp.full(1000, 1e-3, jnp.bfloat16)
    T = operators.entropic(lambda x, theta: jnp.sum(x.astype(jnp.float32)), 1.0)
    assert jax.jit(T)(uniform, None).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.sum(np.asarray(jax.jit(T)(uniform, None), float)), 1.0, rtol=4e-3)


def test_mirror_with_logarithm_and_softmax_is_entropic():
    T = operators.mirror(risk, lambda x, theta: jnp.log(x), lambda v, theta: jax.nn.softmax(v), step_size=0.7)
    x = RNG.dirichlet(np.ones(5))
    weights = x * np.exp(-0.7 * slope(x, 0.3))
    np.testing.assert_allclose(jax.jit(T)(jnp.asarray(x), 0.3), weights / weights.sum(), rtol=1e-13)
    assert (T.name, T.metric) == ("mirror", None)


def test_zeros_stay_nothing_overflows_and_a_nan_comes_out():
    T = operators.entropic(lambda x, theta: jnp.sum(theta * x), step_size=1.0)
    slopes = jnp.asarray([0.0, -1e4, 1e4, 5.0])
    x = jnp.asarray([0.5, 0.0, 0.25, 0.25])
    weights = np.array([0.5, 0.0, 0.0, 0.25 * np.exp(-5)])
    np.testing.assert_allclose(T(x, slopes), weights / weights.sum(), rtol=1e-12, atol=0)
    # At an entry that is zero the derivative is that of the formula: the factor by which it would grow.
    jacobians = jax.jit(
        lambda x, y: [jac(T)(*args) for jac in (jax.jacfwd, jax.jacrev) for args in ((x, slopes), (y, y[::-1]))]
    )(x, jnp.asarray([1.0, 0.0]))
    for steep, plain in (jacobians[:2], jacobians[2:]):
        assert np.isfinite(steep).all()
        np.testing.assert_allclose(plain, [[0.0, -np.exp(-1)], [0.0, np.exp(-1)]], rtol=0, atol=1e-15)
    apply = jax.jit(T)
    for bad in (x.at[0].set(jnp.nan), x.at[0].set(-0.1)):
        assert np.isnan(apply(bad, slopes)).all()
    assert np.isnan(apply(x, slopes.at[0].set(jnp.nan))).all()
    # An entry as small as a positive number can be, and the best: it wins at once.
    tiny = jnp.asarray([1.0, 1e-300])
    np.testing.assert_allclose(apply(tiny, jnp.asarray([800.0, -800.0])), [0.0, 1.0], rtol=0, atol=1e-12)


def test_the_divergence_from_the_minimiser_and_the_objective_fall():
    """At the largest step that the theory allows, with its rate; and T is not non-expansive in the identity."""
    theta = 1.5
    want, _, on = portfolio(theta)
    assert 1 < on.sum() < 5
    _, apply = entropic()
    x = RNG.dirichlet(0.3 * np.ones(5))
    first = divergence(want, x)
    last, value = first, float(risk(x, theta))
    for k in range(1, 200):
        x = np.asarray(apply(jnp.asarray(x), theta))
        now = divergence(want, x)
        assert now <= last + 1e-14
        assert float(risk(x, theta)) <= value + 1e-14
        assert risk(x, theta) - risk(want, theta) <= LARGEST * first / k
        last, value = now, float(risk(x, theta))
    assert last < 1e-3 * first
    T, _ = entropic()
    points = jnp.asarray(RNG.dirichlet(0.3 * np.ones(5), 200))
    images = np.asarray(jax.jit(jax.vmap(lambda x: T(x, theta)))(points))
    moved, apart = images[::2] - images[1::2], np.asarray(points[::2] - points[1::2])
    assert (squares(moved) > 1.05 * squares(apart)).any()


def test_solutions_and_derivatives_on_the_simplex():
    """In the interior and on the boundary."""
    steps = odl.for_steps(odl.fixed_point(entropic()[0]), 2000)
    solver = odl.implicit(steps)
    weights = np.array([1.0, -2.0, 3.0, 0.5, -1.0])

    @jax.jit
    def all_of_it(theta):
        x, tangent = jax.jvp(lambda theta: solver(jnp.asarray(START), theta).x, (theta,), (jnp.ones(()),))
        gradient = jax.grad(lambda theta: weights @ solver(jnp.asarray(START), theta).x)(theta)
        _, unrolled = jax.jvp(lambda theta: steps(jnp.asarray(START), theta).x, (theta,), (jnp.ones(()),))
        return x, tangent, gradient, unrolled

    for theta, inside in ((0.05, True), (1.5, False)):
        want, move, on = portfolio(theta)
        assert on.all() == inside
        x, tangent, gradient, unrolled = all_of_it(jnp.asarray(theta))
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-10)
        np.testing.assert_allclose(tangent, move, rtol=0, atol=1e-9)
        np.testing.assert_allclose(unrolled, move, rtol=0, atol=1e-9)
        np.testing.assert_allclose(gradient, weights @ move, rtol=1e-9)


def test_mirror_reconstructs_from_counts_and_differentiates():
    """Poisson counts of positive intensities: smooth relative to Burg's entropy only, with L = |b|_1.

    Bauschke, Bolte and Teboulle (2017).
    """
    A = RNG.random((8, 3))
    counts = A @ np.array([1.0, 2.0, 0.5]) * np.exp(0.1 * RNG.standard_normal(8))

    def misfit(x, theta):
        expected = A @ x
        return jnp.sum(expected - theta * counts * jnp.log(expected))

    T = operators.mirror(
        misfit, lambda x, theta: -1 / x, lambda v, theta: -1 / v, step_size=lambda theta: 1 / (theta * counts.sum())
    )
    solver = odl.for_steps(odl.fixed_point(T), 20_000)
    solver = odl.implicit(solver)
    x, push = jax.jit(lambda theta: jax.jvp(lambda t: solver(jnp.ones(3), t).x, (theta,), (jnp.ones(()),)))(1.2)
    # The fit is homogeneous: the solution for theta b is theta times that for b.
    np.testing.assert_allclose(push, np.asarray(x) / 1.2, rtol=1e-7)
    best = minimize(
        lambda x: float(np.sum(A @ x - 1.2 * counts * np.log(A @ x))),
        np.ones(3),
        jac=lambda x: A.T @ (1 - 1.2 * counts / (A @ x)),
        method="trust-constr",
        hess=lambda x: A.T @ np.diag(1.2 * counts / (A @ x) ** 2) @ A,
        options={"gtol": 1e-12},
    )
    np.testing.assert_allclose(x, best.x, rtol=1e-8)


def test_refusals():
    with pytest.raises(ValueError, match=r"entropic: step_size must lie in \(0, inf\)"):
        operators.entropic(risk, 0.0)
    with pytest.raises(ValueError, match="entropic: scale must lie in"):
        operators.entropic(risk, 1.0, -1.0)
    with pytest.raises(TypeError, match=r"mirror: to_dual must be a function of \(x, theta\)"):
        operators.mirror(risk, jnp.log, jnp.exp, 1.0)
