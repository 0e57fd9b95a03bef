"""The words of each refusal: who needs what; what came; what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odljax import prox

V = {"w": np.ones((2, 3)), "b": np.ones(3)}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: prox.l1(jnp.arange(3), 0.1),
            TypeError,
            r"needs real or complex floating-point leaves in v; v is int64\[3\]; conv",
        ),
        (lambda: prox.simplex({"w": [jnp.ones(2, complex)]}), TypeError, r"v\['w'\]\[0\] is complex128\[2\]"),
        (lambda: prox.identity(3), TypeError, r"v is int64\[\]"),
        (lambda: prox.l1(V, -0.1), ValueError, r"prox.l1 needs lam\['b'\] >= 0; it is -0.1; .*: pass >= 0"),
        (lambda: prox.l1(V, 0.1, -1), ValueError, r"needs step_size\['b'\] >= 0; it is -1"),
        (lambda: prox.ridge(V, np.array(-2.0)), ValueError, r"prox.ridge needs lam\['b'\] >= 0"),
        (lambda: prox.elastic_net(jnp.ones(3), (0.1, -0.2)), ValueError, "needs gamma >= 0; it is -0.2"),
        (lambda: prox.elastic_net(jnp.ones(3), 0.1), ValueError, r"parameter = \(lam, gamma\); it is float64\[\]"),
        (lambda: prox.l2_ball(V, -1.0), ValueError, "prox.l2_ball needs the radius >= 0; it is -1.0"),
        (
            lambda: prox.l2_ball(V, jnp.ones(2)),
            ValueError,
            r"the radius that broadcasts to shape \(\); it is float64\[2\]",
        ),
        (lambda: prox.simplex(V, -1.0), ValueError, r"prox.simplex needs scale\['b'\] >= 0"),
        (lambda: prox.simplex(jnp.ones((2, 0))), ValueError, r"needs rows of at least one entry; v has shape \(2, 0\)"),
        (
            lambda: prox.simplex(V["w"], jnp.ones(3)),
            ValueError,
            r"scale that broadcasts to shape \(2,\); it is float64\[3\]",
        ),
        (lambda: prox.group_lasso(V["b"], jnp.ones(3)), ValueError, r"lam that broadcasts to shape \(\)"),
        (lambda: prox.l1(V["b"], V["w"]), ValueError, r"lam that broadcasts to shape \(3,\); it is float64\[2, 3\]"),
        (
            lambda: prox.l1(V["b"], jnp.ones(3, complex)),
            TypeError,
            r"real number or array for lam; it is complex128\[3\]",
        ),
        (lambda: prox.l1(V, {"w": 0.1}), ValueError, r"lam has structure PyTreeDef\(\{'w': \*\}\) and v has"),
        (
            lambda: prox.l1(V["b"], [0.1, 0.2, 0.3]),
            ValueError,
            "needs lam to be a scalar, an array or a tree prefix of v",
        ),
        (lambda: prox.box(V, 1.0), ValueError, r"prox.box needs parameter = \(lower, upper\); it is float64\[\]"),
        (lambda: prox.box(V, (0.0, 1.0, 2.0)), ValueError, "it is a tuple of length 3"),
        (lambda: prox.box(V, None), ValueError, "it is a NoneType"),
        (lambda: prox.box(V, ({"w": 0.0}, 1.0)), ValueError, r"needs lower to be .*; give lower the structure of v"),
        (lambda: prox.box(V, (None, 1.0)), ValueError, "needs lower to be a scalar"),
        (lambda: prox.box(V, (2.0, 1.0)), ValueError, "needs lower <= upper; they are 2.0 and 1.0; exchange them"),
        (lambda: prox.box(V, (0.0, {"w": 1.0, "b": -1.0})), ValueError, "they are 0.0 and -1.0"),
        (lambda: prox.top_k(V["b"], 0), ValueError, "prox.top_k: k must be a whole number of at least 1; 0 came"),
        (lambda: jax.jit(prox.top_k)(V["b"], 2), TypeError, "prox.top_k: k fixes the program and must be a Python int"),
        (
            lambda: prox.k_largest(V["b"], 1.0),
            ValueError,
            r"prox.k_largest needs parameter = \(lam, k\); it is float64",
        ),
        (lambda: prox.huber(V, 1.0), ValueError, r"needs parameter = \(lam, delta\); it is float64\[\]"),
        (lambda: prox.nuclear(V["w"], jnp.ones(2)), ValueError, r"needs lam that broadcasts to shape \(\)"),
        (lambda: prox.slope(V["b"], jnp.ones(2)), ValueError, r"needs weights that broadcasts to shape \(3,\)"),
        (
            lambda: prox.overlapping_group_lasso(V["b"], (1.0, [[0, 3]])),
            ValueError,
            "indices below the length of the rows; v has 3 entries a row and a group holds 3",
        ),
        (
            lambda: prox.overlapping_group_lasso(V["b"], (1.0, [[0, 0]])),
            ValueError,
            r"distinct indices .* \[0, 0\] came",
        ),
        (
            lambda: prox.overlapping_group_lasso(V["b"], (1.0, [np.array([0.5])])),
            TypeError,
            "groups of integers that are known",
        ),
        (lambda: prox.box(V["b"], (np.zeros(2), np.ones(3))), ValueError, r"lower that broadcasts to shape \(3,\)"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
    with pytest.raises(error, match=words):
        jax.jit(call)()


def test_a_traced_coefficient_is_not_refused():
    assert np.all(np.isnan(jax.jit(prox.l1)(jnp.ones(2), -1.0)))
