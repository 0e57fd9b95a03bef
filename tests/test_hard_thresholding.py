"""Hard thresholding: sparse signals recovered exactly, derivatives with the support held, the metric it has locally."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from sklearn.datasets import load_diabetes

import odljax as odl
from odljax import _support
from odljax.operators import hard_thresholding
from odljax.operators._operator import displacement

NUM_ROWS, NUM_COLUMNS, NUM_NONZEROS = 100, 120, 4


@functools.cache
def recovery():
    """A Gaussian design, its Lipschitz constant, and four sparse signals with their measurements."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((NUM_ROWS, NUM_COLUMNS)) / np.sqrt(NUM_ROWS)
    signals = np.zeros((4, NUM_COLUMNS))
    for signal in signals:
        on = rng.choice(NUM_COLUMNS, NUM_NONZEROS, replace=False)
        signal[on] = (1 + rng.random(NUM_NONZEROS)) * rng.choice([-1, 1], NUM_NONZEROS)
    return A, float(np.linalg.norm(A, 2) ** 2), signals, signals @ A.T


def fit(x, theta):
    A = jnp.asarray(recovery()[0], x.dtype)
    return 0.5 * jnp.sum((A @ x - theta) ** 2)


def walks(dtype=float):
    step_size = 0.99 / recovery()[1]
    plain = hard_thresholding(fit, NUM_NONZEROS, step_size)
    return {
        "plain": odl.fixed_point(plain),
        "nesterov": odl.nesterov(plain),
        "normalised": odl.accelerated_hard_thresholding(fit, NUM_NONZEROS, step_size, num_refinements=0),
        "accelerated": odl.accelerated_hard_thresholding(fit, NUM_NONZEROS, step_size),
    }


# ---- the selection ---------------------------------------------------------------------------------------------------


def test_the_largest_of_a_tree_and_of_rows():
    x = {"a": jnp.array([1.0, -3.0, 3.0]), "b": jnp.array([[2.0, -3.0]], jnp.float32)}
    mask, rows = jax.jit(lambda x: (_support.largest(x, 2), _support.largest(x, 1, rows=True)))(x)
    assert jax.tree.map(lambda leaf: leaf.tolist(), mask) == {"a": [False, True, True], "b": [[False, False]]}
    assert jax.tree.map(lambda leaf: leaf.tolist(), rows) == {"a": [False, True, False], "b": [[False, True]]}
    assert _support.largest(jnp.array([1.0, jnp.nan, 2.0]), 1).tolist() == [False, True, False]
    assert _support.largest(jnp.array([1.0, 2.0]), 5).tolist() == [True, True]
    assert _support.largest(jnp.array(2.0), 1, rows=True).tolist() is True


# ---- the operator ----------------------------------------------------------------------------------------------------


def test_a_step_against_the_formula():
    A, lipschitz, _, measured = recovery()
    x = np.random.default_rng(1).standard_normal(NUM_COLUMNS)
    T = hard_thresholding(fit, NUM_NONZEROS, lambda theta: 0.5 / lipschitz)
    want = x - 0.5 / lipschitz * A.T @ (A @ x - measured[0])
    want[np.argsort(-np.abs(want))[NUM_NONZEROS:]] = 0.0
    both = jax.jit(lambda x, theta: (T(x, theta), displacement(T, x, theta)))
    image, moved = both(jnp.asarray(x), jnp.asarray(measured[0]))
    np.testing.assert_allclose(image, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(moved, x - want, rtol=0, atol=1e-14)
    assert (T.symmetric, T.metric, T.name) == (False, None, "hard_thresholding")
    assert jnp.isnan(both(jnp.asarray(x).at[3].set(jnp.nan), jnp.asarray(measured[0]))[0]).any()


def test_rows_are_thresholded_each_for_itself():
    T = hard_thresholding(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), 1, 1.0, rows=True)
    target = jnp.array([[3.0, -1.0, 0.5], [0.1, 0.2, -0.3]])
    assert T(jnp.zeros((2, 3)), target).tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, -0.3]]


