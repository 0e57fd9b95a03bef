"""Flax modules made for solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax.networks import DLADMMLayer, DLADMMVariables, PixelWeights, neighbourhoods
from odljax.operators import ADMMVariables


def test_neighbourhoods_are_what_a_loop_collects():
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    columns = neighbourhoods(jnp.asarray(x))
    for i in range(4):
        for j in range(5):
            np.testing.assert_array_equal(columns[:, i, j], padded[:, i : i + 5, j : j + 5].reshape(2, -1))


@pytest.mark.parametrize(
    ("size", "needed"), [(0, "a whole number of at least 1"), (True, "a whole number of at least 1"), (4, "odd")]
)
def test_neighbourhoods_need_an_odd_size(size, needed):
    with pytest.raises(ValueError, match=f"neighbourhoods: size must be {needed}; {size} came"):
        neighbourhoods(jnp.zeros((1, 3, 3, 1)), size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e6])
def test_pixel_weights_stay_positive_and_bounded_for_any_parameters(dtype, size):
    network = PixelWeights(hidden=4)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 6, 6, 2)), dtype)
    marked = jnp.asarray(rng.integers(0, 2, (3, 6, 6)), dtype)
    variables = network.init(jax.random.key(0), neighbourhoods(x), marked)
    variables = jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), dtype), variables)
    weights = network.apply(variables, neighbourhoods(x), marked)
    assert weights.shape == marked.shape
    assert weights.dtype == dtype
    assert float(weights.min()) >= np.exp(-12) * (1 - 1e-6)
    assert float(weights.max()) <= np.exp(3) * (1 + 1e-6)


def test_pixel_weights_start_low_where_pixels_are_marked():
    network = PixelWeights(hidden=4, offset=0.5, discount=4.0)
    columns, marked = jnp.zeros((1, 2, 3)), jnp.array([[0.0, 1.0]])
    weights = network.apply(network.init(jax.random.key(0), columns, marked), columns, marked)
    np.testing.assert_allclose(weights, np.exp([[0.5, -3.5]]), rtol=1e-12)


def problem():
    rng = np.random.default_rng(2)
    A = jnp.asarray(rng.normal(size=(4, 7)))
    parts = [jnp.asarray(rng.normal(size=(3, n))) for n in (7, 4, 4)]
    return A, jnp.asarray(rng.normal(size=(3, 4))), ADMMVariables(*parts)


def test_a_dladmm_layer_starts_as_a_step_of_linearised_admm():
    A, x, u = problem()
    beta, kappa, r = 0.7, 0.1, 20.0
    layer = DLADMMLayer(lambda key, shape, dtype: A / r, beta, kappa / r, 1 / beta)
    step = odl.operators.linearized_admm(
        lambda z, theta: z @ A.T,
        lambda v, theta, step_size: odl.prox.l1(v, kappa, step_size),
        lambda v, theta, step_size: odl.prox.l1(v, 1.0, step_size),
        x,
        penalty=beta,
        proximal_weight=r,
    )
    v = DLADMMVariables(*u, u.z @ A.T + u.e - x)
    variables = layer.init(jax.random.key(0), v, A, x)
    came, wanted = layer.apply(variables, v, A, x), step(u, None)
    for name in ("z", "e", "y"):
        np.testing.assert_allclose(getattr(came, name), getattr(wanted, name), rtol=0, atol=1e-12)
    np.testing.assert_allclose(came.violation, came.z @ A.T + came.e - x, rtol=0, atol=1e-12)


def test_dladmm_weights_scale_the_slack_threshold():
    A, x, u = problem()
    layer = DLADMMLayer(lambda key, shape, dtype: A, slack_threshold=0.5)
    v = DLADMMVariables(*u, u.z @ A.T + u.e - x)
    variables = layer.init(jax.random.key(0), v, A, x)
    double = DLADMMLayer(lambda key, shape, dtype: A, slack_threshold=1.0)
    came = layer.apply(variables, v, A, x, jnp.full_like(x, 2.0))
    wanted = double.apply(double.init(jax.random.key(0), v, A, x), v, A, x)
    np.testing.assert_allclose(came.e, wanted.e, rtol=0, atol=1e-12)
