"""The rows of the estimators' conformance suite: a newcomer adds one line here and is tested against everything."""

from typing import Any, NamedTuple

import ends
import jax
import jax.numpy as jnp

import odljax as odl

h = odl.hypergradients


class Row(NamedTuple):
    """One estimator on ``odl.problems.finite_sum``.

    build: ``(inner, outer, step_size, **options) -> Hypergradient``; stochastic ones take ``batch_size`` and ``key``.
    tolerance: of theta after ``num_updates`` full-batch updates of SGD at ``rate``, against the closed-form minimiser.
    end: ``problem -> theta``, where a biased one ends instead; None: at the minimiser.
    problem: the problem of that descent; None: the common one.
    tasks: the rows of the data are tasks, and ``info.x`` has them as leading axis.
    """

    build: Any
    stochastic: bool = False
    rate: float = 0.05
    num_updates: int = 600
    tolerance: float = 1e-9
    end: Any = None
    problem: Any = None
    tasks: bool = False


def _task(loss):
    """The loss of one row."""
    if not callable(loss):
        return loss
    return lambda x, theta, row: loss(x, theta, jax.tree.map(lambda leaf: leaf[None], row))


def _of_tasks(name, num_steps, **options):
    """A meta-learning estimator: each row is a task, which starts from the entries of theta and the first again."""
    start = lambda theta: jnp.concatenate([theta, theta[:1]])
    build = lambda f, F, a: getattr(h, name)(
        _task(f), _task(F), step_size=a, num_steps=num_steps, start=start, **options
    )
    return Row(build, num_updates=300, rate=0.3, end=lambda p: ends.meta(p, name, num_steps), tasks=True)


def _randomly_cut(name, **options):
    """The mean of the series is that of three terms; its random length makes noise without minibatches too."""
    build = lambda f, F, a, **o: getattr(h, name)(f, F, step_size=a, num_terms=3, **options, **o)
    return Row(build, stochastic=True, rate=0.02, tolerance=0.2, end=lambda p: ends.neumann(p, 3))


ESTIMATORS = {
    "alternating": Row(
        lambda f, F, a: h.alternating(f, F, step_size=a), rate=0.2, num_updates=300, end=ends.alternating
    ),
    "anil": _of_tasks("anil", 2),
    "bamm": Row(lambda f, F, a: h.bamm(f, F, step_size=a, weight=lambda k: 0.5 * 0.95 ** k.astype(float))),
    "bda": Row(
        lambda f, F, a: h.bda(f, F, step_size=a, num_steps=35, weight=lambda k: 0.5 ** (k.astype(float) + 1)),
        num_updates=120,
        rate=0.3,
    ),
    "bome": Row(
        lambda f, F, a: h.bome(f, F, step_size=a / 25, inner_step_size=a), rate=0.02, num_updates=1000, tolerance=0.02
    ),
    "bvfsm": Row(lambda f, F, a: h.bvfsm(f, F, step_size=a, num_steps=20, num_barrier_steps=5), tolerance=0.1),
    "finite_difference": Row(
        lambda f, F, a: h.finite_difference(f, F, step_size=a), rate=0.2, end=ends.finite_difference
    ),
    "fomaml": _of_tasks("fomaml", 2),
    "gap_function": Row(
        lambda f, F, a: h.gap_function(f, F, step_size=a, penalty=5.0), rate=0.2, end=lambda p: ends.envelope(p, 5.0)
    ),
    "imaml": _of_tasks("imaml", 40, penalty=1.0),
    "maml": _of_tasks("maml", 2),
    "meha": Row(lambda f, F, a: h.meha(f, F, step_size=a, penalty=5.0), rate=0.2, end=lambda p: ends.envelope(p, 5.0)),
    "pbgd": Row(
        lambda f, F, a: h.pbgd(f, F, step_size=a, penalty=5.0, warm_start=True), end=lambda p: ends.value_gap(p, 5.0)
    ),
    "rank_one": Row(
        lambda f, F, a: h.rank_one(f, F, step_size=a), num_updates=150, rate=0.2, problem=odl.problems.finite_sum(24, 1)
    ),
    "reptile": _of_tasks("reptile", 2),
    "reversible": Row(  # its steps are few here, because the suite runs them uncompiled, too
        lambda f, F, a: h.reversible(f, F, step_size=a, momentum=0.3, num_steps=12),
        rate=0.3,
        num_updates=150,
        tolerance=2e-4,
    ),
    "soba": Row(lambda f, F, a, **o: h.soba(f, F, step_size=a, **o), stochastic=True),
    "saba": Row(lambda f, F, a, **o: h.saba(f, F, step_size=a, **o), stochastic=True),
    "srba": Row(lambda f, F, a, **o: h.srba(f, F, step_size=a, **o), stochastic=True),
    "fsla": Row(lambda f, F, a, **o: h.fsla(f, F, step_size=a, **o), stochastic=True),
    "amigo": Row(
        lambda f, F, a, **o: h.amigo(f, F, step_size=a, num_steps=2, num_adjoint_steps=3, **o), stochastic=True
    ),
    "stocbio": Row(
        lambda f, F, a, **o: h.stocbio(f, F, step_size=a, num_steps=2, num_adjoint_steps=3, **o),
        stochastic=True,
        end=lambda p: ends.neumann(p, 4),
    ),
    "bsa": _randomly_cut("bsa", num_steps=2),
    "ttsa": _randomly_cut("ttsa"),
    "sustain": _randomly_cut("sustain"),
    "mrbo": Row(
        lambda f, F, a, **o: h.mrbo(f, F, step_size=a, num_adjoint_steps=3, **o),
        stochastic=True,
        end=lambda p: ends.neumann(p, 4),
    ),
    "vrbo": Row(
        lambda f, F, a, **o: h.vrbo(f, F, step_size=a, num_steps=2, num_adjoint_steps=3, **o),
        stochastic=True,
        end=lambda p: ends.neumann(p, 4),
    ),
    "f2sa": Row(
        lambda f, F, a, **o: h.f2sa(f, F, step_size=a, num_steps=3, penalty=5.0, penalty_increment=0.0, **o),
        stochastic=True,
        end=lambda p: ends.value_gap(p, 5.0),
    ),
    "pzobo": Row(  # noisy in any case: the floor is the subject of test_stochastic
        lambda f, F, a, **o: h.pzobo(f, F, step_size=a, num_steps=5, **o), stochastic=True, rate=0.02, tolerance=0.2
    ),
}

# Estimators of solvers: their conformance is the derivative matrix of test_hypergradients.
OF_SOLVERS = {"through", "warm_started", "hodl", "hoag", "pessimistic"}

# What the face offers beside estimators.
HELPERS = {"bamm_rate", "descend"}
