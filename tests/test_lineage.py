"""The literature's test problems: their answers by brute force, who reaches them, and who, as theory says, does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax import hypergradients as h
from odljax.problems import LINEAGE, lineage_bamm, lineage_iaptt, lineage_l1, lineage_pbgd, lineage_sine, p_c

PI = np.pi
number = lambda k: k.astype(float) + 1


def descend(hyper, problem, rate, num_updates, theta=None, x0=None):
    """Projected SGD on theta, a scan: ``(theta, last infos)``; rate is a number or a schedule."""
    theta = problem.theta if theta is None else theta

    def body(carry, k):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state)
        size = rate(k) if callable(rate) else rate
        theta = problem.project(jax.tree.map(lambda leaf, g: leaf - size * g, theta, gradient))
        return (theta, state), (info.x, info.status)

    start = (theta, hyper.init(theta, problem.x0 if x0 is None else x0, allow_unused=True))
    (theta, _), (xs, status) = jax.lax.scan(body, start, jnp.arange(num_updates))
    return theta, xs[-1], status.max()


def ends(hyper, problem, rate, num_updates, **starts):
    theta, x, status = jax.jit(lambda: descend(hyper, problem, rate, num_updates, **starts))()
    assert int(status) <= odl.Status.COMPLETED
    return np.asarray(theta), np.asarray(x)


def ends_from(hyper, problem, rate, num_updates, thetas):
    """From many starts at once, x where the inner solution is."""
    run = lambda theta: descend(hyper, problem, rate, num_updates, theta, problem.solution(theta))[0]
    return np.asarray(jax.jit(jax.vmap(run))(thetas))


def implicit(problem, step_size, max_steps=200):
    walk = odl.gradient_descent(problem.inner, step_size=step_size)
    return h.warm_started(odl.implicit(odl.until_converged(walk, tol=1e-9, max_steps=max_steps)), problem.outer)


# ---- the answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "thetas", "xs"),
    [
        (lineage_pbgd(), np.linspace(0, 3, 601), np.linspace(-5, 2, 7001)),
        (lineage_sine(), np.linspace(-2, 5, 701), np.linspace(-12, 12, 24001)),
        (lineage_iaptt(), np.linspace(1, 10, 901), np.linspace(-2, 2, 20001)),
        (lineage_bamm(), np.linspace(-1, 2, 301), np.linspace(-2, 3, 5001)),
    ],
    ids=["pbgd", "sine", "iaptt", "bamm"],
)
def test_the_answer_by_brute_force(problem, thetas, xs):
    """Optimistic bilevel minimisation on a grid, with nothing but the two losses."""
    shape = problem.x0.shape
    losses = lambda loss: jax.vmap(
        lambda t: jax.vmap(lambda x: loss(jnp.full(shape, x), jnp.full(problem.theta.shape, t)))(xs)
    )
    f, F = (np.asarray(jax.jit(losses(loss))(jnp.asarray(thetas))) for loss in (problem.inner, problem.outer))
    spacing = xs[1] - xs[0]
    # Grid points around a minimum lie above it by up to L/2 spacing^2; L <= 100 for theta <= 10.
    among = f <= f.min(1, keepdims=True) + 50 * spacing**2
    best = np.where(among, F, np.inf).min(1)
    where = thetas[best.argmin()]
    assert where == pytest.approx(float(problem.minimiser.ravel()[0]), abs=0.02)
    # The closed form is an inner minimiser, and the best for F.
    x = jax.vmap(problem.solution)(jnp.asarray(thetas).reshape(-1, *problem.theta.shape))
    mine = jax.vmap(problem.inner)(x, jnp.asarray(thetas).reshape(-1, *problem.theta.shape))
    assert float(np.abs(mine - f.min(1)).max()) <= 50 * spacing**2
    value = np.asarray(jax.vmap(problem.value)(jnp.asarray(thetas).reshape(-1, *problem.theta.shape)))
    # The grid's slack only lowers its best: nowhere above the value, and below it by 1 % of its range at most.
    assert np.all(best < value + 1e-9)
    assert np.all(value - best < 0.01 * np.ptp(best))


def test_the_answer_of_the_nonsmooth_problem():
    """Coordinates do not meet: two of them on a grid."""
    problem = lineage_l1(2)
    t = jnp.linspace(0, 1, 201)
    value = jax.vmap(lambda u: jax.vmap(lambda v: problem.value(jnp.stack([u, v])))(t))(t)
    i, j = np.unravel_index(np.asarray(value).argmin(), value.shape)
    assert (float(t[i]), float(t[j])) == pytest.approx((0.5, 0.0))
    assert float(value.min()) == pytest.approx(-0.5) == float(problem.value(problem.minimiser))
    x = np.linspace(-1, 1, 4001)
    for theta in (0.0, 0.2, 0.7):
        by_hand = [x[(0.5 * (x - a) ** 2 + theta * np.abs(x)).argmin()] for a in (0.5, -0.5)]
        np.testing.assert_allclose(problem.solution(jnp.full(2, theta)), by_hand, atol=1e-3)
    with pytest.raises(ValueError, match="size must be even"):
        lineage_l1(3)


def test_every_problem_is_what_it_says():
    for name, build in LINEAGE.items():
        problem = build(dtype=jnp.float32)
        assert problem.name == name
        dtypes = {
            leaf.dtype for leaf in (problem.theta, problem.x0, problem.minimiser, problem.solution(problem.theta))
        }
        assert dtypes == {jnp.dtype("float32")}
        assert problem.solution(problem.theta).shape == problem.x0.shape
        assert problem.value(problem.minimiser) <= problem.value(problem.theta)


# ---- BAMM's strongly convex problem: everyone who is right agrees ----------------------------------------------------

grow = lambda k: jnp.minimum(number(k), 200.0)
shrink = lambda k: 0.1 / jnp.sqrt(number(k))
AGREE = {
    "implicit": (lambda f, F: implicit(lineage_bamm(), 0.5), 0.1, 200, 1e-6),
    "soba": (lambda f, F: h.soba(f, F, step_size=0.5), 0.1, 400, 1e-6),
    "bamm": (lambda f, F: h.bamm(f, F, step_size=0.5, weight=lambda k: 0.9 / number(k)), 0.1, 2000, 2e-3),
    "pbgd": (lambda f, F: h.pbgd(f, F, step_size=0.5, penalty=grow), lambda k: 0.5 / (1 + grow(k)), 4000, 5e-3),
    "gradient norm": (
        lambda f, F: h.pbgd(f, F, step_size=0.4, penalty=grow, form="gradient_norm"),
        lambda k: 0.5 / (1 + grow(k)),
        4000,
        5e-3,
    ),
    "bome": (lambda f, F: h.bome(f, F, step_size=shrink, inner_step_size=0.5), shrink, 2000, 5e-3),
    "bvfsm": (lambda f, F: h.bvfsm(f, F, step_size=0.5), 0.1, 1500, 0.02),
    "meha": (lambda f, F: h.meha(f, F, step_size=0.3, penalty=lambda k: 2 * number(k) ** 0.49), 0.3, 4000, 5e-3),
    "gap function": (
        lambda f, F: h.gap_function(f, F, step_size=0.3, penalty=lambda k: 2 * number(k) ** 0.49),
        0.3,
        4000,
        5e-3,
    ),
}


@pytest.mark.parametrize("name", AGREE)
def test_the_strongly_convex_problem_is_solved(name):
    build, rate, num_updates, tolerance = AGREE[name]
    problem = lineage_bamm()
    theta, _ = ends(build(problem.inner, problem.outer), problem, rate, num_updates)
    assert theta == pytest.approx(0.5, abs=tolerance)


def test_the_strongly_convex_problem_as_predicted():
    """Alternating descent ends at 1, DARTS' single step of a at 1/(1 + a), a weight of mu at 1/(1 + (1 - mu)^2)."""
    problem = lineage_bamm()
    f, F = problem.inner, problem.outer
    assert ends(h.alternating(f, F, step_size=0.5), problem, 0.1, 400)[0] == pytest.approx(1.0, abs=1e-9)
    assert ends(h.finite_difference(f, F, step_size=0.5), problem, 0.1, 400)[0] == pytest.approx(2 / 3, abs=1e-6)
    mu = 0.9 / 2000**0.1  # the paper's weight has hardly begun to fall
    assert ends(h.bamm(f, F, step_size=0.5), problem, 0.1, 2000)[0] == pytest.approx(1 / (1 + (1 - mu) ** 2), abs=1e-3)


