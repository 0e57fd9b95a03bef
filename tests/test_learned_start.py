"""Learned initialisation: the gradient goes through the start, and is refused where it would not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl

through, hodl = odl.hypergradients.through, odl.hypergradients.hodl
LINE = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
OUTER = lambda x, theta: 0.5 * x**2


def start(theta):
    return theta**3


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_gradient_goes_through_the_start(dtype):
    """x_K = q x_0 + 2 (1 - q) theta with q = 2^-K, in closed form."""
    theta, q = jnp.asarray(0.7, dtype), 0.5**4
    x, slope = q * 0.7**3 + 2 * (1 - q) * 0.7, 3 * q * 0.7**2 + 2 * (1 - q)
    for solver in (odl.for_steps(LINE, 4), odl.unrolled(odl.for_steps(LINE, 4), checkpoint_every=2)):
        hyper = through(solver, OUTER, start=start)
        state = hyper.init(theta, None)
        gradient, state, info = jax.jit(hyper.update)(theta, state)
        tolerance = 1e-9 if dtype == jnp.float64 else 1e-5
        np.testing.assert_allclose((gradient, info.value), (x * slope, 0.5 * x**2), rtol=tolerance)
        assert gradient.dtype == dtype
        assert state.x is None


def test_hodl_from_a_learned_start():
    """Against differentiation of the loop written out."""
    hyper = hodl(LINE, OUTER, num_steps=3, step_size=0.2, start=start)

    def written_out(theta):
        x = start(theta)
        for _ in range(3):
            x = 0.5 * (x - 0.2 * x) + 0.5 * (x + 0.5 * (0.5 * x + theta - x))
        return OUTER(x, theta)

    theta = jnp.asarray(0.7)
    gradient, state, _ = jax.jit(hyper.update)(theta, hyper.init(theta, None))
    np.testing.assert_allclose(gradient, jax.grad(written_out)(theta), rtol=1e-12)
    assert state.x is None


@pytest.mark.parametrize("derivative", ["implicit", "one_step", "truncated"])
def test_refused_where_the_start_does_not_matter(derivative):
    transform = {"truncated": lambda s: odl.truncated(s, num_steps=2)}.get(derivative) or getattr(odl, derivative)
    with pytest.raises(ValueError, match=rf"through: a learned start needs .* and {derivative}\(.*Use unrolled"):
        through(transform(odl.for_steps(LINE, 4)), OUTER, start=start)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"hodl: warm_start begins at the last solution, .* Drop one"):
        hodl(LINE, OUTER, num_steps=2, warm_start=True, start=start)
    for make in (
        lambda s: through(odl.for_steps(LINE, 2), OUTER, start=s),
        lambda s: hodl(LINE, OUTER, num_steps=2, start=s),
    ):
        with pytest.raises(TypeError, match=r"start must be a function of \(theta\)"):
            make(lambda: 1.0)
        hyper = make(lambda theta: 1)
        with pytest.raises(
            TypeError, match=r"start\(theta\) must be real or complex floating point; leaf \(itself\) is int"
        ):
            hyper.update(1.0, hyper.init(1.0, None))
