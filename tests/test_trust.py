"""The truth about the error: its estimate, tolerances tied to the outer step, failed adjoints, and the comparison."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from estimators import OF_SOLVERS
from jaxtyping import config

import odljax as odl
from odljax.hypergradients import hoag, through, warm_started


@pytest.fixture
def as_a_user_has_it():
    """Without the type checker, which the tests bring and which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


SIZE = 8


def quadratic(data, scales, x, theta):
    rows, labels = data
    residual = rows @ (scales * x) - labels
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.exp(theta) * jnp.min(scales) ** 2 * jnp.sum(x**2)


def logistic(data, scales, x, theta):
    rows, labels = data
    margin = labels * (rows @ (scales * x))
    return jnp.mean(jax.nn.softplus(-margin)) + 0.5 * jnp.exp(theta) * jnp.min(scales) ** 2 * jnp.sum(x**2)


def outer(data, x, theta):
    rows, labels = data
    return jnp.mean(jax.nn.softplus(-labels * (rows @ x))) + 0.1 * jnp.cos(theta)


def drawn(seed):
    """Rows and labels, for training and for validation."""
    rng = np.random.default_rng(seed)
    rows, labels = rng.standard_normal((2, 3 * SIZE, SIZE)), np.sign(rng.standard_normal((2, 3 * SIZE)))
    return [(jnp.asarray(rows[i]), jnp.asarray(labels[i])) for i in range(2)]


def truth(objective, outer, theta):
    """Newton's method to rounding, then a dense adjoint solve."""

    def newton(x, _):
        step = jnp.linalg.solve(jax.hessian(objective)(x, theta), jax.grad(objective)(x, theta))
        return x - step / (1 + jnp.linalg.norm(step)), None

    x, _ = jax.lax.scan(newton, jnp.zeros(SIZE), length=1000)
    v = jnp.linalg.solve(jax.hessian(objective)(x, theta), jax.grad(outer)(x, theta))
    return jax.grad(outer, argnums=1)(x, theta) - jax.jacfwd(jax.grad(objective), argnums=1)(x, theta) @ v


@pytest.mark.parametrize("loss", [quadratic, logistic])
def test_error_estimate_bounds_the_error_and_is_near_it(loss):
    """Random problems, conditions to 1e5, inner and adjoint tolerances from loose to tight, or a spent budget."""
    theta = jnp.asarray(0.3)

    @jax.jit
    def report(training, validation, scales, tol, adjoint_tol):
        iteration = odl.nesterov(odl.gradient_descent(functools.partial(loss, training, scales), 0.2))
        solver = odl.until_converged(iteration, tol=tol * jnp.min(scales), max_steps=1000)
        solver = odl.implicit(solver, odl.linear.cg(tol=adjoint_tol))
        hyper = through(solver, functools.partial(outer, validation), error_estimate=True)
        gradient, _, info = hyper.update(theta, hyper.init(theta, jnp.zeros(SIZE)))
        return gradient, info.error

    @jax.jit
    def exact(training, validation, scales):
        return truth(functools.partial(loss, training, scales), functools.partial(outer, validation), theta)

    ratios = []
    for seed, condition in itertools.product(range(5), (1e1, 1e3, 1e5)):
        scales = jnp.geomspace(condition**-0.5, 1.0, SIZE)
        reference = exact(*drawn(seed), scales)
        for tol, adjoint_tol in ((1e-1, 1e-1), (1e-1, 1e-6), (1e-2, 1e-3), (1e-4, 1e-1), (1e-5, 1e-9)):
            gradient, error = report(*drawn(seed), scales, tol, adjoint_tol)
            ratios.append(float(error) / float(jnp.abs(gradient - reference)))
    assert min(ratios) >= 1.0, ratios
    assert np.exp(np.mean(np.log(ratios))) <= 10.0, ratios


