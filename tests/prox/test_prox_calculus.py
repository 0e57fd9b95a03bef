"""The calculus: operators made of operators, against operators known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odljax import prox

V = 2 * np.random.default_rng(0).normal(size=8)
LAM, STEP = 0.8, 0.6


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (lambda v: prox.conjugate(prox.l1)(v, LAM, STEP), lambda v: prox.box(v, (-LAM, LAM))),
        (lambda v: prox.conjugate(prox.ridge)(v, LAM, STEP), lambda v: prox.ridge(v, 1 / LAM, STEP)),
        (lambda v: prox.conjugate(prox.group_lasso)(v, LAM, STEP), lambda v: prox.l2_ball(v, LAM)),
        (
            lambda v: prox.conjugate(prox.conjugate(prox.huber))(v, (LAM, 0.5), STEP),
            lambda v: prox.huber(v, (LAM, 0.5), STEP),
        ),
        (
            lambda v: v - STEP * prox.conjugate(prox.linf)(v / STEP, LAM, 1 / STEP),
            lambda v: prox.linf(v, LAM, STEP),
        ),
        (lambda v: prox.scale(prox.l1, -2.0)(v, LAM, STEP), lambda v: prox.l1(v, 2 * LAM, STEP)),
        (lambda v: prox.scale(prox.ridge, 0.5)(v, LAM, STEP), lambda v: prox.ridge(v, LAM / 4, STEP)),
        (lambda v: prox.translate(prox.l1, 0.3)(v, LAM, STEP), lambda v: 0.3 + prox.l1(v - 0.3, LAM, STEP)),
        (
            lambda v: prox.translate(prox.box, 1.0)(v, (-0.5, 0.5), STEP),
            lambda v: prox.box(v, (0.5, 1.5)),
        ),
        (lambda v: prox.from_projection(prox.box)(v, (-0.5, 0.5), STEP), lambda v: prox.box(v, (-0.5, 0.5))),
        (lambda v: prox.from_projection(prox.simplex)(v, None, STEP), prox.simplex),
    ],
)
def test_operators_of_operators(made, known):
    def both(operator):
        return jax.jit(lambda v: (operator(v), jax.jacfwd(operator)(v), jax.jacrev(operator)(v)))(V)

    for ours, exact in zip(both(made), both(known), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)


def test_each_part_has_its_own_operator():
    both = prox.separable({"w": prox.l1, "b": (prox.identity, prox.top_k)})
    v = {"w": {"x": V, "y": V[:3].astype("float32")}, "b": (V, V)}
    y = both(v, {"w": LAM, "b": (None, 2)}, {"w": STEP, "b": (1.0, 1.0)})
    assert jax.tree.structure(y) == jax.tree.structure(v)
    assert y["w"]["y"].dtype == "float32"
    np.testing.assert_array_equal(y["w"]["x"], prox.l1(V, LAM, STEP))
    np.testing.assert_array_equal(y["b"][0], V)
    assert np.count_nonzero(y["b"][1]) == 2


def test_the_envelope_of_the_l1_norm_is_huber():
    envelope = prox.moreau_envelope(lambda x, lam: lam * jnp.sum(jnp.abs(x)), prox.l1)

    def huber(v, lam, step):
        size = jnp.abs(v)
        return jnp.sum(jnp.where(size < step * lam, v**2 / (2 * step), lam * size - step * lam**2 / 2))

    def everything(function):
        every = (0, 1, 2)
        return jax.jit(
            lambda *args: (
                function(*args),
                jax.grad(function, every)(*args),
                jax.jacfwd(function, every)(*args),
                jax.jacfwd(jax.grad(function, every), every)(*args),
                jax.jacrev(jax.grad(function, every), every)(*args),
            )
        )(V, LAM, STEP)

    ours, exact = everything(envelope), everything(huber)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_envelope_of_an_indicator_is_the_squared_distance_also_on_the_set():
    envelope = jax.jit(jax.value_and_grad(prox.moreau_envelope(lambda x, radius: 0.0, prox.l2_ball)))
    value, slope = envelope(np.array([3.0, 4.0]), 1.0, 0.5)
    np.testing.assert_allclose(value, 16.0, rtol=1e-14)
    np.testing.assert_allclose(slope, [4.8, 6.4], rtol=1e-14)
    np.testing.assert_array_equal(envelope(np.zeros(2), 1.0, 0.5)[1], 0)


def test_what_is_static_stays_so_in_an_envelope():
    envelope = prox.moreau_envelope(lambda x, p: p[0] * jnp.sum(jnp.sort(jnp.abs(x))[-p[1] :]), prox.k_largest)
    slope = jax.jit(jax.grad(lambda v, lam: envelope(v, (lam, 2), STEP)))(V, LAM)
    np.testing.assert_allclose(slope, (V - prox.k_largest(V, (LAM, 2), STEP)) / STEP, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: prox.conjugate(lambda v: v),
            TypeError,
            r"prox.conjugate: prox must be a function of \(v, parameter, step_size",
        ),
        (lambda: prox.conjugate(prox.l1)(V, 1.0, 0.0), ValueError, r"step_size must lie in \(0, inf\)"),
        (lambda: prox.scale(prox.l1, 0.0), ValueError, "factor must not be 0"),
        (lambda: prox.translate(prox.l1, {"a": 0.0})(V, 1.0), ValueError, "give offset the structure of v"),
        (lambda: prox.separable({"a": prox.l1, "b": 1}), TypeError, "each member of proxes must be a function"),
        (
            lambda: prox.separable({"a": prox.l1})({"b": V}, {"a": 1.0}),
            ValueError,
            "needs v with the structure of prox",
        ),
        (lambda: prox.separable({"a": prox.l1})({"a": V}, 1.0), ValueError, "needs parameter with the structure"),
        (lambda: prox.moreau_envelope(prox.l1, lambda v: v), TypeError, "prox must be a function"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
