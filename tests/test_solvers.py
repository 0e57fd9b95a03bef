"""The two ways to stop: what they return, when they stop, and what they say about it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import odljax as odl
from odljax import Status, problems

QUADRATIC = problems.quadratic(condition=10.0)
Q = np.asarray(jax.hessian(QUADRATIC.objective)(QUADRATIC.x0, QUADRATIC.theta))
THETA = np.asarray(QUADRATIC.theta)
START = np.random.default_rng(5).standard_normal(6)
DESCENT = odl.gradient_descent(QUADRATIC.objective, step_size=1.0)


def residual(x, theta=THETA, step=1.0):
    return step * np.linalg.norm(Q @ np.asarray(x) - np.asarray(theta))


def status(solution):
    return Status(int(solution.status))


def run(solver, x0=START, theta=THETA):
    return jax.jit(lambda x0, theta: solver(x0, theta))(x0, theta)


def same(first, second):
    """Bit for bit, NaN equal to NaN."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# ---- for_steps -------------------------------------------------------------------------------------------------------


def test_for_steps_takes_its_steps():
    solution = run(odl.for_steps(DESCENT, 7))
    x = START
    for _ in range(7):
        x = x - (Q @ x - THETA)
    np.testing.assert_allclose(solution.x, x, rtol=0, atol=1e-13)
    assert int(solution.num_steps) == 7
    assert status(solution) is Status.COMPLETED
    assert solution.history is None
    assert solution.state == ()
    np.testing.assert_allclose(solution.residual, residual(x), rtol=1e-12)


def test_for_steps_statuses():
    grow = odl.fixed_point(lambda x, theta: theta * x)
    solve = jax.jit(lambda x0, theta: odl.for_steps(grow, 30)(x0, theta))
    assert status(solve(1.0, 0.5)) is Status.COMPLETED
    assert status(solve(1.0, 2.0)) is Status.DIVERGED  # 2^30
    assert status(solve(1.0, 1.5)) is Status.COMPLETED  # 1.5^30 is below 1e6
    assert status(solve(1e4, 1.5)) is Status.COMPLETED  # relative to the start
    assert status(solve(1.0, 1e20)) is Status.NON_FINITE
    assert status(solve(np.nan, 0.5)) is Status.NON_FINITE
    assert status(solve(1.0, np.nan)) is Status.NON_FINITE
    assert np.isnan(solve(np.nan, 0.5).x)


def test_for_steps_without_operator():
    walk = odl.iterations.Iteration(lambda x, theta: (), lambda x, s, theta, k: (theta * x, s), None, "walk")
    solve = jax.jit(lambda theta: odl.for_steps(walk, 30, history=True)(1.0, theta))
    fine, bad = solve(0.5), solve(1e30)
    assert fine.residual is None
    assert fine.relative_residual is None
    assert fine.history.residual is None
    assert (status(fine), status(bad)) == (Status.COMPLETED, Status.NON_FINITE)
    # Growth is nothing to complain of where there is no fixed point to approach.
    assert status(solve(2.0)) is Status.COMPLETED


def test_for_steps_judges_divergence_by_the_first_residual():
    """A contraction in large units is no divergence, whatever its residuals."""
    walk = odl.fixed_point(lambda x, theta: x + 0.1 * (theta - x))
    solution = odl.for_steps(walk, 10)(0.0, 1e8)
    assert float(solution.residual) > 1e6
    assert status(solution) is Status.COMPLETED


# ---- until_converged: when it stops ----------------------------------------------------------------------------------


def test_converged():
    solution = run(odl.until_converged(DESCENT, tol=1e-10, max_steps=1000))
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(solution.x, np.linalg.solve(Q, THETA), rtol=0, atol=1e-8)
    assert float(solution.residual) <= 1e-10
    np.testing.assert_allclose(solution.residual, residual(solution.x), rtol=1e-4)
    # At the first iterate that meets the tolerance, and not one step later.
    x, k = START, 0
    while residual(x) > 1e-10:
        x, k = x - (Q @ x - THETA), k + 1
    assert int(solution.num_steps) == k
    np.testing.assert_allclose(solution.x, x, rtol=0, atol=1e-13)