def test_the_merely_convex_problem_of_bamm():
    """P_0: the free coordinate makes the implicit gradient wrong, and BAMM and HODL move it."""
    problem = p_c(0.0)
    project = lineage_bamm()  # no bounds
    run = lambda hyper, rate, n: ends(hyper, project, rate, n, theta=problem.theta, x0=problem.x0)[0]
    wrong = h.soba(problem.objective, problem.outer, step_size=0.5)
    assert run(wrong, 0.05, 1500) == pytest.approx((1 + 0.01) / 2, abs=1e-6)
    right = h.bamm(problem.objective, problem.outer, step_size=0.5, weight=lambda k: 0.9 * number(k) ** -0.25)
    assert run(right, lambda k: 0.05 * number(k) ** -0.25, 6000) == pytest.approx(1.0, abs=0.02)


# ---- PBGD's problem: local methods end at a local minimum, the baselines between them --------------------------------

STARTS = jnp.linspace(0.1, 2.9, 15)
MINIMA = np.array([0.38236, 1.21515, 2.82964])


def distance(found, places):
    return np.abs(found[:, None] - places).min(1)


@pytest.mark.parametrize(
    ("build", "rate", "num_updates", "tolerance"),
    [
        (lambda p: implicit(p, 0.1), 0.05, 200, 1e-4),
        (lambda p: h.soba(p.inner, p.outer, step_size=0.1), 0.02, 1000, 1e-4),
        (lambda p: h.pbgd(p.inner, p.outer, step_size=0.05, inner_step_size=0.1, penalty=50.0), 1e-3, 5000, 0.01),
        (lambda p: h.pbgd(p.inner, p.outer, step_size=0.004, penalty=50.0, form="gradient_norm"), 2e-4, 20000, 0.01),
    ],
    ids=["implicit", "soba", "pbgd", "gradient norm"],
)
def test_pbgds_problem_is_solved_locally(build, rate, num_updates, tolerance):
    problem = lineage_pbgd()
    found = ends_from(build(problem), problem, rate, num_updates, STARTS)
    assert distance(found, MINIMA).max() <= tolerance
    assert len(np.unique(np.abs(found[:, None] - MINIMA).argmin(1))) == 3  # each is found from somewhere


