"""BOAT's nineteen operations in our nouns: each runs, sound combinations equal plain loops, the others are refused."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import odljax as odl

h = odl.hypergradients
K, STEP = 12, 0.3
Q = jnp.asarray([[1.0, 0.2], [0.2, 0.5]])
B = jnp.asarray([[0.8, -0.3], [0.4, 0.9]])
CENTRE = jnp.asarray([0.7, 0.5])
THETA = {"w": jnp.asarray([0.9, 0.6]), "u": jnp.asarray([-0.2, 0.1])}
X0 = THETA["u"]


def inner(x, theta):
    w = theta["w"]
    return 0.5 * jnp.dot(x, Q @ x) - jnp.dot(x, B @ w) + 0.05 * w[0] ** 2 * jnp.sum(x**2)


def outer(x, theta):
    """Greatest where the walk passes the centre, so that its worst iterate is one on the way."""
    return -0.5 * jnp.sum((x - CENTRE) ** 2) + 0.1 * jnp.sum(theta["w"] ** 2) + 0.1 * jnp.dot(x, theta["w"])


def f(x, w):
    """For the estimators whose theta is an array."""
    return inner(x, {"w": w})


def F(x, w):
    return outer(x, {"w": w})


def alpha(k):
    return 0.4 * 0.7**k


DESCENT = odl.gradient_descent(inner, STEP)
MIXED = odl.aggregate(DESCENT, outer, weight=lambda k: alpha(k.astype(float)), step_size=STEP)
STEPS, MIXED_STEPS = odl.for_steps(DESCENT, K), odl.for_steps(MIXED, K)
CONVERGED = odl.until_converged(DESCENT, tol=1e-13, max_steps=400)
START = {"start": lambda theta: theta["u"]}


def gradient_of(hyper, theta=THETA, x0=X0):
    return jax.jit(lambda theta, x0: hyper.update(theta, hyper.init(theta, x0))[::2])(theta, x0)


# ---- the oracle: plain loops, differentiated by JAX -----------------------------------------------------------------


def loop(theta, x, mixed, num_steps=K, held=0):
    """All iterates; the first ``held`` steps carry no derivative."""
    xs = []
    for k in range(num_steps):
        a = alpha(k) if mixed else 0.0
        x = x - a * STEP * jax.grad(outer)(x, theta) - (1 - a) * STEP * jax.grad(inner)(x, theta)
        x = jax.lax.stop_gradient(x) if k < held else x
        xs.append(x)
    return xs


def oracle(mixed=False, learned=False, worst=False, held=0):
    def value(theta):
        xs = loop(theta, theta["u"] if learned else X0, mixed, held=held)
        return outer(xs[WORST[mixed]] if worst else xs[-1], theta)

    return jax.grad(value)(THETA)


WORST = {mixed: int(np.argmax([outer(x, THETA) for x in loop(THETA, X0, mixed)])) for mixed in (False, True)}


def adjoint_oracle(terms=None):
    """At the solution, with the matrices written out: the exact adjoint, or its series."""
    x = CONVERGED(X0, THETA).x
    H = STEP * jax.hessian(inner)(x, THETA)
    b, one = jax.grad(outer)(x, THETA), jnp.eye(2)
    powers = [b]
    for _ in range(terms or 0):
        powers.append((one - H) @ powers[-1])
    v = jnp.linalg.solve(H, b) if terms is None else sum(powers)
    _, pull = jax.vjp(lambda theta: -STEP * jax.grad(inner)(x, theta), THETA)
    direct = jax.grad(outer, 1)(x, THETA)
    return jax.tree.map(jnp.add, direct, pull(v)[0])


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), a, b)


# ---- the nineteen ---------------------------------------------------------------------------------------------------

THROUGH = h.through(STEPS, outer)
IMPLICIT = odl.implicit(CONVERGED, odl.linear.cg())
TASK = {"num_steps": 3, "step_size": STEP}

# name: (estimator, whether theta is an array)
OPERATIONS = {
    "NGD": (THROUGH, False),
    "GDA": (h.through(MIXED_STEPS, outer), False),
    "DI": (h.through(STEPS, outer, **START), False),
    "DM": (h.bamm(f, F), True),
    "RAD": (h.through(odl.unrolled(STEPS), outer), False),
    "RGT": (h.through(odl.truncated(STEPS, num_steps=4), outer), False),
    "PTT": (h.pessimistic(STEPS, outer), False),
    "FOA": (h.fomaml(f, F, **TASK), True),
    "IAD": (h.maml(f, F, **TASK), True),
    "FD": (h.finite_difference(f, F, step_size=STEP), True),
    "IGA": (h.rank_one(f, F, step_size=STEP), True),
    "CG": (h.through(IMPLICIT, outer), False),
    "NS": (h.through(odl.implicit(CONVERGED, odl.linear.neumann(5)), outer), False),
    "VSO": (h.bvfsm(f, F, step_size=0.05), True),
    "VFO": (h.bome(f, F, step_size=0.05), True),
    "MESO": (h.meha(f, F, step_size=0.05), True),
    "PGDO": (h.pbgd(f, F, step_size=0.05), True),
    "GAFFO": (h.gap_function(f, F, step_size=0.05), True),
    "ALTO": (h.alternating(f, F, step_size=STEP), True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_runs(name):
    hyper, plain = OPERATIONS[name]
    theta = THETA["w"] if plain else THETA
    gradient, info = gradient_of(hyper, theta)
    assert jax.tree.structure(gradient) == jax.tree.structure(theta)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient if plain else gradient["w"]).max()) > 1e-3
    assert int(info.status) <= odl.Status.COMPLETED


# ---- sound combinations ---------------------------------------------------------------------------------------------

SOUND = {
    "NGD + RAD": (lambda: h.through(odl.unrolled(STEPS), outer), lambda: oracle()),
    "NGD + RAD, checkpointed": (lambda: h.through(odl.unrolled(STEPS, checkpoint_every=4), outer), lambda: oracle()),
    "NGD + RAD, forward": (lambda: h.through(odl.forward(STEPS), outer), lambda: oracle()),
    "GDA + RAD": (lambda: h.through(odl.unrolled(MIXED_STEPS), outer), lambda: oracle(mixed=True)),
    "GDA + RAD by bda": (
        lambda: h.bda(
            inner, outer, num_steps=K, step_size=STEP, outer_step_size=STEP, weight=lambda k: alpha(k.astype(float))
        ),
        lambda: oracle(mixed=True),
    ),
    "DI + RAD": (lambda: h.through(STEPS, outer, **START), lambda: oracle(learned=True)),
    "DI + GDA + RAD": (lambda: h.through(MIXED_STEPS, outer, **START), lambda: oracle(mixed=True, learned=True)),
    "RGT": (lambda: h.through(odl.truncated(STEPS, num_steps=4), outer), lambda: oracle(held=K - 4)),
    "RGT + GDA": (
        lambda: h.through(odl.truncated(MIXED_STEPS, num_steps=4), outer),
        lambda: oracle(mixed=True, held=K - 4),
    ),
    "PTT + RAD": (lambda: h.pessimistic(STEPS, outer), lambda: oracle(worst=True)),
    "PTT + DI + RAD": (lambda: h.pessimistic(STEPS, outer, **START), lambda: oracle(worst=True, learned=True)),
    "PTT + GDA + RAD": (lambda: h.pessimistic(MIXED_STEPS, outer), lambda: oracle(worst=True, mixed=True)),
    "PTT + DI + GDA + RAD, checkpointed": (
        lambda: h.pessimistic(odl.unrolled(MIXED_STEPS, checkpoint_every=5), outer, **START),
        lambda: oracle(worst=True, mixed=True, learned=True),
    ),
    "CG": (lambda: h.through(IMPLICIT, outer), adjoint_oracle),
    "NS": (
        lambda: h.through(odl.implicit(CONVERGED, odl.linear.neumann(5)), outer),
        lambda: adjoint_oracle(5),
    ),
    "NS as RGT at the solution": (
        lambda: h.through(odl.truncated(CONVERGED, num_steps=6), outer),
        lambda: adjoint_oracle(5),
    ),
    "CG + Nesterov": (
        lambda: h.through(odl.implicit(odl.until_converged(odl.nesterov(DESCENT), tol=1e-13), odl.linear.cg()), outer),
        adjoint_oracle,
    ),
}


def test_the_worst_iterate_is_one_on_the_way():
    assert all(0 < k < K - 1 for k in WORST.values())


@pytest.mark.parametrize("name", SOUND)
def test_sound_combinations_equal_plain_loops(name):
    build, expected = SOUND[name]
    gradient, _ = gradient_of(build())
    close(gradient, jax.jit(expected)())


def test_an_implicit_gradient_with_warm_starts():
    hyper = h.warm_started(IMPLICIT, outer)
    update = jax.jit(hyper.update)
    first, state, before = update(THETA, hyper.init(THETA, X0))
    second, _, after = update(THETA, state)
    close(first, adjoint_oracle())
    close(second, first)
    assert int(after.num_steps) == 0 < int(before.num_steps)


def test_iad_and_foa_are_maml_and_fomaml():
    """In BOAT the two are one configuration; both against a loop, theta being the start."""

    def value(w, first_order):
        x = w
        for _ in range(3):
            slope = jax.grad(f)(x, w)
            x = x - STEP * (jax.lax.stop_gradient(slope) if first_order else slope)
        return F(x, w)

    for name, first_order in (("IAD", False), ("FOA", True)):
        gradient, _ = gradient_of(OPERATIONS[name][0], THETA["w"], None)
        close(gradient, jax.grad(value)(THETA["w"], first_order))


def test_fd_is_the_last_step_however_many_there_are():
    last = h.through(odl.truncated(odl.for_steps(odl.gradient_descent(f, STEP), 5), num_steps=1), F)
    ours = h.finite_difference(f, F, step_size=STEP, num_steps=5, radius=1e-3)
    np.testing.assert_allclose(gradient_of(ours, THETA["w"])[0], gradient_of(last, THETA["w"])[0], atol=1e-7)


# ---- refused --------------------------------------------------------------------------------------------------------

REFUSED = {
    "PTT + CG": (lambda: h.pessimistic(odl.implicit(STEPS), outer), "the worst iterate is none"),
    "PTT + NS": (lambda: h.pessimistic(odl.implicit(STEPS, odl.linear.neumann(3)), outer), "the worst iterate is none"),
    "PTT + RGT": (lambda: h.pessimistic(odl.truncated(STEPS, num_steps=3), outer), "behind the worst iterate"),
    "PTT + a tolerance": (lambda: h.pessimistic(odl.unrolled(CONVERGED), outer), "Use for_steps"),
    "GDA + CG": (lambda: odl.implicit(MIXED_STEPS, odl.linear.cg()), "needs an operator"),
    "GDA + NS": (lambda: odl.implicit(MIXED_STEPS, odl.linear.neumann(3)), "needs an operator"),
    "GDA + one step": (lambda: odl.one_step(MIXED_STEPS), "needs an operator"),
    "GDA + a tolerance": (lambda: odl.until_converged(MIXED), "has no operator"),
    "DI + CG": (lambda: h.through(IMPLICIT, outer, **START), "learned start needs a derivative that reaches it"),
    "DI + NS": (
        lambda: h.through(odl.implicit(STEPS, odl.linear.neumann(3)), outer, **START),
        "learned start needs a derivative that reaches it",
    ),
    "DI + RGT": (
        lambda: h.through(odl.truncated(STEPS, num_steps=3), outer, **START),
        "stops the derivative before it reaches the start",
    ),
    "DI + copied last parameters": (
        lambda: h.bda(inner, outer, num_steps=K, step_size=STEP, warm_start=True, **START),
        "both came",
    ),
    "RGT with more steps than there are": (lambda: odl.truncated(STEPS, num_steps=K + 1), "Ask for at most"),
    "CG on a Jacobian that is not symmetric": (
        lambda: odl.implicit(odl.for_steps(odl.fixed_point(lambda x, theta: 0.5 * x), 3), odl.linear.cg()),
        "not declared symmetric",
    ),
    "a whole algorithm + GDA": (
        lambda: h.bome(MIXED, F, step_size=0.05),
        r"Iteration\(aggregate\(.* came. bome takes its own inner steps on a loss",
    ),
    "DM + GDA": (lambda: h.bamm(MIXED_STEPS, F), r"Solver\(.* came. bamm takes its own inner steps on a loss"),
    "FD + GDA": (
        lambda: h.finite_difference(MIXED, F, step_size=STEP),
        r"Iteration\(aggregate\(.* came. finite_difference takes its own inner steps on a loss",
    ),
    "IGA + PTT": (
        lambda: h.rank_one(h.pessimistic(STEPS, outer), F, step_size=STEP),
        r"Hypergradient\(pessimistic\(.* came. rank_one takes its own inner steps on a loss",
    ),
}


@pytest.fixture
def as_a_user_has_it():
    """Without the type checker, which the tests bring and which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("name", REFUSED)
def test_unsound_combinations_are_refused_with_the_reason(name):
    build, reason = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=reason):
        build()


@pytest.mark.usefixtures("as_a_user_has_it")
@pytest.mark.parametrize("place", ["inner", "outer"])
@pytest.mark.parametrize("came", [DESCENT.operator, DESCENT, STEPS, THROUGH], ids=lambda came: type(came).__name__)
def test_no_record_passes_for_a_loss(came, place):
    """Operators and solvers can be called with two arguments, but they are no losses."""
    given = {"inner": f, "outer": F, place: came}
    with pytest.raises(TypeError, match=rf"bome: {place} must be a loss, .* {re.escape(repr(came))} came.* by hodl"):
        h.bome(step_size=0.05, **given)


def test_the_page_lists_them_all():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "boat.md").read_text()
    rows = {match[1] for match in re.finditer(r"^\| ([A-Z]+) \|", page, re.MULTILINE)}
    assert rows == set(OPERATIONS)
    assert [name for name in REFUSED if f"| {name} |" not in page] == []
    for name in re.findall(r"`(?:hypergradients|h)\.(\w+)", page):
        assert name in h.__all__