def test_no_step_from_the_solution():
    solution = run(odl.until_converged(DESCENT, tol=1e-8), x0=np.linalg.solve(Q, THETA))
    assert int(solution.num_steps) == 0
    assert status(solution) is Status.CONVERGED
    np.testing.assert_array_equal(solution.x, np.linalg.solve(Q, THETA))


def test_budget_spent():
    solution = run(odl.until_converged(DESCENT, tol=1e-10, max_steps=5))
    assert status(solution) is Status.STEP_BUDGET_SPENT
    assert int(solution.num_steps) == 5
    x = START
    for _ in range(5):
        x = x - (Q @ x - THETA)
    np.testing.assert_allclose(solution.x, x, rtol=0, atol=1e-13)
    # The last step's outcome is looked at: a budget that just suffices is enough.
    exact = odl.until_converged(odl.fixed_point(lambda x, theta: theta), tol=1e-10, max_steps=1)(0.0, 3.0)
    assert (status(exact), int(exact.num_steps), float(exact.x)) == (Status.CONVERGED, 1, 3.0)


def test_stalled_in_float32():
    problem = problems.ridge(dtype=jnp.float32)
    descent = odl.gradient_descent(problem.objective, problem.step_size)
    solution = run(odl.until_converged(descent, tol=1e-12, max_steps=5000), problem.x0, problem.theta)
    assert status(solution) is Status.STALLED
    assert int(solution.num_steps) < 1000
    assert 1e-12 < float(solution.residual) < 1e-5
    double = problems.ridge()  # the same in float64: a quadratic, which vanishing slopes solve
    slope, curvature = jax.grad(double.objective)(double.x0, double.theta), jax.hessian(double.objective)
    want = double.x0 - np.linalg.solve(curvature(double.x0, double.theta), slope)
    np.testing.assert_allclose(solution.x, want, rtol=0, atol=2e-6)
    # The same tolerance is met in float64, and a looser one in float32.
    assert status(run(odl.until_converged(descent, tol=1e-5), problem.x0, problem.theta)) is Status.CONVERGED
    descent = odl.gradient_descent(double.objective, double.step_size)
    assert status(run(odl.until_converged(descent, tol=1e-12), double.x0, double.theta)) is Status.CONVERGED


def test_ever_smaller_by_a_hair_is_a_stall():
    """Rounding of the large number hides the small one, whose residual falls by a hundredth in just over 100 steps."""
    rates = jnp.array([0.0, 8e-5])
    creep = odl.fixed_point(lambda x, theta: x - rates * x)
    start = jnp.array([1e10, 1.0])
    solution = run(odl.until_converged(creep, tol=1e-9, max_steps=3000), start, None)
    assert status(solution) is Status.STALLED
    assert int(solution.num_steps) < 500


def test_a_plateau_above_rounding_is_not_a_stall():
    """Momentum lets the residual rise for long; the walk goes on."""
    walk = odl.heavy_ball(DESCENT, momentum=0.97)
    solution = run(odl.until_converged(walk, tol=1e-9, max_steps=3000, history=True))
    assert status(solution) is Status.CONVERGED
    rows = np.asarray(solution.history.residual[: int(solution.num_steps)])
    longest = max(np.diff(np.flatnonzero(rows == np.minimum.accumulate(rows))))
    assert longest > 25  # steps without a smaller residual


def test_diverged():
    wild = odl.gradient_descent(QUADRATIC.objective, step_size=3.0)
    solution = run(odl.until_converged(wild, tol=1e-10, max_steps=1000))
    assert status(solution) is Status.DIVERGED
    eps, steepest = np.finfo(float).eps, 3.0 * np.linalg.eigvalsh(Q).max() - 1.0
    growth = float(solution.residual) / residual(START)
    assert eps**-2 < growth < steepest * eps**-2  # the first step beyond
    cut = run(odl.until_converged(wild, tol=1e-10, max_steps=40))  # at the end of the budget a million times will do
    assert status(cut) is Status.DIVERGED
    assert 1e6 < float(cut.residual) / residual(START) < eps**-2
    early = run(odl.until_converged(wild, tol=1e-10, max_steps=5))
    assert status(early) is Status.STEP_BUDGET_SPENT


