"""Quadratic programs: solutions against SciPy, derivatives against closed forms, certificates, the metric, messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from scipy.optimize import linprog, minimize

import odljax as odl
from odljax import operators
from odljax.operators import QPVariables, QuadraticProgram
from odljax.operators._operator import displacement

N, EQUALITIES, INEQUALITIES = 5, 1, 5
M = EQUALITIES + INEQUALITIES
INF = np.inf


def random_program(seed, n=N, equalities=EQUALITIES, inequalities=INEQUALITIES, width=0.3):
    """Strictly convex, feasible, some constraints active and none weakly."""
    rng = np.random.default_rng(seed)
    m = equalities + inequalities
    root, A, inside = rng.standard_normal((n, n)), rng.standard_normal((m, n)), rng.standard_normal(n)
    slack = np.concatenate([np.zeros(equalities), width * rng.random(inequalities)])
    data = (root @ root.T + 0.5 * np.eye(n), 3 * rng.standard_normal(n), A, A @ inside - slack, A @ inside + slack)
    return QuadraticProgram(*map(jnp.asarray, data))


PROGRAM = random_program(0)
START = QPVariables.zeros(N, M)


def given(theta):
    return theta


def derived(walk, tol=1e-12, max_steps=3000):
    """Implicit, with a dense adjoint system: quicker to compile than the default, which other tests take."""
    return odl.implicit(odl.until_converged(walk, tol=tol, max_steps=max_steps), odl.linear.dense())


polish = jax.jit(operators.polish_quadratic_program(given))


def violation(program, u):
    """The largest violation of the optimality conditions, in NumPy."""
    P, q, A, lower, upper = map(np.asarray, program)
    image = A @ np.asarray(u.x)
    parts = [P @ u.x + q + A.T @ np.asarray(u.y), image - np.clip(image + np.asarray(u.y), lower, upper)]
    return max(np.abs(part).max() for part in parts)


@functools.cache
def solver(tol=1e-10, max_steps=4000, relative_tol=0.0, **options):
    """One compilation for all programs of one shape."""
    walk = odl.quadratic_program(given, **options)
    return jax.jit(odl.until_converged(walk, tol=tol, max_steps=max_steps, relative_tol=relative_tol))


def start_of(program, dtype=float):
    return QPVariables.zeros(len(program.q), len(program.lower), dtype)


def solve(program, dtype=float, **options):
    program = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), program)
    return solver(**options)(start_of(program, dtype), program)


# ---- one application -------------------------------------------------------------------------------------------------


def osqp_step(program, x, z, y, rho, sigma, alpha):
    """Algorithm 1 of Stellato et al. (2020), by its full linear system."""
    P, q, A, lower, upper = map(np.asarray, program)
    n, m = len(q), len(lower)
    matrix = np.block([[P + sigma * np.eye(n), A.T], [A, -np.diag(1 / rho)]])
    solution = np.linalg.solve(matrix, np.concatenate([sigma * x - q, z - y / rho]))
    ahead, nu = solution[:n], solution[n : n + m]
    ahead_z = z + (nu - y) / rho
    new_z = np.clip(alpha * ahead_z + (1 - alpha) * z + y / rho, lower, upper)
    return alpha * ahead + (1 - alpha) * x, new_z, y + rho * (alpha * ahead_z + (1 - alpha) * z - new_z)


def random_point(seed):
    rng = np.random.default_rng(seed)
    return QPVariables(*(jnp.asarray(rng.standard_normal(size)) for size in (N, M, M)))


def test_a_step_against_the_full_linear_system():
    u, rho = random_point(1), np.array([1e3] + [1.0] * INEQUALITIES) * 0.3
    program = PROGRAM._replace(upper=PROGRAM.upper.at[2].set(INF), lower=PROGRAM.lower.at[2].set(-INF))
    rho[2] *= 1e-3
    want = osqp_step(program, *map(np.asarray, u), rho, 1e-2, 1.5)
    T = operators.quadratic_program(given, penalty=0.3, regularization=1e-2, relaxation=1.5, scaling=0)
    image, moved = jax.jit(lambda u, theta: (T(u, theta), displacement(T, u, theta)))(u, program)
    for got, step, before, wanted in zip(image, moved, u, want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)
        np.testing.assert_allclose(step, np.asarray(before) - wanted, rtol=0, atol=1e-10)
    assert (T.symmetric, T.name) == (False, "quadratic_program")


def test_one_decomposition_serves_every_penalty():
    """The step at a multiple of the penalty is the step of an operator built with it, dense or by products."""
    from odljax.operators._quadratic_program import metric_at, reader, splitting

    u, read = random_point(2), reader("test", given)
    split = lambda penalty, way=None: splitting("test", read, metric_at("test", penalty, 1e-2 * penalty, 4), 1.6, way)
    dense, products = split(0.2), split(0.2, odl.linear.cg())
    for scale in (1 / 64, 1.0, 8.0):
        want = split(0.2 * scale)(u, PROGRAM).outcome
        for way in (dense, products):
            got = way(u, PROGRAM, jnp.asarray(scale)).outcome
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, want)


def test_a_step_is_that_of_the_equilibrated_program():
    """With D, E and c computed here, the weights are those of OSQP on the scaled program, whatever the units."""
    stretch, height = 10.0 ** np.arange(-2.0, 3.0), 10.0 ** np.arange(-3.0, 3.0)
    P, q, A, lower, upper = map(np.asarray, PROGRAM)
    P, q, A = stretch[:, None] * P * stretch, stretch * q, height[:, None] * A * stretch
    lower, upper = height * lower, height * upper
    d, e, c = np.ones(N), np.full(M, 1 / np.abs(A).max()), 1 / np.abs(P).max()
    for _ in range(10):
        curved, image = c * np.abs(d[:, None] * P * d), np.abs(e[:, None] * A * d)
        d, e = d / np.sqrt(np.maximum(curved.max(0), image.max(0))), e / np.sqrt(image.max(1))
        c = 1 / np.abs(d[:, None] * P * d).max()
    bounds = e * np.minimum(np.abs(lower), np.abs(upper))
    gain = max(1, np.abs(c * d * q).max() / np.exp(np.mean(np.log(bounds))))
    scaled = (c * d[:, None] * P * d, c * d * q, e[:, None] * A * d, e * lower, e * upper)
    u = random_point(1)
    rho = 0.3 * gain * np.array([1e3] + [1.0] * INEQUALITIES)
    x, z, y = osqp_step(scaled, *map(np.asarray, u), rho, 0.01 * gain, 1.6)
    T = operators.quadratic_program(given, penalty=0.3, regularization=0.01)
    at = QPVariables(d * u.x, u.z / e, e * u.y / c)
    got = T(at, QuadraticProgram(*map(jnp.asarray, (P, q, A, lower, upper))))
    for part, unit, want in zip(got, (d, 1 / e, e / c), (x, z, y), strict=True):
        np.testing.assert_allclose(part / unit, want, rtol=0, atol=1e-9)


# ---- solutions -------------------------------------------------------------------------------------------------------


def test_random_programs_against_scipy():
    for seed in range(3):
        program = random_program(seed)
        solution = odl.check(solve(program))
        P, q, A, lower, upper = map(np.asarray, program)
        constraints = [
            {"type": "eq", "fun": lambda x, A=A, b=lower: A[:1] @ x - b[:1]},
            {
                "type": "ineq",
                "fun": lambda x, A=A[1:], low=lower[1:], high=upper[1:]: np.concatenate([A @ x - low, high - A @ x]),
            },
        ]
        peer = minimize(lambda x, P=P, q=q: 0.5 * x @ P @ x + q @ x, np.zeros(N), jac=lambda x, P=P, q=q: P @ x + q,
                        method="SLSQP", constraints=constraints, options={"ftol": 1e-15, "maxiter": 500})  # fmt: skip
        np.testing.assert_allclose(solution.x.x, peer.x, rtol=0, atol=1e-6)
        assert violation(program, solution.x) < 1e-8
        polished = polish(solution.x, program)
        assert violation(program, polished) < 1e-13
        np.testing.assert_allclose(polished.x, solution.x.x, rtol=0, atol=1e-8)


def test_a_transport_problem_against_highs():
    """A linear program with a redundant equality: three mines, four mills."""
    rng = np.random.default_rng(0)
    cost, supply, demand = rng.random((3, 4)), np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.2, 0.1])
    rows, columns = np.kron(np.eye(3), np.ones(4)), np.kron(np.ones(3), np.eye(4))
    A = np.concatenate([rows, columns, np.eye(12)])
    marginals = np.concatenate([supply, demand])
    program = QuadraticProgram(
        None, cost.ravel(), A, np.r_[marginals, np.zeros(12)], np.r_[marginals, np.full(12, INF)]
    )
    walk = odl.quadratic_program(program)
    solution = odl.check(jax.jit(odl.until_converged(walk, tol=1e-10, max_steps=5000))(start_of(program), None))
    peer = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=marginals, method="highs")
    np.testing.assert_allclose(cost.ravel() @ np.asarray(solution.x.x), peer.fun, rtol=0, atol=1e-9)
    np.testing.assert_allclose(solution.x.x, peer.x, rtol=0, atol=1e-8)  # the costs are generic: it is unique
    polished = polish(solution.x, program._replace(P=jnp.zeros((12, 12))))
    np.testing.assert_allclose(polished.x, peer.x, rtol=0, atol=1e-12)


@functools.cache
def portfolio():
    """Eight assets on two factors: covariance, expected returns; budget and no short sales."""
    rng = np.random.default_rng(3)
    factors = rng.standard_normal((8, 2))
    covariance = factors @ factors.T + np.diag(0.5 + rng.random(8))
    returns = 0.8 * rng.random(8)
    A = np.concatenate([np.ones((1, 8)), np.eye(8)])
    lower, upper = np.r_[1.0, np.zeros(8)], np.r_[1.0, np.full(8, 0.3)]
    return QuadraticProgram(covariance, -returns, A, lower, upper)


def test_a_portfolio_and_how_it_moves_with_the_aversion_to_risk():
    data = portfolio()
    program = lambda aversion: data._replace(P=aversion * data.P)
    stopping = derived(odl.quadratic_program(program))
    weights = jax.jit(lambda aversion: stopping(start_of(data), aversion).x.x)
    x = np.asarray(weights(2.0))
    peer = minimize(lambda x: x @ data.P @ x + data.q @ x, np.full(8, 1 / 8), jac=lambda x: 2 * data.P @ x + data.q,
                    method="SLSQP", bounds=[(0, 0.3)] * 8, options={"ftol": 1e-15, "maxiter": 500},
                    constraints=[{"type": "eq", "fun": lambda x: np.sum(x) - 1}])  # fmt: skip
    np.testing.assert_allclose(x, peer.x, rtol=0, atol=1e-6)
    free = (x > 1e-6) & (x < 0.3 - 1e-6)
    assert 2 <= free.sum() < 8
    # On the free assets: 2 S dx + S x + dy = 0 with the sum of dx zero.
    k, S = free.sum(), data.P[np.ix_(free, free)]
    system = np.block([[2.0 * S, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    want = np.zeros(8)
    want[free] = np.linalg.solve(system, np.r_[-(data.P @ x)[free], 0.0])[:k]
    np.testing.assert_allclose(jax.jit(jax.jacfwd(weights))(2.0), want, rtol=0, atol=1e-9)


def test_products_instead_of_arrays():
    def products(theta):
        return theta._replace(P=lambda v: theta.P @ v, A=lambda v: theta.A @ v)

    stopping = derived(odl.quadratic_program(products), tol=1e-10)
    dense = solve(PROGRAM)
    loss = lambda theta: jnp.sum(jnp.sin(stopping(START, theta).x.x))
    value, gradient = jax.jit(jax.value_and_grad(loss))(PROGRAM)
    np.testing.assert_allclose(value, jnp.sum(jnp.sin(dense.x.x)), rtol=0, atol=1e-9)
    want = derivatives_by_polish(lambda u: jnp.sum(jnp.sin(u.x)))
    np.testing.assert_allclose(gradient.q, want.q, rtol=0, atol=1e-8)
    np.testing.assert_allclose(gradient.A, want.A, rtol=0, atol=1e-8)


def test_the_penalty_is_adapted_as_documented():
    """Against a loop in plain Python: the mean over the second half, its root, the threshold, the bounds, the waits."""
    from odljax.iterations._quadratic_program import Penalty, adapted

    rng = np.random.default_rng(0)
    levels = np.repeat([0.0, 9.0, -9.0, 4.0, -4.7, 4.8, 30.0, -30.0, 5.2, 0.0] * 4, 9)
    imbalances = levels + rng.standard_normal(levels.size)
    scale, wait, age, seen, last, want = 0, 6, 0, [], 0, []
    for imbalance in imbalances:
        age, seen = age + 1, [*seen, imbalance]
        if age == wait:
            root = np.mean(seen[wait // 2 :]) / 2
            age, seen = 0, []
            if abs(root) > np.log2(5):
                change = int(np.clip(np.round(root), -6, 6))
                scale, wait = int(np.clip(scale + change, -26, 26)), wait * (2 if change * last < 0 else 1)
                last = np.sign(change)
        want.append((scale, wait))
    assert len({scale for scale, _ in want}) > 5
    assert want[-1][1] > 6
    step = lambda penalty, imbalance: (adapted(penalty, imbalance), adapted(penalty, imbalance))
    _, got = jax.lax.scan(step, Penalty.initial(6, jnp.float64), jnp.asarray(imbalances))
    np.testing.assert_array_equal(np.log2(got.scale), [scale for scale, _ in want])
    np.testing.assert_array_equal(got.wait, [wait for _, wait in want])


def test_what_the_penalty_is_adapted_to():
    """The relative residuals in the infinity norm, equilibrated: here by no passes, so as they are; guarded at zero."""
    from odljax.operators._quadratic_program import metric_at, reader, splitting

    split = splitting("test", reader("test", given), metric_at("test", 0.1, None, 0), 1.6, None)
    P, q, A, _, _ = map(np.asarray, PROGRAM)
    u = random_point(4)
    image, slopes = A @ u.x, (P @ u.x, q, A.T @ u.y)
    top = lambda *parts: max(np.abs(part).max() for part in parts)
    want = np.log2(top(image - u.z) / top(image, u.z)) - np.log2(top(sum(slopes)) / top(*slopes))
    np.testing.assert_allclose(split(u, PROGRAM).imbalance, want, rtol=0, atol=1e-12)
    feasible = split(u._replace(z=jnp.asarray(PROGRAM.A @ u.x)), PROGRAM).imbalance
    np.testing.assert_allclose(
        feasible, np.log2(100 * np.finfo(float).eps * top(*slopes) / top(sum(slopes))), atol=1e-9
    )


def test_the_adaptive_penalty_makes_good_for_a_wrong_one():
    wrong, ends = jnp.array([1e-4, 1e4]), {}
    for every in (20, None):
        walk = odl.quadratic_program(lambda theta: PROGRAM, penalty=lambda theta: theta, adapt_every=every)
        stopping = odl.until_converged(walk, tol=1e-9, max_steps=1000)
        ends[every] = jax.jit(jax.vmap(lambda rho, stopping=stopping: stopping(START, rho)))(wrong)
    assert (ends[None].status == odl.Status.STEP_BUDGET_SPENT).all()
    assert odl.check(ends[20]).num_steps.max() < 300
    for x in ends[20].x.x:
        np.testing.assert_allclose(x, solve(PROGRAM).x.x, rtol=0, atol=1e-8)


# ---- the problem families of OSQP ------------------------------------------------------------------------------------


def sparse(rng, *shape):
    return rng.standard_normal(shape) * (rng.random(shape) < 0.5)


def family_random(rng, n=10, m=24):
    root = sparse(rng, n, n)
    return root @ root.T + 1e-2 * np.eye(n), rng.standard_normal(n), sparse(rng, m, n), -rng.random(m), rng.random(m)


def family_equality(rng, n=16, m=8):
    root, A = sparse(rng, n, n), sparse(rng, m, n)
    b = A @ rng.standard_normal(n)
    return root @ root.T + 1e-2 * np.eye(n), rng.standard_normal(n), A, b, b


def family_portfolio(rng, n=20, k=3):
    factors, zero = sparse(rng, n, k), np.zeros
    A = np.block([[factors.T, -np.eye(k)], [np.ones((1, n)), zero((1, k))], [np.eye(n), zero((n, k))]])
    P = np.diag(np.r_[2 * rng.random(n) * k**0.5, np.full(k, 2.0)])
    q = np.r_[-rng.standard_normal(n), zero(k)]
    return P, q, A, np.r_[zero(k), 1, zero(n)], np.r_[zero(k), 1, np.full(n, INF)]


def family_lasso(rng, n=5, m=14):
    X, one, zero = rng.standard_normal((m, n)), np.eye(n), np.zeros
    b = X @ (rng.standard_normal(n) * (rng.random(n) < 0.5) / n**0.5) + rng.standard_normal(m)
    A = np.block([[X, -np.eye(m), zero((m, n))], [one, zero((n, m)), -one], [one, zero((n, m)), one]])
    q = np.r_[zero(n + m), np.full(n, np.abs(X.T @ b).max() / 5)]
    return np.diag(np.r_[zero(n), np.full(m, 2.0), zero(n)]), q, A, np.r_[b, np.full(n, -INF), zero(n)], np.r_[b, zero(n), np.full(n, INF)]  # fmt: skip # noqa: E501


def family_svm(rng, n=4, m=16):
    labels = np.repeat([1.0, -1.0], m // 2)
    X = rng.standard_normal((m, n)) / n**0.5 + labels[:, None] / n
    A = np.block([[labels[:, None] * X, -np.eye(m)], [np.zeros((m, n)), np.eye(m)]])
    P, q = np.diag(np.r_[np.ones(n), np.zeros(m)]), np.r_[np.zeros(n), np.full(m, 0.5)]
    return P, q, A, np.r_[np.full(m, -INF), np.zeros(m)], np.r_[-np.ones(m), np.full(m, INF)]


def family_huber(rng, n=3, m=8):
    X, one, zero = rng.standard_normal((m, n)), np.eye(m), np.zeros
    b = X @ rng.standard_normal(n) + np.where(rng.random(m) < 0.2, 10 * rng.random(m), rng.standard_normal(m) / 4)
    A = np.block([[X, -one, -one, one], [zero((m, n + m)), one, zero((m, m))], [zero((m, n + 2 * m)), one]])
    P, q = np.diag(np.r_[zero(n), np.full(m, 2.0), zero(2 * m)]), np.r_[zero(n + m), np.full(2 * m, 2.0)]
    return P, q, A, np.r_[b, zero(2 * m)], np.r_[b, np.full(2 * m, INF)]


def family_control(rng, n=2, T=5):
    move = np.eye(n) + 0.1 * rng.standard_normal((n, n))
    push, weight, states = rng.standard_normal((n, 1)), 10 * rng.random(n), (T + 1) * n
    dynamics = np.zeros((states, states + T))
    dynamics[:, :states] = np.kron(np.eye(T + 1, k=-1), move) - np.eye(states)
    dynamics[n:, states:] = np.kron(np.eye(T), push)
    start, most = np.r_[-rng.uniform(-0.5, 0.5, n), np.zeros(T * n)], np.r_[1 + rng.random(states), np.full(T, 0.3)]
    P = np.diag(np.r_[np.tile(weight, T + 1), np.full(T, 0.1)])
    A = np.concatenate([dynamics, np.eye(states + T)])
    return P, np.zeros(states + T), A, np.r_[start, -most], np.r_[start, most]


def family_linear(rng, n=8, m=6):
    A, b = np.abs(rng.standard_normal((m, n))) + 0.1, np.abs(rng.standard_normal(m)) + 1
    q = np.abs(rng.standard_normal(n)) + 0.5
    return np.zeros((n, n)), q, np.concatenate([A, np.eye(n)]), np.r_[b, np.zeros(n)], np.full(m + n, INF)


# Iterations of OSQP 1.1.3 at eps_rel = 1e-4, eps_abs = 1e-12, tested at every step, for the seeds 0 and 1.
FAMILIES = {
    family_random: (162, 69),
    family_equality: (32, 32),
    family_portfolio: (62, 62),
    family_lasso: (59, 66),
    family_svm: (129, 103),
    family_huber: (53, 58),
    family_control: (26, 26),
    family_linear: (273, 453),
}
WIDE, TALL = 28, 44


def padded(program):
    """The same program in one shape for all: more variables, held at zero by a row each, and rows without bounds."""
    P, q, A, lower, upper = program
    more, rest = WIDE - q.size, TALL - lower.size - (WIDE - q.size)
    P, q = np.pad(P, (0, more)), np.pad(q, (0, more))
    A = np.pad(A, ((0, more + rest), (0, more)))
    A[lower.size : lower.size + more, q.size - more :] = np.eye(more)
    ends = np.zeros(more), np.full(rest, INF)
    return QuadraticProgram(P, q, A, np.r_[lower, ends[0], -ends[1]], np.r_[upper, ends[0], ends[1]])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_families_of_osqp_within_twice_its_iterations_in_any_units(dtype):
    programs = [family(np.random.default_rng(seed)) for family in FAMILIES for seed in range(2)]
    limits = [2 * count for counts in FAMILIES.values() for count in counts]
    batch = QuadraticProgram(*map(np.stack, zip(*map(padded, programs), strict=True)))
    stopping = odl.until_converged(odl.quadratic_program(given), tol=0.0, relative_tol=1e-4, max_steps=2000)
    start = QPVariables.zeros(WIDE, TALL, dtype)
    run = jax.jit(jax.vmap(lambda theta: stopping(start, theta)))
    for cost, length, row in ((1.0, 1.0, 1.0), (1e3, 1e-2, 1e2), (1e-6, 1e3, 1e2)):
        P, q, A, lower, upper = batch
        units = (cost / length**2 * P, cost / length * q, row / length * A, row * lower, row * upper)
        solutions = run(QuadraticProgram(*(jnp.asarray(part, dtype) for part in units)))
        odl.check(solutions)
        for i, (program, limit) in enumerate(zip(programs, limits, strict=True)):
            P, q, A, lower, upper = program
            x, z = (np.asarray(part[i], float)[: size.size] / unit for part, size, unit in
                    zip(solutions.x[:2], (q, lower), (length, row), strict=True))  # fmt: skip
            y = np.asarray(solutions.x.y[i], float)[: lower.size] * row / cost
            assert solutions.num_steps[i] <= limit, i
            # Feasible, stationary and complementary to the tolerance.
            eps = 2e-4
            terms, size = (P @ x, q, A.T @ y), max(np.linalg.norm(A @ x), np.linalg.norm(z))
            assert np.linalg.norm(A @ x - np.clip(A @ x, lower, upper)) <= eps * size, i
            assert np.linalg.norm(sum(terms)) <= eps * max(map(np.linalg.norm, terms)), i
            value, gap = (abs(x @ terms[0]), abs(q @ x), abs(y @ z)), x @ terms[0] + q @ x
            bound = np.where(y > 0, upper, lower)
            assert np.abs(y[np.isinf(bound)]).max(initial=0) <= 1e-6 * np.abs(y).max()
            support = np.sum(np.where(np.isinf(bound), 0, y * bound))
            assert abs(gap + support) <= eps * max(value), i


def test_float32_with_x64_on():
    exact = solve(PROGRAM)
    solution = odl.check(solve(PROGRAM, jnp.float32, tol=3e-6))
    floats = (solution.x, solution.state.scale, solution.state.total)
    assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(solution.x.x, exact.x.x, rtol=0, atol=1e-5)
    polished = polish(solution.x, PROGRAM)
    assert polished.x.dtype == jnp.float32
    np.testing.assert_allclose(polished.x, exact.x.x, rtol=0, atol=2e-6)


def test_equilibration_of_a_badly_scaled_program():
    rng = np.random.default_rng(5)
    stretch, height = 10.0 ** rng.uniform(-2, 2, N), 10.0 ** rng.uniform(-2, 2, M)
    P, q, A, lower, upper = map(np.asarray, PROGRAM)
    bad = QuadraticProgram(
        *map(jnp.asarray, (stretch[:, None] * P * stretch, stretch * q, height[:, None] * A * stretch)),
        *map(jnp.asarray, (height * lower, height * upper)),
    )
    scaled, restore = operators.equilibrate_quadratic_program(given)
    stopping = derived(odl.quadratic_program(scaled), tol=1e-11)

    def restored(theta):
        solution = stopping(START, theta)
        return restore(solution.x, theta), solution

    loss = lambda theta: (jnp.sum(jnp.asarray(stretch) * restored(theta)[0].x), restored(theta))
    (_, (u, solution)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(bad)
    assert int(solution.num_steps) < 400
    assert int(solve(bad, scaling=0).num_steps) > 1200
    want = solve(PROGRAM)
    np.testing.assert_allclose(np.asarray(u.x) * stretch, want.x.x, rtol=0, atol=1e-8)
    np.testing.assert_allclose(np.asarray(u.y) * height, want.x.y, rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.asarray(u.z) / height, want.x.z, rtol=0, atol=1e-7)
    # The scaling carries no derivative, and none is missing.
    want = derivatives_by_polish(lambda u: jnp.sum(u.x))
    np.testing.assert_allclose(gradient.q * stretch, want.q, rtol=0, atol=1e-7)
    np.testing.assert_allclose(height[:, None] * np.asarray(gradient.A) * stretch, want.A, rtol=0, atol=1e-7)


# ---- the metric ------------------------------------------------------------------------------------------------------


def ratios(T, points, weights):
    """The squared lengths of ``T a - T b`` over those of ``a - b``, in a diagonal metric."""
    flat = lambda u: jnp.concatenate(u)
    images = np.asarray(jax.jit(jax.vmap(lambda u: flat(T(u, PROGRAM))))(points))
    sources = np.asarray(jax.vmap(flat)(points))
    moved, apart = images[::2] - images[1::2], sources[::2] - sources[1::2]
    return np.sum(weights * moved**2, 1) / np.sum(weights * apart**2, 1)


@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_it_is_non_expansive_in_its_metric_and_not_in_the_identity(relaxation):
    T = operators.quadratic_program(given, penalty=0.3, regularization=0.05, relaxation=relaxation, scaling=0)
    ones = QPVariables(jnp.ones(N), jnp.ones(M), jnp.ones(M))
    weights = np.concatenate(T.metric(ones, PROGRAM))
    rho = 0.3 * np.array([1e3] + [1.0] * INEQUALITIES)
    np.testing.assert_allclose(weights, np.concatenate([np.full(N, 0.05), rho, 1 / rho]), rtol=1e-14)
    np.testing.assert_allclose(np.concatenate(T.metric_inverse(ones, PROGRAM)), 1 / weights, rtol=1e-14)
    rng = np.random.default_rng(0)
    anywhere = QPVariables(*(jnp.asarray(3 * rng.standard_normal((400, size))) for size in (N, M, M)))
    # Its own outcomes: z is the projection of z + y / rho.
    w = np.asarray(anywhere.z) + np.asarray(anywhere.y) / rho
    z = np.clip(w, PROGRAM.lower, PROGRAM.upper)
    outcomes = QPVariables(anywhere.x, jnp.asarray(z), jnp.asarray(rho * (w - z)))
    assert ratios(T, outcomes, weights).max() <= 1 + 1e-9
    assert ratios(T, outcomes, np.ones_like(weights)).max() > 1.1
    if relaxation == 1.0:
        assert ratios(T, anywhere, weights).max() <= 1 + 1e-9


def test_the_relaxed_operator_may_expand_between_points_that_are_no_outcomes():
    T = operators.quadratic_program(given, penalty=0.3, regularization=0.05, relaxation=1.9, scaling=0)
    weights = np.concatenate(T.metric(QPVariables(jnp.ones(N), jnp.ones(M), jnp.ones(M)), PROGRAM))
    rng = np.random.default_rng(0)
    rho = 0.3 * np.array([1e3] + [1.0] * INEQUALITIES)
    z = rng.standard_normal((400, M))
    against = QPVariables(*map(jnp.asarray, (np.zeros((400, N)), z, -rho * z)))
    assert ratios(T, against, weights).max() > 1


# ---- certificates ----------------------------------------------------------------------------------------------------

ROWS = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
# P, q, lower, upper and the status.
CASES = {
    "contradicting equalities": (np.eye(2), [1.0, 1.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0], "PRIMAL_INFEASIBLE"),
    "contradicting inequalities": (0 * np.eye(2), [1.0, 1.0], [5.0, 0.0, 0.0], [INF, 1.0, 1.0], "PRIMAL_INFEASIBLE"),
    "bounds that cross": (np.eye(2), [1.0, 1.0], [0.0, 0.0, 1.0], [INF, 1.0, 0.0], "PRIMAL_INFEASIBLE"),
    "unbounded linear": (0 * np.eye(2), [-1.0, 0.0], [-INF, 0.0, 0.0], [INF, INF, 1.0], "DUAL_INFEASIBLE"),
    "unbounded quadratic": (np.diag([1.0, 0.0]), [1.0, -1.0], [-INF] * 3, [INF, 1.0, INF], "DUAL_INFEASIBLE"),
    "dependent equalities": (np.eye(2), [1.0, 1.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.5], "CONVERGED"),
    "unbounded set, bounded program": (0 * np.eye(2), [1.0, 0.0], [0.0, 0.0, 0.0], [INF, INF, 1.0], "CONVERGED"),
    "far away": (1e-3 * np.eye(2), [1.0, 1.0], [2e4, -INF, -INF], [INF, INF, INF], "CONVERGED"),
}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_program_without_a_solution_ends_with_a_certificate(dtype):
    exact = dtype == jnp.float64
    options = {"tol": 1e-8 if exact else 1e-3, "relative_tol": 0.0 if exact else 1e-5}
    for name, (P, q, lower, upper, status) in CASES.items():
        program = QuadraticProgram(P, np.array(q), ROWS, np.array(lower), np.array(upper))
        solution = solve(program, dtype, **options)
        assert odl.Status(int(solution.status)).name == status, name
        assert int(solution.num_steps) < 1000, name
        assert bool(jnp.isfinite(solution.x.x).all()), name


def test_far_away_is_not_nowhere():
    """min x^2 / 2 s.t. c x >= 1, and min (c x)^2 / 2 - x: solutions beyond the reach of a proof in absolute numbers."""
    for dtype, c in ((jnp.float32, 1e-4), (jnp.float64, 1e-7)):
        far = QuadraticProgram(np.eye(1), np.zeros(1), np.full((1, 1), c), np.ones(1), np.full(1, INF))
        flat = QuadraticProgram(np.full((1, 1), c**2), -np.ones(1), np.eye(1), np.full(1, -INF), np.full(1, INF))
        for program, x in ((far, 1 / c), (flat, c**-2)):
            for scaling in (10, 0):
                walk = odl.quadratic_program(program, scaling=scaling)
                stopping = odl.until_converged(walk, tol=0.0, relative_tol=1e-5, max_steps=200)
                solution = stopping(QPVariables.zeros(1, 1, dtype), None)
                proved = solution.status in (odl.Status.PRIMAL_INFEASIBLE, odl.Status.DUAL_INFEASIBLE)
                assert not proved
                if scaling:
                    odl.check(solution)
                    np.testing.assert_allclose(solution.x.x, [x], rtol=1e-4)


def test_how_far_is_nowhere():
    """x_1 >= 1 / d twice over: a proof to 1e-1 or 1e-3 takes it for infeasible, one to 1e-6 does not."""
    d = 3e-4
    program = QuadraticProgram(np.eye(2), np.zeros(2), np.array([[d, 1.0], [d, -1.0]]), np.ones(2), np.full(2, INF))

    def status(dtype, **options):
        walk = odl.quadratic_program(program, **options)
        solver = odl.until_converged(walk, tol=1e-3, max_steps=200)
        return odl.Status(int(solver(QPVariables.zeros(2, 2, dtype), None).status))

    nowhere = odl.Status.PRIMAL_INFEASIBLE
    assert status(jnp.float32) is nowhere
    assert status(jnp.float64, infeasibility_tol=1e-1) is nowhere
    assert status(jnp.float64, infeasibility_tol=1e-3) is nowhere
    assert status(jnp.float64) is not nowhere
    assert status(jnp.float32, infeasibility_tol=1e-6) is not nowhere


def test_the_polish_of_an_exact_solution_keeps_its_derivative_and_a_rejected_one_shows():
    q, corners = np.array([-3.0, 0.4, 2.0]), (np.full(3, -0.3), np.full(3, 0.7))
    scaled = lambda theta: QuadraticProgram(
        np.diag([1.0, 2.0, 3.0]), q * theta, np.eye(3), *(c * theta for c in corners)
    )
    x = np.clip(-q / np.array([1.0, 2.0, 3.0]), *corners)
    y = np.where((x > corners[0]) & (x < corners[1]), 0.0, -(np.array([1.0, 2.0, 3.0]) * x + q))
    exact = QPVariables(*map(jnp.asarray, (x, x, y)))
    polish = operators.polish_quadratic_program(scaled)
    np.testing.assert_allclose(jax.jacobian(lambda theta: polish(exact, theta).x)(1.0), x, rtol=1e-12)
    wrong = exact._replace(z=exact.z.at[1].set(-0.31))  # its second constraint seems to be active
    assert np.array_equal(polish(wrong, 1.0).x, x)
    assert np.isnan(jax.jacobian(lambda theta: polish(wrong, theta).x)(1.0)).all()


def test_transforms_of_the_iteration_keep_the_verdict():
    P, q, lower, upper, _ = CASES["contradicting inequalities"]
    program = QuadraticProgram(P, np.array(q), ROWS, np.array(lower), np.array(upper))
    walk = odl.quadratic_program(program)
    T = operators.quadratic_program(program)
    verdicts = {
        "krasnoselskii_mann": odl.krasnoselskii_mann(walk, 0.7),
        "averaged": odl.fixed_point(operators.averaged(T, 0.6)),
        "anderson": odl.anderson(T, memory=2),
    }
    start = start_of(program)
    for name, iteration in verdicts.items():
        solution = jax.jit(odl.until_converged(iteration, tol=1e-8, max_steps=2000))(start, None)
        assert odl.Status(int(solution.status)) is odl.Status.PRIMAL_INFEASIBLE, name
    unrolled = jax.jit(odl.unrolled(odl.until_converged(walk, tol=1e-8, max_steps=200)))(start, None)
    assert odl.Status(int(unrolled.status)) is odl.Status.PRIMAL_INFEASIBLE
    with pytest.raises(RuntimeError, match="PRIMAL_INFEASIBLE: the constraints contradict each other"):
        odl.check(unrolled)


def test_a_batch_has_a_verdict_for_each_element():
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(
            QuadraticProgram(jnp.asarray(P), jnp.array(q), jnp.asarray(ROWS), jnp.array(lower), jnp.array(upper))
            for P, q, lower, upper, _ in CASES.values()
        ),
    )
    start = QPVariables.zeros(2, 3)
    stopping = odl.until_converged(odl.quadratic_program(given), tol=1e-8, max_steps=1000)
    solutions = jax.jit(jax.vmap(lambda program: stopping(start, program)))(stacked)
    assert [odl.Status(int(code)).name for code in solutions.status] == [case[-1] for case in CASES.values()]


def test_statuses_are_sorted_by_severity_and_each_has_a_message():
    codes = [odl.Status.DIVERGED, odl.Status.PRIMAL_INFEASIBLE, odl.Status.DUAL_INFEASIBLE, odl.Status.NON_FINITE]
    assert codes == sorted(codes)
    assert list(odl.STATUS_MESSAGES) == sorted(odl.Status)


def test_nan_comes_out():
    for part in QuadraticProgram._fields:
        bad = PROGRAM._replace(**{part: getattr(PROGRAM, part).at[-1].set(jnp.nan)})
        solution = solver()(START, bad)
        assert odl.Status(int(solution.status)) is odl.Status.NON_FINITE, part
        assert any(bool(jnp.isnan(leaf).any()) for leaf in solution.x), part


# ---- derivatives -----------------------------------------------------------------------------------------------------

WEIGHTS = random_point(9)


def weighted(u):
    return sum(jnp.vdot(a, b) for a, b in zip(WEIGHTS, u, strict=True))


def derivatives_by_hand(outer_gradient):
    """The differential of the optimality conditions, in closed form; bounds as if both sides of an equality moved.

    With the active rows a, K = [[P, A_a'], [A_a, 0]] and K v = w: dP = -(v_x x' + x v_x')/2, dq = -v_x,
    dA = -(y v_x' + v_y x'), db = v_y.
    """
    P, _, A, lower, upper = map(np.asarray, PROGRAM)
    u = jax.tree.map(np.asarray, polished_solution())
    low, high = np.isclose(u.z, lower, atol=1e-12), np.isclose(u.z, upper, atol=1e-12)
    active = low | high
    Aa = A[active]
    system = np.block([[P, Aa.T], [Aa, np.zeros((active.sum(),) * 2)]])
    # z = A x off the active set, and the bound on it.
    wx, wz, wy = (np.asarray(part) for part in outer_gradient)
    adjoint = np.linalg.solve(system, np.r_[wx + A[~active].T @ wz[~active], wy[active]])
    vx, vy = adjoint[:N], np.zeros(M)
    vy[active] = adjoint[N:]
    dA = -(np.outer(u.y, vx) + np.outer(vy, u.x))
    dA[~active] += np.outer(wz[~active], u.x)
    bound = vy + np.where(active, wz, 0.0)
    return -(np.outer(vx, u.x) + np.outer(u.x, vx)) / 2, -vx, dA, np.where(low, bound, 0), np.where(high, bound, 0)


@functools.cache
def polished_solution():
    return polish(solve(PROGRAM).x, PROGRAM)


@functools.cache
def derivatives_by_polish(outer):
    u = solve(PROGRAM).x
    return jax.jit(jax.grad(lambda theta: outer(polish(jax.lax.stop_gradient(u), theta))))(PROGRAM)


def rules():
    adaptive, fixed = odl.quadratic_program(given), odl.quadratic_program(given, penalty=3.0, adapt_every=None)
    stopping = lambda walk: odl.until_converged(walk, tol=1e-12, max_steps=2000)
    return {
        "implicit": lambda theta: odl.implicit(stopping(adaptive))(START, theta).x,
        "unrolled": lambda theta: odl.unrolled(odl.for_steps(fixed, 250))(START, theta).x,
        "unrolled, adaptive": lambda theta: odl.unrolled(odl.for_steps(adaptive, 250))(START, theta).x,
        "polish": lambda theta: polish(jax.lax.stop_gradient(stopping(fixed)(START, theta).x), theta),
    }


@pytest.mark.parametrize("rule", ["implicit", "unrolled", "unrolled, adaptive", "polish"])
def test_derivatives_in_all_data_against_the_closed_form(rule):
    u = polished_solution()
    active = np.isclose(u.z, PROGRAM.lower, atol=1e-12) | np.isclose(u.z, PROGRAM.upper, atol=1e-12)
    assert 2 <= active.sum() < min(N, M)
    assert np.abs(np.asarray(u.y)[active]).min() > 0.1  # strictly complementary
    want = derivatives_by_hand(WEIGHTS)
    loss = lambda theta: weighted(rules()[rule](theta))
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), PROGRAM)
    along = along._replace(upper=along.upper.at[0].set(along.lower[0]))  # an equality stays one
    both = jax.jit(lambda theta: (jax.grad(loss)(theta), jax.jvp(loss, (theta,), (along,))[1]))
    reverse, forward = both(PROGRAM)
    for name, got, wanted in zip(PROGRAM._fields, reverse, want, strict=True):
        rows = slice(EQUALITIES, None) if name in ("lower", "upper") else slice(None)
        np.testing.assert_allclose(np.asarray(got)[rows], wanted[rows], rtol=0, atol=1e-9, err_msg=name)
    # Of an equality only the sum counts: both of its bounds move.
    np.testing.assert_allclose(reverse.lower[0] + reverse.upper[0], want[3][0], rtol=0, atol=1e-9)
    whole = sum(np.vdot(a, b) for a, b in zip(along[:3], want[:3], strict=True))
    whole += np.asarray(along.lower)[0] * want[3][0]
    whole += sum(np.vdot(a[1:], b[1:]) for a, b in zip(map(np.asarray, along[3:]), want[3:], strict=True))
    np.testing.assert_allclose(forward, whole, rtol=0, atol=1e-8)


def test_derivatives_in_all_data_against_finite_differences():
    gradient = derivatives_by_polish(weighted)

    @jax.jit
    def value(theta):
        return weighted(polish(solver()(START, theta).x, theta))

    rng = np.random.default_rng(2)
    for name in PROGRAM._fields:
        along = jnp.asarray(rng.standard_normal(getattr(PROGRAM, name).shape))
        move = {name: along} if name not in ("lower", "upper") else {name: along.at[0].set(0.0)}
        slope = sum(jnp.vdot(getattr(gradient, key), part) for key, part in move.items())
        ends = [
            value(PROGRAM._replace(**{key: getattr(PROGRAM, key) + sign * 1e-5 * part for key, part in move.items()}))
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=0, atol=1e-6, err_msg=name)


def test_second_derivatives():
    """The Hessian of the solution in q, through implicit reverse mode and forward over it, is that of the polish."""
    stopping = derived(odl.quadratic_program(given))
    u = solve(PROGRAM).x
    along = jnp.asarray(np.random.default_rng(3).standard_normal((N, N)))

    def curved(read):
        loss = lambda P: jnp.sum(jnp.sin(read(PROGRAM._replace(P=P)).x))
        return jax.jit(lambda P: jax.jvp(jax.grad(loss), (P,), (along,))[1])(PROGRAM.P)

    got = curved(lambda theta: stopping(START, theta).x)
    want = curved(lambda theta: polish(jax.lax.stop_gradient(u), theta))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


def test_at_a_weakly_active_constraint_the_derivative_is_that_of_the_active_side():
    """min (x - t)^2 / 2 over x <= 1 at t = 1: the multiplier vanishes, and x = min(t, 1) has a kink."""
    program = lambda t: QuadraticProgram(jnp.eye(1), -t[None], jnp.eye(1), jnp.array([-INF]), jnp.array([1.0]))
    stopping = derived(odl.quadratic_program(program, adapt_every=None), tol=1e-13)
    at = QPVariables(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
    slope = jax.jit(jax.grad(lambda t: stopping(at, t).x.x[0]))
    np.testing.assert_allclose(slope(jnp.array(1.0)), 0.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(slope(jnp.array(0.5)), 1.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(slope(jnp.array(1.5)), 0.0, rtol=0, atol=1e-9)


# ---- equalities alone ------------------------------------------------------------------------------------------------


def test_equalities_alone_against_the_full_system():
    P, q, A, b = PROGRAM.P, PROGRAM.q, PROGRAM.A[:2], PROGRAM.lower[:2]
    system = np.block([[np.asarray(P), np.asarray(A).T], [np.asarray(A), np.zeros((2, 2))]])
    want = np.linalg.solve(system, np.r_[-np.asarray(q), np.asarray(b)])
    dense = operators.equality_quadratic_program(P, q, A, b)
    np.testing.assert_allclose(jnp.concatenate([dense.x, dense.y]), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(dense.z, b)

    def by_products(P, q, A, b):
        return operators.equality_quadratic_program(lambda v: P @ v, q, lambda v: A @ v, b)

    def loss(solve):
        return jax.jit(jax.grad(lambda *data: jnp.sum(jnp.sin(solve(*data).x)), argnums=(0, 1, 2, 3)))(P, q, A, b)

    reference = loss(operators.equality_quadratic_program)
    for name, got, wanted in zip("PqAb", loss(by_products), reference, strict=True):
        got = (got + got.T) / 2 if name == "P" else got
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9, err_msg=name)
    value = lambda q: jnp.sum(jnp.sin(operators.equality_quadratic_program(P, q, A, b).x))
    along = jnp.asarray(np.random.default_rng(4).standard_normal(N))
    numeric = (value(q + 1e-5 * along) - value(q - 1e-5 * along)) / 2e-5
    np.testing.assert_allclose(jnp.vdot(reference[1], along), numeric, rtol=0, atol=1e-8)


def test_dependent_constraints_pass_the_polish():
    program = QuadraticProgram(
        np.eye(2), np.ones(2), np.array([[1.0, 1.0], [2.0, 2.0]]), np.r_[1.0, 2.0], np.r_[1.0, 2.0]
    )
    rough = QPVariables(jnp.array([0.4, 0.6]), jnp.array([1.0, 2.0]), jnp.array([-0.3, -0.6]))
    polished = polish(rough, program)
    np.testing.assert_allclose(polished.x, [0.5, 0.5], rtol=0, atol=1e-12)
    assert violation(program, polished) < 1e-12


# ---- what it costs ---------------------------------------------------------------------------------------------------


def computations(text):
    """The names of the computations of a compiled program in which a decomposition is called."""
    inside, found = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line.split(" ")[0]
        if "potrf" in line or "syevd" in line:
            found.append(inside)
    return found


@pytest.mark.usefixtures("optimised")
def test_the_loop_factors_the_matrix_once():
    """The compiler takes what does not change out of the loop: the factors are computed before it."""
    stopping = odl.until_converged(odl.quadratic_program(given), tol=1e-8, max_steps=100)
    text = jax.jit(lambda theta: stopping(START, theta).x).lower(PROGRAM).compile().as_text()
    found = computations(text)
    assert found
    assert set(found) == {"ENTRY"}


def test_a_solver_without_a_certificate_pays_nothing():
    calls = []

    def certificate(x, move, theta):
        calls.append(move)
        return jnp.where(jnp.abs(move) > 0.4, jnp.int32(odl.Status.DUAL_INFEASIBLE), jnp.int32(-1))

    drift = operators.Operator(lambda x, theta: x + theta, certificate=certificate)
    solution = odl.until_converged(odl.fixed_point(drift), tol=1e-8, max_steps=50)(0.0, 0.5)
    assert odl.Status(int(solution.status)) is odl.Status.DUAL_INFEASIBLE
    assert calls
    assert (
        int(odl.until_converged(odl.fixed_point(drift), max_steps=50)(0.0, 0.1).status) == odl.Status.STEP_BUDGET_SPENT
    )
    plain = operators.Operator(lambda x, theta: x + theta)
    trace = lambda T: str(jax.make_jaxpr(odl.until_converged(odl.fixed_point(T), max_steps=50))(0.0, 0.5))
    assert "0.4" in trace(drift)
    assert len(trace(plain)) < len(trace(drift))


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_users_see_it():
    """Without the annotation checks of the tests, which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


SMALL = QuadraticProgram(np.eye(2), np.zeros(2), np.ones((3, 2)), np.zeros(3), np.ones(3))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("build", [operators.quadratic_program, odl.quadratic_program])
@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (3.0, {}, r"program must be a QuadraticProgram; a float came. Pass QuadraticProgram\(P, q, A, lower, upper\)"),
        (lambda: SMALL, {}, "program must be a function of"),
        (SMALL._replace(P=np.ones((2, 3))), {}, r"P must be \[n, n\]; came P \[2, 3\], q \[2\], A \[3, 2\]"),
        (SMALL._replace(A=np.ones((2, 3))), {}, r"A must be \[m, n\]; came .* A \[2, 3\], .* Reshape A to \[3, 2\]"),
        (SMALL._replace(upper=np.ones(2)), {}, r"upper must be \[m\]; came .* upper \[2\]"),
        (SMALL._replace(q=1.0), {}, r"q must be \[n\]; came .* q \[\]"),
        (SMALL._replace(lower=np.array([0.0, 2.0, 0.0])), {}, r"lower must not exceed upper; at row 1 they are 2\.0"),
        (SMALL, {"penalty": 0.0}, "penalty must lie in"),
        (SMALL, {"regularization": -1.0}, "regularization must lie in"),
        (SMALL, {"relaxation": 2.0}, "relaxation must lie in"),
        (SMALL, {"linear_solver": "cg"}, "linear_solver must be a LinearSolver"),
        (SMALL, {"infeasibility_tol": 0.0}, "infeasibility_tol must lie in"),
    ],
)
def test_messages(build, program, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(program, **options)


@pytest.mark.usefixtures("as_users_see_it")
def test_messages_at_trace_time():
    T = operators.quadratic_program(SMALL)
    with pytest.raises(
        TypeError, match=r"x must be a QPVariables; .* Start from odl.operators.QPVariables.zeros\(n, m\)"
    ):
        T(jnp.zeros(2), None)
    with pytest.raises(TypeError, match=r"x\.y must have the shape \(3,\) of the program; float64\[2\] came"):
        T(QPVariables(jnp.zeros(2), jnp.zeros(3), jnp.zeros(2)), None)
    with pytest.raises(TypeError, match="A must keep the shapes and dtypes of z"):
        operators.quadratic_program(SMALL._replace(A=lambda v: v))(QPVariables.zeros(2, 3), None)
    with pytest.raises(ValueError, match="adapt_every must be a whole number of at least 1; 0 came"):
        odl.quadratic_program(SMALL, adapt_every=0)
    products = SMALL._replace(A=lambda v: jnp.ones((3, 2)) @ v)
    with pytest.raises(TypeError, match="polish_quadratic_program: needs P and A as arrays; a function came"):
        operators.polish_quadratic_program(products)(QPVariables.zeros(2, 3), None)
    with pytest.raises(TypeError, match="equilibrate_quadratic_program: needs P and A as arrays; a function came"):
        operators.equilibrate_quadratic_program(products)[0](None)
    with pytest.raises(TypeError, match=r"equality_quadratic_program: A must be \[m, n\]"):
        operators.equality_quadratic_program(np.eye(2), np.zeros(2), np.ones((1, 3)), np.ones(1))
    with pytest.raises(TypeError, match="cg needs a positive-definite matrix; that of the optimality conditions"):
        operators.equality_quadratic_program(
            np.eye(2), np.zeros(2), np.ones((1, 2)), np.ones(1), linear_solver=odl.linear.cg()
        )