@pytest.mark.parametrize("name", ["ridge", "lasso"])
def test_error_estimate_of_biased_estimators(name):
    """One step, truncated, unrolled short, on symmetric and non-symmetric operators; the corrected one is better."""
    problem = getattr(odl.problems, name)(30, 5)
    exact = problem.hypergradient(problem.theta)
    iteration = odl.gradient_descent(problem.objective, problem.step_size)
    if problem.prox is not None:
        iteration = odl.proximal_gradient(problem.objective, problem.prox, problem.step_size)
    long, short = odl.for_steps(iteration, 100), odl.for_steps(iteration, 20)
    solvers = [odl.one_step(long), odl.truncated(long, num_steps=5), odl.unrolled(short), odl.implicit(short)]
    for solver in solvers:
        hyper = through(solver, problem.outer)
        gradient, _, info = jax.jit(hyper.update)(problem.theta, hyper.init(problem.theta, problem.x0))
        report = jax.jit(
            lambda x, g, solver=solver: odl.diagnostics.hypergradient_error(solver, problem.outer, x, problem.theta, g)
        )(info.x, gradient)
        error = float(jnp.abs(gradient - exact))
        assert error <= float(report.error) <= 10 * error
        assert float(jnp.abs(report.corrected - exact)) <= 0.01 * error
        inside = float(jnp.linalg.norm(info.x - problem.solution(problem.theta)))
        np.testing.assert_allclose(report.inner_error, inside, rtol=0.05, atol=1e-12)


def test_error_estimate_does_not_promise_what_it_cannot_know():
    """Where the linear solve fails, or Newton's step does not shrink the residual, the error is infinite."""
    report = odl.diagnostics.hypergradient_error(lambda x, t: x + t, lambda x, t: x**2, 1.0, 1.0, 0.0)
    assert report.error == jnp.inf
    wild = lambda x, theta: x - jnp.arctan(x - theta)  # Newton overshoots from afar
    report = odl.diagnostics.hypergradient_error(wild, lambda x, t: x**2, 9.0, 1.0, 18.0)
    assert report.error == jnp.inf
    walk = odl.aggregate(wild, lambda x, t: x**2, step_size=0.1)
    with pytest.raises(TypeError, match="inner needs an operator, and aggregate"):
        odl.diagnostics.hypergradient_error(walk, lambda x, t: x**2, 1.0, 1.0, 0.0)


def test_error_estimate_sees_what_the_right_sides_hardly_show():
    """Condition 1e6: the direction that carries the gradient is 5e-4 of the outer gradient, and 1e-6 of a step."""
    curvature, slope = jnp.asarray([1.0, 1e-6]), jnp.asarray([1.0, 5e-4])
    inner = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum(curvature * x**2) - jnp.sum(x * theta), 1.0)
    outer = lambda x, theta: jnp.sum(slope * x)

    @jax.jit
    def report(unit, x):
        scaled = lambda x, theta: unit * outer(x, theta)
        short = odl.implicit(odl.for_steps(inner, 1), odl.linear.neumann(20), on_failure="ignore")
        hyper = through(short, scaled, error_estimate=True)
        theta = curvature * x
        gradient, _, info = hyper.update(theta, hyper.init(theta, x))
        alone = odl.diagnostics.hypergradient_error(inner, scaled, x, theta, gradient)
        return gradient, info.error, alone.error

    truth = slope / curvature
    for unit in (1e-30, 1.0, 1e30):
        gradient, *estimates = report(unit, jnp.asarray([0.3, 2.0]))
        error = float(jnp.linalg.norm(gradient / unit - truth))
        assert error > 400
        for estimate in estimates:
            assert error <= float(estimate) / unit <= 3 * error


RIDGE = odl.problems.ridge(30, 5)
DESCENT = odl.gradient_descent(RIDGE.objective, RIDGE.step_size)


def test_failed_adjoint_policies():
    """Two steps of conjugate gradients are too few: kept, zeroed or replaced, and always told."""
    solver = odl.until_converged(DESCENT, tol=1e-12, max_steps=500)
    failing = odl.implicit(solver, odl.linear.cg(tol=1e-12, max_steps=2))
    sound = odl.implicit(solver)

    @jax.jit
    def gradients():
        results = {}
        for policy, make in itertools.product(("keep", "zero", "one_step"), (through, warm_started)):
            for name, one in (("failing", failing), ("sound", sound)):
                hyper = make(one, RIDGE.outer, on_adjoint_failure=policy)
                gradient, _, info = hyper.update(RIDGE.theta, hyper.init(RIDGE.theta, RIDGE.x0))
                results[policy, make.__name__, name] = gradient, info.status
        hyper = through(odl.one_step(solver), RIDGE.outer)
        return results, hyper.update(RIDGE.theta, hyper.init(RIDGE.theta, RIDGE.x0))[0]

    results, one_step = gradients()
    exact = RIDGE.hypergradient(RIDGE.theta)
    for (policy, _, name), (gradient, status) in results.items():
        if name == "sound":
            assert int(status) == odl.Status.CONVERGED
            np.testing.assert_allclose(gradient, exact, rtol=1e-9)
            continue
        assert int(status) == odl.Status.STEP_BUDGET_SPENT
        if policy == "keep":
            assert 1e-9 < float(jnp.abs(gradient - exact)) < 0.1 * float(jnp.abs(exact))
        else:
            np.testing.assert_allclose(gradient, 0.0 if policy == "zero" else one_step, rtol=1e-12)


