"""Nested checkpoints chosen by a budget of bytes: the same derivative, and compiled programs that keep the budget."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax.derivatives._unrolled import _stored, plan_segments

ROWS, COLUMNS = 300, 200
ITERATE = 8 * COLUMNS


def pendulum(x, theta):
    return x + 0.1 * jnp.sin(theta * x[::-1])


@pytest.mark.parametrize("stopping", [False, True])
def test_every_nesting_gives_the_same_derivatives(stopping):
    """23 steps, which no segment length divides: values, rows and derivatives of first and second order."""
    iteration, x0, theta = odl.fixed_point(pendulum), jnp.array([0.3, -1.2]), jnp.asarray(0.8)
    solver = odl.for_steps(iteration, 23, history=True)
    if stopping:
        solver = odl.until_converged(iteration, tol=0.02, max_steps=23, history=True)

    def results(solver):
        loss = lambda theta: jnp.sum(solver(x0, theta).x ** 2)
        return jax.jit(lambda t: (solver(x0, t), jax.grad(loss)(t), jax.hessian(loss)(t), jax.jacfwd(loss)(t)))(theta)

    expected, bare = results(odl.unrolled(solver)), jax.eval_shape(odl.unrolled(solver), x0, theta)
    assert bare.history.residual.shape == (23,)
    with pytest.raises(ValueError) as told:
        results(odl.unrolled(solver, memory_budget=1))
    least = int(re.search(r"at least (\d+) bytes", str(told.value))[1])
    for budget in (least, 2 * least):
        got = results(odl.unrolled(solver, memory_budget=budget))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, expected)


def test_plans_take_the_fewest_levels_that_fit():
    for length in (1, 2, 23, 100, 997):
        assert plan_segments("", length, 1, 10, 10 * length) == []
        best = {1: min(_stored(length, 1, 10, [n]) for n in range(1, length + 1))}  # by brute force
        best[2] = min(_stored(length, 1, 10, [m, n]) for n in range(1, 40) for m in range(n, length + n, n))
        for budget in (2 * length, 60, 50, 45, 42, 36):
            try:
                segments = plan_segments("", length, 1, 10, budget)
            except ValueError:
                continue
            assert _stored(length, 1, 10, segments) <= budget
            if 1 < len(segments) <= 3:
                assert best[len(segments) - 1] > budget


def least(length, levels=None):
    """The least budget that is met, with at most so many levels of checkpoints."""
    low, high = 1, length
    while low < high:
        middle = (low + high) // 2
        try:
            fits = len(plan_segments("", length, 1, 1, middle)) <= (levels or length)
        except ValueError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def test_the_memory_of_levels_grows_like_roots_and_of_all_levels_like_the_logarithm():
    for length in (100, 3000):
        assert least(length, 1) <= 2 * math.ceil(math.sqrt(length)) + 1
        assert least(length, 2) <= 3 * math.ceil(length ** (1 / 3)) + 2
        assert least(length) <= 2.9 * math.log(length) + 4


@pytest.mark.usefixtures("optimised")
def test_the_compiled_gradient_keeps_the_budget():
    def nonlinear(A):
        return lambda x, theta: jnp.sum(jnp.log(jnp.cosh(A @ x - 1.0))) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)

    def temporary_bytes(num_steps, stopping=False, **options):
        def gradient(A, theta):
            walk = odl.gradient_descent(nonlinear(A), 1e-4)
            solver = odl.for_steps(walk, num_steps)
            if stopping:
                solver = odl.until_converged(walk, tol=1e-9, max_steps=num_steps - 1)
            solver = odl.unrolled(solver, **options)
            return jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(COLUMNS), theta).x ** 2))(theta)

        shapes = (jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float64), jax.ShapeDtypeStruct((), jnp.float64))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    working = 12 * ITERATE  # of a single step
    plain = temporary_bytes(256)
    bytes_at = {}
    for budget in (300_000, 70_000, 48_000):
        bytes_at[budget] = temporary_bytes(256, memory_budget=budget)
        assert bytes_at[budget] <= budget + working
    assert bytes_at[48_000] < bytes_at[70_000] < bytes_at[300_000] < plain / 10
    assert temporary_bytes(256, stopping=True, memory_budget=100_000) <= 100_000 + working + 64 * 256
    # All levels: sixteen times the steps for less than one and a half times the bytes.
    assert temporary_bytes(4096, memory_budget=56_000) < 1.5 * bytes_at[48_000]


def test_refusals():
    solver = odl.for_steps(odl.fixed_point(pendulum), 8)
    with pytest.raises(ValueError, match=r"unrolled: memory_budget chooses .* both came\. Drop one of them"):
        odl.unrolled(solver, checkpoint_every=2, memory_budget=100)
    with pytest.raises(ValueError, match=r"unrolled: memory_budget must be a whole number of at least 1; 0 came"):
        odl.unrolled(solver, memory_budget=0)
    words = (
        r"unrolled\(fixed_point\(pendulum\)\): reverse mode through 8 steps stores at least \d+ bytes, .* "
        r"\(16 a checkpoint, \d+ a step\); memory_budget is 20\. Raise it, take fewer steps, or use forward"
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(odl.unrolled(solver, memory_budget=20), jnp.zeros(2), 1.0)
