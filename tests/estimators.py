"""The rows of the estimators' conformance suite: a newcomer adds one line here and is tested against everything."""

from typing import Any, NamedTuple

import odljax as odl

h = odl.hypergradients


class Row(NamedTuple):
    """One estimator on ``odl.problems.finite_sum``.

    build: ``(inner, outer, step_size, **options) -> Hypergradient``; stochastic ones take ``batch_size`` and ``key``.
    tolerance: of theta after ``num_updates`` full-batch updates of SGD at ``rate``, against the closed-form minimiser.
    """

    build: Any
    stochastic: bool = False
    rate: float = 0.05
    num_updates: int = 600
    tolerance: float = 1e-9


ESTIMATORS = {
    "soba": Row(lambda f, F, a, **o: h.soba(f, F, step_size=a, **o), stochastic=True),
}

# Estimators of solvers: their conformance is the derivative matrix of test_hypergradients.
OF_SOLVERS = {"through", "warm_started", "hodl"}
