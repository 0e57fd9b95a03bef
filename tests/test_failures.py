"""A failed solve is told once, where its derivative is used, and the alarm changes nothing else."""

import functools
import itertools
import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax import Status

WILD = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), 2.5)
CALM = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), 0.5)


def derivatives(iteration, max_steps, **options):
    stop, run = odl.until_converged(iteration, tol=1e-8, max_steps=max_steps), odl.for_steps(iteration, max_steps)
    return {
        "implicit": odl.implicit(stop, **options),
        "implicit of steps": odl.implicit(run, **options),
        "on_support": odl.on_support(stop, 3, **options),
        "one_step": odl.one_step(stop, **options),
        "phantom": odl.phantom(stop, 2, **options),
        "truncated": odl.truncated(stop, num_steps=2, **options),
        "unrolled": odl.unrolled(stop, **options),
        "forward": odl.forward(stop, **options),
    }


def told(function, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = jax.block_until_ready(function(*arguments))
    return result, [str(warning.message) for warning in caught]


def gradient_of(solver):
    return jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(3), theta).x))


@pytest.mark.parametrize("name", list(derivatives(CALM, 9)))
def test_a_diverged_solve_is_told_by_its_derivative_alone(name):
    solver, theta = derivatives(WILD, 60)[name], jnp.ones(3)
    _, of_value = told(jax.jit(lambda theta: solver(jnp.zeros(3), theta).x), theta)
    assert of_value == []
    _, of_gradient = told(jax.jit(gradient_of(solver)), theta)
    assert len(of_gradient) == 1
    kind = name.split(" ")[0]
    assert of_gradient[0].startswith(f"{kind}: the solve failed (DIVERGED, relative residual 1")
    _, batched = told(jax.jit(jax.vmap(gradient_of(solver))), jnp.stack([theta, 0 * theta, theta]))
    assert len(batched) == 1  # one call for the batch
    # At zero the solve is no failure, but an empty support is, and one step of a map that expands.
    assert f"in {3 if name in ('on_support', 'one_step') else 2} of 3 elements" in batched[0]
    quiet = derivatives(WILD, 60, on_failure="ignore")[name]
    silent, nothing = told(jax.jit(gradient_of(quiet)), theta)
    assert nothing == []
    np.testing.assert_array_equal(silent, jax.jit(gradient_of(solver.quiet))(theta))
    calm, nothing = told(jax.jit(gradient_of(derivatives(CALM, 60)[name])), theta)
    assert nothing == []
    assert np.all(np.isfinite(calm))


def test_a_solve_that_ran_out_of_steps_is_told_where_the_derivative_is_that_of_a_solution():
    for name, solver in derivatives(CALM, 3).items():
        _, messages = told(jax.jit(gradient_of(solver)), jnp.ones(3))
        exact = name not in ("unrolled", "forward")  # theirs is that of the steps
        assert [("STEP_BUDGET_SPENT" in message) for message in messages] == [True] * exact, name
        status = solver(jnp.zeros(3), jnp.ones(3)).status
        assert Status(int(status)) is Status.STEP_BUDGET_SPENT
        with pytest.raises(RuntimeError, match="STEP_BUDGET_SPENT"):
            odl.check(solver(jnp.zeros(3), jnp.ones(3)))


def test_a_fixed_number_of_steps_that_arrived_is_no_failure():
    """Also at a solution of zero, where the residual is never small beside x."""
    for theta in (jnp.ones(3), jnp.zeros(3)):
        solver = odl.implicit(odl.for_steps(CALM, 20))
        solution, messages = told(jax.jit(lambda theta, s=solver: s(jnp.full(3, 4.0), theta)), theta)
        assert Status(int(solution.status)) is Status.COMPLETED
        assert told(jax.jit(gradient_of(solver)), theta)[1] == messages == []


def test_raise_and_unknown_policies():
    solver = odl.implicit(odl.until_converged(WILD, max_steps=60), on_failure="raise")
    with pytest.raises(Exception, match="implicit: the solve failed"):
        jax.block_until_ready(jax.jit(gradient_of(solver))(jnp.ones(3)))
    for derivative in (odl.implicit, odl.one_step, odl.unrolled, odl.forward):
        with pytest.raises(ValueError, match="on_failure must be 'warn', 'ignore' or 'raise'; 'shout' came"):
            derivative(odl.until_converged(CALM), on_failure="shout")


