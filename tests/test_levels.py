"""Three and more levels: nested solvers, and estimators as levels, against closed-form quadratics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import config

import odljax as odl

h = odl.hypergradients
PROBLEM = odl.problems.trilevel()
EXACT = PROBLEM.hypergradient(PROBLEM.theta)


def solvers(tol=1e-13):
    """Ways to solve and differentiate one level."""
    return {
        "implicit": lambda walk: odl.implicit(odl.until_converged(walk, tol=tol, max_steps=500)),
        "unrolled": lambda walk: odl.for_steps(walk, 90),
    }


def inner_walk(theta):
    return odl.gradient_descent(lambda x, y: PROBLEM.inner(x, y, theta), PROBLEM.inner_step_size)


# ---- nested solvers -------------------------------------------------------------------------------------------------


def nested(middle, inner):
    """``theta -> (x, y)``: the objective of the middle solver contains the inner solver's solution."""

    def x_of(y, theta):
        walk = odl.gradient_descent(lambda x, both: PROBLEM.inner(x, *both), PROBLEM.inner_step_size)
        return inner(walk)(PROBLEM.x0, (y, theta)).x

    walk = odl.gradient_descent(
        lambda y, theta: PROBLEM.middle(x_of(y, theta), y, theta), PROBLEM.middle_step_size
    )  # fmt: skip

    def solution(theta):
        y = middle(walk)(PROBLEM.y0, theta).x
        return x_of(y, theta), y

    return solution


@pytest.mark.parametrize(("middle", "inner"), list(itertools.product(["implicit", "unrolled"], repeat=2)))
def test_nested_solvers(middle, inner):
    ways = solvers()
    solution = nested(ways[middle], ways[inner])

    @jax.jit
    def run(theta):
        x, y = solution(theta)
        return jax.grad(lambda theta: PROBLEM.outer(*solution(theta), theta))(theta), x, y

    gradient, x, y = run(PROBLEM.theta)
    exact = PROBLEM.middle_solution(PROBLEM.theta)
    np.testing.assert_allclose(y, exact, atol=1e-9)
    np.testing.assert_allclose(x, PROBLEM.inner_solution(exact, PROBLEM.theta), atol=1e-9)
    np.testing.assert_allclose(gradient, EXACT, atol=1e-9)


def test_a_checkpoint_around_nested_implicit_solvers():
    """Over fixed counts and around loops that stop by themselves."""
    ways = solvers()

    def gradient(solution, checkpoint):
        value = lambda theta: PROBLEM.outer(*solution(theta), theta)
        return jax.jit(jax.grad(jax.checkpoint(value) if checkpoint else value))(PROBLEM.theta)

    counted = lambda walk: odl.implicit(odl.for_steps(walk, 90))
    np.testing.assert_allclose(gradient(nested(counted, counted), checkpoint=True), EXACT, atol=1e-9)
    np.testing.assert_allclose(gradient(nested(ways["implicit"], ways["implicit"]), checkpoint=True), EXACT, atol=1e-9)
    segments = lambda walk: odl.unrolled(odl.for_steps(walk, 90), checkpoint_every=10)
    np.testing.assert_allclose(gradient(nested(segments, ways["implicit"]), checkpoint=False), EXACT, atol=1e-9)


# ---- estimators as levels -------------------------------------------------------------------------------------------


def two_losses(theta):
    return (lambda x, y: PROBLEM.inner(x, y, theta)), (lambda x, y: PROBLEM.middle(x, y, theta))


def middle_levels():
    """``theta -> estimator`` of the middle level, how many updates it takes to converge, and at which rate."""
    step, rate = PROBLEM.inner_step_size, PROBLEM.middle_step_size

    def of_solver(make, transform):
        def build(theta):
            inner, middle = two_losses(theta)
            return make(transform(odl.gradient_descent(inner, step)), middle)

        return build

    def of_losses(make, **options):
        return lambda theta: make(*two_losses(theta), step_size=step, **options)

    unrolled = lambda walk: odl.unrolled(odl.for_steps(walk, 45))
    implicit = lambda walk: odl.implicit(odl.until_converged(walk, tol=1e-13, max_steps=200))
    implicit_steps = lambda walk: odl.implicit(odl.for_steps(walk, 45), odl.linear.neumann(45))
    return {
        "through unrolled": (of_solver(h.through, unrolled), 90, rate),
        "through implicit": (of_solver(h.through, implicit), 90, rate),
        "through implicit, Neumann": (of_solver(h.through, implicit_steps), 90, rate),
        "warm-started implicit": (of_solver(h.warm_started, implicit), 90, rate),
        "warm-started unrolled": (of_solver(h.warm_started, unrolled), 90, rate),
        "hodl": (lambda theta: h.hodl(inner_walk(theta), two_losses(theta)[1], num_steps=90, weight=0.0), 90, rate),
        "bda": (of_losses(h.bda, num_steps=45, weight=0.0), 90, rate),
        "soba": (of_losses(h.soba), 400, 0.17),
    }