@pytest.mark.parametrize("unit", [1.0, 2.0**40, 2.0**-40])
def test_growth_from_an_unstable_point_is_no_divergence(unit):
    """Logistic growth and a double well, started a billionth of the way: they arrive, in any unit."""
    growth = odl.fixed_point(lambda x, theta: x + 0.5 * x * (1 - x / theta))
    well = odl.gradient_descent(lambda x, theta: 0.25 * (x**2 - theta**2) ** 2 / theta**2, 0.3)
    for walk, steps in ((growth, 71), (well, 94)):
        solution = odl.until_converged(walk, tol=0.0, relative_tol=1e-6, max_steps=500)(1e-9 * unit, unit)
        assert status(solution) is Status.CONVERGED
        assert int(solution.num_steps) == steps
        assert abs(float(solution.x) / unit - 1) < 1e-5


def test_non_finite_wherever_it_comes_from():
    root = odl.fixed_point(lambda x, theta: x - 0.1 * (x - theta) / jnp.sqrt(x - 0.5))  # leaves its domain at 1/2
    solve = jax.jit(lambda x0, theta: odl.until_converged(root, tol=1e-8, max_steps=500)(x0, theta))
    good = solve(2.0, 1.0)
    assert status(good) is Status.CONVERGED
    for x0, theta in ((np.nan, 1.0), (np.inf, 1.0), (2.0, np.nan), (2.0, np.inf)):
        bad = solve(x0, theta)
        assert (status(bad), int(bad.num_steps)) == (Status.NON_FINITE, 0)
        assert not np.isfinite(bad.x)  # it shows in x, also where it came in with theta
    on_the_way = solve(2.0, -1.0)
    assert status(on_the_way) is Status.NON_FINITE
    assert int(on_the_way.num_steps) > 3
    assert not np.isfinite(on_the_way.residual)
    assert not np.isfinite(on_the_way.x)


def test_relative_tolerance():
    solution = run(odl.until_converged(DESCENT, tol=0.0, relative_tol=1e-3, max_steps=1000))
    assert status(solution) is Status.CONVERGED
    assert float(solution.residual) <= 1e-3 * np.linalg.norm(solution.x)
    slope, walk = lambda x: Q @ x - THETA, [START]
    for _ in range(int(solution.num_steps)):
        walk.append(walk[-1] - slope(walk[-1]))
    steepest = max(np.linalg.norm(slope(b) - slope(a)) / np.linalg.norm(b - a) for a, b in itertools.pairwise(walk))
    scale = steepest * np.linalg.norm(walk[-1])
    np.testing.assert_allclose(solution.relative_residual, np.linalg.norm(slope(walk[-1])) / scale, rtol=1e-9)
    tight = run(odl.until_converged(DESCENT, tol=1e-3, max_steps=1000))
    assert np.linalg.norm(solution.x) > 1
    assert int(solution.num_steps) < int(tight.num_steps)  # |x| is above one
    zero = run(odl.for_steps(odl.fixed_point(lambda x, theta: jnp.zeros_like(x)), 1))
    assert float(zero.relative_residual) == 0.0


# ---- the residual is the operator's ----------------------------------------------------------------------------------

WALKS = {
    "krasnoselskii_mann": lambda inner: odl.krasnoselskii_mann(inner, relaxation=0.3),
    "nesterov": odl.nesterov,
    "heavy_ball": lambda inner: odl.heavy_ball(inner, momentum=0.5),
    "anderson": lambda inner: odl.anderson(inner, memory=3),
    "nested": lambda inner: odl.anderson(odl.krasnoselskii_mann(inner), memory=2),
    "proximal_gradient": lambda inner: odl.proximal_gradient(QUADRATIC.objective, lambda v, theta, s: v, step_size=0.5),
    "from_optax": lambda inner: odl.from_optax(QUADRATIC.objective, optax.sgd(0.5)),
}


@pytest.mark.parametrize("name", list(WALKS))
def test_the_residual_is_that_of_the_operator_at_the_x_returned(name):
    walk = WALKS[name](odl.gradient_descent(QUADRATIC.objective, step_size=0.5))

    def both(x0, theta):
        record = lambda x, theta, k: x
        fixed = odl.for_steps(walk, 6, record=record)(x0, theta)
        return fixed, odl.until_converged(walk, tol=1e-9, max_steps=3000, record=record)(x0, theta)

    fixed, stopped = jax.jit(both)(START, THETA)
    np.testing.assert_allclose(fixed.residual, residual(fixed.x), rtol=1e-12)
    np.testing.assert_allclose(fixed.history.residual, [residual(x) for x in fixed.history.recorded], rtol=1e-12)
    assert status(stopped) is Status.CONVERGED
    np.testing.assert_allclose(stopped.residual, residual(stopped.x), rtol=1e-5)
    want = [residual(x) for x in stopped.history.recorded[:6]]
    np.testing.assert_allclose(stopped.history.residual[:6], want, rtol=1e-12)
    np.testing.assert_allclose(stopped.x, np.linalg.solve(Q, THETA), rtol=0, atol=1e-7)


