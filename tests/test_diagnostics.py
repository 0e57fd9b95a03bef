"""The probes: stretch against singular values, Taylor slopes of right and wrong gradients, kinks of the lasso path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

import odljax as odl
from odljax import operators, problems, prox
from odljax.diagnostics import expansion, kinks, taylor_test
from odljax.operators import ADMMVariables, Operator

RNG = np.random.default_rng(0)
J = RNG.standard_normal((5, 5)) * 0.4
ROOT = RNG.standard_normal((5, 5))
G = ROOT @ ROOT.T + np.eye(5)


def stretch(jacobian, metric=None):
    """The largest singular value in the metric, and its direction."""
    if metric is None:
        metric = np.eye(len(jacobian))
    root = sqrtm(metric).real
    _, values, vectors = np.linalg.svd(root @ jacobian @ np.linalg.inv(root))
    assert values[1] < 0.95 * values[0]  # the power iteration can settle
    return values[0], np.linalg.solve(root, vectors[0])


def parallel(a, b):
    a, b = np.ravel(a), np.ravel(b)
    np.testing.assert_allclose(abs(a @ b), np.linalg.norm(a) * np.linalg.norm(b), rtol=1e-9)


# ---- expansion -------------------------------------------------------------------------------------------------------


def test_in_the_identity():
    probe = expansion(lambda x, theta: theta * (J @ x) + 1.0, jnp.ones(5), 0.7)
    factor, direction = stretch(0.7 * J)
    np.testing.assert_allclose(probe.factor, factor, rtol=1e-10)
    parallel(probe.direction, direction)
    np.testing.assert_allclose(np.linalg.norm(probe.direction), 1.0, rtol=1e-12)
    assert 0 <= float(probe.change) < 1e-10
    assert probe.factor.shape == probe.change.shape == ()


@pytest.mark.parametrize("inverse", [None, lambda v, theta: np.linalg.inv(G) @ v / theta], ids=["solved for", "given"])
def test_in_a_metric(inverse):
    T = Operator(lambda x, theta: J @ x, metric=lambda v, theta: theta * (G @ v), metric_inverse=inverse)
    probe = expansion(T, jnp.zeros(5), 2.0, num_steps=80)
    factor, direction = stretch(J, G)
    assert abs(factor - stretch(J)[0]) > 0.1  # the metric matters
    np.testing.assert_allclose(probe.factor, factor, rtol=1e-9)
    parallel(probe.direction, direction)
    np.testing.assert_allclose(probe.direction @ (2.0 * G) @ probe.direction, 1.0, rtol=1e-9)


def test_at_the_point_where_it_is_asked():
    x = jnp.array([0.3, -1.2, 0.5, 2.0, 0.0])
    probe = expansion(lambda x, theta: jnp.tanh(J @ x), x, None, num_steps=200)
    jacobian = (1 - np.tanh(J @ x) ** 2)[:, None] * J
    np.testing.assert_allclose(probe.factor, np.linalg.norm(jacobian, 2), rtol=1e-9)


def test_on_pytrees_with_a_scalar_leaf():
    def T(x, theta):
        flat = J @ jnp.concatenate([x["a"][None], x["b"].ravel()])
        return {"a": flat[0], "b": flat[1:].reshape(2, 2)}

    probe = expansion(T, {"a": jnp.zeros(()), "b": jnp.zeros((2, 2))}, None)
    factor, direction = stretch(J)
    np.testing.assert_allclose(probe.factor, factor, rtol=1e-9)
    assert probe.direction["a"].shape == ()
    parallel(np.concatenate([[probe.direction["a"]], probe.direction["b"].ravel()]), direction)


def test_in_float32_and_mixed():
    T = lambda x, theta: {"a": 0.5 * x["a"], "b": 0.9 * x["b"]}
    x = {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.float32)}
    np.testing.assert_allclose(expansion(T, x, None, num_steps=60).factor, 0.9, rtol=3e-7)
    probe = expansion(lambda x, theta: jnp.asarray(J, jnp.float32) @ x, jnp.zeros(5, jnp.float32), None)
    assert probe.factor.dtype == probe.direction.dtype == jnp.float32
    np.testing.assert_allclose(probe.factor, stretch(J)[0], rtol=1e-5)


def test_an_expanding_map_is_found_out_and_the_probe_stays_below():
    thin = np.diag([0.999, 0.9, 0.5, 0.2, 1.001])  # hard to tell apart in few steps
    few = [float(expansion(lambda x, theta: thin @ x, jnp.ones(5), None, num_steps=n).factor) for n in (1, 10, 3000)]
    assert few == sorted(few)
    assert few[0] < 1
    np.testing.assert_allclose(few[2], 1.001, rtol=1e-6)
    assert few[2] <= 1.001 * (1 + 1e-14)
    assert float(expansion(lambda x, theta: 3.0 * x, jnp.ones(()), None, num_steps=1).factor) == pytest.approx(3.0)


def test_a_constant_map_and_the_key():
    probe = expansion(lambda x, theta: jnp.zeros(5), jnp.ones(5), None)
    assert float(probe.factor) == float(probe.change) == 0.0
    T = lambda x, theta: J @ x
    first, second = (expansion(T, jnp.ones(5), None, key=jax.random.key(i), num_steps=1) for i in (1, 2))
    assert float(first.factor) != float(second.factor)
    same = expansion(T, jnp.ones(5), None, key=jax.random.key(1), num_steps=1)
    assert float(first.factor) == float(same.factor)


def test_linearized_admm_in_its_metric_and_in_the_identity():
    A = RNG.standard_normal((5, 4)) * 0.3
    l1 = lambda v, theta, step_size: prox.l1(v, theta, step_size)
    weight = 1.05 * np.linalg.norm(A, 2) ** 2
    T = operators.linearized_admm(lambda z, theta: A @ z, l1, l1, jnp.ones(5), proximal_weight=weight)
    points = [ADMMVariables(*(jnp.asarray(3.0 * RNG.standard_normal(n)) for n in (4, 5, 5))) for _ in range(8)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    inside = jax.jit(jax.vmap(lambda u: expansion(T, u, 0.1, num_steps=100).factor))(batch)
    assert inside.shape == (8,)
    assert (inside <= 1 + 1e-9).all()
    assert (inside > 0.5).all()
    plain = jax.jit(jax.vmap(lambda u: expansion(Operator(T.apply), u, 0.1, num_steps=100).factor))(batch)
    assert (plain > 1.05).any()
    # Against the Jacobian in the metric, by columns.
    flat, unravel = jax.flatten_util.ravel_pytree(points[0])
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda v: jax.flatten_util.ravel_pytree(T(unravel(v), 0.1))[0]))(flat))
    top = weight * np.eye(4) - A.T @ A
    root = sqrtm(np.block([[top, np.zeros((4, 10))], [np.zeros((10, 4)), np.eye(10)]])).real
    np.testing.assert_allclose(inside[0], np.linalg.norm(root @ jacobian @ np.linalg.inv(root), 2), rtol=1e-3)


# ---- taylor_test -----------------------------------------------------------------------------------------------------


def smooth(theta):
    return jnp.sum(jnp.sin(theta["a"])) + theta["b"] ** 3


POINT = {"a": jnp.asarray([0.3, -1.0, 2.0]), "b": jnp.asarray(0.7)}


def test_slope_two_for_the_right_gradient():
    test = taylor_test(smooth, POINT)
    assert test.slope == pytest.approx(2.0, abs=0.02)
    assert test.relative_error < 1e-8
    assert test.directional == pytest.approx(test.finite_difference, rel=1e-8)
    assert test.steps.shape == test.remainders.shape == (12,)
    given = taylor_test(smooth, POINT, jax.grad(smooth)(POINT), key=jax.random.key(0))
    assert given.slope == test.slope
    other = taylor_test(smooth, POINT, key=jax.random.key(3))
    assert other.directional != test.directional
    assert other.slope == pytest.approx(2.0, abs=0.02)


def test_slope_one_for_a_wrong_gradient():
    for size in (1e-3, 1e-2, 1.0):
        wrong = jax.tree.map(lambda leaf: (1 + size) * leaf, jax.grad(smooth)(POINT))
        test = taylor_test(smooth, POINT, wrong)
        assert test.slope == pytest.approx(1.0, abs=0.05), size
        assert test.relative_error == pytest.approx(size / (1 + size), rel=1e-3)


@pytest.mark.parametrize(("name", "derivative"), [("lasso", odl.implicit), ("tree", odl.unrolled)])
def test_hypergradients_pass(name, derivative):
    problem = problems.PROBLEMS[name]()
    solver = derivative(odl.until_converged(odl.fixed_point(problem.T), tol=1e-13, max_steps=300))
    test = taylor_test(lambda theta: problem.outer(solver(problem.x0, theta).x, theta), problem.theta)
    assert test.slope == pytest.approx(2.0, abs=0.05)
    assert test.relative_error < 1e-7


def test_a_wrong_hypergradient_fails():
    problem = problems.ridge()
    solver = odl.one_step(odl.until_converged(odl.fixed_point(problem.T), tol=1e-13, max_steps=300))
    test = taylor_test(lambda theta: problem.outer(solver(problem.x0, theta).x, theta), problem.theta)
    assert test.slope == pytest.approx(1.0, abs=0.05)
    assert test.relative_error > 0.1


def test_float32():
    point = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), POINT)
    test = taylor_test(smooth, point)
    assert test.slope == pytest.approx(2.0, abs=0.1)
    assert test.relative_error < 1e-3
    wrong = jax.tree.map(lambda leaf: 1.1 * leaf, jax.grad(smooth)(point))
    assert taylor_test(smooth, point, wrong).slope == pytest.approx(1.0, abs=0.1)


def test_a_linear_function():
    slope = jnp.arange(1.0, 5.0)
    test = taylor_test(lambda theta: jnp.sum(slope * theta), jnp.ones(4))
    assert test.slope == 2.0
    assert test.relative_error < 1e-10
    test = taylor_test(lambda theta: jnp.sum(slope * theta), jnp.ones(4), 1.001 * slope)
    assert test.slope == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_the_units_of_theta_and_of_the_function_do_not_matter(unit):
    theta = unit * jnp.asarray([0.3, -1.0, 2.0])
    function = lambda theta: jnp.sum(jnp.sin(theta / unit)) / unit
    test = taylor_test(function, theta)
    assert test.slope == pytest.approx(2.0, abs=0.05)
    assert test.relative_error < 1e-8
    wrong = taylor_test(function, theta, 1.01 * jax.grad(function)(theta))
    assert wrong.slope == pytest.approx(1.0, abs=0.05)
    assert wrong.relative_error == pytest.approx(0.01 / 1.01, rel=1e-3)
    # At zero there is no unit to go by: it is given.
    origin = taylor_test(function, 0 * theta, 1.01 * jax.grad(function)(0 * theta), scale=unit)
    assert origin.slope == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match=r"taylor_test: scale must lie in \(0, inf\); 0.0 came"):
        taylor_test(function, theta, scale=0.0)


# ---- kinks -----------------------------------------------------------------------------------------------------------

ROWS = RNG.standard_normal((20, 8)) / np.sqrt(20)
SEEN = ROWS @ np.array([1.0, 0, -2.0, 0, 0, 0.5, 0, 0]) + 0.1 * RNG.standard_normal(20)
SHRINK = 0.9 / np.linalg.norm(ROWS, 2) ** 2
LASSO = odl.proximal_gradient(lambda x, lam: 0.5 * jnp.sum((ROWS @ x - SEEN) ** 2), prox.l1, SHRINK)
PROBE = jax.jit(lambda x, lam: kinks(LASSO, x, lam))


def test_kinks_of_the_lasso_path_are_its_knots():
    """At a knot one entry enters or leaves: it alone is weakly active; between knots none is."""
    from sklearn.linear_model import lars_path

    alphas, _, path = lars_path(ROWS, SEEN, method="lasso")
    path, knots = jnp.asarray(path), alphas * len(SEEN)
    assert len(knots) > 4
    for k in range(len(knots) - 1):
        x, lam = path[:, k], knots[k]
        slope = np.abs(ROWS.T @ (ROWS @ x - SEEN))
        weak = (np.asarray(x) == 0) & (np.abs(slope - lam) < 1e-9)
        report = PROBE(x, lam)
        assert weak.sum() == 1
        np.testing.assert_array_equal(report.mask, weak)
        np.testing.assert_allclose(report.fraction, 1 / 8)
        np.testing.assert_allclose(np.asarray(report.gap)[weak], 1.0, atol=1e-6)
        between = PROBE((path[:, k] + path[:, k + 1]) / 2, (knots[k] + knots[k + 1]) / 2)  # the path is straight
        assert not np.asarray(between.mask).any()
        assert np.asarray(between.gap).max() < 1e-6


def test_the_radius_is_the_distance_that_counts():
    near = jax.jit(jax.vmap(lambda v, radius: kinks(lambda x, theta: prox.l1(x, 1.0), v, None, radius=radius).mask))
    points, radii = jnp.asarray([1.01, 1.01, 0.99, 0.99, 1.0]), jnp.asarray([1e-4, 1.0, 1e-4, 1.0, 1e-9])
    assert near(points, radii).tolist() == [False, True, False, True, True]
    # The default is relative to the largest entry: 1e-2 is near a kink at zero beside 1e6, and not beside 1.
    default = jax.jit(lambda x: kinks(lambda x, theta: prox.l1(x, 0.0) + jnp.abs(x), x, None).mask)
    assert default(jnp.asarray([1e-2, 1e6])).tolist() == [True, False]
    assert default(jnp.asarray([1e-2, 1.0])).tolist() == [False, False]


def test_smooth_maps_have_no_kinks_and_trees_keep_their_shape():
    smooth = jax.jit(lambda x: kinks(lambda x, theta: jnp.tanh(J @ x) + x**3, x, None))(jnp.ones(5))
    assert not np.asarray(smooth.mask).any()
    assert 0 < np.asarray(smooth.gap).max() < 1e-4
    T = lambda x, theta: {"rows": prox.group_lasso(x["rows"], 5.0), "low": jnp.maximum(x["low"], theta)}
    x = {"rows": jnp.asarray([[3.0, 4.0], [1.0, 1.0]]), "low": jnp.asarray(0.5, jnp.float32)}
    report = jax.jit(lambda x, theta: kinks(T, x, theta))(x, jnp.float32(0.5))
    assert report.mask["rows"].tolist() == [[True, True], [False, False]]
    assert bool(report.mask["low"])
    np.testing.assert_allclose(report.fraction, 3 / 5)
    assert report.gap["low"].dtype == jnp.float32


def test_kinks_says_what_it_needs():
    with pytest.raises(TypeError, match=r"kinks: inner needs an operator, and layered\(.*\) has none"):
        kinks(odl.layered(lambda x, theta: x), jnp.ones(2), None)
    with pytest.raises(ValueError, match=r"kinks: radius must lie in \(0, inf\); -1.0 came"):
        kinks(lambda x, theta: x, jnp.ones(2), None, radius=-1.0)
    bad = kinks(lambda x, theta: x * jnp.nan, jnp.ones(2), None)
    assert np.asarray(bad.mask).all()
