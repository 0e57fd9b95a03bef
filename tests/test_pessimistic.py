"""Pessimistic truncation: the gradient at the worst iterate, under every derivative of the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl

pessimistic, through = odl.hypergradients.pessimistic, odl.hypergradients.through
LINE = odl.fixed_point(lambda x, theta: 0.5 * x + theta)


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


DERIVATIVES = {
    "bare": lambda s: s,
    "unrolled(checkpoint)": lambda s: odl.unrolled(s, checkpoint_every=4),
    "forward": odl.forward,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_gradient_at_the_worst_iterate_in_closed_form(derivative, dtype):
    """x_k = q x_0 + 2 (1 - q) theta with q = 2^-k; the loss peaks at the iterate nearest to the target."""
    solver = DERIVATIVES[derivative](odl.for_steps(LINE, 10, history=True))
    hyper = pessimistic(solver, lambda x, theta, target: -((x - target) ** 2) + theta, start=lambda theta: theta**2)
    theta, tolerance = jnp.asarray(0.6, dtype), 1e-9 if dtype == jnp.float64 else 1e-5
    update, state = jax.jit(hyper.update), hyper.init(theta, None)
    for target, k in ((0.75, 1), (1.1, 3), (5.0, 10)):
        gradient, new, info = update(theta, state, jnp.asarray(target, dtype))
        q = 0.5**k
        x, slope = q * 0.36 + 2 * (1 - q) * 0.6, q * 1.2 + 2 * (1 - q)
        close(gradient, 1 - 2 * (x - target) * slope, tolerance)
        close((info.value, info.x, info.inner_residual), (0.6 - (x - target) ** 2, x, abs(0.6 - 0.5 * x)), tolerance)
        assert int(info.num_steps) == k
        assert gradient.dtype == dtype
        assert info.history.residual.shape == (10,)
        assert odl.Status(int(info.status)) is odl.Status.COMPLETED
        assert jax.tree.structure(new) == jax.tree.structure(state)


def test_it_is_through_the_steps_to_the_worst_iterate_of_an_aggregated_walk():
    """Two unknowns, a walk without an operator, and a loss that is worst on the way."""
    problem = odl.problems.ridge(20, 3)
    base = odl.gradient_descent(problem.objective, problem.step_size)
    walk = odl.aggregate(
        base, lambda x, theta: jnp.sum(x**2), weight=0.3, step_size=lambda k: 0.5 / (k.astype(float) + 1.0)
    )
    outer, start = lambda x, theta: -((jnp.sum(x**2) - 0.36) ** 2) + theta**2, problem.x0 + 2
    hyper = pessimistic(odl.for_steps(walk, 25), outer)
    gradient, _, info = jax.jit(hyper.update)(problem.theta, hyper.init(problem.theta, start))
    k = int(info.num_steps)
    assert 1 < k < 25
    values = [outer(odl.for_steps(walk, n)(start, problem.theta).x, problem.theta) for n in (k - 1, k, k + 1, 25)]
    assert np.argmax(values) == 1
    plain = through(odl.for_steps(walk, k), outer)
    want, _, at = plain.update(problem.theta, plain.init(problem.theta, start))
    close((gradient, info.value, info.x), (want, at.value, at.x))
    assert info.inner_residual is None


def test_ties_and_numbers_that_are_none():
    hyper = pessimistic(odl.for_steps(LINE, 5), lambda x, theta, bad: jnp.where(x > bad, jnp.nan, 0.0) + theta)
    state = hyper.init(1.0, 0.0)
    gradient, _, info = hyper.update(1.0, state, 9.0)
    assert (int(info.num_steps), float(gradient), odl.Status(int(info.status)).name) == (1, 1.0, "COMPLETED")
    _, _, info = hyper.update(1.0, state, 1.6)  # x_3 = 1.75 is the first beyond it
    assert (int(info.num_steps), odl.Status(int(info.status)).name) == (3, "NON_FINITE")
    assert np.isnan(info.value)
    grow = pessimistic(odl.for_steps(odl.fixed_point(lambda x, theta: 9.0 * x + theta), 30), lambda x, theta: -x)
    _, _, info = grow.update(1.0, grow.init(1.0, 0.0))
    assert (int(info.num_steps), odl.Status(int(info.status)).name) == (1, "DIVERGED")


def test_refusals():
    outer = lambda x, theta: x
    with pytest.raises(ValueError, match=r"pessimistic: .*until_converged\(.*\) stops by itself.* Use for_steps"):
        pessimistic(odl.until_converged(LINE), outer)
    solver = odl.for_steps(LINE, 5)
    for wrong, reason in (
        (odl.implicit(odl.unrolled(solver)), "differentiates at a solution"),
        (odl.phantom(solver, 2), "differentiates at a solution"),
        (odl.truncated(solver, num_steps=2), "differentiates the last steps only"),
    ):
        with pytest.raises(ValueError, match=rf"pessimistic: reverses the steps .*, and {wrong.derivative}.*{reason}"):
            pessimistic(wrong, outer)