LEVELS = middle_levels()


def top(name, num_updates=None, make=h.through, **options):
    build, enough, rate = LEVELS[name]
    walk = h.descend(build, optax.sgd(rate))
    solver = odl.unrolled(odl.for_steps(walk, num_updates or enough), **options)
    return make(solver, lambda level, theta: PROBLEM.outer(level.x, level.theta, theta))


START = h.Level(PROBLEM.y0, PROBLEM.x0)


@pytest.mark.parametrize("name", LEVELS)
def test_estimators_as_levels(name):
    hyper = top(name)
    gradient, _, info = jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, START)))(PROBLEM.theta)
    np.testing.assert_allclose(info.x.theta, PROBLEM.middle_solution(PROBLEM.theta), atol=1e-9)
    np.testing.assert_allclose(
        info.x.x, PROBLEM.inner_solution(PROBLEM.middle_solution(PROBLEM.theta), PROBLEM.theta), atol=1e-9
    )
    np.testing.assert_allclose(gradient, EXACT, atol=1e-9)


def test_a_checkpointed_level():
    hyper = top("through unrolled", checkpoint_every=9)
    gradient = jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, START))[0])(PROBLEM.theta)
    np.testing.assert_allclose(gradient, EXACT, atol=1e-9)


def test_few_updates_are_differentiated_as_they_are():
    """Three updates of a single loop with momentum: the gradient is that of the walk itself, not of its limit."""
    walk = h.descend(LEVELS["soba"][0], optax.sgd(0.2, momentum=0.5))
    hyper = h.through(odl.for_steps(walk, 3), lambda level, theta: PROBLEM.outer(level.x, level.theta, theta))
    update = jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, START)))
    gradient = update(PROBLEM.theta)[0]
    e = 1e-3
    for i, direction in enumerate(np.eye(2)):
        at = [float(update(PROBLEM.theta + m * e * direction)[2].value) for m in (-2, -1, 1, 2)]
        np.testing.assert_allclose(gradient[i], (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * e), atol=1e-9)


def test_the_top_level_descends_to_the_minimiser():
    """Few steps a level and warm starts through all three: y, x and theta move together."""
    hyper = top("warm-started implicit", 2, h.warm_started)

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state)
        return (theta - 0.02 * gradient, state), jnp.abs(info.x.theta - PROBLEM.middle_solution(theta)).max()

    run = jax.jit(
        lambda theta: jax.lax.scan(body, (theta, hyper.init(theta, START)), length=400)
    )  # a truncated unroll is biased: two steps of y do not see all of dy/dtheta
    (theta, state), misses = run(PROBLEM.theta)
    assert misses[-1] < 1e-6 < 1e-2 < misses[0]
    np.testing.assert_allclose(state.x.x, PROBLEM.inner_solution(state.x.theta, theta), atol=1e-6)
    exact = top("through implicit")
    gradient = jax.jit(lambda theta: exact.update(theta, exact.init(theta, START))[0])(PROBLEM.minimiser)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)


def test_a_level_remembers_its_worst_update():
    """The first solve from afar runs out of steps; the later ones, warm, converge."""
    below = odl.gradient_descent(lambda x, y: 0.5 * (x - y) ** 2, step_size=0.5)
    solver = odl.implicit(odl.until_converged(below, tol=1e-3, max_steps=12))
    middle = h.descend(lambda theta: h.warm_started(solver, lambda x, y: (x - theta) ** 2), optax.sgd(0.01))
    step = jax.jit(lambda level, state, k: middle.step(level, state, 1.0, k))
    level, codes = h.Level(jnp.asarray(1.0), jnp.asarray(1e4)), []
    state = middle.init(level, 1.0)
    for k in range(4):
        level, state = step(level, state, k)
        codes.append(odl.Status(int(state.status)))
    assert float(abs(level.x - level.theta)) < 0.01  # the last updates were good
    assert codes[0] is codes[-1] is odl.Status.STEP_BUDGET_SPENT


