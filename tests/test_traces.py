"""How often a user's functions are traced: a fixed number in a training loop, and never again."""

import jax
import jax.numpy as jnp
import optax
import pytest

import odljax as odl

PROBLEM = odl.problems.ridge(20, 3)

# Inner objective: once where init looks for theta in it, once for the step, once for the residual that is tested, once
# for its shapes (twice where the first and the last are reported), once for the derivative in x and once in theta where
# there is an adjoint system.
BOUNDS = {
    "implicit": ({"inner": 5, "outer": 1}, lambda i: odl.implicit(odl.until_converged(i, tol=1e-8, max_steps=50))),
    "unrolled": ({"inner": 4, "outer": 1}, lambda i: odl.unrolled(odl.for_steps(i, 50))),
    "checkpointed": ({"inner": 5, "outer": 1}, lambda i: odl.unrolled(odl.for_steps(i, 50), checkpoint_every=8)),
    "truncated": ({"inner": 5, "outer": 1}, lambda i: odl.truncated(odl.for_steps(i, 50), num_steps=10)),
    "one_step": ({"inner": 6, "outer": 1}, lambda i: odl.one_step(odl.for_steps(i, 50))),
    "hodl": ({"inner": 5, "outer": 3}, None),  # one of each for the default step
}


def counted(function, counts, name):
    def call(*arguments):
        counts[name] += 1
        return function(*arguments)

    return call


@pytest.mark.parametrize("derivative", BOUNDS)
def test_a_hundred_updates_trace_a_bounded_number_of_times(derivative):
    bounds, transform = BOUNDS[derivative]
    counts = {"inner": 0, "outer": 0}
    objective, outer = counted(PROBLEM.objective, counts, "inner"), counted(PROBLEM.outer, counts, "outer")
    iteration = odl.gradient_descent(objective, PROBLEM.step_size)
    if transform is None:
        hyper = odl.hypergradients.hodl(iteration, outer, num_steps=50)
    else:
        hyper = odl.hypergradients.warm_started(transform(iteration), outer)
    tx = optax.sgd(0.1)

    @jax.jit
    def update(theta, state, opt_state):
        gradient, state, info = hyper.update(theta, state)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(theta, updates), state, opt_state, info

    theta = PROBLEM.theta
    state, opt_state = hyper.init(theta, PROBLEM.x0), tx.init(theta)
    first = None
    for _ in range(100):
        theta, state, opt_state, info = update(theta, state, opt_state)
        first = first or dict(counts)
    assert counts == first, "a later update traced again"
    assert all(counts[name] <= bounds[name] for name in bounds), (counts, bounds)
    assert jnp.isfinite(info.value)


@pytest.mark.parametrize("derivative", ["implicit", "unrolled"])
def test_plain_grad_traces_a_bounded_number_of_times(derivative):
    counts = {"inner": 0}
    iteration = odl.gradient_descent(counted(PROBLEM.objective, counts, "inner"), PROBLEM.step_size)
    solver = getattr(odl, derivative)(odl.for_steps(iteration, 30))
    gradient = jax.jit(jax.grad(lambda theta: PROBLEM.outer(solver(PROBLEM.x0, theta).x, theta)))
    gradient(PROBLEM.theta)
    assert counts["inner"] <= 6  # one looks for theta; the first residual and the last tell whether the steps arrived
    before = counts["inner"]
    gradient(PROBLEM.theta + 1)
    assert counts["inner"] == before


def test_a_number_that_changes_does_not_compile_again():
    """Numbers that travel as arguments are data: a step size, a tolerance, a penalty."""
    counts = {"inner": 0}

    @jax.jit
    def solve(theta, step_size, tol):
        iteration = odl.gradient_descent(counted(PROBLEM.objective, counts, "inner"), step_size)
        return odl.implicit(odl.until_converged(iteration, tol=tol, max_steps=500))(PROBLEM.x0, theta)

    loose = solve(PROBLEM.theta, 0.1, 1e-3)
    before = dict(counts)
    tight = solve(PROBLEM.theta, 0.2, 1e-9)
    assert counts == before
    assert int(tight.num_steps) != int(loose.num_steps)


@pytest.mark.usefixtures("optimised")
def test_the_residual_test_costs_no_second_gradient():
    """Step and residual see the same iterate: the compiled loop multiplies by the data as often as a plain one."""

    def dots(solver):
        text = jax.jit(lambda A, theta: solver(A)(PROBLEM.x0, theta).x).lower(jnp.ones((7, 3)), 1.0).compile().as_text()
        return text.count(" dot(") + text.count('custom_call_target="__onednn$matmul"')

    def iteration(A):
        return odl.gradient_descent(lambda x, t: 0.5 * jnp.sum((A @ x) ** 2) + t * jnp.sum(x**2), 0.01)

    plain = dots(lambda A: odl.for_steps(iteration(A), 10))
    stopping = dots(lambda A: odl.until_converged(iteration(A), tol=1e-8, max_steps=10))
    assert 0 < stopping <= plain