@pytest.mark.usefixtures("as_a_user_has_it")
def test_options_that_cannot_go_together_are_refused():
    unrolled = odl.unrolled(odl.for_steps(DESCENT, 5))
    with pytest.raises(ValueError, match="on_adjoint_failure must be 'keep', 'zero' or 'one_step'; 'ignore' came"):
        through(unrolled, RIDGE.outer, on_adjoint_failure="ignore")
    with pytest.raises(ValueError, match=r"unrolled\(for_steps\(gradient_descent\)\) solves no adjoint system"):
        warm_started(unrolled, RIDGE.outer, on_adjoint_failure="zero")
    walk = odl.for_steps(odl.aggregate(DESCENT, RIDGE.outer, step_size=0.1), 5)
    with pytest.raises(ValueError, match="error_estimate compares with the gradient at the fixed point"):
        through(walk, RIDGE.outer, error_estimate=True)
    with pytest.raises(ValueError, match="tol must lie in"):
        hoag(DESCENT, RIDGE.outer, tol=-1.0)
    with pytest.raises(TypeError, match="until_converged: the residual of an operator is tested"):
        hoag(odl.aggregate(DESCENT, RIDGE.outer, step_size=0.1), RIDGE.outer)
    with pytest.raises(TypeError, match="linear_solver must be a function of"):
        hoag(DESCENT, RIDGE.outer, linear_solver=odl.linear.dense)


def regularised(x, theta):
    return RIDGE.outer(x, theta) + 0.1 * theta**2


def descend(hyper, num_updates, rate):
    tx = optax.sgd(rate)

    def body(carry, _):
        theta, state, opt_state = carry
        gradient, state, info = hyper.update(theta, state)
        updates, opt_state = tx.update(gradient, opt_state)
        return (optax.apply_updates(theta, updates), state, opt_state), (info, theta)

    start = (RIDGE.theta, hyper.init(RIDGE.theta, RIDGE.x0), tx.init(RIDGE.theta))
    (theta, *_), (infos, thetas) = jax.lax.scan(body, start, length=num_updates)
    slopes = jax.vmap(lambda x, theta: jnp.linalg.norm(jax.grad(RIDGE.objective)(x, theta)))(infos.x, thetas)
    return theta, infos, slopes


def test_hoag_ties_its_tolerances_to_the_outer_step():
    """It ends where exact hypergradients end, with fewer inner steps, each residual within its own tolerance."""
    schedule = lambda k: 1e-2 * jnp.exp(-0.2 * k.astype(float))
    hyper = hoag(DESCENT, regularised, tol=schedule, error_estimate=True)
    walk, infos, slopes = jax.jit(lambda: descend(hyper, 60, 1.0))()
    solver = odl.implicit(odl.until_converged(DESCENT, tol=1e-10, max_steps=1000))
    exact, full, _ = jax.jit(lambda: descend(through(solver, regularised), 60, 1.0))()
    tolerances = schedule(np.arange(60))
    np.testing.assert_allclose(infos.inner_residual, slopes, rtol=1e-9, atol=1e-15)
    for residuals in (np.asarray(slopes), np.asarray(infos.adjoint_residual)):
        assert np.all(residuals <= tolerances)
        assert np.median(residuals / tolerances) > 0.01  # and no better than was asked for
    assert int(infos.status.max()) == odl.Status.CONVERGED
    np.testing.assert_allclose(walk, exact, atol=1e-6)
    assert int(infos.num_steps.sum()) < 0.2 * int(full.num_steps.sum())
    assert infos.error[-1] < 1e-3 * infos.error[0]