def counting(steps_of_x):
    """A middle level whose inner walk counts its steps in a leaf of its own."""

    def build(theta):
        def T(x, y):
            slope = jax.grad(PROBLEM.inner)(x["x"], y, theta)
            return {"x": x["x"] - PROBLEM.inner_step_size * slope, "count": x["count"] + 1.0}

        solver = odl.for_steps(odl.fixed_point(T), steps_of_x)
        return h.warm_started(solver, lambda x, y: PROBLEM.middle(x["x"], y, theta))

    return build


def test_each_level_has_its_own_frequency():
    """Two updates of theta, three of y for each, five of x for each of those."""
    solver = odl.for_steps(h.descend(counting(5), optax.sgd(0.2)), 3)
    hyper = h.warm_started(solver, lambda level, theta: PROBLEM.outer(level.x["x"], level.theta, theta))
    state = hyper.init(PROBLEM.theta, h.Level(PROBLEM.y0, {"x": PROBLEM.x0, "count": jnp.asarray(0.0)}))
    update = jax.jit(hyper.update)
    counts = []
    for _ in range(2):
        _, state, info = update(PROBLEM.theta, state)
        counts.append(float(info.x.x["count"]))
        assert int(info.num_steps) == 3
    assert counts == [15.0, 30.0]
    solution = solver(h.Level(PROBLEM.y0, {"x": PROBLEM.x0, "count": jnp.asarray(0.0)}), PROBLEM.theta)
    assert int(solution.state.estimator.outer.t) == 3
    assert int(solution.state.status) == odl.Status.COMPLETED


def test_a_warm_start_reaches_the_lowest_level():
    """The second update at the same theta starts y and x where the first ended: no inner step is left to take."""
    hyper = top("warm-started implicit", make=h.warm_started)
    update = jax.jit(hyper.update)
    first, state, _ = update(PROBLEM.theta, hyper.init(PROBLEM.theta, START))
    exact = PROBLEM.middle_solution(PROBLEM.theta)
    np.testing.assert_allclose(state.x.theta, exact, atol=1e-12)
    np.testing.assert_allclose(state.x.x, PROBLEM.inner_solution(exact, PROBLEM.theta), atol=1e-12)
    second, state, _ = update(PROBLEM.theta, state)
    np.testing.assert_allclose(first, second, atol=1e-9)
    walk = h.descend(LEVELS["warm-started implicit"][0], optax.sgd(PROBLEM.middle_step_size))
    counted = odl.for_steps(walk, 1)(state.x, PROBLEM.theta).state.estimator
    np.testing.assert_allclose(counted.x, state.x.x, atol=1e-12)


# ---- four levels ----------------------------------------------------------------------------------------------------

# w_1 minimises (w_1 - 0.5 w_2 - w_3)^2 / 2, w_2 minimises (w_1 + w_2 - w_4)^2 / 2 + w_2^2 / 2, w_3 minimises
# (w_1 + w_2 + w_3 - 1)^2 / 2 + (w_3 - w_4)^2 / 2, each with those below it at their solutions; the loss of w_4 is
# (w_1 - 1)^2 / 2 + (w_2 + w_3)^2 / 2 + w_4^2 / 2.


def four_levels_by_hand(w4):
    """Every level is affine in those above it: rows (coefficients of w_3, w_4 and 1)."""
    # w_1 = w_2 / 2 + w_3, so the loss of w_2 is (1.5 w_2 + w_3 - w_4)^2 / 2 + w_2^2 / 2.
    w2 = 1.5 / 3.25 * np.array([-1.0, 1.0, 0.0])
    w1 = 0.5 * w2 + np.array([1.0, 0.0, 0.0])
    w3 = np.array([1.0, 0.0, 0.0])
    total = w1 + w2 + w3 - np.array([0.0, 0.0, 1.0])
    away = w3 - np.array([0.0, 1.0, 0.0])
    # d/dw_3: total_0 (total) + away_0 (away) = 0
    row = total[0] * total + away[0] * away
    third = -np.array([0.0, row[1], row[2]]) / row[0]
    first, second = w1[0] * third + [0, w1[1], w1[2]], w2[0] * third + [0, w2[1], w2[2]]
    at = lambda row: row[1] * w4 + row[2]
    gradient = (at(first) - 1) * first[1] + (at(second) + at(third)) * (second[1] + third[1]) + w4
    return gradient, at(first), at(second), at(third)


