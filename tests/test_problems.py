"""The test problems keep their word: solution, contraction, hypergradient, dtype, and the limits of P_c."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from odljax import problems
from odljax.problems import PROBLEMS, p_c, p_c_minimiser

problem_named = functools.cache(lambda name: PROBLEMS[name]())
every = pytest.mark.parametrize("name", list(PROBLEMS))


def flat(tree):
    return np.asarray(ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree))[0])


def fixed_and_stationary(problem):
    """``|T(x) - x|`` and ``|x - prox(x - grad f(x))|`` at the closed-form solution."""

    def measure(theta):
        x = problem.solution(theta)
        gaps = [jax.tree.map(jnp.subtract, problem.T(x, theta), x)]
        if problem.objective is not None:
            ahead = x - jax.grad(problem.objective)(x, theta)
            gaps.append(x - (ahead if problem.prox is None else problem.prox(ahead, theta, 1.0)))
        return gaps

    return [np.abs(flat(gap)).max() for gap in jax.jit(measure)(problem.theta)]


@every
def test_the_solution_is_a_fixed_point_and_stationary(name):
    problem = problem_named(name)
    gaps = fixed_and_stationary(problem)
    assert max(gaps) < 1e-13
    assert len(gaps) == (2 if name in ("ridge", "quadratic", "lasso") else 1)
    assert problem.name == name
    # ... and not one of another theta.
    x = problem.solution(problem.theta)
    moved = problem.T(x, jax.tree.map(lambda leaf: 1.1 * leaf, problem.theta))
    assert np.abs(flat(jax.tree.map(jnp.subtract, moved, x))).max() > 1e-4


@every
def test_the_solution_is_reached_from_x0(name):
    problem = problem_named(name)
    x = jax.jit(lambda x, theta: jax.lax.fori_loop(0, 400, lambda _, x: problem.T(x, theta), x))(
        problem.x0, problem.theta
    )
    np.testing.assert_allclose(flat(x), flat(problem.solution(problem.theta)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "square_root"])
def test_the_map_contracts(name):
    problem = problem_named(name)
    start, unravel = ravel_pytree(problem.x0)
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda v: ravel_pytree(problem.T(unravel(v), problem.theta))[0])))
    points = jnp.asarray(2.0 * np.random.default_rng(0).standard_normal((20, start.size)))
    rates = np.linalg.norm(np.asarray(jacobian(points)), 2, axis=(1, 2))
    assert rates.max() < 1
    if problem.strong_convexity is not None:
        bound = 1 - problem.step_size * problem.strong_convexity
        assert rates.max() <= bound + 1e-12
        if problem.prox is None:
            np.testing.assert_allclose(rates.max(), bound, rtol=1e-12)  # attained: the constants are the true ones


def test_heron_converges_quadratically():
    problem = problems.square_root()
    slope = jax.grad(lambda x: problem.T(x, problem.theta)[0])(problem.solution(problem.theta))
    np.testing.assert_allclose(slope, 0.0, atol=1e-15)


@every
def test_the_hypergradient_against_central_differences(name):
    problem = problem_named(name)
    theta, unravel = ravel_pytree(problem.theta)
    step = 1e-5
    shifts = step * jnp.concatenate([jnp.eye(theta.size), -jnp.eye(theta.size)])
    values, gradient = jax.jit(
        lambda shifts, theta: (
            jax.vmap(lambda shift: problem.value(unravel(ravel_pytree(theta)[0] + shift)))(shifts),
            problem.hypergradient(theta),
        )
    )(shifts, problem.theta)
    central = (values[: theta.size] - values[theta.size :]) / (2 * step)
    np.testing.assert_allclose(flat(gradient), central, rtol=1e-8, atol=1e-9)
    assert np.abs(flat(gradient)).min() > 1e-4
    np.testing.assert_allclose(
        problem.value(problem.theta), problem.outer(problem.solution(problem.theta), problem.theta), rtol=1e-14
    )


@every
def test_the_dtype_is_that_asked_for(name):
    problem = PROBLEMS[name](dtype=jnp.float32)
    x = problem.solution(problem.theta)
    for tree in (problem.x0, problem.theta, x, problem.T(x, problem.theta), problem.outer(x, problem.theta)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(flat(problem.T(x, problem.theta)), flat(x), rtol=0, atol=1e-5)
    double = problem_named(name)
    assert {leaf.dtype for leaf in jax.tree.leaves((double.x0, double.theta))} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(flat(problem.theta), flat(double.theta), rtol=1e-6)
    np.testing.assert_allclose(flat(x), flat(double.solution(double.theta)), rtol=1e-4, atol=1e-5)


def test_the_default_dtype_follows_x64(float32_only):
    assert problems.quadratic().theta.dtype == jnp.float32


def test_two_dtypes_on_the_tree():
    problem = problems.tree(second_dtype=jnp.float32)
    x = problem.solution(problem.theta)
    assert {key: leaf.dtype for key, leaf in x.items()} == {"a": jnp.float64, "b": jnp.float32}
    assert jax.tree.map(lambda leaf: leaf.dtype, problem.T(x, problem.theta)) == {"a": jnp.float64, "b": jnp.float32}
    np.testing.assert_allclose(flat(problem.T(x, problem.theta)), flat(x), rtol=0, atol=1e-7)


def test_sizes_seeds_and_condition():
    problem = problems.quadratic(condition=1e4, size=9)
    hessian = np.asarray(jax.jit(jax.hessian(problem.objective))(problem.x0, problem.theta))
    eigenvalues = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(eigenvalues, np.geomspace(1e-4, 1.0, 9), rtol=1e-9)
    assert problem.strong_convexity == pytest.approx(1e-4)
    for make in (problems.ridge, problems.lasso):
        first, second = make(12, 5), make(12, 5, seed=1)
        assert first.x0.shape == (5,)
        assert float(first.value(first.theta)) != float(second.value(first.theta))
    lasso = problem_named("lasso")
    support = np.asarray(lasso.solution(lasso.theta)) != 0
    assert 0 < support.sum() < 8


# ---- P_c -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5])
def test_p_c_the_truth(c):
    problem = p_c(c)
    value = jax.jit(problem.value)
    truth = 1 / (1 + c)
    np.testing.assert_allclose(jax.grad(problem.value)(truth), 0.0, atol=1e-15)
    assert float(value(truth)) < min(float(value(truth + 1e-3)), float(value(truth - 1e-3)))
    # Over all fixed points (u1 = w, u2 free), jointly in w and u2: no better answer.
    w, u2 = np.meshgrid(np.linspace(-1, 2, 61), np.linspace(-1, 2, 61))
    losses = 0.5 * (w - u2) ** 2 + 0.5 * (w - 1) ** 2 + c / 2 * w**2
    assert float(value(truth)) <= losses.min()
    np.testing.assert_allclose(problem.solution(truth), [truth, truth], rtol=1e-15)
    assert max(fixed_and_stationary(problem)) < 1e-15


def test_p_c_the_map_is_non_expansive_and_no_contraction():
    problem = p_c(1.0)
    jacobian = jax.jacobian(problem.T)(problem.x0, problem.theta)
    np.testing.assert_allclose(jacobian, np.diag([0.5, 1.0]), rtol=0, atol=1e-15)
    u, w = jnp.array([0.3, -0.8]), jnp.asarray(0.7)
    np.testing.assert_allclose(problem.T(u, w), u - 0.5 * jax.grad(problem.objective)(u, w), rtol=0, atol=1e-15)


def test_p_c_copies_add_up():
    one, three = p_c(1.0), p_c(1.0, copies=3)
    w = jnp.array([0.1, 0.5, 0.9])
    assert (three.x0.shape, three.theta.shape) == ((3, 2), (3,))
    np.testing.assert_allclose(three.value(w), sum(one.value(entry) for entry in w), rtol=1e-14)
    u = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(three.T(u, w), jnp.stack([one.T(*pair) for pair in zip(u, w, strict=True)]), atol=1e-15)
    np.testing.assert_allclose(three.hypergradient(w), [one.hypergradient(entry) for entry in w], rtol=1e-14)


def simulated_minimiser(c, num_steps, relaxation, weight, step_size):
    """Golden truth: phi_K at three points determines the quadratic."""

    def phi(w):
        u = np.array([0.01, 0.01])
        for k in range(num_steps):
            below = u - relaxation * 0.5 * np.array([u[0] - w, 0.0])
            above = u - step_size(k) * np.array([u[0] - 1.0, u[1] - w])
            u = weight * above + (1 - weight) * below
        return 0.5 * (w - u[1]) ** 2 + 0.5 * (u[0] - 1) ** 2 + c / 2 * w**2

    low, middle, high = phi(-1.0), phi(0.0), phi(1.0)
    return (low - high) / (2 * (low + high - 2 * middle))


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_p_c_minimiser_against_a_simulation(c, num_steps):
    for relaxation, weight, schedule in (
        (0.5, 0.5, lambda k: 1 / (k + 1)),
        (0.3, 0.8, lambda k: 0.5),
        (0.9, 0.1, lambda k: 0.7 / (k + 1) ** 0.5),
    ):
        got = p_c_minimiser(c, num_steps, relaxation=relaxation, weight=weight, step_size=schedule)
        assert got == pytest.approx(simulated_minimiser(c, num_steps, relaxation, weight, schedule), abs=1e-12)


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize("start", [0.01, 0.6])
def test_p_c_the_simple_variant_ends_at_the_wrong_point(c, start):
    for num_steps in (200, 1000):
        got = p_c_minimiser(c, num_steps, weight=0.0, start=(start, start))
        assert got == pytest.approx((1 + start) / (2 + c), abs=1e-12)
    assert abs(got - 1 / (1 + c)) > 0.03


@pytest.mark.parametrize(("relaxation", "s"), [(0.5, 1.0), (0.5, 0.3), (0.8, 0.1)])
def test_p_1_a_constant_step_ends_at_the_wrong_point(relaxation, s):
    ratio = relaxation * 0.5 / (relaxation * 0.5 + s)
    got = p_c_minimiser(1.0, 3000, relaxation=relaxation, weight=0.5, step_size=s)
    assert got == pytest.approx(ratio**2 / (1 + ratio**2), abs=1e-9)
    assert got < 0.5


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize("s", [0.2, 0.5, 1.0])
def test_p_c_the_harmonic_schedule_tends_to_the_truth_slowly(c, s):
    errors = [abs(p_c_minimiser(c, n, step_size=lambda k: s / (k + 1)) - 1 / (1 + c)) for n in (10, 100, 1000, 10000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    # The free direction moves like K^(-mu s); where it alone decides, the error is its square.
    if c == 0:
        assert errors[3] / errors[2] == pytest.approx(10 ** (-2 * 0.5 * s), rel=0.1)
    assert errors[3] > 1e-5