def test_forward_and_adjoint_failure_are_one_message():
    cut = odl.implicit(odl.until_converged(CALM, max_steps=2), odl.linear.cg(max_steps=1))
    tilted = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum(jnp.array([1.0, 0.5, 0.1]) * (x - theta) ** 2), 0.5)
    adjoint = odl.implicit(odl.until_converged(tilted, max_steps=2000), odl.linear.cg(max_steps=1))
    assert [message[:29] for message in told(gradient_of(cut), jnp.ones(3))[1]] == ["implicit: the solve failed (S"]
    (message,) = told(gradient_of(adjoint), jnp.ones(3))[1]
    assert "the adjoint solve failed (STEP_BUDGET_SPENT" in message


@pytest.mark.parametrize("mode", ["warn", "ignore"])
def test_a_solve_of_which_only_the_status_is_read_has_no_derivative(mode):
    """No NaN from it, no adjoint solve in the program."""
    solver = odl.implicit(odl.until_converged(CALM, tol=1e-6, max_steps=100), on_failure=mode)

    def loss(theta, data):
        bad, used = solver(jnp.zeros(3), theta * data[0]), solver(jnp.zeros(3), theta * data[1])
        return jnp.sum(used.x**2) + jnp.where(bad.status <= 1, 0.0, 1.0)

    gradient, messages = told(jax.jit(jax.grad(loss)), 1.0, jnp.array([jnp.nan, 2.0]))
    assert messages == []
    np.testing.assert_allclose(gradient, 24.0, rtol=1e-5)

    def loops(read):
        value = lambda theta: read(solver(jnp.zeros(3), theta * jnp.ones(3)))
        text = jax.jit(jax.grad(value)).lower(2.0).as_text()
        return len(re.findall(r"stablehlo\.while", text))

    assert loops(lambda solution: jnp.sum(solution.x)) > loops(
        lambda solution: jnp.where(solution.status < 1, 1.0, 2.0)
    )


def test_the_alarm_stays_out_of_programs_that_are_kept(tmp_path):
    """The persistent compilation cache keeps no program that calls the host, and no export holds one."""
    from jax.experimental.compilation_cache import compilation_cache

    gradient = gradient_of(odl.implicit(odl.until_converged(CALM, max_steps=3)))
    jax.export.export(jax.jit(gradient))(jnp.ones(3))
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def a_gradient_to_be_kept(theta):
        return gradient(theta)

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        assert told(jax.jit(a_gradient_to_be_kept), jnp.ones(3))[1] == []
        assert any("a_gradient_to_be_kept" in name for name in os.listdir(tmp_path))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_an_adjoint_that_the_loss_does_not_need_is_no_failure():
    """The least value of an under-determined least-squares problem: the cotangent of x is zero to rounding."""
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.standard_normal((5, 3)) @ rng.standard_normal((3, 6)))
    fit = lambda x, t: 0.5 * jnp.sum((A @ x - t) ** 2)
    step = 1 / float(np.linalg.norm(A, 2) ** 2)
    solver = odl.implicit(odl.until_converged(odl.gradient_descent(fit, step), tol=1e-12, max_steps=5000))
    t = jnp.arange(5.0)
    right = t - A @ (np.linalg.pinv(A) @ t)
    gradient, messages = told(jax.jit(jax.grad(lambda t: fit(solver(jnp.zeros(6), t).x, t))), t)
    assert messages == []
    np.testing.assert_allclose(gradient, right, rtol=0, atol=1e-9)
    hyper = odl.hypergradients.through(solver, fit)
    gradient, _, info = jax.jit(hyper.update)(t, hyper.init(t, jnp.zeros(6)))
    assert odl.check(info) is info
    np.testing.assert_allclose(gradient, right, rtol=0, atol=1e-9)
    # A loss that does depend on what the problem leaves open is told, at a solution of zero, too.
    zero = odl.implicit(odl.until_converged(odl.gradient_descent(lambda x, t: 0.5 * (x[0] - t) ** 2, 0.5), tol=1e-9))
    for start in (jnp.zeros(2), jnp.ones(2)):
        _, messages = told(jax.jit(jax.grad(lambda t, start=start: jnp.sum(zero(start, t).x))), 0.0)
        assert len(messages) == 1
    hyper = odl.hypergradients.through(solver, lambda x, t: jnp.sum(x**3))
    _, _, info = jax.jit(hyper.update)(t, hyper.init(t, jnp.ones(6)))
    with pytest.raises(RuntimeError):
        odl.check(info)