def test_pbgds_problem_defeats_the_baselines():
    """At x = -theta the hypergradient is F_theta - F_x; alternating descent drops F_x, DARTS' step s scales it."""
    problem = lineage_pbgd()
    grid = jnp.linspace(0, 3, 30001)
    F_x, F_theta = (np.asarray(g) for g in jax.vmap(lambda t: jax.grad(problem.outer, argnums=(0, 1))(-t, t))(grid))

    def equilibria(share):
        slope = F_theta - share * F_x
        return np.asarray(grid)[np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0))]

    np.testing.assert_allclose(equilibria(1.0), MINIMA, atol=1e-3)
    s = 0.05
    darts = h.finite_difference(problem.inner, problem.outer, step_size=s)
    for hyper, places in (
        (h.alternating(problem.inner, problem.outer, step_size=0.1), equilibria(0.0)),
        (darts, equilibria(s * (2 + 2 * np.asarray(grid)))),
    ):
        found = ends_from(hyper, problem, 0.02, 1500, STARTS)
        assert distance(found, places).max() < 2e-3
        assert distance(found, MINIMA).max() > 0.04


# ---- the sine: the value function sees all inner minima, an implicit gradient one branch -----------------------------

closing = lambda k: 4 * jnp.exp(-k.astype(float) / 150)
GLOBAL = {
    "bvfsm": (
        lambda f, F: h.bvfsm(
            f, F, step_size=0.5, num_steps=20, num_barrier_steps=10, slack=closing, barrier=lambda k: closing(k) ** 0.5
        ),
        0.05,
        1000,
    ),
    "meha": (lambda f, F: h.meha(f, F, step_size=0.1, penalty=lambda k: 0.2 * number(k) ** 0.49), 0.1, 15000),
    "pbgd": (
        lambda f, F: h.pbgd(f, F, step_size=0.2, inner_step_size=0.5, penalty=lambda k: 0.01 * number(k)),
        lambda k: 0.05 / (1 + 0.01 * number(k)),
        6000,
    ),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_the_sine_is_solved_from_both_starts(name):
    build, rate, num_updates = GLOBAL[name]
    problem = lineage_sine()
    hyper = build(problem.inner, problem.outer)
    starts = jnp.array([0.0, -6.0])
    run = lambda start: descend(hyper, problem, rate, num_updates, start, start[None])[:2]
    theta, x = jax.jit(jax.vmap(run))(starts)
    np.testing.assert_allclose(theta, 0.75 * PI, rtol=0, atol=0.06)
    np.testing.assert_allclose(x[:, 0], 0.75 * PI + 2, rtol=0, atol=0.06)


def test_the_sine_keeps_the_others_on_the_branch_of_their_start():
    """Implicit gradients end at (2 k - 1/2) pi / 2; so does a barrier with less slack than a hill is high."""
    problem = lineage_sine()
    for start, k in ((0.0, 0), (-6.0, -2)):
        at = {"theta": jnp.asarray(start), "x0": jnp.full(1, start)}
        assert ends(implicit(problem, 0.5), problem, 0.1, 300, **at)[0] == pytest.approx(
            (2 * k - 0.5) * PI / 2, abs=1e-4
        )
    narrow = h.bvfsm(problem.inner, problem.outer, step_size=0.5, num_steps=20, num_barrier_steps=10)
    assert ends(narrow, problem, 0.05, 600)[0] == pytest.approx(-0.25 * PI, abs=0.1)
    assert ends(h.alternating(problem.inner, problem.outer, step_size=0.5), problem, 0.1, 300)[0] == pytest.approx(2.0)


# ---- the non-smooth problem: the derivative of the penalty in theta is all there is ----------------------------------


def test_the_nonsmooth_problem():
    problem = lineage_l1(1000)
    walk = odl.proximal_gradient(problem.inner, problem.prox, step_size=0.5)
    solver = odl.implicit(odl.until_converged(walk, tol=1e-9, max_steps=100))
    options = {"step_size": 0.3, "penalty": lambda k: 200 * number(k) ** 0.4, "prox": problem.prox}
    meha = h.meha(problem.inner, problem.outer, nonsmooth=problem.nonsmooth, **options)
    for hyper, rate, num_updates in ((meha, 0.2, 400), (h.through(solver, problem.outer), 5e-5, 60)):
        theta, _ = ends(hyper, problem, rate, num_updates)
        assert float(problem.value(jnp.asarray(theta))) == pytest.approx(-0.5, abs=1e-9)
        assert theta[:500].min() >= 1e-3 - 1e-12
        assert theta[500:].max() == 0.0
    # Without the derivative of the non-smooth part, and for alternating descent, theta stays.
    blind = h.meha(problem.inner, problem.outer, nonsmooth=lambda x, theta: 0.0 * jnp.sum(x), **options)
    for hyper in (blind, h.alternating(problem.inner, problem.outer, step_size=0.5)):
        theta, _ = ends(hyper, problem, 0.2, 50)
        np.testing.assert_array_equal(theta, problem.theta)


# ---- IAPTT's problem: the worst iterate and a learned start ----------------------------------------------------------


def test_iaptts_problem_needs_the_worst_iterate_and_the_learned_start():
    """5e-4 is the inner step and 0.1 the outer one: exchanged, nobody leaves theta = 1."""
    problem = lineage_iaptt()
    f = lambda x, w: problem.inner(x, w["theta"])
    F = lambda x, w: problem.outer(x, w["theta"])
    learned = lambda w: w["x"]

    def run(build, inner_step, outer_step, num_updates=600):
        solver = odl.for_steps(odl.gradient_descent(f, step_size=inner_step), 40)
        hyper = build(solver)

        def body(carry, _):
            w, state = carry
            g, state, info = hyper.update(w, state)
            w = jax.tree.map(lambda leaf, g: leaf - outer_step * g, w, g)
            w = {"theta": jnp.clip(w["theta"], 1.0, 10.0), "x": jnp.clip(w["x"], -2.0, 2.0)}
            return (w, state), (w["theta"], info.x)

        w = {"theta": problem.theta, "x": problem.x0}
        _, (thetas, xs) = jax.jit(lambda: jax.lax.scan(body, (w, hyper.init(w, problem.x0)), length=num_updates))()
        return np.asarray(thetas)[-100:], np.asarray(xs)[-100:]

    theta, x = run(lambda s: h.pessimistic(s, F, start=learned), 5e-4, 0.1)
    assert np.abs(theta - 11 * PI / 4).max() < 0.11  # the outer step
    assert np.abs(x + 2).max() < 0.02
    theta, x = run(lambda s: h.through(odl.unrolled(s), F, start=learned), 5e-4, 0.1)
    assert np.abs(theta - 11 * PI / 4).min() > 0.5  # the last iterate leads astray
    for build in (lambda s: h.pessimistic(s, F), lambda s: h.through(odl.unrolled(s), F)):
        assert run(build, 5e-4, 0.1)[0].max() == 1.0  # so does the fixed start
    assert run(lambda s: h.pessimistic(s, F, start=learned), 0.1, 5e-4)[0].max() == 1.0
