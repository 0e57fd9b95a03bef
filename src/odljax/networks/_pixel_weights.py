"""A network that says how far each pixel of an observation is to be trusted."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .. import _checks

_LOWEST, _HIGHEST = -12.0, 3.0


def neighbourhoods(x: Float[Array, "n h w c"], size: int = 5) -> Float[Array, "n h w d"]:
    """Returns what each pixel and its neighbours hold, side by side, with the border repeated.

    When: a convolution reads data, not parameters. As a product with these columns it has a cheap gradient: none goes
    into the data.

    Shapes: d = size * size * c.

    Args:
        x: images with their channels last.
        size: of the square neighbourhood, odd.

    Raises:
        ValueError: an even size, or one below 1.

    Cost: size * size copies of x.

    Example:
        >>> import jax.numpy as jnp
        >>> from odljax.networks import neighbourhoods
        >>> neighbourhoods(jnp.arange(4.0).reshape(1, 1, 4, 1), size=3)[0, 0, 0].tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    """
    if _checks.count("neighbourhoods", "size", size) % 2 == 0:
        raise ValueError(f"neighbourhoods: size must be odd; {size} came. Then each pixel is in the middle of its own.")
    half = size // 2
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)), mode="edge")
    shifts = [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1)


class PixelWeights(nn.Module):
    r"""A network whose positive output weights the absolute error of each pixel.

    .. math:: c_i = \exp(\operatorname{clip}(v^\top \max(W h_i + b, 0) + c - d m_i, -12, 3))

    with the neighbourhood h of pixel i and a mark m in {0, 1}, such as "this pixel is pure black or white".

    When: the weights of :math:`\sum_i c_i |e_i|` inside an operator. They depend on the observation and never on the
    inner variable, so the inner problem stays convex and an operator that is non-expansive stays so.

    Shapes: ``module.apply(variables, neighbourhoods (..., d), marked (...))`` returns weights (...).

    Args:
        hidden: width of the hidden layer.
        offset: c at the start.
        discount: d at the start: marked pixels begin exp(-d) times as heavy.

    Cost: one product with a d x hidden matrix a pixel; none of it inside the inner iteration if applied once before it.

    Source: this library.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from odljax.networks import PixelWeights, neighbourhoods
        >>> x = jnp.zeros((1, 4, 4, 1))
        >>> network = PixelWeights(hidden=2)
        >>> variables = network.init(jax.random.key(0), neighbourhoods(x), x[..., 0])
        >>> network.apply(variables, neighbourhoods(x), x[..., 0]).shape
        (1, 4, 4)
    """

    hidden: int = 8
    offset: float = 0.5
    discount: float = 4.0

    @nn.compact
    def __call__(self, neighbourhoods: Float[Array, "*n d"], marked: Float[Array, "*n"]) -> Float[Array, "*n"]:
        dtype = marked.dtype
        hidden = nn.Dense(self.hidden, kernel_init=nn.initializers.normal(0.1), param_dtype=dtype)(neighbourhoods)
        last = nn.Dense(
            1,
            kernel_init=nn.initializers.normal(0.05),
            bias_init=nn.initializers.constant(self.offset),
            param_dtype=dtype,
        )
        discount = self.param("discount", nn.initializers.constant(self.discount), (), dtype)
        logarithm = last(nn.relu(hidden))[..., 0] - discount * marked
        return jax.numpy.exp(jnp.clip(logarithm, _LOWEST, _HIGHEST))