def test_non_finite_is_seen_in_x_even_if_the_iteration_hides_it():
    hide = odl.Iteration(
        lambda x, theta: (), lambda x, state, theta, k: (jnp.where(jnp.isfinite(x), x, 0.0), state),
        odl.Operator(lambda x, theta: jnp.where(x > 0.5, jnp.nan, x + theta)), "hide",
    )  # fmt: skip
    for solver in (odl.until_converged(hide, max_steps=9), odl.for_steps(hide, 4)):
        solution = solver(1.0, 0.1)
        assert Status(int(solution.status)) is Status.NON_FINITE
        assert np.isnan(solution.x)


# ---- what is finished, what is dropped, what is coupled --------------------------------------------------------------


def clipped(x, theta):
    """A step of length one at most; where it arrives, its slope is not finite."""
    away = x - theta
    return x - away * jnp.minimum(1.0, 1.0 / jnp.linalg.norm(away))


def test_a_step_that_is_not_taken_has_no_derivative():
    """Two steps arrive at theta exactly, so the Jacobian is the identity; a third one has a slope of NaN."""
    theta, x0 = jnp.array([1.02, 1.36]), jnp.zeros(2)
    stop = odl.until_converged(odl.fixed_point(clipped), tol=1e-9, max_steps=6)
    assert int(stop(x0, theta).num_steps) == 2
    assert np.isnan(jax.jacfwd(lambda theta: clipped(stop(x0, theta).x, theta))(theta)).any()
    for solver in (odl.unrolled(stop), odl.forward(stop), odl.unrolled(stop, checkpoint_every=2)):
        for mode in (jax.jacrev, jax.jacfwd):
            jacobian = jax.jit(mode(lambda theta, s=solver: s(x0, theta).x))(theta)
            np.testing.assert_allclose(jacobian, np.eye(2), rtol=0, atol=1e-9)
    batch = jax.jit(jax.vmap(jax.grad(lambda theta: jnp.sum(odl.unrolled(stop)(x0, theta).x))))
    gradients = batch(jnp.stack([0.2 * theta, theta, 1.4 * theta]))
    np.testing.assert_allclose(gradients, np.ones((3, 2)), rtol=0, atol=1e-9)


def test_what_is_cut_off_has_no_second_derivative_either():
    """The solution is theta^3, reached by clipped steps whose slope there is NaN: the Hessian of its sum is 6 theta."""
    stop = odl.until_converged(odl.fixed_point(lambda x, theta: clipped(x, theta**3)), tol=1e-9, max_steps=6)
    theta = jnp.array([1.1, 1.2])
    for solver in (odl.unrolled(stop), odl.forward(stop)):
        value = lambda theta, s=solver: jnp.sum(s(jnp.zeros(2), theta).x)
        for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
            np.testing.assert_allclose(jax.jit(outer(inner(value)))(theta), np.diag(6 * theta), rtol=0, atol=1e-8)


def test_a_start_at_the_solution_takes_a_step():
    stop = odl.until_converged(odl.fixed_point(lambda x, theta: 0.5 * x + theta), tol=1e-2, max_steps=50)
    for solver in (odl.unrolled(stop), odl.forward(stop)):
        assert float(jax.grad(lambda theta, s=solver: s(2.0, theta).x)(1.0)) == 1.0  # that of the one step
        assert int(solver(2.0, 1.0).num_steps) == 1
    assert int(stop(2.0, 1.0).num_steps) == 0


@pytest.mark.parametrize("name", ["implicit", "one_step", "unrolled", "truncated", "phantom", "forward"])
def test_failed_elements_are_dropped(name):
    """Sixteen problems share theta, one has no data: x = theta c, loss |x|^2."""
    data = jnp.linspace(0.5, 2.0, 16).at[3].set(jnp.nan)
    walk = odl.gradient_descent(lambda x, p: 0.5 * jnp.sum((x - p[0] * p[1]) ** 2), 0.5)
    stop = odl.until_converged(walk, tol=1e-10, max_steps=60)
    rule = {"phantom": lambda s: odl.phantom(s, 3), "truncated": lambda s: odl.truncated(s, num_steps=5)}
    bare = rule.get(name, getattr(odl, name))(stop)
    solver = odl.maskable(bare)

    def total(theta, data, drop=True):
        def one(datum):
            solution = solver(jnp.zeros(3), (theta, datum))
            good = (solution.status <= Status.COMPLETED) | (not drop)
            return jnp.where(good, jnp.sum(jnp.where(good, solution.x, 0.0) ** 2), 0.0)

        return jnp.sum(jax.vmap(one)(data))

    good = jnp.delete(data, 3)
    slopes = jax.vmap(jax.jacfwd(lambda theta, c: bare(jnp.zeros(3), (theta, c)).x), in_axes=(None, 0))(1.0, good)
    right = float(jnp.sum(2 * good[:, None] * slopes))
    for mode in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(mode(total))(1.0, data), right, rtol=1e-8)
    assert np.isnan(jax.jit(lambda t: jax.grad(total)(t, data, False))(1.0))  # a NaN that is used is seen


