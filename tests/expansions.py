"""How operators stretch: random pairs, matrices of linear maps, Picard iterates."""

import jax
import jax.numpy as jnp
import numpy as np


def picard(operator, x, theta, num_steps, relaxation=1.0):
    """The last iterate, as NumPy arrays."""

    def body(_, x):
        return jax.tree.map(lambda a, b: a + relaxation * (b - a), x, operator(x, theta))

    return jax.tree.map(np.asarray, jax.jit(lambda x, theta: jax.lax.fori_loop(0, num_steps, body, x))(x, theta))


def as_matrix(linear, like):
    """The matrix of a linear map of pytrees, by columns."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    return np.asarray(
        jax.jit(jax.vmap(lambda v: jax.flatten_util.ravel_pytree(linear(unravel(v)))[0], out_axes=1))(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
    )


def pairs(operator, like, theta, count=200, spread=3.0):
    """``T a - T b`` and ``a - b`` of random pairs, as rows."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    points = spread * np.random.default_rng(7).standard_normal((2 * count, flat.size))

    def apply(v):
        return jax.flatten_util.ravel_pytree(operator(unravel(v), theta))[0]

    images = np.asarray(jax.jit(jax.vmap(apply))(jnp.asarray(points)))
    return images[::2] - images[1::2], points[::2] - points[1::2]


def squares(rows, metric=None):
    """``|v|^2`` of each row, in a metric."""
    return np.sum(rows * (rows if metric is None else rows @ metric.T), axis=1)
