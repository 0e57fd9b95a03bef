"""Iteration x derivative x problem: every mode against the closed form, finite differences and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import DERIVATIVES, EXCLUDED, ITERATIONS, NUM_STEPS, PROBLEMS, SOLVERS, base, direction, moved, triples

import odljax as odl


def close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(1.0, float(np.abs(e).max(initial=0.0)))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


def modes(value_of, theta):
    """All the ways in which JAX may ask for the derivative of ``value_of``, in one compiled function."""

    @jax.jit
    def compute(theta, along):
        gradient = jax.grad(value_of)
        pair = jax.tree.map(lambda leaf, d: jnp.stack([leaf, leaf + jnp.asarray(0.01, leaf.dtype) * d]), theta, along)
        return {
            "value": value_of(theta),
            "reverse": gradient(theta),
            "forward": jax.jvp(value_of, (theta,), (along,))[1],
            "hessian_vector": jax.jvp(gradient, (theta,), (along,))[1],
            "vmap of grad": jax.vmap(gradient)(pair),
            "grad of vmap": jax.grad(lambda pair: jnp.sum(jax.vmap(value_of)(pair)))(pair),
        }

    return compute(theta, direction(theta))


def references(problem):
    return modes(problem.value, problem.theta)


REFERENCES = {}


def reference(name):
    if name not in REFERENCES:
        problem = PROBLEMS[name]()
        REFERENCES[name] = (problem, references(problem))
    return REFERENCES[name]


def value_function(problem, solver):
    return lambda theta: problem.outer(solver(problem.x0, theta).x, theta)


@pytest.mark.parametrize(("problem_name", "iteration", "derivative"), list(triples()))
def test_matrix(problem_name, iteration, derivative):
    """Forward and reverse mode of every triple; the stop rules alternate."""
    problem, expected = reference(problem_name)
    stop = "until_converged" if (len(iteration) + len(derivative) + len(problem_name)) % 2 else "for_steps"
    value_of = value_function(problem, DERIVATIVES[derivative](SOLVERS[stop](ITERATIONS[iteration](problem))))

    @jax.jit
    def both(theta, along):
        return jax.value_and_grad(value_of)(theta), jax.jvp(value_of, (theta,), (along,))[1]

    (value, reverse), forward = both(problem.theta, direction(problem.theta))
    for actual, mode in ((value, "value"), (reverse, "reverse"), (forward, "forward")):
        close(actual, expected[mode], 1e-9)


KINDS = ["implicit", "implicit(gmres)", "unrolled", "unrolled(checkpoint)", "truncated"]  # the other rows: other solves
FULL = [(p, "base", d) for p in PROBLEMS for d in KINDS if p != "quadratic"]
FULL += [("quadratic", "nesterov", "implicit")]  # which does not see the road
FULL += [("quadratic", i, "unrolled") for i in ITERATIONS if ITERATIONS[i](PROBLEMS["quadratic"]()) is not None]
FULL = [row for row in FULL if row[1:] not in EXCLUDED]


@pytest.mark.parametrize(("problem_name", "iteration", "derivative"), FULL)
def test_every_mode(problem_name, iteration, derivative):
    """Hessian, vmap, vmap of grad and grad of vmap too: each derivative on each problem, each iteration on one."""
    problem, expected = reference(problem_name)
    build = {**ITERATIONS, "base": base}[iteration]
    actual = modes(
        value_function(problem, DERIVATIVES[derivative](SOLVERS["for_steps"](build(problem)))), problem.theta
    )
    for mode, value in expected.items():
        # The second derivative of Anderson's weights divides by steps that have shrunk to rounding.
        exact = mode != "hessian_vector" or iteration != "anderson" or derivative.startswith("implicit")
        close(actual[mode], value, 1e-9 if exact else 1e-5)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("stop", SOLVERS)
def test_both_stop_rules_agree_with_finite_differences_and_without_jit(stop, derivative):
    problem, expected = reference("quadratic")
    solver = DERIVATIVES[derivative](SOLVERS[stop](base(problem)))

    def value_of(theta):
        return problem.outer(solver(problem.x0, theta).x, theta)

    along, h = direction(problem.theta), 1e-3
    value = jax.jit(value_of)
    at = {i: value(moved(problem.theta, i * h, along)) for i in (-2, -1, 1, 2)}
    fourth_order = (at[-2] - 8 * at[-1] + 8 * at[1] - at[2]) / (12 * h)
    close(expected["forward"], fourth_order, 1e-9)
    close(jax.grad(value_of)(problem.theta), expected["reverse"], 1e-9)
    close(jax.hessian(value_of)(problem.theta), jax.hessian(problem.value)(problem.theta), 1e-9)


@pytest.mark.parametrize("derivative", KINDS)
@pytest.mark.parametrize("stop", SOLVERS)
def test_captured_tracers(stop, derivative):
    """Hyperparameters that the operator closes over are differentiated as those that travel as theta."""
    problem, expected = reference("ridge")

    def value_of(theta):
        iteration = odl.gradient_descent(lambda x, _: problem.objective(x, theta), problem.step_size)
        solver = DERIVATIVES[derivative](SOLVERS[stop](iteration))
        return problem.outer(solver(problem.x0, None).x, theta)

    actual = modes(value_of, problem.theta)
    for mode, value in expected.items():
        close(actual[mode], value, 1e-9)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_captured_in_part(derivative):
    """One hyperparameter travels, another is captured from an outer level, a batch is captured from a vmap."""
    problem = PROBLEMS["quadratic"]()

    def value_of(scale, theta, shift):
        iteration = odl.gradient_descent(
            lambda x, theta: scale * problem.objective(x, theta) - jnp.sum(shift * x), problem.step_size
        )
        solver = DERIVATIVES[derivative](odl.for_steps(iteration, NUM_STEPS))
        return problem.outer(solver(problem.x0, theta).x, theta)

    def closed(scale, theta, shift):
        return problem.outer(problem.solution(theta + shift / scale), theta)

    shifts = 0.1 * jnp.arange(6.0).reshape(2, 3)
    arguments = (jnp.asarray(0.9), problem.theta, shifts)

    def batched(function):
        return lambda scale, theta, shifts: jnp.sum(jax.vmap(lambda s: function(scale, theta, s))(shifts))

    actual = jax.jit(jax.grad(batched(value_of), argnums=(0, 1, 2)))(*arguments)
    close(actual, jax.grad(batched(closed), argnums=(0, 1, 2))(*arguments), 1e-9)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("problem_name", PROBLEMS)
def test_float32_data_with_float64_on(problem_name, derivative):
    problem = PROBLEMS[problem_name](jnp.float32)
    solver = DERIVATIVES[derivative](SOLVERS["until_converged"](base(problem)))
    gradient = jax.jit(jax.grad(lambda theta: problem.outer(solver(problem.x0, theta).x, theta)))(problem.theta)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
    close(gradient, reference(problem_name)[1]["reverse"], 1e-5)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_float32_only(derivative, float32_only):
    problem = PROBLEMS["ridge"]()
    assert problem.x0.dtype == jnp.float32
    solver = DERIVATIVES[derivative](SOLVERS["for_steps"](base(problem)))

    def value_of(theta):
        return problem.outer(solver(problem.x0, theta).x, theta)

    gradient, forward = jax.grad(value_of)(problem.theta), jax.jvp(value_of, (problem.theta,), (jnp.float32(1),))[1]
    close(gradient, problem.hypergradient(problem.theta), 1e-5)
    close(forward, problem.hypergradient(problem.theta), 1e-5)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_mixed_dtypes(derivative):
    problem = odl.problems.tree(second_dtype=jnp.float32)
    solver = SOLVERS["for_steps"](odl.fixed_point(problem.T))
    # One flat vector of the widest dtype: the rounding of the narrow leaf looks like a failed solve.
    loose = derivative == "on_support"
    solver = odl.on_support(solver, 64, on_failure="ignore") if loose else DERIVATIVES[derivative](solver)
    solution = solver(problem.x0, problem.theta)
    assert {"a": solution.x["a"].dtype, "b": solution.x["b"].dtype} == {"a": jnp.float64, "b": jnp.float32}
    gradient = jax.jit(jax.grad(lambda theta: problem.outer(solver(problem.x0, theta).x, theta)))(problem.theta)
    close(gradient, problem.hypergradient(problem.theta), 1e-5)


def test_one_step_is_implicit_with_the_identity_and_has_the_predicted_bias():
    problem = PROBLEMS["quadratic"]()
    iteration, gain = base(problem), 1.0
    solver = SOLVERS["for_steps"](iteration)
    x = solver(problem.x0, problem.theta).x
    cotangent = x - 1  # the outer slope in x; the direct part is theta

    def gradient(solver):
        return jax.grad(lambda theta: problem.outer(solver(problem.x0, theta).x, theta))(problem.theta)

    one = gradient(odl.one_step(solver))
    close(one, gradient(odl.implicit(solver, odl.linear.identity())), 1e-14)
    # T = x - (Q x - theta): the one-step derivative is the identity where the truth is the inverse of Q.
    close(one, gain * cotangent + problem.theta, 1e-12)
    # On a map that converges quadratically, one step is the whole truth.
    root, expected = reference("square_root")
    exact = odl.one_step(SOLVERS["until_converged"](odl.fixed_point(root.T)))
    close(jax.grad(lambda t: root.outer(exact(root.x0, t).x, t))(root.theta), expected["reverse"], 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_truncation_at_the_solution_is_the_neumann_series(steps):
    problem = PROBLEMS["ridge"]()
    solver = odl.until_converged(odl.fixed_point(problem.T), tol=1e-14, max_steps=NUM_STEPS)

    def gradient(solver):
        return jax.jit(jax.grad(lambda theta: problem.outer(solver(problem.x0, theta).x, theta)))(problem.theta)

    short = gradient(odl.truncated(solver, num_steps=steps))
    close(short, gradient(odl.implicit(solver, odl.linear.neumann(steps - 1))), 1e-12)
    # The bias that theory predicts: the contraction rate to the power of the steps.
    bias = abs(float(short - problem.hypergradient(problem.theta)))
    rate = 1 - problem.step_size * problem.strong_convexity
    size = float(jnp.linalg.norm(jax.grad(problem.outer)(problem.solution(problem.theta), problem.theta)))
    derivative = float(jnp.linalg.norm(jax.jacfwd(problem.solution)(problem.theta)))
    assert 0 < bias <= size * derivative * rate**steps * 1.0001


def test_truncation_of_fixed_steps_differentiates_the_last_ones():
    problem = PROBLEMS["line"]()
    for last in (1, 3, 7):
        solver = odl.truncated(odl.for_steps(odl.fixed_point(problem.T), 7, history=True), num_steps=last)
        slope = jax.jacfwd(lambda theta, solver=solver: solver(problem.x0, theta).x)(problem.theta)
        close(slope, 2 * (1 - 0.5**last), 1e-14)
        plain = odl.for_steps(odl.fixed_point(problem.T), 7, history=True)(problem.x0, problem.theta)
        truncated = solver(problem.x0, problem.theta)
        close((truncated.x, truncated.history.residual), (plain.x, plain.history.residual), 0)


def test_implicit_does_not_depend_on_the_relaxation_nor_on_the_start():
    problem, expected = reference("ridge")
    for relaxation in (0.3, 0.9):
        iteration = odl.krasnoselskii_mann(base(problem), relaxation)
        solver = odl.implicit(odl.until_converged(iteration, tol=1e-14, max_steps=2000))
        for x0 in (problem.x0, problem.x0 + 3):
            value = lambda theta, solver=solver, x0=x0: problem.outer(solver(x0, theta).x, theta)
            close(jax.grad(value)(problem.theta), expected["reverse"], 1e-9)
    start = jax.grad(lambda x0: jnp.sum(solver(x0, problem.theta).x))(problem.x0)
    assert not np.any(start)


def test_unrolled_tends_to_implicit_at_the_contraction_rate():
    problem = PROBLEMS["line"]()
    for steps in (5, 10, 20):
        solver = odl.unrolled(odl.for_steps(odl.fixed_point(problem.T), steps))
        slope = jax.jacrev(lambda theta, solver=solver: solver(problem.x0, theta).x)(problem.theta)
        close(2 - slope, 2 * 0.5**steps, 1e-15)


def test_aggregate_and_layers_are_unrolled_exactly():
    """Iterations without an operator: against differentiation of the written-out loop."""
    problem = PROBLEMS["ridge"]()
    schedule = lambda theta, k: jnp.exp(theta) / (k + 1).astype(theta.dtype)
    walk = odl.aggregate(base(problem), problem.outer, weight=0.4, step_size=schedule)

    def written_out(theta):
        x = problem.x0
        for k in range(6):
            above = x - jnp.exp(theta) / (k + 1) * jax.grad(problem.outer)(x, theta)
            x = 0.4 * above + 0.6 * (x - problem.step_size * jax.grad(problem.objective)(x, theta))
        return problem.outer(x, theta)

    for solver in (odl.unrolled(odl.for_steps(walk, 6)), odl.unrolled(odl.for_steps(walk, 6), checkpoint_every=4)):
        value = lambda theta, solver=solver: problem.outer(solver(problem.x0, theta).x, theta)
        close(jax.grad(value)(problem.theta), jax.grad(written_out)(problem.theta), 1e-12)
        close(jax.hessian(value)(problem.theta), jax.hessian(written_out)(problem.theta), 1e-11)

    weights = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2)))
    network = odl.for_steps(odl.layered(lambda x, W: jnp.tanh(W @ x)), 3)
    x0 = jnp.asarray([0.5, -0.2])
    loss = lambda weights: jnp.sum(network(x0, weights).x ** 2)
    plain = lambda w: jnp.sum(jnp.tanh(w[2] @ jnp.tanh(w[1] @ jnp.tanh(w[0] @ x0))) ** 2)
    close(jax.grad(loss)(weights), jax.grad(plain)(weights), 1e-14)
    last = jax.grad(lambda w: jnp.sum(odl.truncated(network, num_steps=1)(x0, w).x ** 2))(weights)
    assert not np.any(last[:2])
    close(last[2], jax.grad(plain)(weights)[2], 1e-14)


def test_implicit_in_a_scan_in_a_vmap_and_under_checkpoint():
    """A solver is a differentiable function, anywhere."""
    problem = PROBLEMS["ridge"]()
    solver = odl.implicit(odl.until_converged(base(problem), tol=1e-14, max_steps=NUM_STEPS))

    def many(theta):
        body = jax.checkpoint(
            lambda carry, shift: (carry + problem.outer(solver(problem.x0, theta + shift).x, theta), None)
        )
        return jax.lax.scan(body, jnp.zeros(()), jnp.linspace(0.0, -1.0, 3))[0]

    closed = lambda theta: sum(problem.outer(problem.solution(theta + s), theta) for s in (0.0, -0.5, -1.0))
    thetas = jnp.asarray([-1.0, -2.2])
    close(jax.jit(jax.vmap(jax.grad(many)))(thetas), jax.vmap(jax.grad(closed))(thetas), 1e-9)


@pytest.mark.parametrize("derivative", [*DERIVATIVES, "one_step", "bare"])
def test_through_and_warm_started_give_the_gradient_of_plain_jax(derivative):
    problem = PROBLEMS["ridge"]()
    transform = {**DERIVATIVES, "one_step": odl.one_step, "bare": lambda s: s}[derivative]
    solver = transform(odl.for_steps(base(problem), NUM_STEPS))
    outer = lambda x, theta, weight: weight * problem.outer(x, theta) + jnp.sin(theta)
    plain = jax.grad(lambda theta: outer(solver(problem.x0, theta).x, theta, 2.0))(problem.theta)
    for make in (odl.hypergradients.through, odl.hypergradients.warm_started):
        hyper = make(solver, outer)
        state = hyper.init(problem.theta, problem.x0)
        update = jax.jit(hyper.update)
        gradient, state, info = update(problem.theta, state, 2.0)
        close(gradient, plain, 1e-11)
        close(info.value, outer(problem.solution(problem.theta), problem.theta, 2.0), 1e-11)
        assert float(info.inner_residual) < 1e-12
        assert np.isinf(info.outer_change)
        assert (info.adjoint_residual is None) == (not derivative.startswith(("implicit", "one_step", "on_support")))
        odl.check(info)
        _, state, info = update(problem.theta + 0.1, state, 2.0)
        close(info.outer_change, 0.1 / abs(float(problem.theta)), 1e-12)


def test_warm_starts_save_inner_steps_and_adjoint_products():
    problem = PROBLEMS["ridge"]()
    solver = odl.implicit(odl.until_converged(base(problem), tol=1e-10, max_steps=NUM_STEPS), odl.linear.cg(tol=1e-10))
    warm, cold = (f(solver, problem.outer) for f in (odl.hypergradients.warm_started, odl.hypergradients.through))
    states = {hyper: hyper.init(problem.theta, problem.x0) for hyper in (warm, cold)}
    steps = {warm: [], cold: []}
    for hyper in (warm, cold):
        for t in range(4):
            _, states[hyper], info = hyper.update(problem.theta + 1e-6 * t, states[hyper])
            steps[hyper].append(int(info.num_steps))
    assert steps[cold][-1] == steps[cold][0] == steps[warm][0]
    assert steps[warm][-1] < steps[cold][-1] / 2
    # The adjoint by a factorisation: the solver finds it, and started there takes no step.
    x = solver(problem.x0, problem.theta).x
    slope, hessian = jax.grad(problem.outer)(x, problem.theta), jax.hessian(problem.objective)(x, problem.theta)
    exact = np.linalg.solve(problem.step_size * np.asarray(hessian), np.asarray(slope))
    _, adjoint, first = solver.adjoint.pull_back(x, problem.theta, slope, None)
    _, _, second = solver.adjoint.pull_back(x, problem.theta, slope, jnp.asarray(exact))
    np.testing.assert_allclose(adjoint, exact, rtol=0, atol=1e-8 * np.linalg.norm(exact))
    assert int(first.num_steps) > 0
    assert int(second.num_steps) == 0


def test_the_penalty_of_imaml_is_that_of_its_update():
    """f = (x - 2)^2/2: x = (2 + p theta)/(1 + p), with a p for each of three updates."""
    penalties, theta = np.array([0.7, 0.2, 1.3]), 0.4
    hyper = odl.hypergradients.imaml(
        lambda x, theta, goal: 0.5 * (x - goal) ** 2, lambda x, theta, goal: 0.5 * (x - goal) ** 2,
        num_steps=100, step_size=0.5, penalty=lambda k: jnp.asarray(penalties)[k],
    )  # fmt: skip
    tasks = (jnp.array([2.0]), jnp.array([0.5]))
    update, state = jax.jit(hyper.update), hyper.init(jnp.asarray(theta), None, *tasks)
    for p in penalties:
        gradient, state, info = update(jnp.asarray(theta), state, *tasks)
        x = (2 + p * theta) / (1 + p)
        close(info.x, np.array([x]), 1e-9)
        close(gradient, (x - 0.5) * p / (1 + p), 1e-9)
        theta = theta - 0.1 * (x - 0.5) * p / (1 + p)


def test_a_bad_solve_is_reported_and_does_not_spoil_the_next():
    problem = PROBLEMS["ridge"]()
    solver = odl.implicit(odl.until_converged(base(problem), tol=1e-12, max_steps=NUM_STEPS))
    hyper = odl.hypergradients.warm_started(solver, problem.outer)
    update = jax.jit(hyper.update)
    _, state, good = update(problem.theta, hyper.init(problem.theta, problem.x0))
    gradient, state, bad = update(jnp.asarray(jnp.nan), state)
    assert odl.Status(int(bad.status)) is odl.Status.NON_FINITE
    assert np.isnan(gradient)
    with pytest.raises(RuntimeError, match="NON_FINITE"):
        odl.check(bad)
    gradient, _, info = update(problem.theta, state)
    close(gradient, problem.hypergradient(problem.theta), 1e-9)
    assert int(info.num_steps) == 0
    assert int(good.num_steps) > 0


def test_the_adjoint_residual_is_the_truth():
    problem = PROBLEMS["ridge"]()
    solver = odl.for_steps(odl.fixed_point(problem.T), NUM_STEPS)
    x = problem.solution(problem.theta)
    slope = np.asarray(jax.grad(problem.outer)(x, problem.theta))
    jacobian = np.asarray(jax.jacobian(problem.T)(x, problem.theta))
    for terms in (0, 3):
        v = sum(np.linalg.matrix_power(jacobian.T, i) @ slope for i in range(terms + 1))
        expected = np.linalg.norm(slope - v + jacobian.T @ v) / np.linalg.norm(slope)
        hyper = odl.hypergradients.through(odl.implicit(solver, odl.linear.neumann(terms)), problem.outer)
        _, _, info = hyper.update(problem.theta, hyper.init(problem.theta, problem.x0))
        close(info.adjoint_residual, expected, 1e-9)
        assert odl.Status(int(info.status)) is odl.Status.COMPLETED


def test_hodl_with_a_metric_and_an_outer_loss_that_sees_one_leaf():
    """The gradient of the outer loss reaches z alone; the metric solve must not mind."""
    A = 0.3 * jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
    l1 = lambda v, theta, step_size: odl.prox.l1(v, theta, step_size)
    operator = odl.operators.linearized_admm(lambda z, theta: A @ z, l1, l1, jnp.ones(3), proximal_weight=2.0)
    hyper = odl.hypergradients.hodl(operator, lambda u, theta: jnp.sum((u.z - 1.3) ** 2), num_steps=3)
    state = hyper.init(jnp.asarray(0.1), odl.operators.ADMMVariables(jnp.zeros(4), jnp.zeros(3), jnp.zeros(3)))
    gradient, _, info = hyper.update(jnp.asarray(0.1), state)
    test = odl.diagnostics.taylor_test(lambda theta: hyper.update(theta, state)[2].value, jnp.asarray(0.1), gradient)
    assert test.relative_error < 1e-9
    assert odl.Status(int(info.status)) is odl.Status.COMPLETED


def test_a_metric_that_is_none_is_shown():
    """Not positive definite: conjugate gradients fail, and so does, visibly, what is built on them."""
    matrix = jnp.asarray([[1.0, 0.2], [0.2, -0.1]])
    operator = odl.Operator(lambda x, theta: 0.5 * x, metric=lambda v, theta: matrix @ v)
    hyper = odl.hypergradients.hodl(operator, lambda x, theta: jnp.sum((x - theta) ** 2), num_steps=3)
    _, _, info = hyper.update(jnp.asarray(1.0), hyper.init(jnp.asarray(1.0), jnp.zeros(2), allow_unused=True))
    assert odl.Status(int(info.status)) is odl.Status.NON_FINITE
    assert np.isnan(odl.diagnostics.expansion(operator, jnp.ones(2), 1.0).factor)


@pytest.mark.parametrize("derivative", ["implicit", "unrolled", "unrolled(checkpoint)", "truncated", "forward"])
def test_the_number_of_an_outer_step_may_be_captured(derivative):
    """The loss looks at a whole number of the loop around the solver; first and second derivatives find it again."""
    scales = jnp.linspace(1.0, 2.0, 4)

    def chained(theta, solve):
        def body(carry, k):
            return carry + scales[k] * solve(theta * carry, k), None

        return jax.lax.scan(body, jnp.ones(()), jnp.arange(4))[0]

    def solve(target, k):
        loss = lambda x, theta: 0.5 * scales[k] * (x - theta) ** 2
        solver = DERIVATIVES[derivative](odl.for_steps(odl.gradient_descent(loss, 0.4), NUM_STEPS))
        return solver(0.0, target).x

    compute = lambda solve: jax.jit(
        lambda theta: (jax.grad(chained)(theta, solve), jax.grad(jax.grad(chained))(theta, solve))
    )(0.5)
    close(compute(solve), compute(lambda target, k: target), 1e-9)


@pytest.mark.parametrize("derivative", ["implicit", "one_step", "forward", "unrolled"])
def test_a_collective_over_a_mapped_axis_finds_its_name_in_the_rule(derivative):
    """T averages over the batch: the gradient of the mapped solver, not only the mapped gradient."""

    def solve(theta, d):
        T = lambda x, theta: 0.5 * x + theta * jax.lax.pmean(d, "batch")
        return getattr(odl, derivative)(odl.for_steps(odl.fixed_point(T), 60))(0.0, theta).x

    data = jnp.arange(1.0, 5.0)
    total = lambda theta: jnp.sum(jax.vmap(lambda d: solve(theta, d), axis_name="batch")(data))
    exact = 4 * 2.5 * (1.0 if derivative == "one_step" else 2.0)
    np.testing.assert_allclose(jax.grad(total)(1.0), exact, rtol=1e-12)


def test_forward_inside_a_loop_keeps_its_memory_at_the_second_order(optimised):
    """Reverse over reverse mode through a scan transposes no inner step; nor does a loop that stops by itself."""

    def chained(theta, solver):
        body = lambda carry, _: (carry + solver(jnp.zeros(50), theta * carry).x.sum() / 50, None)
        return jax.lax.scan(body, theta, None, length=3)[0]

    def compiled(make):
        solver = odl.forward(make(odl.gradient_descent(lambda x, t: 0.5 * jnp.sum((x - t) ** 2), 0.4)))
        return jax.jit(jax.grad(jax.grad(lambda theta: chained(theta, solver)))).lower(0.5).compile()

    few, many = (compiled(lambda i, K=K: odl.for_steps(i, K)) for K in (40, 400))
    stopping = compiled(lambda i: odl.until_converged(i, tol=1e-13, max_steps=400))
    assert many.memory_analysis().temp_size_in_bytes <= few.memory_analysis().temp_size_in_bytes + 1024
    exact = jax.grad(jax.grad(lambda t: t * (1 + t) ** 3))(0.5)  # x = theta * carry
    close(many(0.5), exact, 1e-9)
    close(stopping(0.5), exact, 1e-9)