def test_it_is_non_expansive_where_the_same_entries_are_kept_and_not_across_a_tie():
    _, lipschitz, signals, measured = recovery()
    rng = np.random.default_rng(2)
    T = hard_thresholding(fit, NUM_NONZEROS, 1.9 / lipschitz)
    near = signals[0] + 0.02 * rng.standard_normal((200, NUM_COLUMNS))
    images = np.asarray(jax.jit(jax.vmap(lambda x: T(x, jnp.asarray(measured[0]))))(jnp.asarray(near)))
    assert len({tuple(row) for row in images != 0}) == 1
    moved, apart = images[::2] - images[1::2], near[::2] - near[1::2]
    assert (np.linalg.norm(moved, axis=1) <= np.linalg.norm(apart, axis=1)).all()
    tie = hard_thresholding(lambda x, theta: 0.0 * jnp.sum(x), 1, 1.0)
    first, second = jnp.array([1.0, 1.0 - 1e-9]), jnp.array([1.0 - 1e-9, 1.0])
    assert float(jnp.linalg.norm(tie(first, None) - tie(second, None))) > 1.4


# ---- recovery --------------------------------------------------------------------------------------------------------


@functools.cache
def solved(name):
    solver = odl.until_converged(walks()[name], tol=1e-10, max_steps=2000)
    return jax.jit(jax.vmap(lambda theta: solver(jnp.zeros(NUM_COLUMNS), theta)))(jnp.asarray(recovery()[3]))


@pytest.mark.parametrize("name", ["plain", "nesterov", "normalised", "accelerated"])
def test_sparse_signals_are_recovered_exactly(name):
    solutions = odl.check(solved(name))
    np.testing.assert_allclose(solutions.x, recovery()[2], rtol=0, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(solutions.x) != 0, recovery()[2] != 0)


def test_what_the_acceleration_saves():
    """Momentum hardly helps; normalised steps do, and conjugate gradients on the support most of all."""
    steps = {name: float(jnp.mean(solved(name).num_steps)) for name in walks()}
    assert steps["accelerated"] < 15
    assert 3 * steps["accelerated"] < steps["normalised"] < 0.5 * steps["plain"]
    assert steps["nesterov"] > steps["normalised"]


def test_the_best_subset_of_diabetes():
    """Two of ten features: all 45 pairs are the reference; the accelerated walk rests at the best."""
    data = load_diabetes()
    X, y = data.data * np.sqrt(len(data.data)), data.target - data.target.mean()
    gram, moment = X.T @ X / len(y), X.T @ y / len(y)
    errors = {}
    for pair in itertools.combinations(range(10), 2):
        S = list(pair)
        errors[pair] = -moment[S] @ np.linalg.solve(gram[np.ix_(S, S)], moment[S])
    best = min(errors, key=errors.__getitem__)
    f = lambda x, theta: 0.5 * x @ (gram @ x) - moment @ x
    walk = odl.accelerated_hard_thresholding(f, 2, 0.99 / np.linalg.norm(gram, 2))
    solution = odl.check(jax.jit(odl.until_converged(walk, tol=1e-9))(jnp.zeros(10), None))
    assert tuple(np.flatnonzero(solution.x)) == best
    want = np.linalg.solve(gram[np.ix_(best, best)], moment[list(best)])
    np.testing.assert_allclose(solution.x[jnp.array(best)], want, rtol=0, atol=1e-9)