def test_hoags_own_tolerance_falls_with_the_square_of_the_update():
    asked = []

    def recording(tol):
        jax.debug.callback(lambda value: asked.append(float(value)), tol)
        return odl.linear.cg(tol=tol)

    hyper = hoag(DESCENT, regularised, linear_solver=recording)
    state = hyper.init(RIDGE.theta, RIDGE.x0)
    steepest = float(jnp.linalg.eigvalsh(jax.hessian(RIDGE.objective)(RIDGE.x0, RIDGE.theta))[-1])
    update = jax.jit(hyper.update)
    for t in range(3):
        jax.effects_barrier()
        asked.clear()
        _, state, info = update(RIDGE.theta, state)
        jax.effects_barrier()
        assert asked
        np.testing.assert_allclose(asked, 0.1 / (t + 1) ** 2, rtol=1e-12)
        assert float(info.inner_residual) <= 0.1 / (t + 1) ** 2 * steepest * float(jnp.linalg.norm(info.x))


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_hoags_own_tolerance_has_no_unit(kind):
    """x(theta) = theta: in units from 1e-12 to 1e12 the same inner steps, the same walk, down to a solution of zero."""
    rates = jnp.linspace(0.2, 1.0, 4).astype(kind)

    def walk(unit):
        goal = unit * jnp.array([1.0, 0.5, -0.5, 0.0], kind)
        inner = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum(rates * (x - theta) ** 2), 1.0)
        hyper = hoag(inner, lambda x, theta: 0.5 * jnp.sum(((x - goal) / unit) ** 2))

        def body(carry, _):
            theta, state = carry
            gradient, state, info = hyper.update(theta, state)
            return (theta - 0.3 * unit**2 * gradient, state), (theta / unit, info.num_steps, info.status)

        start = unit * jnp.array([0.0, 0.0, 0.0, 1.0], kind)
        return jax.lax.scan(body, (start, hyper.init(start, jnp.zeros_like(start))), length=60)[1]

    thetas, steps, statuses = jax.jit(jax.vmap(walk))(jnp.array([1e-12, 1.0, 1e12], kind))
    assert int(statuses.max()) <= odl.Status.CONVERGED
    loose = 1e-9 if kind == "float64" else 1e-4
    for i in (0, 2):
        np.testing.assert_allclose(thetas[i], thetas[1], atol=loose)
        assert abs(int(steps[i].sum()) - int(steps[1].sum())) <= (0 if kind == "float64" else 10)
    np.testing.assert_allclose(thetas[1][-1], [1.0, 0.5, -0.5, 0.0], atol=1e-3)


@pytest.mark.parametrize("far", [1e2, 1e6])
def test_hoag_forgets_how_far_its_start_was(far):
    """x(theta) = theta = 1, whatever the first x0, in float32."""
    inner = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), 0.5)
    hyper = hoag(inner, lambda x, theta: 0.5 * jnp.sum(x**2))
    theta = jnp.ones(2, jnp.float32)

    def body(state, _):
        gradient, state, info = hyper.update(theta, state)
        return state, (gradient, info.x, info.status)

    _, (gradients, xs, statuses) = jax.lax.scan(body, hyper.init(theta, far * theta), length=60)
    np.testing.assert_allclose(xs[-1], 1.0, atol=1e-3)
    np.testing.assert_allclose(gradients[-1], 1.0, atol=1e-3)
    assert int(statuses.max()) == odl.Status.CONVERGED


def test_the_adjoint_starts_from_the_last_one_and_the_inner_solve_keeps_its_budget():
    """Two products an update are too few for an adjoint; update by update they add up."""
    short = odl.implicit(odl.until_converged(DESCENT, tol=1e-12, max_steps=500), odl.linear.cg(tol=1e-9, max_steps=2))
    estimators = [
        warm_started(short, RIDGE.outer),
        hoag(DESCENT, RIDGE.outer, tol=1e-9, linear_solver=lambda tol: odl.linear.cg(tol=tol, max_steps=2)),
        through(short, RIDGE.outer),
        hoag(DESCENT, RIDGE.outer, tol=1e-9, max_steps=3),
    ]

    def updates(hyper):
        def body(state, _):
            _, state, info = hyper.update(RIDGE.theta, state)
            return state, info

        return jax.lax.scan(body, hyper.init(RIDGE.theta, RIDGE.x0), length=12)[1]

    warm, hoags, cold, cut = jax.jit(lambda: [updates(hyper) for hyper in estimators])()
    for infos in (warm, hoags):
        assert infos.adjoint_residual[-1] <= 1e-9
        assert infos.adjoint_residual[0] > 1e-3
        assert (int(infos.status[0]), int(infos.status[-1])) == (odl.Status.STEP_BUDGET_SPENT, odl.Status.CONVERGED)
    np.testing.assert_allclose(cold.adjoint_residual, float(cold.adjoint_residual[0]), rtol=1e-9)
    assert (int(cut.num_steps[0]), int(cut.status[0])) == (3, odl.Status.STEP_BUDGET_SPENT)