def test_the_state_is_the_last_one():
    solution = run(odl.for_steps(odl.nesterov(DESCENT), 4, record=lambda x, theta, k: x))
    previous, inner = solution.state
    np.testing.assert_array_equal(previous, solution.history.recorded[-1])
    assert inner == ()
    state = run(odl.for_steps(odl.anderson(DESCENT, memory=3), 5, record=lambda x, theta, k: x)).state
    assert state.iterates.shape == (3, 6)
    assert state.gram.shape == (3, 3)
    cosines = lambda gram: gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))  # each row in a unit of its own
    np.testing.assert_allclose(cosines(state.gram), cosines(state.steps @ state.steps.T), rtol=0, atol=1e-12)


# ---- history ---------------------------------------------------------------------------------------------------------


def test_history_of_until_converged():
    solver = odl.until_converged(
        DESCENT, tol=1e-2, max_steps=60, record=lambda x, theta, k: {"x": x, "k": k, "sum": jnp.sum(x - theta)}
    )
    solution = run(solver)
    steps = int(solution.num_steps)
    assert 3 < steps < 55
    rows, recorded = np.asarray(solution.history.residual), solution.history.recorded
    assert rows.shape == (60,)
    assert recorded["x"].shape == (60, 6)
    x = START
    for k in range(steps):  # row k belongs to the iterate from which step k starts
        np.testing.assert_allclose(recorded["x"][k], x, rtol=0, atol=1e-13)
        np.testing.assert_allclose(recorded["sum"][k], np.sum(x - THETA), rtol=0, atol=1e-12)
        np.testing.assert_allclose(rows[k], residual(x), rtol=1e-10)
        assert int(recorded["k"][k]) == k
        x = x - (Q @ x - THETA)
    assert np.isnan(rows[steps:]).all()
    assert np.isnan(recorded["x"][steps:]).all()
    assert not np.isnan(recorded["x"][:steps]).any()
    np.testing.assert_array_equal(recorded["k"][steps:], 0)
    np.testing.assert_allclose(solution.x, x, rtol=0, atol=1e-13)
    assert float(solution.residual) < rows[steps - 1]


def test_history_of_for_steps():
    solution = run(odl.for_steps(DESCENT, 5, history=True))
    assert solution.history.recorded is None
    assert solution.history.residual.shape == (5,)
    np.testing.assert_allclose(solution.history.residual[0], residual(START), rtol=1e-12)
    assert np.isfinite(solution.history.residual).all()
    assert (np.diff(solution.history.residual) < 0).all()
    assert float(solution.residual) < float(solution.history.residual[-1])


# ---- the masked loop, and batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-2, 1e-30], ids=["stops", "spends its budget"])
def test_the_masked_loop_is_the_while_loop_bit_for_bit(tol):
    walk = odl.anderson(
        odl.krasnoselskii_mann(DESCENT, relaxation=lambda k: 0.5 + 0.5 / (k.astype(float) + 1.0)), memory=2
    )
    solver = odl.until_converged(walk, tol=tol, max_steps=20, record=lambda x, theta, k: (x, k))
    roads = (solver, odl.unrolled(solver), odl.unrolled(solver, checkpoint_every=4))
    loop, masked, segmented = jax.jit(lambda x0, theta: [road(x0, theta) for road in roads])(START, THETA)
    assert (int(loop.num_steps) < 20) == (tol > 1e-10)
    same(loop, masked)
    same(loop, segmented)


