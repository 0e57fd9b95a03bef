"""Records are static: they live in modules, trees of settings and arguments; calls outside of jit compile once."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, struct
from flax.training import train_state

import odljax as odl


def layer(z, theta):
    return jnp.tanh(0.4 * theta["W"] @ z + theta["x"])


def make():
    return odl.implicit(odl.until_converged(odl.fixed_point(layer), tol=1e-10, max_steps=100))


W, X = np.eye(3) * 0.5, jnp.ones(3)
ANSWER = np.full(3, 0.9)
for _ in range(100):
    ANSWER = np.tanh(0.2 * ANSWER + 1.0)


def apply(solver, W, x):
    return solver(jnp.zeros(3), {"W": W, "x": x}).x


def test_nnx():
    class Layer(nnx.Module):
        def __init__(self):
            self.W, self.solver = nnx.Param(jnp.asarray(W)), make()
            self.hyper = odl.hypergradients.through(self.solver, lambda z, theta: jnp.sum(z))

        def __call__(self, x):
            return apply(self.solver, self.W[...], x)

    model = Layer()
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    value, gradients = nnx.jit(nnx.value_and_grad(loss))(model, X)
    np.testing.assert_allclose(value, np.sum(ANSWER**2), rtol=1e-9)
    step, moved = 1e-6, []
    for sign in (1, -1):  # along one entry of W
        solver, point = make(), jnp.asarray(W).at[0, 1].add(sign * step)
        moved.append(float(jnp.sum(apply(solver, point, X) ** 2)))
    np.testing.assert_allclose(gradients["W"][...][0, 1], (moved[0] - moved[1]) / (2 * step), rtol=1e-6)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, gradients)
    assert float(loss(model, X)) < float(value)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), model(X))
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(Layer(), X), ANSWER, rtol=1e-9)


class Flax(linen.Module):
    solver: odl.Solver

    @linen.compact
    def __call__(self, x):
        return apply(self.solver, self.param("W", lambda key: jnp.asarray(W)), x)


class Equinox(eqx.Module):
    W: jax.Array
    solver: odl.Solver

    def __call__(self, x):
        return apply(self.solver, self.W, x)


@struct.dataclass
class Struct:
    W: jax.Array
    solver: odl.Solver


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    W: jax.Array
    solver: odl.Solver


def test_linen_equinox_dataclasses_and_train_states():
    module = Flax(make())
    np.testing.assert_allclose(jax.jit(module.apply)(module.init(jax.random.key(0), X), X), ANSWER, rtol=1e-9)
    model = Equinox(jnp.asarray(W), make())
    np.testing.assert_allclose(eqx.filter_jit(lambda m, x: m(x))(model, X), ANSWER, rtol=1e-9)
    assert eqx.filter_grad(lambda m, x: jnp.sum(m(x)))(model, X).W.shape == (3, 3)
    np.testing.assert_allclose(eqx.filter_jit(apply)(make(), jnp.asarray(W), X), ANSWER, rtol=1e-9)
    for kind in (Struct, Data):
        np.testing.assert_allclose(
            jax.jit(lambda s: apply(s.solver, s.W, X))(kind(jnp.asarray(W), make())), ANSWER, rtol=1e-9
        )
    state = train_state.TrainState.create(apply_fn=make(), params={"W": jnp.asarray(W)}, tx=optax.sgd(0.1))
    np.testing.assert_allclose(jax.jit(lambda s, x: apply(s.apply_fn, s.params["W"], x))(state, X), ANSWER, rtol=1e-9)


@pytest.mark.parametrize(
    "record",
    [make(), make().iteration, make().iteration.operator, odl.linear.cg(), odl.hypergradients.through(make(), max)],
    ids=lambda record: type(record).__name__,
)
def test_a_record_is_a_leafless_tree_equal_to_itself_alone(record):
    settings = jax.tree.map(lambda leaf: 2 * leaf, {"rate": 0.1, "record": record})
    assert settings == {"rate": 0.2, "record": record}
    assert jax.tree.leaves(record) == []
    assert jax.jit(lambda record, x: x)(record, 1.0) == 1.0
    assert record != dataclasses.replace(record)


def test_jit_traces_again_for_another_record_only():
    traces = []

    @jax.jit
    def run(solver, x):
        traces.append(solver)
        return apply(solver, jnp.asarray(W), x)

    one, other = make(), make()
    for solver in (one, one, other, one):
        run(solver, X)
    assert traces == [one, other]


def test_what_closes_over_a_traced_value_is_told_when_it_leaks():
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(lambda t: odl.for_steps(odl.fixed_point(lambda x, theta: x + t), 2))(1.0)(0.0, None)


def test_a_call_outside_of_jit_compiles_once():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **rest: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    walk = odl.gradient_descent(lambda x, theta: jnp.sum((x - theta) ** 2 + 0.1 * x**4), 0.2)
    stop = odl.until_converged(walk, tol=1e-8, max_steps=50)
    solver, unrolled = odl.implicit(stop), odl.unrolled(odl.for_steps(walk, 5))
    hyper = odl.hypergradients.warm_started(solver, lambda x, theta: jnp.sum(x**2))
    start = hyper.init(jnp.ones(3), jnp.zeros(3))
    calls = {
        "until_converged": lambda theta: stop(jnp.zeros(3), theta),
        "gradient, implicit": jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(3), theta).x)),
        "gradient, unrolled": jax.grad(lambda theta: jnp.sum(unrolled(jnp.zeros(3), theta).x)),
        "update": lambda theta: hyper.update(theta, start),
    }
    first, *others = map(jnp.asarray, np.linspace(0.1, 1.0, 9).reshape(3, 3))
    for name, call in calls.items():
        jax.block_until_ready(call(first))
        compiled.clear()
        for theta in others:
            jax.block_until_ready(call(theta))
        assert compiled == [], name