def test_four_levels():
    def second(w3, w4):
        below = odl.gradient_descent(lambda w1, w2: 0.5 * (w1 - 0.5 * w2 - w3) ** 2, 0.7)
        solver = odl.implicit(odl.for_steps(below, 40))
        return h.through(solver, lambda w1, w2: 0.5 * (w1 + w2 - w4) ** 2 + 0.5 * w2**2)

    def third(w4):
        solver = odl.for_steps(h.descend(lambda w3: second(w3, w4), optax.sgd(0.25)), 25)
        return h.warm_started(
            solver, lambda low, w3: 0.5 * (low.x + low.theta + w3 - 1) ** 2 + 0.5 * (w3 - w4) ** 2
        )  # fmt: skip

    solver = odl.for_steps(h.descend(third, optax.sgd(0.5)), 40)
    hyper = h.through(
        solver,
        lambda level, w4: 0.5 * (level.x.x - 1) ** 2 + 0.5 * (level.x.theta + level.theta) ** 2 + 0.5 * w4**2,
    )
    start = h.Level(jnp.asarray(0.0), h.Level(jnp.asarray(0.0), jnp.asarray(0.0)))
    gradient, _, info = jax.jit(lambda w4: hyper.update(w4, hyper.init(w4, start)))(jnp.asarray(0.7))
    expected, w1, w2, w3 = four_levels_by_hand(0.7)
    np.testing.assert_allclose([info.x.theta, info.x.x.theta, info.x.x.x], [w3, w2, w1], atol=1e-9)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


# ---- what else a level owes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [24, 8], ids=["full", "minibatches"])
def test_a_stochastic_estimator_as_a_level(batch_size):
    """Keys travel in the state; with all rows a batch, end and derivative are those of the closed form."""
    problem = odl.problems.finite_sum()
    data = (problem.inner_data, problem.outer_data)

    def build(theta):
        outer = lambda x, y, rows: problem.outer(x, y, rows) + 0.5 * jnp.sum((y - theta) ** 2)
        return h.soba(problem.inner, outer, step_size=problem.step_size, batch_size=batch_size)

    num_steps = 400 if batch_size == 24 else 20
    solver = odl.for_steps(h.descend(build, optax.sgd(0.2), data=data), num_steps)
    start, weights = h.Level(problem.theta, problem.x0), jnp.asarray([1.0, -2.0])
    ends = lambda theta: (y := solver(start, theta).x.theta, weights @ y)[::-1]
    (_, end), gradient = jax.jit(jax.value_and_grad(ends, has_aux=True))(problem.theta)
    if batch_size == 8:
        assert bool(jnp.all(jnp.isfinite(end) & jnp.isfinite(gradient)))
        return
    # x(y) = B y + z, and the loss of y is |x(y) - c|^2 / 2 + |y|^2 / 2 + |y - theta|^2 / 2 up to a constant.
    zero, one = np.zeros(2), np.eye(2)
    B = np.stack([np.asarray(problem.solution(e) - problem.solution(zero)) for e in one], axis=1)
    curvature = B.T @ B + one
    right = curvature @ np.asarray(problem.minimiser) + np.asarray(problem.theta)
    np.testing.assert_allclose(end, np.linalg.solve(curvature + one, right), atol=1e-9)
    np.testing.assert_allclose(gradient, np.linalg.solve(curvature + one, weights), atol=1e-9)


def test_a_level_of_tasks_needs_no_start():
    """Meta-learning in the middle: the level above learns the inner step size of MAML."""
    goals = jnp.asarray([1.0, 2.0, 4.0])
    loss = lambda x, y, goal: 0.5 * (x - goal) ** 2

    def build(theta):
        return h.maml(loss, loss, num_steps=2, step_size=lambda k: jnp.exp(theta))

    walk = h.descend(build, optax.sgd(1.0), data=(goals, goals))
    hyper = h.through(odl.for_steps(walk, 200), lambda level, theta: 0.5 * jnp.mean((level.theta - goals) ** 2))
    theta = jnp.log(jnp.asarray(0.3))
    gradient, _, info = jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, h.Level(jnp.asarray(0.0), None))))(
        theta
    )
    np.testing.assert_allclose(info.x.theta, jnp.mean(goals), atol=1e-9)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)  # the mean, whatever the step