def test_a_batch_that_is_one_problem_is_right_or_refused():
    """x_i = q_i mean_j x_j + 1, by a collective over the vmapped axis."""
    q = jnp.linspace(0.1, 0.8, 5)
    coupled = odl.fixed_point(lambda x, q: q * jax.lax.pmean(x, "batch") + 1)
    stop = odl.until_converged(coupled, tol=1e-12, max_steps=300)
    mean = 1 / (1 - q.mean())
    right = np.linalg.solve(np.eye(5) - np.outer(q, np.ones(5)) / 5, float(mean) * np.eye(5))
    solve = lambda s: lambda q: jax.vmap(lambda q: s(0.0, q).x, axis_name="batch")(q)
    for solver in (odl.unrolled(stop), odl.truncated(stop, num_steps=150)):
        for mode in (jax.jacrev, jax.jacfwd):
            np.testing.assert_allclose(jax.jit(mode(solve(solver)))(q), right, rtol=0, atol=1e-9)
    for solver in (odl.implicit(stop), odl.implicit(stop, odl.linear.neumann(50)), odl.forward(stop)):
        np.testing.assert_allclose(solve(solver)(q), q * mean + 1, rtol=0, atol=1e-9)  # the value is right
        with pytest.raises(TypeError, match="other elements of the vmapped axis 'batch'"):
            jax.jacrev(solve(solver))(q)


# ---- a theta that never enters --------------------------------------------------------------------------------------


def ignoring(x, theta):
    return 0.5 * x + 1.0


def test_other_roads_of_theta_are_seen_and_what_is_not_known_passes():
    h, ones, x0 = odl.hypergradients, jnp.ones(3), 2 * jnp.ones(3)
    inner, outer = lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2), lambda x, theta: jnp.sum(x**2)
    rate, theta = (lambda theta: jnp.exp(theta["rate"])), {"rate": jnp.log(jnp.asarray(0.1))}
    walk = odl.gradient_descent(inner, 0.1)
    by_rate = [
        h.reversible(inner, outer, step_size=rate, momentum=0.5, num_steps=5),
        h.bda(inner, outer, num_steps=5, step_size=rate), h.bda(inner, outer, num_steps=5, step_size=0.1, weight=rate),
        h.hodl(walk, outer, num_steps=5, weight=rate), h.hodl(walk, outer, num_steps=5, step_size=rate),
    ]  # fmt: skip
    for hyper in by_rate:
        gradient, _, _ = hyper.update(theta, hyper.init(theta, x0))
        assert abs(float(gradient["rate"])) > 1e-3
    started = h.bda(inner, outer, num_steps=5, step_size=0.1, start=lambda theta: theta)
    assert jnp.all(started.update(ones, started.init(ones, x0))[0] != 0)
    # Where the inner problem has many solutions, the outer loss chooses, and theta may be in it alone.
    flat, chosen = lambda x, theta: 0.5 * (x[0] + x[1] - 1) ** 2, lambda x, theta: jnp.sum((x - theta) ** 2)
    h.bda(flat, chosen, num_steps=5, step_size=0.1).init(1.0, jnp.ones(2))
    h.hodl(odl.gradient_descent(flat, 0.1), chosen, num_steps=5).init(1.0, jnp.ones(2))
    # Losses that may take data are not called without them.
    hungry = lambda x, theta, *data: 0.5 * jnp.sum((data[0] @ x) ** 2)
    for loss in (hungry, lambda x, theta, data=None: 0.5 * jnp.sum((data @ x) ** 2)):
        h.bda(loss, loss, num_steps=3, step_size=0.1).init(ones, x0)
    # An axis that is mapped around the updates alone; an init of the user's own.
    mean = odl.fixed_point(lambda x, theta: 0.5 * jax.lax.pmean(x, "i") + theta)
    h.through(odl.unrolled(odl.for_steps(mean, 5)), outer).init(ones, x0)
    own = odl.Hypergradient(lambda theta, start, *, seed=0: (theta, seed), lambda theta, state: (theta, state, None))
    assert own.init(theta=ones, start=x0, seed=1)[1] == 1


