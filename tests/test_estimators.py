"""What every estimator of two losses owes: structure, dtype, jit, scan, vmap, honest status, and the right answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from estimators import ESTIMATORS, HELPERS, OF_SOLVERS, Row
from jaxtyping import config

import odljax as odl

PROBLEM = odl.problems.finite_sum()


@pytest.fixture
def as_a_user_has_it():
    """Without the type checker, which the tests bring and which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def built(name, problem=PROBLEM, **options):
    row: Row = ESTIMATORS[name]
    return row.build(problem.inner, problem.outer, problem.step_size, **options)


def descend(hyper, problem, rate, num_updates, data=None):
    """SGD on theta as a scan: ``(theta, state, infos)``."""
    data = (problem.inner_data, problem.outer_data) if data is None else data

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *data)
        theta = jax.tree.map(lambda leaf, g: leaf - jnp.asarray(rate, leaf.dtype) * g, theta, gradient)
        return (theta, state), info._replace(x=None, history=None)

    state = hyper.init(problem.theta, problem.x0, *data)
    return jax.lax.scan(body, (problem.theta, state), length=num_updates)


def same(a, b, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def signature(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_every_estimator_of_the_face_is_registered():
    names = {name for name in odl.hypergradients.__all__ if name[0].islower()}
    assert names == set(ESTIMATORS) | OF_SOLVERS | HELPERS


@pytest.mark.parametrize("name", ESTIMATORS)
def test_full_batch_descent_ends_at_the_minimiser(name):
    row = ESTIMATORS[name]
    problem = row.problem or PROBLEM
    run = jax.jit(lambda: descend(built(name, problem), problem, row.rate, row.num_updates))
    (theta, _), infos = run()
    end = problem.minimiser if row.end is None else row.end(problem)
    assert float(jnp.abs(theta - end).max()) <= row.tolerance
    assert int(infos.status.max()) <= odl.Status.COMPLETED
    assert infos.inner_residual is not None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_conformance(name):
    """jit = no jit; state, gradient and info keep structure and dtype; float32 stays float32 with float64 on."""
    problem = odl.problems.finite_sum(8, dtype=jnp.float32)
    options = {"batch_size": 4} if ESTIMATORS[name].stochastic else {}
    hyper = built(name, problem, **options)
    assert hyper.name.startswith(name)
    data = (problem.inner_data, problem.outer_data)
    state = hyper.init(problem.theta, problem.x0, *data)
    plain = hyper.update(problem.theta, state, *data)  # operation by operation, but for its loops
    compiled = jax.jit(hyper.update)(problem.theta, state, *data)
    same(plain[0], compiled[0], 1e-5)
    gradient, new_state, info = compiled
    assert signature(gradient) == signature(problem.theta)
    assert signature(new_state) == signature(state)
    assert isinstance(info, odl.Info)
    assert info.value.shape == info.status.shape == info.inner_residual.shape == ()
    x = jax.tree.map(lambda leaf: leaf[0], info.x) if ESTIMATORS[name].tasks else info.x
    assert signature(x) == signature(problem.x0)
    assert info.value.dtype == jnp.float32
    # vmap over theta = a loop.
    thetas = jnp.stack([problem.theta, problem.theta + 1])
    step = lambda theta: hyper.update(theta, hyper.init(theta, problem.x0, *data), *data)[0]
    batched, single = jax.jit(lambda thetas: (jax.vmap(step)(thetas), step(thetas[1])))(thetas)
    same(batched[1], single, 1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_losses_are_traced_a_bounded_number_of_times(name):
    """Whatever the number of inner steps, directions or terms; nothing is compiled here."""
    counts = {"inner": 0, "outer": 0}

    def counted(side):
        def loss(*arguments):
            counts[side] += 1
            return getattr(PROBLEM, side)(*arguments)

        return loss

    hyper = ESTIMATORS[name].build(counted("inner"), counted("outer"), PROBLEM.step_size)
    data = (PROBLEM.inner_data, PROBLEM.outer_data)
    state = jax.eval_shape(hyper.init, PROBLEM.theta, PROBLEM.x0, *data)
    counts.update(inner=0, outer=0)
    jax.eval_shape(hyper.update, PROBLEM.theta, state, *data)
    assert counts["inner"] <= 8, counts
    assert 0 < counts["outer"] <= 4, counts


@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_not_a_number_is_told_and_bad_input_is_refused(name):
    hyper = built(name)
    data = (PROBLEM.inner_data, PROBLEM.outer_data)
    state = hyper.init(PROBLEM.theta, PROBLEM.x0, *data)
    _, _, info = jax.jit(hyper.update)(PROBLEM.theta * jnp.nan, state, *data)
    assert int(info.status) == odl.Status.NON_FINITE
    with pytest.raises(TypeError, match="theta is differentiated and must be real floating point"):
        hyper.init(jnp.array([1, 2]), PROBLEM.x0, *data)
    with pytest.raises(TypeError, match="needs no data, or inner and outer data; 1 came"):
        hyper.update(PROBLEM.theta, state, PROBLEM.inner_data)
    row = ESTIMATORS[name]
    with pytest.raises(TypeError, match="inner must be a function"):
        row.build(3.0, PROBLEM.outer, 0.1)
    with pytest.raises(ValueError, match="step_size must lie in"):
        row.build(PROBLEM.inner, PROBLEM.outer, -1.0)


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.stochastic])
def test_minibatches(name):
    """Keys make runs different, epochs make them repeatable; sizes are checked."""
    run = functools.partial(descend, problem=PROBLEM, rate=0.01, num_updates=7)
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    ends = jax.vmap(lambda key: run(built(name, batch_size=(8, 4), key=key))[0][0])(jnp.stack(keys))
    same(ends[0], ends[1])
    assert float(jnp.abs(ends[0] - ends[2]).max()) > 1e-6
    with pytest.raises(TypeError, match="batch_size is 4, but no data came"):
        built(name, batch_size=4).init(PROBLEM.theta, PROBLEM.x0)
    with pytest.raises(ValueError, match="batch_size is 25, but there are 24 samples"):
        built(name, batch_size=25).init(PROBLEM.theta, PROBLEM.x0, PROBLEM.inner_data, PROBLEM.outer_data)


@pytest.mark.parametrize("name", ["alternating", "soba"])
def test_divergence_is_told_in_any_units(name):
    """Steps three times too long grow for ever, right ones come to rest; the units of x and theta do not matter."""
    outer = lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2)

    def statuses(step, unit):
        inner = lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2)
        hyper = getattr(odl.hypergradients, name)(inner, outer, step_size=lambda k: step)
        theta = unit * jnp.array([0.5, -0.2])

        def body(state, _):
            _, state, info = hyper.update(theta, state)
            return state, info.status

        return jax.lax.scan(body, hyper.init(theta, jnp.zeros(2)), length=40)[1]

    steps, units = jnp.meshgrid(jnp.asarray([3.0, 0.3]), jnp.asarray([1e-100, 1.0, 1e100]), indexing="ij")
    told = jax.jit(jax.vmap(statuses))(steps.ravel(), units.ravel()).reshape(2, 3, 40)
    assert (told[0, :, -1] == odl.Status.DIVERGED).all()
    assert (told[0, :, 0] == odl.Status.COMPLETED).all()
    assert (told[1] == odl.Status.COMPLETED).all()
