"""Bytes of the compiled gradient: stopping costs none, checkpointing saves what it promises."""

import jax
import jax.numpy as jnp
import pytest

import odljax as odl

pytestmark = pytest.mark.usefixtures("optimised")

ROWS, COLUMNS, STEPS = 300, 200, 100
ITERATE = 8 * COLUMNS


def objective(A):
    return lambda x, theta: 0.5 * jnp.sum((A @ x - 1.0) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)


def nonlinear(A):
    return lambda x, theta: jnp.sum(jnp.log(jnp.cosh(A @ x - 1.0))) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)


def temporary_bytes(solver_of, loss=objective):
    def gradient(A, theta):
        solver = solver_of(odl.gradient_descent(loss(A), 1e-4))
        return jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(COLUMNS), theta).x ** 2))(theta)

    shapes = (jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float64), jax.ShapeDtypeStruct((), jnp.float64))
    return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def hand_written_bytes(loss=objective):
    """A plain scan, without anything of ours."""

    def gradient(A, theta):
        def final(theta):
            f = loss(A)
            step = lambda x, _: (x - 1e-4 * jax.grad(f)(x, theta), None)
            return jnp.sum(jax.lax.scan(step, jnp.zeros(COLUMNS), None, length=STEPS)[0] ** 2)

        return jax.grad(final)(theta)

    shapes = (jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float64), jax.ShapeDtypeStruct((), jnp.float64))
    return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", [objective, nonlinear])
def test_stopping_costs_the_memory_of_a_plain_scan(loss):
    plain = hand_written_bytes(loss)
    assert plain >= STEPS * ITERATE
    fixed = temporary_bytes(lambda i: odl.for_steps(i, STEPS), loss)
    stopping = temporary_bytes(lambda i: odl.unrolled(odl.until_converged(i, tol=1e-9, max_steps=STEPS)), loss)
    assert fixed <= 1.02 * plain + 4 * ITERATE
    # One step more for the last test, and a handful of scalars a step.
    assert stopping <= 1.02 * (plain * (STEPS + 1) / STEPS + 64 * STEPS) + 8 * ITERATE


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("every", [5, 10, 25])
def test_checkpointing_costs_the_memory_of_its_segments(every, stopping):
    def solver(iteration):
        if stopping:
            return odl.unrolled(odl.until_converged(iteration, tol=1e-9, max_steps=STEPS - 1), checkpoint_every=every)
        return odl.unrolled(odl.for_steps(iteration, STEPS), checkpoint_every=every)

    a_step = hand_written_bytes(nonlinear) / STEPS
    segments = STEPS / every * ITERATE + every * a_step
    assert temporary_bytes(solver, nonlinear) <= 1.3 * segments + 13 * ITERATE + 128 * STEPS


def test_implicit_does_not_grow_with_the_steps():
    few, many = (temporary_bytes(lambda i, n=n: odl.implicit(odl.for_steps(i, n)), nonlinear) for n in (10, 1000))
    assert many <= few + 64


def test_truncated_costs_its_last_steps():
    bytes_of = {
        n: temporary_bytes(lambda i, n=n: odl.truncated(odl.for_steps(i, STEPS), num_steps=n)) for n in (10, 20)
    }
    full = temporary_bytes(lambda i: odl.for_steps(i, STEPS))
    assert bytes_of[20] - bytes_of[10] <= 1.1 * full / STEPS * 10 + 4 * ITERATE
    assert bytes_of[10] < full / 3


@pytest.mark.parametrize("name", ["hodl", "bda"])
def test_checkpoints_of_aggregated_walks_save_memory(name):
    def bytes_of(**options):
        def gradient(A, theta):
            outer = lambda x, theta: jnp.sum(x**2)
            if name == "hodl":
                walk = odl.operators.gradient(nonlinear(A), 1e-4)
                hyper = odl.hypergradients.hodl(walk, outer, num_steps=STEPS, **options)
            else:
                hyper = odl.hypergradients.bda(nonlinear(A), outer, num_steps=STEPS, step_size=1e-4, **options)
            return hyper.update(theta, hyper.init(theta, jnp.zeros(COLUMNS)))[0]

        shapes = (jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float64), jax.ShapeDtypeStruct((), jnp.float64))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(checkpoint_every=10) < bytes_of() / 3