def test_the_masked_loop_keeps_a_bad_ending_as_it_is():
    grow = odl.fixed_point(lambda x, theta: theta * x)
    solver = odl.until_converged(grow, tol=1e-3, max_steps=40)
    solve = jax.jit(lambda theta: (solver(1.0, theta), odl.unrolled(solver)(1.0, theta)))
    for theta, code in ((2.5, Status.DIVERGED), (1e200, Status.NON_FINITE), (1.1, Status.STEP_BUDGET_SPENT)):
        loop, masked = solve(theta)
        same(loop, masked)
        assert status(loop) is code


@pytest.mark.parametrize("masked", [False, True], ids=["while", "masked"])
def test_in_a_batch_each_element_stops_by_itself(masked):
    walk = odl.nesterov(odl.fixed_point(lambda x, theta: theta * x + 1.0), momentum=0.1)
    solver = odl.until_converged(walk, tol=1e-6, max_steps=60, record=lambda x, theta, k: k)
    solver = odl.unrolled(solver) if masked else solver
    one = jax.jit(lambda x0, theta: solver(x0, theta))
    thetas, starts = np.array([0.1, 0.6, 0.95, 40.0, np.nan]), np.linspace(0.0, 1.0, 5)
    batch = jax.jit(jax.vmap(lambda x0, theta: solver(x0, theta)))(starts, thetas)
    codes = [Status(int(code)) for code in batch.status]
    assert codes == [Status.CONVERGED] * 2 + [Status.STEP_BUDGET_SPENT, Status.DIVERGED, Status.NON_FINITE]
    assert len(set(batch.num_steps.tolist())) == 5
    for i in range(5):
        alone = one(starts[i], thetas[i])
        jax.tree.map(
            lambda together, single: np.testing.assert_allclose(together[i], single, rtol=1e-12, atol=1e-14),
            batch,
            alone,
        )


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_hands_on_what_is_good():
    fine = run(odl.until_converged(DESCENT, tol=1e-6))
    assert odl.check(fine) is fine
    completed = run(odl.for_steps(DESCENT, 2))
    assert odl.check(completed) is completed


@pytest.mark.parametrize(
    ("theta", "steps", "words"),
    [
        (0.99, 5, r"solver: STEP_BUDGET_SPENT: .* raise max_steps"),
        (9.0, 50, r"solver: DIVERGED: .* take a smaller step size"),
        (np.nan, 5, r"solver: NON_FINITE: .* look at them"),
    ],
)
def test_check_raises(theta, steps, words):
    solver = odl.until_converged(odl.fixed_point(lambda x, theta: theta * x + 1.0), tol=1e-9, max_steps=steps)
    with pytest.raises(RuntimeError, match=words):
        odl.check(run(solver, 0.0, theta))


def test_check_on_batches_names_and_infos():
    solver = odl.until_converged(odl.fixed_point(lambda x, theta: theta * x + 1.0), tol=1e-6, max_steps=60)
    batch = jax.jit(jax.vmap(jax.vmap(lambda theta: solver(0.0, theta))))(np.array([[0.1, 0.2, 0.99], [0.3, 9.0, 9.0]]))
    with pytest.raises(
        RuntimeError, match=r"inner: DIVERGED in 2 of 6 elements, first at index \(1, 1\): the residual"
    ):
        odl.check(batch, name="inner")
    good = jax.tree.map(lambda leaf: leaf[0, :2], batch)
    assert odl.check(good) is good
    hyper = odl.hypergradients.through(odl.implicit(solver), lambda x, theta: x**2)
    for theta, bad in ((0.5, False), (0.99, True)):
        _, _, info = jax.jit(hyper.update)(theta, hyper.init(theta, 0.0))
        if bad:
            with pytest.raises(RuntimeError, match="STEP_BUDGET_SPENT"):
                odl.check(info)
        else:
            assert odl.check(info) is info
    with pytest.raises(TypeError, match=r"check: the status is traced; return the solution .* check it outside"):
        jax.jit(lambda x0: odl.check(solver(x0, 0.5)).x)(1.0)