def test_refused_steps_and_objectives_that_are_no_squares():
    """From starts with a wrong support, the objective falls at every step, also where it is logistic."""
    rng = np.random.default_rng(3)
    A, labels = rng.standard_normal((30, 12)), rng.choice([-1.0, 1.0], 30)

    def logistic(x, theta):
        return jnp.sum(jnp.logaddexp(0.0, -labels * (A @ x))) + 0.5 * jnp.sum(x**2)

    lipschitz = np.linalg.norm(A, 2) ** 2 / 4 + 1
    for num_refinements in (0, 3):
        walk = odl.accelerated_hard_thresholding(logistic, 3, 0.99 / lipschitz, num_refinements=num_refinements)
        solver = odl.for_steps(walk, 60, record=lambda x, theta, k: logistic(x, theta))
        starts = np.zeros((10, 12))
        for start in starts:
            start[rng.choice(12, 3, replace=False)] = 3 * rng.standard_normal(3)
        solutions = jax.jit(jax.vmap(lambda x0, solver=solver: solver(x0, None)))(jnp.asarray(starts))
        assert (np.diff(solutions.history.recorded, axis=1) <= 1e-12).all()
        assert (np.sum(np.asarray(solutions.x) != 0, axis=1) <= 3).all()
        assert (solutions.residual < 1e-6 * lipschitz).all()


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "accelerated"])
def test_derivatives_with_the_support_held(name):
    A, _, signals, measured = recovery()
    rng = np.random.default_rng(4)
    theta = jnp.asarray(measured[0] + 0.02 * rng.standard_normal(NUM_ROWS))
    weights, along = jnp.asarray(rng.standard_normal(NUM_COLUMNS)), jnp.asarray(rng.standard_normal(NUM_ROWS))
    S = np.flatnonzero(signals[0])
    want = A[:, S] @ np.linalg.solve(A[:, S].T @ A[:, S], np.asarray(weights)[S])
    walk, start = walks()[name], jnp.zeros(NUM_COLUMNS)
    solvers = {
        "implicit": odl.implicit(odl.until_converged(walk, tol=1e-11, max_steps=2000)),
        "unrolled": odl.unrolled(odl.for_steps(walk, 30 if name == "accelerated" else 300)),
    }
    for rule, solver in solvers.items():
        loss = lambda theta, solver=solver: weights @ solver(start, theta).x
        both = jax.jit(lambda theta, loss=loss: (jax.grad(loss)(theta), jax.jvp(loss, (theta,), (along,))[1]))
        reverse, forward = both(theta)
        np.testing.assert_allclose(reverse, want, rtol=0, atol=1e-9, err_msg=rule)
        np.testing.assert_allclose(forward, want @ np.asarray(along), rtol=0, atol=1e-8, err_msg=rule)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_keeps_its_dtype(dtype):
    walk = walks()["accelerated"]
    tol = 1e-6 if dtype == jnp.float32 else 2e-2
    theta = jnp.asarray(recovery()[3][0], dtype)
    solution = odl.check(
        jax.jit(odl.until_converged(walk, tol=tol, max_steps=200))(jnp.zeros(NUM_COLUMNS, dtype), theta)
    )
    assert solution.x.dtype == dtype
    np.testing.assert_allclose(np.asarray(solution.x, float), recovery()[2][0], rtol=0, atol=10 * tol)


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_users_see_it():
    """Without the annotation checks of the tests, which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("build", [hard_thresholding, odl.accelerated_hard_thresholding])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": 3.0}, "objective must be a function of"),
        ({"num_nonzeros": 0}, "num_nonzeros must be a whole number of at least 1; 0 came"),
        ({"num_nonzeros": 2.0}, "num_nonzeros must be a whole number"),
        ({"step_size": -1.0}, "step_size must lie in"),
        ({"step_size": lambda k: 1.0}, "an operator has no steps"),
    ],
)
def test_messages(build, arguments, message):
    given = {"objective": fit, "num_nonzeros": 3, "step_size": 0.1} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        build(**given)


@pytest.mark.usefixtures("as_users_see_it")
def test_messages_of_what_fixes_the_program():
    with pytest.raises(TypeError, match="num_nonzeros fixes the program and must be a Python int; a traced value came"):
        jax.jit(lambda k: hard_thresholding(fit, k, 0.1)(jnp.ones(NUM_COLUMNS), jnp.ones(NUM_ROWS)))(3)
    with pytest.raises(ValueError, match="num_refinements must be a whole number of at least 0; -1 came"):
        odl.accelerated_hard_thresholding(fit, 3, 0.1, num_refinements=-1)
