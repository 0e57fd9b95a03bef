"""Forward accumulation and phantom gradients: what the matrix of derivatives does not ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import NUM_STEPS, PROBLEMS, base

import odljax as odl


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


# ---- forward ---------------------------------------------------------------------------------------------------------


def test_second_derivatives_in_every_order_of_modes_and_captured_tracers():
    """Also of the loop that stops by itself, whose transpose does not exist."""
    problem = PROBLEMS["ridge"]()

    def value_of(solver_of):
        def value(theta, start):
            iteration = odl.gradient_descent(lambda x, _: problem.objective(x, theta), problem.step_size)
            return problem.outer(solver_of(iteration)(start, None).x, theta)

        return value

    stopping = lambda i: odl.until_converged(i, tol=1e-3, max_steps=40)
    forward, unrolled = (value_of(lambda i, d=d: d(stopping(i))) for d in (odl.forward, odl.unrolled))
    start = problem.x0 + 0.3

    def derivatives(value):
        over = lambda outer, inner: outer(inner(value, argnums=0), argnums=0)(problem.theta, start)
        modes = (jax.jacfwd, jax.jacrev)
        return {
            "both": jax.grad(value, argnums=(0, 1))(problem.theta, start),
            **{f"{o.__name__} {i.__name__}": over(o, i) for o in modes for i in modes},
            "vmap": jax.vmap(jax.grad(value), (0, None))(problem.theta + jnp.arange(2.0), start),
        }

    expected = jax.jit(lambda: derivatives(unrolled))()
    assert np.abs(expected["both"][1]).max() > 1e-6  # stopped early: the start still matters
    close(jax.jit(lambda: derivatives(forward))(), expected)


def test_forward_of_rows_states_and_integers():
    """Rows and counts come through; theta may hold whole numbers; steps without an operator are steps, too."""
    walk = odl.aggregate(odl.heavy_ball(lambda x, t: 0.5 * x + t["a"] ** t["n"]), lambda x, t: x**2, step_size=0.1)
    plain = odl.for_steps(walk, 7, record=lambda x, theta, k: (x, k))
    solver, theta = odl.forward(plain), {"a": jnp.asarray(0.7), "n": jnp.asarray(2)}
    assert solver.name == "forward(for_steps(aggregate(heavy_ball(fixed_point(<lambda>)))))"
    close(solver(0.1, theta), plain(0.1, theta), 0)
    slope = lambda solver: jax.grad(lambda a: solver(0.1, theta | {"a": a}).x)(theta["a"])
    close(slope(solver), slope(plain))
    both = lambda theta: solver(0.1, theta).x
    close(jax.grad(both, allow_int=True)(theta)["a"], slope(plain))
    assert not np.any(jax.grad(lambda a: jnp.sum(solver(0.1, theta | {"a": a}).history.recorded[0]))(theta["a"]))


def test_forward_keeps_float32_and_mixed_dtypes():
    problem = odl.problems.tree(second_dtype=jnp.float32)
    solver = odl.forward(odl.for_steps(odl.fixed_point(problem.T), 60))
    gradient = jax.grad(lambda theta: problem.outer(solver(problem.x0, theta).x, theta))(problem.theta)
    close(gradient, problem.hypergradient(problem.theta), 1e-5)
    assert jax.tree.map(lambda g: g.dtype, gradient) == jax.tree.map(lambda t: t.dtype, problem.theta)


def test_forward_stops_by_the_relative_tolerance():
    """x_k = theta (1 - 2^-k) has the residual theta 2^-(k+1): at k = 9 it is below a thousandth of x_k."""
    halved = odl.fixed_point(lambda x, theta: 0.5 * (x + theta))
    solver = odl.forward(odl.until_converged(halved, tol=0.0, relative_tol=1e-3, max_steps=40))
    solution, slope = jax.jit(lambda t: (solver(0.0, t), jax.grad(lambda t: solver(0.0, t).x)(t)))(jnp.asarray(3.0))
    assert (int(solution.num_steps), int(solution.status)) == (9, odl.Status.CONVERGED)
    close((solution.x, slope), (3 * (1 - 0.5**9), 1 - 0.5**9))


@pytest.mark.usefixtures("optimised")
def test_the_memory_of_forward_does_not_grow_with_the_steps():
    """p + 1 iterates, whatever the steps; a start or data that nobody differentiates cost no column."""
    rows, columns = 300, 200

    def temporary_bytes(num_steps):
        def gradient(A, theta):
            f = lambda x, theta: jnp.sum(jnp.log(jnp.cosh(A @ x - 1.0))) + 0.5 * jnp.sum(jnp.exp(theta)) * jnp.sum(x**2)
            solver = odl.forward(odl.for_steps(odl.gradient_descent(f, 1e-4), num_steps))
            return jax.grad(lambda theta: jnp.sum(solver(A[0], theta).x ** 2))(theta)

        shapes = (jax.ShapeDtypeStruct((rows, columns), jnp.float64), jax.ShapeDtypeStruct((3,), jnp.float64))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(10), temporary_bytes(1000)
    assert many <= few + 64
    assert many <= 4 * 8 * (3 * rows + 5 * columns)


# ---- truncated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [False, True])
def test_truncated_steps_keep_their_numbers(stopping):
    """x <- x - s_k (x - theta) with s_k = 1 / (k + 2): the last three steps, or three more after the stop."""
    descent = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, lambda k: 1 / (k.astype(float) + 2))
    if stopping:  # x_k = theta k / (k + 1), and so |x_9 - theta| = 0.3
        solver, first = odl.until_converged(descent, tol=0.31, max_steps=40), 9
    else:
        solver, first = odl.for_steps(descent, 10), 7
    value, slope = jax.jit(jax.value_and_grad(lambda t: odl.truncated(solver, num_steps=3)(0.0, t).x))(3.0)
    close(slope, 1 - np.prod([1 - 1 / (k + 2) for k in range(first, first + 3)]))
    close(value, 3 * (1 - 1 / (10 if stopping else 11)))


# ---- phantom ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [odl.for_steps, lambda i, n: odl.until_converged(i, tol=1e-14, max_steps=n)])
def test_phantom_is_the_damped_series_and_keeps_the_value(stop):
    problem = PROBLEMS["ridge"]()
    solver = stop(odl.nesterov(base(problem), 0.3), NUM_STEPS)
    x = problem.solution(problem.theta)
    jacobian, push = jax.jacobian(problem.T, argnums=(0, 1))(x, problem.theta)
    for num_steps, damping in ((1, 1.0), (3, 0.4), (400, 0.8)):
        phantom = odl.phantom(solver, num_steps, damping)
        damped = (1 - damping) * jnp.eye(len(x)) + damping * jacobian
        want = damping * sum(np.linalg.matrix_power(damped, j) @ push for j in range(num_steps))
        value_and_slope = jax.jit(
            lambda t, s=phantom: (s(problem.x0, t).x, jax.jacrev(lambda t: s(problem.x0, t).x)(t))
        )
        value, slope = value_and_slope(problem.theta)
        close(value, solver(problem.x0, problem.theta).x, 1e-14)
        close(slope, want, 1e-9)
    close(slope, jax.jacobian(problem.solution)(problem.theta), 1e-9)


def test_phantom_without_damping_is_truncation_at_the_solution():
    problem = PROBLEMS["ridge"]()
    solver = odl.until_converged(odl.fixed_point(problem.T), tol=1e-13, max_steps=NUM_STEPS)
    gradient = lambda s: jax.grad(lambda t: problem.outer(s(problem.x0, t).x, t))(problem.theta)
    short = gradient(odl.phantom(solver, 4, 1.0))
    x = problem.solution(problem.theta)
    jacobian, push = jax.jacobian(problem.T, argnums=(0, 1))(x, problem.theta)
    series = sum(np.linalg.matrix_power(jacobian, j) @ push for j in range(4))
    close(short, jax.grad(problem.outer)(x, problem.theta) @ series, 1e-10)
    close(short, gradient(odl.truncated(solver, num_steps=4)))
    close(short, gradient(odl.implicit(solver, odl.linear.neumann(3))))
    along = lambda s: jax.jvp(lambda t: problem.outer(s(problem.x0, t).x, t), (problem.theta,), (jnp.ones(()),))[1]
    close(along(odl.phantom(solver, 4, 1.0)), short)


def test_phantom_captures_tracers_in_single_precision():
    problem = odl.problems.ridge(30, 4, dtype=jnp.float32)

    def value(theta, damping):
        iteration = odl.gradient_descent(lambda x, _: problem.objective(x, theta), problem.step_size)
        solver = odl.phantom(odl.for_steps(iteration, NUM_STEPS), 200, damping)
        return problem.outer(solver(problem.x0, None).x, theta)

    gradient, of_damping = jax.grad(value, argnums=(0, 1))(problem.theta, jnp.float32(0.9))
    close(gradient, problem.hypergradient(problem.theta), 1e-5)
    assert gradient.dtype == jnp.float32
    assert of_damping == 0  # no part of the point


def test_phantom_refusals():
    solver = odl.for_steps(odl.fixed_point(lambda x, theta: 0.5 * x + theta), 5)
    with pytest.raises(ValueError, match=r"phantom: damping must lie in \(0, 2\); 2.0 came"):
        odl.phantom(solver, 2, 2.0)
    with pytest.raises(ValueError, match=r"phantom: num_steps must be a whole number of at least 1; 0 came"):
        odl.phantom(solver, 0)
    walk = odl.aggregate(solver.iteration, lambda x, theta: x**2, step_size=0.1)
    with pytest.raises(TypeError, match=r"phantom: .* aggregate\(fixed_point\(<lambda>\)\) has none\. Use unrolled or"):
        odl.phantom(odl.for_steps(walk, 5), 2)
    with pytest.raises(ValueError, match=r"through: a learned start needs .* and phantom\("):
        odl.hypergradients.through(odl.phantom(solver, 2), lambda x, theta: x, start=lambda theta: theta)