# ---- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (0.3, lambda theta, k: 0.3),
        (np.float32(0.25), lambda theta, k: 0.25),
        (jnp.asarray(0.3), lambda theta, k: 0.3),
        (lambda k: 1 / (k.astype(float) + 1.5), lambda theta, k: 1 / (k + 1.5)),
        (lambda theta: 0.1 * theta, lambda theta, k: 0.1 * theta),
        (lambda theta, k: theta / (k.astype(float) + 4.0), lambda theta, k: theta / (k + 4.0)),
        (optax.exponential_decay(0.5, 3, 0.5), lambda theta, k: 0.5 * 0.5 ** (k / 3)),
        (optax.piecewise_constant_schedule(0.5, {2: 0.1}), lambda theta, k: 0.5 if k < 2 else 0.05),
    ],
    ids=["float", "numpy", "array", "schedule", "of theta", "of both", "optax", "optax steps"],
)
def test_coefficients(given, value):
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
        walk = odl.krasnoselskii_mann(lambda x, theta: 0.5 * x + theta, relaxation=given)
        solution = run(odl.for_steps(walk, 5), 2.0, 0.7)
    x = 2.0
    for k in range(5):
        x = x + value(0.7, k) * (0.5 * x + 0.7 - x)
    np.testing.assert_allclose(solution.x, x, rtol=1e-6 if "optax" in str(given) else 1e-14)


def test_a_coefficient_of_theta_is_differentiated():
    walk = odl.gradient_descent(lambda x, theta: 0.5 * (x - 1.0) ** 2, step_size=lambda theta: theta)
    slope = jax.jit(jax.grad(lambda theta: odl.for_steps(walk, 3)(0.0, theta).x))(0.2)
    np.testing.assert_allclose(slope, 3 * 0.8**2, rtol=1e-13)  # x = 1 - (1 - theta)^3


def test_each_transform_takes_a_schedule():
    def numpy_nesterov(x, momentum):
        last = x
        for k in range(4):
            ahead = x + momentum(k) * (x - last)
            last, x = x, ahead - 0.4 * (ahead - 0.7)
        return x

    def numpy_heavy_ball(x, momentum):
        last = x
        for k in range(4):
            last, x = x, x - 0.4 * (x - 0.7) + momentum(k) * (x - last)
        return x

    inner = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.4)
    schedule = lambda k: 0.5 / (k.astype(float) + 1.0)
    for transform, reference in ((odl.nesterov, numpy_nesterov), (odl.heavy_ball, numpy_heavy_ball)):
        got = run(odl.for_steps(transform(inner, momentum=schedule), 4), 3.0, 0.7).x
        np.testing.assert_allclose(got, reference(3.0, lambda k: 0.5 / (k + 1)), rtol=1e-14)
    # The default momentum k / (k + 3).
    np.testing.assert_allclose(
        run(odl.for_steps(odl.nesterov(inner), 4), 3.0, 0.7).x, numpy_nesterov(3.0, lambda k: k / (k + 3)), rtol=1e-6
    )
    falling = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=schedule)
    solution = run(odl.for_steps(falling, 3), 3.0, 0.7)
    np.testing.assert_allclose(solution.x, 0.7 + 2.3 * 0.5 * 0.75 * (1 - 1 / 6), rtol=1e-14)
    np.testing.assert_allclose(solution.residual, solution.x - 0.7, rtol=1e-13)  # the gradient, whatever the step


# ---- layered, optax, anderson, nesterov ------------------------------------------------------------------------------


def test_layers():
    network = odl.layered(lambda x, layer: jnp.tanh(layer["weight"] * x + layer["shift"]))
    theta = {"weight": np.array([0.5, 2.0, -1.0, 9.0]), "shift": np.array([0.1, 0.0, 0.3, 9.0])}
    solution, slopes = jax.jit(
        lambda theta: (
            odl.for_steps(network, 3)(0.8, theta),
            jax.grad(lambda t: odl.for_steps(network, 3)(0.8, t).x)(theta),
        )
    )(theta)
    x = 0.8
    for weight, shift in zip(theta["weight"][:3], theta["shift"][:3], strict=True):
        x = np.tanh(weight * x + shift)
    np.testing.assert_allclose(solution.x, x, rtol=1e-14)
    assert solution.residual is None
    assert status(solution) is Status.COMPLETED
    # The budget is three steps: the fourth layer is not touched.
    assert (np.asarray(slopes["weight"])[:3] != 0).all()
    assert float(slopes["weight"][3]) == float(slopes["shift"][3]) == 0.0
    checkpointed = jax.jit(jax.grad(lambda t: odl.unrolled(odl.for_steps(network, 3), checkpoint_every=2)(0.8, t).x))(
        theta
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), slopes, checkpointed)


