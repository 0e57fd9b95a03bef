"""One layer of D-LADMM, the untied network made of linearised ADMM steps."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..prox import l1


class DLADMMVariables(NamedTuple):
    """What one layer hands to the next: code z, slack e, multiplier y and violation A z + e - x."""

    z: Float[Array, "n m"]
    e: Float[Array, "n p"]
    y: Float[Array, "n p"]
    violation: Float[Array, "n p"]


class DLADMMLayer(nn.Module):
    r"""One layer of D-LADMM: a linearised ADMM step whose transpose, penalties and thresholds are free.

    For :math:`\min |z|_1 + |e|_1` subject to :math:`A z + e = x`, with
    :math:`S_t(v) = \operatorname{sign}(v) \max(|v| - t, 0)`,

    .. math::
        z^+ &= S_{t}(z - W (y + \beta_1 \odot p)) \\
        e^+ &= S_{s}(x - A z^+ - \beta_2 \odot y) \\
        p^+ &= A z^+ + e^+ - x \\
        y^+ &= y + \beta_1 \odot p^+

    When: the learned baseline of sparse coding. Stack the parameters of K layers along a leading axis, for instance
    with ``jax.vmap(layer.init, ...)``, and run them with ``odljax.layered``. W is free, so the layers are no operator
    in any metric, and there is nothing beyond the last one.

    Shapes: z (n, m), the others (n, p); A is (p, m) and W is stored as (p, m), the transpose of the paper's.

    Args:
        kernel_init: of W, called as ``kernel_init(key, shape, dtype)``.
        penalty: beta_1 and 1 / beta_2 at the start.
        code_threshold: t at the start.
        slack_threshold: s at the start.

    With W = A / r, the penalty beta, t = kappa / r and s = 1 / beta the layer starts as a step of
    ``odljax.operators.linearized_admm``.

    The layer is called with the variables, A, x, and ``weights``, by which s is multiplied.

    Cost: two products with p x m matrices.

    Source: Xie, Wu, Liu, Zhong and Lin (2019), differentiable linearised ADMM.
    Differs: the thresholds are learned too, one for each entry.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from odljax.networks import DLADMMLayer, DLADMMVariables
        >>> A, x, z = jnp.eye(2, 3), jnp.ones((1, 2)), jnp.zeros((1, 3))
        >>> u = DLADMMVariables(z, jnp.zeros_like(x), jnp.zeros_like(x), -x)
        >>> layer = DLADMMLayer(kernel_init=lambda key, shape, dtype: A)
        >>> u = layer.apply(layer.init(jax.random.key(0), u, A, x), u, A, x)
        >>> [round(float(entry), 3) for entry in u.z[0]]
        [0.975, 0.975, 0.0]
    """

    kernel_init: nn.initializers.Initializer
    penalty: float = 1.0
    code_threshold: float = 0.025
    slack_threshold: float = 0.06

    @nn.compact
    def __call__(
        self,
        u: DLADMMVariables,
        dictionary: Float[Array, "p m"],
        x: Float[Array, "n p"],
        weights: Float[Array, "n p"] | None = None,
    ) -> DLADMMVariables:
        (p, m), dtype = dictionary.shape, dictionary.dtype
        constant = nn.initializers.constant
        W = self.param("W", self.kernel_init, (p, m), dtype)
        beta_1 = self.param("beta_1", constant(self.penalty), (p,), dtype)[None]
        beta_2 = self.param("beta_2", constant(1 / self.penalty), (p,), dtype)[None]
        t = jnp.abs(self.param("code_threshold", constant(self.code_threshold), (m,), dtype))
        s = jnp.abs(self.param("slack_threshold", constant(self.slack_threshold), (p,), dtype))[None]
        z = l1(u.z - (u.y + beta_1 * u.violation) @ W, t)
        rest = x - z @ dictionary.T
        e = l1(rest - beta_2 * u.y, s if weights is None else s * weights)
        violation = e - rest
        return type(u)(z, e, u.y + beta_1 * violation, violation)
