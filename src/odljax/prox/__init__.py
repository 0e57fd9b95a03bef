"""Proximal operators and projections: `prox(v, parameter, step_size=1.0)` returns

    argmin over x of  step_size * h(x; parameter) + |x - v|^2 / 2.

All work on any tree of floating-point arrays and keep its structure, shapes and dtypes; a leaf is computed in float32
at least. What fixes the program (k, groups) sits in the parameter as Python or NumPy values and is refused if traced.
Every derivative (in v, parameter and step size, of any order, forward or reverse) is plain autodiff of the formula, or
of the equation that the result solves; `nuclear` and `psd_cone` can be differentiated at most twice. An operator whose
h is not convex says so, returns a global minimiser, and names the one it returns where there are several. At a kink it
is one fixed element of the generalised Jacobian, always finite and named in the docstring: thresholds give that of the
shrinking side, projections that of the boundary (the simplex: of the larger support), the sides that stay right when
the threshold or the set shrinks to nothing. A NaN in v or in a parameter comes out as NaN; so does a row whose inner
method failed, derivative and all. A negative parameter is refused where its value is known, and NaN where it is traced.
Complex v, as pairs of real numbers, are for the operators whose docstring says so.

To add an operator: write its rule in a private file, name it here, and give it a row in the tests' registry.
"""

from ._affine import affine_set, halfspace, hyperplane, polyhedron, span
from ._balls import hypercube, l1_ball, l1_sphere, l2_ball, l2_sphere, linf_ball
from ._calculus import conjugate, from_projection, moreau_envelope, scale, separable, translate
from ._cones import exponential_cone, psd_cone, second_order_cone
from ._entropy import entropy, kullback_leibler
from ._groups import group_lasso, overlapping_group_lasso
from ._isotonic import isotonic
from ._nonconvex import l0, lq, mcp, scad, top_k
from ._norms import k_largest, linf, nuclear, slope
from ._separable import (
    box,
    elastic_net,
    huber,
    identity,
    l1,
    log_barrier,
    non_negative,
    non_negative_l1,
    non_negative_ridge,
    ridge,
)
from ._simplex import box_section, simplex, sparse_simplex
from ._total_variation import total_variation_1d, total_variation_2d
from ._transport import birkhoff, kl_birkhoff, kl_transport, transport

__all__ = [
    "affine_set",
    "birkhoff",
    "box",
    "box_section",
    "conjugate",
    "elastic_net",
    "entropy",
    "exponential_cone",
    "from_projection",
    "group_lasso",
    "halfspace",
    "huber",
    "hypercube",
    "hyperplane",
    "identity",
    "isotonic",
    "k_largest",
    "kl_birkhoff",
    "kl_transport",
    "kullback_leibler",
    "l0",
    "l1",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf",
    "linf_ball",
    "log_barrier",
    "lq",
    "mcp",
    "moreau_envelope",
    "non_negative",
    "non_negative_l1",
    "non_negative_ridge",
    "nuclear",
    "overlapping_group_lasso",
    "polyhedron",
    "psd_cone",
    "ridge",
    "scad",
    "scale",
    "second_order_cone",
    "separable",
    "simplex",
    "slope",
    "span",
    "sparse_simplex",
    "top_k",
    "total_variation_1d",
    "total_variation_2d",
    "translate",
    "transport",
]