def test_from_optax_adam_with_a_schedule():
    """Step by step what optax does by hand."""
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.adam(optax.exponential_decay(0.3, 10, 0.8))
        solution = run(odl.for_steps(odl.from_optax(QUADRATIC.objective, tx), 25), jnp.asarray(START))

        @jax.jit
        def by_hand(x, theta):
            state = tx.init(x)
            for _ in range(25):
                updates, state = tx.update(jax.grad(QUADRATIC.objective)(x, theta), state, x)
                x = optax.apply_updates(x, updates)
            return x

        np.testing.assert_allclose(solution.x, by_hand(jnp.asarray(START), jnp.asarray(THETA)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(solution.residual, residual(solution.x), rtol=1e-12)  # of the unit gradient step
    assert int(solution.state[0].count) == 25


@pytest.mark.parametrize("name", ["lbfgs", "backtracking"])
def test_from_optax_with_a_line_search(name):
    tx = {
        "lbfgs": lambda: optax.lbfgs(),
        "backtracking": lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
        ),
    }[name]()
    with jax.numpy_dtype_promotion("standard"):
        solver = odl.until_converged(odl.from_optax(QUADRATIC.objective, tx), tol=1e-6, max_steps=400)
        solution = run(solver, jnp.asarray(START))
    assert status(solution) is Status.CONVERGED
    np.testing.assert_allclose(solution.x, np.linalg.solve(Q, THETA), rtol=0, atol=2e-5)
    if name == "lbfgs":
        assert int(solution.num_steps) < 40


def test_anderson_is_faster_than_picard_and_stays_finite_once_converged():
    slow = problems.quadratic(condition=300.0)
    picard = odl.gradient_descent(slow.objective, step_size=1.0)
    fast = odl.anderson(picard, memory=7)
    counts = [
        int(run(odl.until_converged(walk, tol=1e-8, max_steps=10000), slow.x0, slow.theta).num_steps)
        for walk in (picard, fast)
    ]
    assert counts[1] < 30 < 20 * counts[1] < counts[0]

    def value(theta):
        solution = odl.for_steps(fast, 150)(slow.x0, theta)
        return slow.outer(solution.x, theta), solution

    (_, solution), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(slow.theta)
    np.testing.assert_allclose(solution.x, slow.solution(slow.theta), rtol=0, atol=1e-9)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope, slow.hypergradient(slow.theta), rtol=1e-5, atol=1e-6)
    # From the solution itself: every step is zero or rounding.
    at_rest = lambda theta: slow.outer(odl.for_steps(fast, 9)(0 * theta, theta).x, theta)
    for got in jax.jit(jax.value_and_grad(at_rest))(np.zeros(6)):
        assert np.isfinite(got).all()


def test_nesterov_keeps_its_rate():
    """f(x_k) - f* <= 2 |x_0 - x*|^2 L / (k + 1)^2, where gradient descent is far behind."""
    flat = problems.quadratic(condition=1e6, size=8)
    truth = np.asarray(flat.solution(flat.theta))
    start = truth + 1.0
    descent = odl.gradient_descent(flat.objective, step_size=1.0)
    objective = lambda x, theta, k: flat.objective(x, theta)

    def curves(x0, theta):
        return [odl.for_steps(walk, 300, record=objective)(x0, theta) for walk in (odl.nesterov(descent), descent)]

    fast, plain = (
        s.history.recorded - flat.objective(jnp.asarray(truth), flat.theta) for s in jax.jit(curves)(start, flat.theta)
    )
    k = np.arange(300)
    assert (fast <= 2 * 8.0 / (k + 1.0) ** 2 + 1e-9).all()
    assert float(fast[-1]) < 0.1 * float(plain[-1])


def test_nesterov_with_strong_convexity_is_linear_in_the_root_of_the_condition():
    problem = problems.quadratic(condition=100.0)
    descent = odl.gradient_descent(problem.objective, step_size=1.0)
    beta = (1 - 0.1) / (1 + 0.1)
    counts = [
        int(run(odl.until_converged(walk, tol=1e-9, max_steps=5000), problem.x0, problem.theta).num_steps)
        for walk in (odl.nesterov(descent, momentum=beta), descent)
    ]
    assert counts[0] < 260  # (1 - 1/10)^k, and a factor k
    assert counts[0] < counts[1] / 6