@pytest.mark.parametrize("rule", ["implicit", "one_step", "unrolled", "forward", "on_support"])
def test_a_theta_that_does_not_enter_is_told_by_the_derivative_alone(rule):
    build = functools.partial(odl.on_support, capacity=3) if rule == "on_support" else getattr(odl, rule)
    solver = build(odl.for_steps(odl.fixed_point(ignoring), 30))
    strict = build(odl.for_steps(odl.fixed_point(ignoring), 30), on_failure="raise")
    silent = build(odl.for_steps(odl.fixed_point(ignoring), 30), on_failure="ignore")
    theta = {"of": jnp.ones(2), "key": jax.random.key(0)}
    value = lambda theta, s=solver: s(0.0, {**theta, "key": jax.random.key(0)}).x
    assert abs(float(value(theta)) - 2) < 1e-6
    numbers = {"of": theta["of"]}
    for mode in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        with pytest.warns(RuntimeWarning, match=rf"{rule}: theta does not enter fixed_point\(ignoring\).*on_failure"):
            mode(value)(numbers)
    with pytest.raises(ValueError, match="theta does not enter"):
        jax.grad(lambda theta: value(theta, strict))(numbers)
    np.testing.assert_array_equal(jax.grad(lambda theta: value(theta, silent))(numbers)["of"], 0)
    # What the map closes over is another road, and a part of theta may well be for others.
    entering = lambda x, theta: 0.5 * x + theta["of"][0]
    closed = lambda c: build(odl.for_steps(odl.fixed_point(lambda x, _: 0.5 * x + c), 30))(0.0, 1.0).x
    partly = build(odl.for_steps(odl.fixed_point(entering), 30))
    assert float(jax.grad(closed)(1.0)) != 0
    assert float(jax.grad(lambda theta: partly(0.0, theta).x)(numbers)["of"][1]) == 0


class Layer:
    def __call__(self, x, training=False):
        return 0.5 * x


def test_a_theta_that_does_not_enter_an_estimator_is_refused():
    h, outer = odl.hypergradients, lambda x, theta: jnp.sum(x**2) + jnp.sum(theta**2)
    walk = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2) + jnp.sum(theta), 0.5)
    solver = odl.for_steps(walk, 3)
    blind = lambda x, theta: 0.5 * jnp.sum((x - 1.0) ** 2) + jnp.sum(theta)
    theta, x0 = jnp.ones(2), jnp.zeros(3)
    of_solvers = [
        h.through(solver, outer), h.warm_started(solver, outer), h.hoag(walk, outer), h.hodl(walk, outer, num_steps=3),
        h.pessimistic(solver, outer),
    ]  # fmt: skip
    of_losses = [
        h.soba(blind, outer, step_size=0.1), h.bda(blind, outer, step_size=0.1, num_steps=2),
        h.pbgd(blind, outer, step_size=0.1), h.reversible(blind, outer, step_size=0.1, momentum=0.5, num_steps=2),
    ]  # fmt: skip
    for hyper in of_solvers + of_losses:
        with pytest.raises(ValueError, match=r"theta does not enter the inner problem.*allow_unused=True"):
            hyper.init(theta, x0)
        gradient, _, _ = hyper.update(theta, hyper.init(theta, x0, allow_unused=True))
        np.testing.assert_allclose(gradient, 2 * theta, atol=1e-9)
    # A start that theta says is a road of its own; data that come with the updates only are not guessed.
    h.through(solver, outer, start=lambda theta: jnp.zeros(3) + theta[0]).init(theta, None)
    with_data = h.soba(lambda x, theta, r: jnp.sum((x - r) ** 2), lambda x, theta, r: jnp.sum(x**2), step_size=0.1)
    with_data.init(theta, x0)
    with pytest.raises(ValueError, match="theta does not enter"):
        with_data.init(theta, x0, jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match="whether training is to keep its default is ambiguous"):
        h.hodl(Layer(), outer, num_steps=3)


def test_a_loss_without_its_data_is_told():
    h, outer = odl.hypergradients, lambda x, theta, target: jnp.sum((x - target) ** 2)
    inner = lambda x, theta: jnp.sum((x - theta) ** 2)
    theta, x0 = jnp.ones(2), jnp.zeros(2)
    words = r"{}: the outer loss takes \(x, theta, target\), and was called with \(x, theta\)\. What it needs beyond"
    for hyper in (
        h.through(odl.for_steps(CALM, 3), outer), h.hodl(CALM, outer, num_steps=3), h.soba(inner, outer, step_size=0.1),
        h.pessimistic(odl.for_steps(CALM, 3), outer), h.warm_started(odl.implicit(odl.for_steps(CALM, 30)), outer),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=words.format(hyper.name.split("(")[0])):
            hyper.update(theta, hyper.init(theta, x0))
