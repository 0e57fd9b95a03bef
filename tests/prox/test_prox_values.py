"""Single operators: the values and derivatives that their docstrings promise, Moreau's identity, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odljax import prox


@pytest.mark.parametrize(
    ("ours", "of_the_conjugate"),
    [
        (lambda v: prox.l1(v, 0.8, 0.6), lambda v: 0.6 * prox.box(v / 0.6, (-0.8, 0.8))),
        (lambda v: prox.ridge(v, 0.8, 0.6), lambda v: 0.6 * prox.ridge(v / 0.6, 1 / 0.8, 1 / 0.6)),
        (lambda v: prox.group_lasso(v, 0.8, 0.6), lambda v: prox.l2_ball(v, 0.8 * 0.6)),
        (prox.non_negative, lambda v: -prox.non_negative(-v)),
    ],
    ids=["l1", "ridge", "group_lasso", "non_negative"],
)
def test_moreau_identity(ours, of_the_conjugate):
    v = 2 * np.random.default_rng(0).normal(size=12)
    np.testing.assert_allclose(jax.jit(lambda v: ours(v) + of_the_conjugate(v))(v), v, rtol=1e-14)


@functools.cache
def derivatives(operator):
    def function(v, parameter):
        argnums = 0 if parameter is None else (0, 1)
        second = jax.jacfwd(jax.jacrev(operator))(v, parameter)
        return jax.jacfwd(operator, argnums)(v, parameter), jax.jacrev(operator, argnums)(v, parameter), second

    return jax.jit(function)


NORMAL = np.outer([0.6, 0.8], [0.6, 0.8])
CENTRED = np.full((2, 2), -0.5) + np.eye(2)


@pytest.mark.parametrize(
    ("operator", "v", "parameter", "by_v", "by_parameter"),
    [
        (prox.non_negative, [0.0], None, [[0]], None),
        (prox.box, [-1.0], (-1.0, 2.0), [[0]], ([1], [0])),
        (prox.box, [2.0], (-1.0, 2.0), [[0]], ([0], [1])),
        (prox.box, [0.5], (0.5, 0.5), [[0]], ([0], [1])),
        (prox.box, [0.5], (-np.inf, np.inf), [[1]], ([0], [0])),
        (prox.l1, [0.5, -0.5], 0.5, np.eye(2), [-1, 1]),
        (prox.l1, [0.0], 0.5, [[0]], [0]),
        (prox.l1, [0.0], 0.0, [[1]], [0]),
        (prox.elastic_net, [0.5], (0.5, 2.0), [[0.5]], ([-0.5], [0])),
        (prox.ridge, [0.0], 1.0, [[0.5]], [0]),
        (prox.group_lasso, [0.0, 0.0], 0.5, np.zeros((2, 2)), [0, 0]),
        (prox.group_lasso, [0.0, 0.0], 0.0, np.eye(2), [0, 0]),
        (prox.group_lasso, [3.0, 4.0], 5.0, NORMAL, [-0.6, -0.8]),
        (prox.l2_ball, [0.0, 0.0], 1.0, np.eye(2), [0, 0]),
        (prox.l2_ball, [0.0, 0.0], 0.0, np.zeros((2, 2)), [0, 0]),
        (prox.l2_ball, [3.0, 4.0], 5.0, np.eye(2) - NORMAL, [0.6, 0.8]),
        (prox.l2_ball, [3.0, 4.0], 0.0, np.zeros((2, 2)), [0.6, 0.8]),
        (prox.l2_ball, [3.0, 4.0], np.inf, np.eye(2), [0, 0]),
        (prox.simplex, [1.0, 0.0], 1.0, CENTRED, [0.5, 0.5]),
        (prox.simplex, [0.5, 0.5], 1.0, CENTRED, [0.5, 0.5]),
        (prox.simplex, [2.0, 0.0], 0.0, np.zeros((2, 2)), [1, 0]),
        (prox.simplex, [7.0], 1.0, [[0]], [1]),
        (prox.simplex, [0.0, -np.inf], 1.0, np.zeros((2, 2)), [1, 0]),
    ],
)
def test_derivatives_at_kinks_are_the_documented_ones(operator, v, parameter, by_v, by_parameter):
    v, parameter = jnp.array(v), jax.tree.map(jnp.asarray, parameter)
    columns = [by_v, *(by_parameter if isinstance(by_parameter, tuple) else [by_parameter])]
    *first, second = derivatives(operator)(v, parameter)
    for jacobian in first:
        for ours, exact in zip(jax.tree.leaves(jacobian), columns, strict=False):
            np.testing.assert_allclose(ours, exact, atol=1e-15)
    assert np.all(np.isfinite(second))


def test_the_ball_bends_rightly_next_to_a_leaf_of_zeros():
    """A norm of norms would have the wrong second derivative here."""
    along = jax.jit(jax.hessian(lambda x: prox.l2_ball({"a": x, "b": jnp.array(2.0)}, 1.0)["b"]))(0.0)
    np.testing.assert_allclose(along, -1 / 4, rtol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 100.0])
def test_a_long_simplex_row_sums_to_one(dtype, tolerance, spread):
    v = jnp.asarray(5 + spread * np.random.default_rng(0).normal(size=4096), dtype)
    y = np.asarray(jax.jit(prox.simplex)(v), np.float64)
    assert np.all(y >= 0)
    assert abs(y.sum() - 1) <= tolerance


def test_a_simplex_tie_that_rounds_stays_non_negative():
    v = np.random.default_rng(0).uniform(size=(2000, 3)).astype("float32")
    v[:, 1] = v[:, 0] - 1
    v[:, 2] = v[:, 0] - 1
    y = jax.jit(prox.simplex)(v)
    assert jnp.all(y >= 0)
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_overflow_nor_underflow(scale):
    v = np.array([3 * scale, 4 * scale], "float32")
    for operator in (prox.l2_ball, prox.group_lasso):
        np.testing.assert_allclose(jax.jit(operator)(v, 2.5 * scale), v / 2, rtol=1e-6)


def test_the_ball_is_global_and_leaves_the_inside_alone():
    v = {"a": jnp.array([3.0], "float32"), "b": jnp.array(4.0)}
    y = prox.l2_ball(v, 1.0)
    np.testing.assert_allclose([y["a"][0], y["b"]], [0.6, 0.8], rtol=1e-7)
    inside = prox.l2_ball(v, 5.1)
    assert inside["a"] == v["a"]
    assert inside["b"] == v["b"]


def test_coefficients_broadcast_as_documented():
    v = jnp.ones((2, 3))
    l1 = jax.jit(prox.l1)
    assert l1(v, np.array([0.0, 1.0, 2.0])).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert l1(v, np.array([[0.0], [1.0]])).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert l1(v, 1, step_size=np.array([[0.5], [1.0]])).tolist() == [[0.5] * 3, [0, 0, 0]]
    np.testing.assert_allclose(jax.jit(prox.simplex)(v, np.array([3.0, 6.0])), [[1] * 3, [2] * 3], rtol=1e-15)
    prefix = jax.jit(prox.ridge)({"w": (v, v), "b": v[0]}, {"w": 1.0, "b": 0.0})
    assert prefix["w"][1].tolist() == [[0.5] * 3] * 2
    assert prefix["b"].tolist() == [1.0] * 3