def test_compare_takes_the_median_of_its_rounds(monkeypatch):
    ticks = itertools.cycle([0.0, 7.0, 10.0, 11.0, 20.0, 25.0, 30.0, 32.0])  # 7 s of compilation, then 1, 5 and 2 s
    monkeypatch.setattr(odl.diagnostics, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    solver = odl.unrolled(odl.for_steps(DESCENT, 2))
    table = odl.diagnostics.compare(
        {"one": through(solver, RIDGE.outer)}, RIDGE.theta, RIDGE.x0, num_updates=1, rounds=3, reference=RIDGE.theta
    )
    assert table.seconds[0] == 2.0
    assert table.compile_seconds[0] == 7.0


def test_compare():
    solver = odl.until_converged(DESCENT, tol=1e-10, max_steps=500)
    estimators = {
        "exact": through(odl.implicit(solver), RIDGE.outer),
        "one step": through(odl.one_step(solver), RIDGE.outer),
        "soba": odl.hypergradients.soba(RIDGE.objective, RIDGE.outer, step_size=RIDGE.step_size),
    }
    run = functools.partial(odl.diagnostics.compare, estimators, RIDGE.theta, RIDGE.x0, num_updates=200, rounds=2)
    table = run(reference=RIDGE.hypergradient(RIDGE.theta))
    assert table.errors[0] < 1e-8
    assert table.errors[1] > 1e-2
    assert table.errors[2] < 1e-6  # at a fixed theta the single loop arrives
    assert table.statuses == [odl.Status.CONVERGED, odl.Status.COMPLETED, odl.Status.COMPLETED]
    np.testing.assert_allclose(table.values, float(RIDGE.value(RIDGE.theta)), rtol=1e-6)
    assert all(size > 0 for size in table.num_bytes + table.seconds + table.compile_seconds)
    lines = str(table).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["estimator", "value", "gradient", "error", "ms", "compile", "ms", "KiB", "status"]
    assert lines[1].split()[-1] == "CONVERGED"
    with pytest.raises(ValueError, match="reference is 'gone', but the estimators are exact, one step, soba"):
        run(reference="gone")
    with pytest.raises(ValueError, match="needs at least one estimator"):
        odl.diagnostics.compare({}, 0.0, 0.0)


def test_every_estimator_of_a_solver_takes_data_and_stands_beside_the_others():
    """One interface: init and update with data, compiled, scanned, and in one table with an estimator of two losses."""
    problem = odl.problems.finite_sum()
    inner = lambda x, theta: problem.inner(x, theta, problem.inner_data)
    descent = odl.gradient_descent(inner, problem.step_size)
    steps, solver = odl.for_steps(descent, 60), odl.until_converged(descent, tol=1e-12, max_steps=200)
    h, rows = odl.hypergradients, (problem.outer_data,)
    estimators = {
        "through": through(odl.implicit(solver), problem.outer),
        "warm_started": warm_started(odl.implicit(solver), problem.outer),
        "hoag": hoag(descent, problem.outer, tol=1e-12),
        "hodl": h.hodl(descent, problem.outer, num_steps=60, weight=0.0, relaxation=1.0),
        "pessimistic": h.pessimistic(steps, problem.outer),
    }
    assert set(estimators) == OF_SOLVERS
    soba = h.soba(problem.inner, problem.outer, step_size=problem.step_size)
    pairs = {**{name: (hyper, rows) for name, hyper in estimators.items()}, "soba": soba}
    data = (problem.inner_data, problem.outer_data)
    exact = problem.hypergradient(problem.theta)
    table = odl.diagnostics.compare(pairs, problem.theta, problem.x0, *data, reference=exact, num_updates=120, rounds=1)
    for name, error in zip(table.names, table.errors, strict=True):
        assert error < 1e-8 or name == "pessimistic", (name, error)
    for hyper in estimators.values():
        shapes = jax.eval_shape(lambda hyper=hyper: hyper.init(problem.theta, problem.x0, *rows))
        after = jax.eval_shape(lambda s, hyper=hyper: hyper.update(problem.theta, s, *rows)[1], shapes)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), after)
