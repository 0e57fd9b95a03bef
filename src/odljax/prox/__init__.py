"""Proximal operators and projections: `prox(v, parameter, step_size=1.0)` returns

    argmin over x of  step_size * h(x; parameter) + |x - v|^2 / 2.

All work on any tree of floating-point arrays and keep its structure, shapes and dtypes; a leaf is computed in float32
at least. Every derivative (in v, parameter and step size, of any order, forward or reverse) is plain autodiff of the
formula. At a kink it is one fixed element of the generalised Jacobian, always finite and named in the docstring:
thresholds give that of the shrinking side, projections that of the boundary (the simplex: of the larger support), the
sides that stay right when the threshold or the set shrinks to nothing. A NaN in v or in a parameter comes out as NaN.

To add an operator: write its rule in a private file, name it here, and give it a row in the tests' registry.
"""

from ._balls import l2_ball
from ._groups import group_lasso
from ._separable import box, elastic_net, identity, l1, non_negative, ridge
from ._simplex import simplex

__all__ = [
    "box",
    "elastic_net",
    "group_lasso",
    "identity",
    "l1",
    "l2_ball",
    "non_negative",
    "ridge",
    "simplex",
]
