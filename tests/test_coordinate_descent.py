"""Coordinate descent: sweeps against the formula, solutions against scikit-learn, derivatives and the metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, MultiTaskLasso
from sklearn.svm import SVC

import odljax as odl
from odljax import prox
from odljax.operators import block_coordinate_descent, box_quadratic_program, coordinate_descent
from odljax.operators._operator import displacement

RNG = np.random.default_rng(0)
SMALL = RNG.standard_normal((8, 5))
TARGET = RNG.standard_normal(8)


def diabetes():
    data = load_diabetes()
    return data.data * np.sqrt(len(data.data)), data.target - data.target.mean()


def cancer(rows, features):
    data = load_breast_cancer()
    X = data.data[:rows, :features]
    return (X - X.mean(0)) / X.std(0), 2.0 * data.target[:rows] - 1.0


def half_squares(b):
    return lambda prediction, theta: 0.5 * jnp.sum((prediction - jnp.asarray(b, prediction.dtype)) ** 2)


def soft(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)


def solve(operator, x0, theta, tol=1e-11, max_steps=2000):
    solution = jax.jit(odl.until_converged(odl.fixed_point(operator), tol=tol, max_steps=max_steps))(x0, theta)
    odl.check(solution)
    return solution


# ---- one sweep ------------------------------------------------------------------------------------------------------


def test_a_sweep_updates_one_coordinate_after_the_other():
    x = RNG.standard_normal(5)
    T = coordinate_descent(half_squares(TARGET), SMALL, prox.l1, lipschitz=1.3)
    want = x.copy()
    for j in range(5):
        L = 1.3 * SMALL[:, j] @ SMALL[:, j]
        want[j] = soft(want[j] - SMALL[:, j] @ (SMALL @ want - TARGET) / L, 0.7 / L)
    np.testing.assert_allclose(T(jnp.asarray(x), 0.7), want, rtol=0, atol=1e-13)
    np.testing.assert_allclose(displacement(T, jnp.asarray(x), 0.7), x - want, rtol=0, atol=1e-13)
    assert (T.symmetric, T.metric, T.name) == (False, None, "coordinate_descent")


def test_a_sweep_over_rows():
    x, B = RNG.standard_normal((5, 3)), RNG.standard_normal((8, 3))
    T = block_coordinate_descent(half_squares(B), lambda theta: jnp.asarray(SMALL), prox.group_lasso, lipschitz=2.0)
    want = x.copy()
    for j in range(5):
        L = 2.0 * SMALL[:, j] @ SMALL[:, j]
        v = want[j] - SMALL[:, j] @ (SMALL @ want - B) / L
        want[j] = v * max(1 - 0.7 / L / np.linalg.norm(v), 0.0)
    np.testing.assert_allclose(T(jnp.asarray(x), 0.7), want, rtol=0, atol=1e-13)


def test_a_sweep_over_groups_of_features():
    A, x = RNG.standard_normal((8, 2, 3)), RNG.standard_normal((2, 3))
    T = block_coordinate_descent(half_squares(TARGET), A, prox.group_lasso)
    want = x.copy()
    for j in range(2):
        L = np.sum(A[:, j] ** 2)
        v = want[j] - A[:, j].T @ (np.einsum("njk,jk->n", A, want) - TARGET) / L
        want[j] = v * max(1 - 0.7 / L / np.linalg.norm(v), 0.0)
    np.testing.assert_allclose(T(jnp.asarray(x), 0.7), want, rtol=0, atol=1e-13)


def test_each_coordinate_gets_its_own_parameter():
    weights = jnp.asarray(RNG.random(5) * 3)
    T = coordinate_descent(half_squares(TARGET), SMALL, prox.l1, parameter=lambda theta: theta["weights"])
    x = solve(T, jnp.zeros(5), {"weights": weights}).x
    on = np.asarray(x) != 0
    slope = SMALL.T @ (SMALL @ np.asarray(x) - TARGET)
    assert 0 < on.sum() < 5
    np.testing.assert_allclose(slope[on], -np.asarray(weights)[on] * np.sign(x)[on], rtol=0, atol=1e-10)
    assert (np.abs(slope[~on]) < weights[~on]).all()


def test_a_column_of_zeros_leaves_its_coordinate_to_the_penalty():
    A = SMALL.copy()
    A[:, 2] = 0.0
    T = coordinate_descent(half_squares(TARGET), A, prox.l1)
    x = solve(T, jnp.ones(5), 0.1).x
    assert float(x[2]) == 0.0
    gradient = jax.grad(lambda theta: jnp.sum(T(jnp.ones(5), theta)))(0.1)
    assert jnp.isfinite(gradient)


def test_nan_comes_out():
    T = coordinate_descent(half_squares(TARGET), SMALL, prox.l1)
    assert jnp.isnan(T(jnp.zeros(5).at[1].set(jnp.nan), 0.1)).all()
    assert jnp.isnan(T(jnp.zeros(5), jnp.nan)).all()


# ---- solutions against scikit-learn ---------------------------------------------------------------------------------


def test_lasso_and_elastic_net_on_diabetes():
    X, y = diabetes()
    n = len(y)
    T = coordinate_descent(half_squares(y), X, prox.l1)
    lasso = solve(T, jnp.zeros(10), 2.0 * n, tol=1e-9)
    want = Lasso(alpha=2.0, fit_intercept=False, tol=1e-14, max_iter=100000).fit(X, y).coef_
    assert 0 < np.sum(want != 0) < 10
    np.testing.assert_allclose(lasso.x, want, rtol=0, atol=1e-8 * np.abs(want).max())
    np.testing.assert_array_equal(np.asarray(lasso.x) != 0, want != 0)
    T = coordinate_descent(half_squares(y), X, prox.elastic_net)
    net = solve(T, jnp.zeros(10), (0.3 * 0.5 * n, 1.0), tol=1e-9)
    want = ElasticNet(alpha=0.3, l1_ratio=0.5, fit_intercept=False, tol=1e-14, max_iter=100000).fit(X, y).coef_
    np.testing.assert_allclose(net.x, want, rtol=0, atol=1e-8 * np.abs(want).max())


def test_multi_task_lasso_on_diabetes():
    X, _ = diabetes()
    X, Y = X[:, 2:], X[:, :2] + 0.1 * X[:, [3, 4]]
    T = block_coordinate_descent(half_squares(Y), X, prox.group_lasso)
    x = solve(T, jnp.zeros((8, 2)), 0.15 * len(X)).x
    want = MultiTaskLasso(alpha=0.15, fit_intercept=False, tol=1e-14, max_iter=100000).fit(X, Y).coef_.T
    assert 0 < np.sum(want[:, 0] != 0) < 8
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-8)


def test_sparse_logistic_regression_on_breast_cancer():
    X, y = cancer(80, 8)
    T = coordinate_descent(
        lambda prediction, theta: jnp.sum(jax.nn.softplus(-y * prediction)), X, prox.l1, lipschitz=0.25
    )
    x = solve(T, jnp.zeros(8), 2.0, tol=1e-11, max_steps=5000).x
    peer = LogisticRegression(C=0.5, l1_ratio=1.0, fit_intercept=False, solver="saga", tol=1e-13, max_iter=100000)
    want = peer.fit(X, y).coef_[0]
    assert 0 < np.sum(want != 0) < 8
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-8)


def test_the_dual_of_a_support_vector_machine_on_breast_cancer():
    """Both ways: the prediction is w = sum of a_i y_i x_i, or the kernel matrix is the P of a box program."""
    X, y = cancer(60, 5)
    features = np.ascontiguousarray((X * y[:, None]).T)

    def box(a, C, step_size):
        return prox.box(a + step_size, (0.0, C))  # the linear term -a belongs to h

    T = coordinate_descent(lambda w, C: 0.5 * jnp.sum(w**2), features, box)
    composite = solve(T, jnp.zeros(60), 0.5, tol=1e-9, max_steps=20000)
    kernel = features.T @ features
    T = box_quadratic_program(kernel, -np.ones(60), np.zeros(60), lambda C: jnp.full(60, C))
    program = solve(T, jnp.zeros(60), 0.5, tol=1e-9, max_steps=20000)
    peer = SVC(C=0.5, kernel="linear", tol=1e-10)  # with an intercept, so it is given none to find: mirrored data
    peer.fit(np.concatenate([X, -X]), np.concatenate([y, -y]))
    for solution in (composite, program):
        a = np.asarray(solution.x)
        gradient = kernel @ a - 1
        assert (gradient[a == 0] > -1e-8).all()
        assert (gradient[a == 0.5] < 1e-8).all()
        np.testing.assert_allclose(gradient[(a > 0) & (a < 0.5)], 0.0, atol=1e-8)
    w = features @ np.asarray(composite.x)
    np.testing.assert_allclose(features @ np.asarray(program.x), w, rtol=0, atol=1e-7)
    # Mirrored data double the loss: the peer's weights are those of twice the penalty parameter.
    twice = solve(T, jnp.zeros(60), 1.0, tol=1e-9, max_steps=20000)
    np.testing.assert_allclose(features @ np.asarray(twice.x), peer.coef_[0], rtol=0, atol=1e-5)


def test_box_program_against_an_active_set_method():
    from scipy.optimize import lsq_linear

    want = lsq_linear(SMALL, TARGET, (-0.6, 0.3), method="bvls", tol=1e-14).x
    # Of a P that is not symmetric its symmetric part counts.
    skew = np.triu(np.ones((5, 5))) - np.tril(np.ones((5, 5)))
    T = box_quadratic_program(SMALL.T @ SMALL + skew, -SMALL.T @ TARGET, jnp.full(5, -0.6), jnp.full(5, 0.3))
    solution = solve(T, jnp.zeros(5), None)
    np.testing.assert_allclose(solution.x, want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(displacement(T, jnp.ones(5), None), np.ones(5) - T(jnp.ones(5), None), atol=1e-14)


# ---- the metric -----------------------------------------------------------------------------------------------------


def energies(operator, G, dim, theta=0.3, count=200):
    points = 3.0 * np.random.default_rng(7).standard_normal((2 * count, dim))
    images = np.asarray(jax.jit(jax.vmap(lambda x: operator(x, theta)))(jnp.asarray(points)))
    moved, apart = images[::2] - images[1::2], points[::2] - points[1::2]
    return np.sum(moved * (moved @ G), 1) / np.sum(apart * (apart @ G), 1)


# Nearly dependent columns, one of them small.
STRETCHED = np.linalg.cholesky(np.array([[1.0, 0.95, 0.0], [0.95, 1.0, 0.02], [0.0, 0.02, 0.05]])).T


def test_without_a_prox_a_sweep_is_non_expansive_in_the_energy_metric_and_not_in_the_identity():
    gram = STRETCHED.T @ STRETCHED
    T = coordinate_descent(half_squares(np.ones(3)), STRETCHED)
    G = np.asarray(jax.vmap(lambda v: T.metric(v, 0.3))(jnp.eye(3)))
    np.testing.assert_allclose(G, gram, rtol=0, atol=1e-14)
    assert energies(T, G, 3).max() <= 1 + 1e-12
    assert energies(T, np.eye(3), 3).max() > 1.1
    # A constant above the curvatures relaxes the projections; one below half of them goes too far.
    weights = np.array([1.0, 3.0, 2.0])
    weighted = lambda u, theta: 0.5 * jnp.sum(weights * (u - 1) ** 2)
    for constant, sound in ((3.0, True), (0.45, False)):
        T = coordinate_descent(weighted, STRETCHED, lipschitz=constant)
        G = np.asarray(jax.vmap(lambda v: T.metric(v, 0.3))(jnp.eye(3)))
        np.testing.assert_allclose(G, STRETCHED.T @ np.diag(weights) @ STRETCHED, rtol=0, atol=1e-14)
        assert (energies(T, G, 3).max() <= 1 + 1e-12) == sound
    # What is singular is no metric: more unknowns than predictions.
    wide = [coordinate_descent(half_squares(np.ones(2)), STRETCHED[:2])]
    wide += [block_coordinate_descent(half_squares(np.ones(3)), np.ones((3, 2, 2)))]
    assert [T.metric for T in wide] == [None, None]
    # Gauss and Seidel: x+ = (D + L)^-1 (A'b - U x).
    T = coordinate_descent(half_squares(np.ones(3)), STRETCHED)
    x = RNG.standard_normal(3)
    lower = np.tril(gram)
    want = np.linalg.solve(lower, STRETCHED.T @ np.ones(3) - (gram - lower) @ x)
    np.testing.assert_allclose(T(jnp.asarray(x), 0.3), want, rtol=0, atol=1e-12)


def test_with_a_prox_a_sweep_is_non_expansive_in_neither_but_descends():
    T = coordinate_descent(half_squares(np.ones(3)), STRETCHED, prox.l1)
    assert T.metric is None
    assert energies(T, STRETCHED.T @ STRETCHED, 3).max() > 1 + 1e-3
    assert energies(T, np.eye(3), 3).max() > 1 + 1e-3
    points = 3.0 * RNG.standard_normal((100, 3))

    def objective(x):
        return 0.5 * np.sum((x @ STRETCHED.T - 1) ** 2, 1) + 0.3 * np.sum(np.abs(x), 1)

    images = np.asarray(jax.jit(jax.vmap(lambda x: T(x, 0.3)))(jnp.asarray(points)))
    assert (objective(images) <= objective(points) + 1e-12).all()


# ---- derivatives ----------------------------------------------------------------------------------------------------


def test_derivatives_of_the_lasso_against_the_closed_form_on_the_support():
    T = coordinate_descent(lambda u, theta: 0.5 * jnp.sum((u - theta["b"]) ** 2), SMALL, prox.l1,
                           parameter=lambda theta: jnp.broadcast_to(theta["penalty"], (5,)))  # fmt: skip
    walk = odl.fixed_point(T)
    theta = {"b": jnp.asarray(TARGET), "penalty": jnp.asarray(0.6)}
    weights = jnp.asarray(RNG.standard_normal(5))
    x = np.asarray(solve(T, jnp.zeros(5), theta, tol=1e-13).x)
    on = x != 0
    assert 0 < on.sum() < 5
    S = SMALL[:, on]
    adjoint = np.linalg.solve(S.T @ S, np.asarray(weights)[on])
    want = {"b": S @ adjoint, "penalty": -np.sign(x)[on] @ adjoint}
    stopping = odl.until_converged(walk, tol=1e-13, max_steps=1000)
    solvers = {"implicit": odl.implicit(stopping), "unrolled": odl.unrolled(odl.for_steps(walk, 150))}
    for name, solver in solvers.items():
        loss = lambda theta, solver=solver: weights @ solver(jnp.zeros(5), theta).x
        direction = {"b": jnp.asarray(RNG.standard_normal(8)), "penalty": jnp.asarray(1.0)}
        both = lambda theta, loss=loss, along=direction: (jax.grad(loss)(theta), jax.jvp(loss, (theta,), (along,))[1])
        reverse, forward = jax.jit(both)(theta)
        for key in want:
            np.testing.assert_allclose(reverse[key], want[key], rtol=0, atol=1e-9, err_msg=name)
        along = np.asarray(direction["b"]) @ want["b"] + want["penalty"]
        np.testing.assert_allclose(forward, along, rtol=0, atol=1e-9, err_msg=name)


def test_the_derivative_in_the_design_against_finite_differences():
    T = coordinate_descent(lambda u, theta: jnp.sum(jnp.logaddexp(0.0, -u)) + 0.05 * jnp.sum(u**2), lambda theta: theta,
                           lambda v, theta, step_size: prox.l1(v, 0.2, step_size), lipschitz=0.35)  # fmt: skip
    solver = odl.implicit(odl.until_converged(odl.fixed_point(T), tol=1e-13, max_steps=3000), odl.linear.dense())
    loss = jax.jit(lambda A: jnp.sum(jnp.sin(solver(jnp.zeros(5), A).x)))
    A, along = jnp.asarray(SMALL), jnp.asarray(RNG.standard_normal(SMALL.shape))
    numeric = (loss(A + 1e-5 * along) - loss(A - 1e-5 * along)) / 2e-5
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(loss))(A), along), numeric, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_keeps_its_dtype(dtype):
    """Data in float64, x below: the design is cast, the sums are accumulated in float32."""
    T = coordinate_descent(half_squares(TARGET), SMALL, prox.l1)
    exact = solve(T, jnp.zeros(5), 0.6).x
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    low = solve(T, jnp.zeros(5, dtype), jnp.asarray(0.6, dtype), tol=tolerance / 4)
    assert low.x.dtype == dtype
    np.testing.assert_allclose(np.asarray(low.x, float), exact, rtol=0, atol=tolerance)


def test_a_batch_is_its_elements():
    T = coordinate_descent(half_squares(TARGET), SMALL, prox.l1)
    one = lambda penalty: odl.until_converged(odl.fixed_point(T), tol=1e-12)(jnp.zeros(5), penalty)
    penalties = jnp.array([0.1, 0.6, 5.0])
    batch, single = jax.jit(jax.vmap(one))(penalties), jax.jit(one)
    for i, penalty in enumerate(penalties):
        np.testing.assert_allclose(batch.x[i], single(penalty).x, rtol=0, atol=1e-11)


# ---- messages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_users_see_it():
    """Without the annotation checks of the tests, which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("arguments", "x", "message"),
    [
        ({"loss": 3.0}, None, "coordinate_descent: loss must be a function of"),
        ({"prox": lambda v: v}, None, "prox must be a function of"),
        ({"lipschitz": 0.0}, None, "lipschitz must lie in"),
        ({"lipschitz": lambda k: 1.0}, None, "an operator has no steps"),
        ({}, jnp.zeros((5, 2)), r"x must be one array, a vector \[p\]; float64\[5,2\] came"),
        ({}, {"a": jnp.zeros(5)}, "x must be one array, a vector .*; a dict came"),
        ({}, jnp.zeros(8), r"the design must be a real floating-point array \[n,8\] .* float64\[8,5\] came"),
        ({"design": np.ones((8, 5), int)}, jnp.zeros(5), r"int64\[8,5\] came"),
        ({"loss": lambda u, theta: u}, jnp.zeros(5), "the loss must return a real scalar"),
        ({"prox": lambda v, theta, step_size: v[None]}, jnp.zeros(5), "the prox must keep the shapes"),
        ({"parameter": lambda theta: jnp.ones(4)}, jnp.zeros(5), r"leading axis 5, .*float64\[4\] came"),
    ],
)
def test_messages(arguments, x, message):
    given = {"loss": half_squares(TARGET), "design": SMALL, "prox": prox.l1} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        coordinate_descent(**given)(x, 0.1)


def test_messages_of_blocks_and_boxes():
    with pytest.raises(TypeError, match=r"\[n,5\] or \[n,5,2\] for x float64\[5,2\]; float64\[8,4\] came"):
        block_coordinate_descent(half_squares(TARGET), SMALL[:, :4])(jnp.zeros((5, 2)), None)
    with pytest.raises(TypeError, match=r"box_quadratic_program: P must be \[n, n\]"):
        box_quadratic_program(SMALL, jnp.zeros(5), jnp.zeros(5), jnp.ones(5))(jnp.zeros(5), None)
    with pytest.raises(ValueError, match=r"lower must not exceed upper; at row 0 they are 1\.0 and 0\.0"):
        box_quadratic_program(jnp.eye(5), jnp.zeros(5), jnp.ones(5), jnp.zeros(5))(jnp.zeros(5), None)
    with pytest.raises(TypeError, match=r"x must be one vector \[n\]; a dict came"):
        box_quadratic_program(jnp.eye(5), jnp.zeros(5), jnp.zeros(5), jnp.ones(5))({"a": jnp.zeros(5)}, None)