@pytest.fixture
def as_a_user_has_it():
    """Without the type checker, which the tests bring and which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_a_user_has_it")
def test_structure_dtype_and_messages():
    problem = odl.problems.trilevel(dtype=jnp.float32)
    build = lambda theta: h.soba(
        lambda x, y: problem.inner(x, y, theta), lambda x, y: problem.middle(x, y, theta), step_size=0.5
    )
    solver = odl.for_steps(h.descend(build, optax.sgd(0.1)), 3)
    start = h.Level(problem.y0, problem.x0)
    solution = jax.jit(lambda theta: solver(start, theta))(problem.theta)
    assert {leaf.dtype for leaf in jax.tree.leaves(solution.x)} == {jnp.dtype("float32")}
    assert solution.state.value.dtype == jnp.float32
    assert solver.name == "for_steps(descend)"
    with pytest.raises(TypeError, match="what build\\(theta\\) returns must be a Hypergradient"):
        odl.for_steps(h.descend(lambda theta: theta, optax.sgd(0.1)), 3)(start, problem.theta)
    with pytest.raises(TypeError, match="tx must be a GradientTransformation"):
        h.descend(build, 0.1)
    with pytest.raises(TypeError, match="the iterate must be a Level"):
        solver(problem.y0, problem.theta)
    with pytest.raises(TypeError, match="descend has none"):
        odl.implicit(solver)
    # A bad update below is told above.
    broken = odl.for_steps(h.descend(build, optax.sgd(0.1)), 3)(start, problem.theta * jnp.nan)
    assert int(broken.status) == int(broken.state.status) == odl.Status.NON_FINITE


# ---- what levels rest on: derivatives of derivatives of a solution, inside a loop -----------------------------------


@pytest.mark.parametrize("outside", ["plain", "vmap"])
def test_an_implicit_solver_inside_a_scan_keeps_its_rule_at_every_order(outside):
    """``jax.custom_jvp`` would lose it at the second reverse-mode derivative of the scan."""

    def walk(solver_of, p, q, counts):
        def objective(x, theta):
            p, counts = theta
            return 0.5 * (x - jnp.sin(p) * q * counts[0].astype(float)) ** 2 + 0.05 * x**4

        solver = solver_of(odl.gradient_descent(objective, 0.5))
        step = lambda p, _: (p + 0.3 * solver(jnp.asarray(0.0), (p, counts)).x ** 2, None)
        return jax.lax.scan(step, p, length=2)[0]

    ways = {
        "implicit": lambda walk: odl.implicit(odl.for_steps(walk, 60), odl.linear.dense()),
        "unrolled": lambda walk: odl.for_steps(walk, 60),
    }
    counts = jnp.asarray([1, 2])

    def derivatives(solver_of):
        f = lambda p, q: walk(solver_of, p, q, counts)
        chain = [
            jax.grad(f, 1),
            jax.grad(jax.grad(f, 1), 1),
            jax.grad(jax.grad(jax.grad(f, 0), 1), 0),
            jax.jacfwd(jax.grad(f, 0), 1),
        ]
        all_of = lambda p, q: [one(p, q) for one in chain]
        if outside == "vmap":
            # Each mapped and not, inside and outside of the derivatives.
            both = jax.vmap(all_of, in_axes=(0, None))(jnp.asarray([0.6, 0.7]), jnp.asarray(0.9))
            summed = lambda p, q: jnp.sum(jax.vmap(f, in_axes=(None, 0))(p, jnp.stack([q, 2 * q])))
            return [*both, jax.grad(jax.grad(summed, 1), 0)(jnp.asarray(0.6), jnp.asarray(0.9))]
        return all_of(jnp.asarray(0.6), jnp.asarray(0.9))

    a, b = jax.jit(lambda: (derivatives(ways["implicit"]), derivatives(ways["unrolled"])))()
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_the_trilevel_problem_keeps_its_word():
    for sizes in ((3, 3, 2), (1, 2, 4)):
        problem = odl.problems.trilevel(*sizes, seed=3)
        theta, y = problem.theta, problem.middle_solution(problem.theta)
        x = problem.inner_solution(y, theta)
        np.testing.assert_allclose(jax.grad(problem.inner)(x, y, theta), 0.0, atol=1e-12)
        reduced = lambda y: problem.middle(problem.inner_solution(y, theta), y, theta)
        np.testing.assert_allclose(jax.grad(reduced)(y), 0.0, atol=1e-12)
        np.testing.assert_allclose(problem.hypergradient(problem.minimiser), 0.0, atol=1e-11)
        assert problem.middle_step_size <= 1 / np.linalg.eigvalsh(jax.hessian(reduced)(y))[-1] * (1 + 1e-9)
    with pytest.raises(ValueError, match="num_middle"):
        odl.problems.trilevel(2, 0)
