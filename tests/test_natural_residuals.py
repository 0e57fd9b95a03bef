"""What an operator calls its residual vanishes at the solution and nowhere else, however small step or penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax import operators
from odljax._checks import is_a, number
from odljax.operators._operator import natural_residual
from odljax.operators._weights import expect

# min (x - theta)^2 / 2 + |x| at theta = 3: x = 2, and the multiplier of the split is 1.
THETA, ANSWER = 3.0, 2.0
smooth = lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2)
prox_smooth = lambda v, theta, s: (v + s * theta) / (1 + s)
prox_l1 = lambda v, theta, s: odl.prox.l1(v, 1.0, s)
same = lambda x, theta: x
ZERO, ONE, TWO = jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0)

# name: (size -> operator, start, solution at that size)
ROWS = {
    "gradient": (lambda s: operators.gradient(lambda x, t: smooth(x, t) + jnp.sum(jnp.abs(x)), s), ONE, lambda s: TWO),
    "forward_backward": (lambda s: operators.forward_backward(smooth, prox_l1, s), ZERO, lambda s: TWO),
    "averaged": (
        lambda s: operators.averaged(operators.forward_backward(smooth, prox_l1, 0.5), s),
        ZERO,
        lambda s: TWO,
    ),
    "project": (
        lambda s: odl.project(odl.gradient_descent(smooth, s), lambda x, t: jnp.minimum(x, 2.0)).operator,
        ZERO,
        lambda s: TWO,
    ),
    "preconditioned": (
        lambda s: operators.preconditioned_forward_backward(smooth, prox_l1, 1 / s),
        ZERO,
        lambda s: TWO,
    ),
    "forward_backward_forward": (
        lambda s: operators.forward_backward_forward(lambda x, t: x - t, prox_l1, step_size=s),
        ZERO,
        lambda s: TWO,
    ),
    "red": (lambda s: operators.red(smooth, lambda x, t: x - 1.0, s, 1.0), ZERO, lambda s: TWO),
    "douglas_rachford": (lambda s: operators.douglas_rachford(prox_l1, prox_smooth, s), ZERO, lambda s: TWO - s),
    "davis_yin": (lambda s: operators.davis_yin(smooth, lambda v, t, s: v, prox_l1, s), ZERO, lambda s: TWO + s),
    "admm": (
        lambda s: operators.admm(prox_smooth, prox_l1, penalty=s),
        operators.SplitVariables(ZERO, ZERO),
        lambda s: operators.SplitVariables(TWO, ONE),
    ),
    "admm, relaxed": (
        lambda s: operators.admm(prox_smooth, prox_l1, relaxation=max(s, 1e-6)),
        operators.SplitVariables(ZERO, ZERO),
        lambda s: operators.SplitVariables(TWO, ONE),
    ),
    "linearized_admm": (
        lambda s: operators.linearized_admm(
            same, prox_l1, lambda v, t, s: prox_smooth(v, -t, s), lambda t: 0 * t, penalty=s, proximal_weight=2 * s
        ),
        operators.ADMMVariables(ZERO, ZERO, ZERO),
        lambda s: operators.ADMMVariables(TWO, -TWO, -ONE),
    ),
    "chambolle_pock": (
        lambda s: operators.chambolle_pock(prox_smooth, prox_l1, same, step_size=s, dual_step_size=0.5),
        operators.PrimalDual(ZERO, ZERO),
        lambda s: operators.PrimalDual(TWO, ONE),
    ),
    "condat_vu": (
        lambda s: operators.condat_vu(smooth, lambda v, t, s: v, prox_l1, same, step_size=0.25, dual_step_size=s),
        operators.PrimalDual(ZERO, ZERO),
        lambda s: operators.PrimalDual(TWO, ONE),
    ),
    "peaceman_rachford": (lambda s: operators.peaceman_rachford(prox_l1, prox_smooth, s), ZERO, lambda s: TWO - s),
    "consensus_admm": (  # the mean of theta - 1 and theta + 1, shrunk by 1 / 2
        lambda s: operators.consensus_admm(
            lambda v, t, s, d: (v + s * d) / (1 + s), lambda t: jnp.stack([t - 1, t + 1]), prox_l1, penalty=s
        ),
        operators.SplitVariables(ZERO, jnp.zeros((2, 1))),
        lambda s: operators.SplitVariables(ONE * (THETA - 0.5), jnp.array([[-0.5], [1.5]])),
    ),
    "proximal_alm": (  # on x = 2, whose multiplier is 1
        lambda s: operators.proximal_alm(smooth, same, lambda t: t - 1, penalty=s),
        operators.PrimalDual(ZERO, ZERO),
        lambda s: operators.PrimalDual(TWO, ONE),
    ),
    "proximal_alm, heavy": (
        lambda s: operators.proximal_alm(smooth, same, lambda t: t - 1, proximal_weight=1 / s),
        operators.PrimalDual(TWO, ZERO),  # feasible, and no multiplier: only the weight's force tells
        lambda s: operators.PrimalDual(TWO, ONE),
    ),
    "linearized_alm": (
        lambda s: operators.linearized_alm(prox_l1, same, lambda t: t - 1, penalty=s, proximal_weight=2 * s),
        operators.PrimalDual(ZERO, ZERO),
        lambda s: operators.PrimalDual(TWO, -ONE),
    ),
    "mirror": (
        lambda s: operators.mirror(
            lambda x, t: smooth(x, t - 1), lambda x, t: jnp.log(x), lambda v, t: jnp.exp(v), step_size=s
        ),
        ONE,
        lambda s: TWO,
    ),
    "entropic": (  # x_1 = x_2 / (theta - 1)
        lambda s: operators.entropic(lambda x, t: 0.5 * jnp.sum(jnp.append(t - 1, 1.0) * x**2), step_size=s),
        jnp.full(2, 0.5),
        lambda s: jnp.array([1 / 3, 2 / 3]),
    ),
    "coordinate_descent": (
        lambda s: operators.coordinate_descent(
            lambda p, t: 0.5 * jnp.sum((p - t) ** 2), ONE[None], prox_l1, lipschitz=1 / s
        ),
        ZERO,
        lambda s: TWO,
    ),
    "block_coordinate_descent": (
        lambda s: operators.block_coordinate_descent(
            lambda p, t: 0.5 * jnp.sum((p[0] - t) ** 2), ONE[None], prox_l1, lipschitz=1 / s
        ),
        ZERO[None],
        lambda s: TWO[None],
    ),
    "hard_thresholding": (
        lambda s: operators.hard_thresholding(lambda x, t: smooth(x, jnp.append(t - 1, 0.5)), 1, step_size=s),
        jnp.array([1.0, 0.0]),
        lambda s: jnp.array([2.0, 0.0]),
    ),
    "plug_and_play": (  # its fixed points depend on the step, and it moves at every step
        lambda s: operators.plug_and_play(smooth, lambda v, t: 0.5 * v, s),
        TWO,
        lambda s: ONE * THETA * s / (1 + s),
    ),
}


def size_of(T, u, theta):
    return max(float(odl._tree.norm(part.value)) for part in natural_residual(T, u, theta))


@pytest.mark.parametrize("name", list(ROWS))
def test_a_small_step_is_no_solution(name):
    build, start, solution = ROWS[name]
    sizes = [size_of(build(s), start, jnp.full(1, THETA)) for s in (0.5, 1e-3, 1e-7)]
    assert min(sizes) > 0.1, sizes
    for s in (0.5, 1e-3, 1e-7):
        assert size_of(build(s), solution(s), jnp.full(1, THETA)) < 1e-8 * max(1.0, max(sizes))
    # The loop reads it, in float32 too; a tolerance relative to the terms sees no less.
    start, theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (start, jnp.full(1, THETA)))
    for how in ({"tol": 1e-4}, {"tol": 0.0, "relative_tol": 1e-4}):
        solution = odl.until_converged(odl.fixed_point(build(1e-7)), max_steps=2, **how)(start, theta)
        assert int(solution.status) != odl.Status.CONVERGED, how


@pytest.mark.parametrize("name", ["forward_backward", "douglas_rachford", "admm", "chambolle_pock", "condat_vu"])
def test_what_has_converged_is_the_answer(name):
    build, start, _ = ROWS[name]
    T, theta = build(0.5), jnp.full(1, THETA)
    solution = jax.jit(odl.until_converged(odl.fixed_point(T), tol=1e-10, max_steps=2000))(start, theta)
    assert int(solution.status) == odl.Status.CONVERGED
    np.testing.assert_allclose(T.answer(solution.x, theta), ANSWER, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["admm", "chambolle_pock", "condat_vu", "douglas_rachford"])
def test_each_part_is_measured_in_its_own_unit(name):
    """x in another unit: the parts in x scale with it, those in the unit of the multiplier by the inverse."""
    unit = 2.0**20

    def scaled(unit):
        f = lambda x, theta: 0.5 * jnp.sum((x / unit - theta) ** 2)
        prox_f = lambda v, theta, s: (v + s / unit * theta) / (1 + s / unit**2)
        prox_h = lambda v, theta, s: odl.prox.l1(v, 1.0 / unit, s)
        s, c = unit**2, 1 / unit**2
        if name == "admm":
            return operators.admm(prox_f, prox_h, penalty=0.5 * c), lambda x, y: operators.SplitVariables(x, y)
        if name == "douglas_rachford":
            return operators.douglas_rachford(prox_h, prox_f, 0.5 * s), lambda x, y: x
        if name == "chambolle_pock":
            T = operators.chambolle_pock(prox_f, prox_h, same, step_size=0.5 * s, dual_step_size=0.5 * c)
        else:
            T = operators.condat_vu(f, lambda v, t, s: v, prox_h, same, step_size=0.25 * s, dual_step_size=0.5 * c)
        return T, lambda x, y: operators.PrimalDual(x, y)

    relative = []
    for u in (1.0, unit):
        T, variables = scaled(u)
        point = variables(jnp.full(1, 0.7) * u, jnp.full(1, 0.4) / u)
        parts = natural_residual(T, point, jnp.full(1, THETA))
        relative.append(
            [
                float(odl._tree.norm(part.value) / max(float(odl._tree.norm(term)) for term in part.scale))
                for part in parts
            ]
        )
    np.testing.assert_allclose(relative[1], relative[0], rtol=1e-12)


@pytest.mark.usefixtures("optimised")
def test_the_products_of_a_step_and_its_residual_are_shared():
    """ADMM and a primal-dual step: one product with A and one with its transpose a step, residual included."""
    A = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)))
    linear = lambda x, theta: A @ x
    T = operators.chambolle_pock(prox_l1, prox_smooth, linear, step_size=0.1, dual_step_size=0.1)
    start = operators.PrimalDual(jnp.zeros(4), jnp.zeros(4))

    def dots(run):
        text = jax.jit(run).lower(start, jnp.ones(4)).compile().as_text()
        return text.count(" dot(")

    plain = dots(lambda u, theta: jax.lax.fori_loop(0, 9, lambda i, u: T(u, theta), u))
    solver = odl.until_converged(odl.fixed_point(T), max_steps=9)
    assert dots(lambda u, theta: solver(u, theta).x) == plain


# ---- what enters is looked at ----------------------------------------------------------------------------------------


def test_a_traced_number_outside_its_range_is_seen():
    for step, good in ((0.5, True), (0.0, False), (-0.5, False)):
        solve = jax.jit(lambda step: odl.until_converged(odl.gradient_descent(smooth, step), max_steps=50)(ZERO, THETA))
        solution = solve(step)
        assert (int(solution.status) == odl.Status.CONVERGED) is good
        assert (int(solution.status) == odl.Status.NON_FINITE) is not good
        assert np.isfinite(solution.x[0]) == good
    decay = odl.gradient_descent(
        smooth, lambda k: 0.5 * jnp.maximum(1.0 - 0.25 * k.astype(float), 0.0)
    )  # to zero exactly, and no further
    assert np.isfinite(odl.for_steps(decay, 9)(ZERO, THETA).x[0])
    for weight, good in ((0.5, True), (0.0, False), (-0.5, False)):  # of a metric: as a function, and traced
        u = operators.PrimalDual(ZERO, ONE)
        by = {"linear": same, "prox_g": prox_smooth, "prox_h": prox_l1, "dual_step_size": 0.5}
        direct = jax.jit(lambda weight: operators.chambolle_pock(step_size=weight, **by)(u, THETA))(weight)
        of_theta = operators.chambolle_pock(step_size=lambda theta: theta, **by)(u, jnp.asarray(weight))
        assert [bool(np.isfinite(v.x[0])) for v in (direct, of_theta)] == [good, good]
    half = jnp.ones(1, jnp.bfloat16)  # a whole number widens no half precision
    scaled = operators.forward_backward(smooth, lambda v, theta, s: v * s, lambda theta: 1)
    assert scaled(half, half).dtype == jnp.bfloat16
    below = odl.gradient_descent(smooth, lambda k: 0.5 - 0.3 * k.astype(float))
    assert np.isnan(odl.for_steps(below, 3)(ZERO, THETA).x[0])


SOLVER = odl.until_converged(odl.gradient_descent(smooth, 0.5))
REFUSED = {
    "text": (lambda: number("who", "step_size", "0.1"), "who: step_size must be a number; '0.1' came"),
    "truth": (lambda: odl.until_converged(SOLVER.iteration, tol=True), "tol must be a number; True came"),
    "solver as map": (lambda: odl.fixed_point(SOLVER), "solver"),
    "solver as iteration": (lambda: odl.krasnoselskii_mann(SOLVER), "solver"),
    "solver as objective": (lambda: odl.gradient_descent(SOLVER, 0.1), "take its iteration"),
    "default": (lambda: odl.fixed_point(lambda x, training=False: x), "whether training is to keep its default"),
    "swapped": (lambda: odl.gradient_descent(smooth, lambda k, theta: 0.1), r"let it take \(theta, k\), in that order"),
    "weight or map": (
        lambda: operators.preconditioned_forward_backward(smooth, prox_l1, lambda theta, safety=1.0: safety * theta),
        "may be called with theta",
    ),
    "article": (lambda: is_a("who", "it", 1.0, odl.Iteration, "Wrap it."), "must be an Iteration; a float came. Wrap"),
    "list": (lambda: SOLVER([0.0, 1.0], THETA), "x0 is a list of numbers"),
    "bare array": (
        lambda: expect("admm", ZERO, operators.SplitVariables),
        r"must be the variables SplitVariables\(z, y\); float\d+\[1\] came",
    ),
}


def test_errors_of_swapped_arguments_say_what_came():
    solver = odl.for_steps(odl.gradient_descent(lambda x, theta: jnp.sum((x - theta["a"]) ** 2), 0.1), 2)
    with pytest.raises(TypeError) as caught:
        solver({"a": ONE}, ZERO)
    told = " ".join(caught.value.__notes__)
    assert "called as solver(x0, theta) with x0: ['a'] float" in told
    assert "theta: float" in told


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_ambiguous_is_refused_where_it_enters(name):
    build, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        build()
