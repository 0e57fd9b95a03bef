"""Acceleration, line searches, Newton-type steps: formulas, rates, safeguards, derivatives before convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import config
from registry import ITERATIONS, PROBLEMS
from scipy.optimize import least_squares

import odljax as odl
from odljax import Status

# A linear map whose residual matrix I - M is well away from singular, not symmetric, in five unknowns.
M = 0.35 * np.random.default_rng(0).standard_normal((5, 5))
B = np.random.default_rng(1).standard_normal(5)
X0 = np.random.default_rng(2).standard_normal(5)
LINEAR = odl.fixed_point(lambda x, b: M @ x + b)
FIXED = np.linalg.solve(np.eye(5) - M, B)

# A smooth convex objective that is not quadratic, and its gradient by hand.
Q = np.diag([1.0, 3.0, 9.0]) + 0.5


def bowl(x, theta):
    return 0.5 * x @ (Q @ x) - theta @ x + 0.25 * jnp.sum(x**4)


def bowl_gradient(x, theta):
    return Q @ x - theta + x**3


THETA = np.array([1.0, -2.0, 0.5])
START = np.array([1.5, -1.0, 2.0])


def path(iteration, num_steps, x0, theta):
    """All iterates, the last included."""
    solver = odl.for_steps(iteration, num_steps, record=lambda x, theta, k: x)
    solution = jax.jit(lambda x0, theta: solver(x0, theta))(jnp.asarray(x0), theta)
    return np.concatenate([np.asarray(solution.history.recorded), np.asarray(solution.x)[None]]), solution


def walked(step, x, num_steps):
    """The same in NumPy: ``step(x, k)``."""
    rows = [x]
    for k in range(num_steps):
        rows.append(step(rows[-1], k))
    return np.asarray(rows)


def agree(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# ---- Halpern, inertia, restarts --------------------------------------------------------------------------------------


def test_halpern_is_its_formula_and_keeps_its_anchor():
    T = lambda x: M @ x + B
    iterates, solution = path(odl.halpern(LINEAR), 8, X0, B)
    agree(iterates, walked(lambda x, k: X0 / (k + 2) + (k + 1) / (k + 2) * T(x), X0, 8))
    agree(solution.state.anchor, X0, 0)
    own, _ = path(odl.halpern(LINEAR, weight=lambda k: 1.0 / (k.astype(float) + 2.0) ** 2), 5, X0, B)
    agree(own, walked(lambda x, k: X0 / (k + 2) ** 2 + (1 - 1 / (k + 2) ** 2) * T(x), X0, 5))


def test_halpern_keeps_the_bound_of_lieder_and_attains_it():
    """||x_k - T x_k|| <= 2 dist / (k + 1): on rotations, and with equality at even k on x -> -x."""
    k = np.arange(101)
    for angle in (0.3, 1.5, np.pi):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.array([[c, -s], [s, c]])
        iterates, _ = path(odl.halpern(lambda x, theta: turn @ x), 100, [3.0, 4.0], 0.0)
        residuals = np.linalg.norm(iterates - iterates @ turn.T, axis=1)
        assert (residuals <= 2 * 5.0 / (k + 1) * (1 + 1e-12)).all()
    np.testing.assert_allclose(residuals[::2], 2 * 5.0 / (k[::2] + 1), rtol=1e-12)


def test_halpern_ends_at_the_fixed_point_nearest_to_the_start():
    mirror = np.diag([1.0, -1.0, 1.0])  # every point of a plane is fixed
    iterates, _ = path(odl.halpern(lambda x, theta: mirror @ x), 999, [1.0, 2.0, 3.0], 0.0)
    agree(iterates[-1], [1.0, 0.0, 3.0], 2e-3)


def test_nesterov_around_krasnoselskii_mann_is_the_inertial_iteration():
    walk = odl.nesterov(odl.krasnoselskii_mann(LINEAR, relaxation=0.6), momentum=0.25)
    iterates, _ = path(walk, 6, X0, B)
    expected = [X0, X0]
    for _ in range(6):
        v = expected[-1] + 0.25 * (expected[-1] - expected[-2])
        expected.append(v + 0.6 * (M @ v + B - v))
    agree(iterates, expected[1:])


def test_nesterovs_own_momentum_is_that_of_fista():
    theta = np.array([1.0, 2.0, -1.0])
    iterates, _ = path(odl.nesterov(odl.gradient_descent(bowl, 0.05)), 8, np.zeros(3), theta)
    expected = [np.zeros(3), np.zeros(3)]
    for k in range(8):
        v = expected[-1] + k / (k + 3) * (expected[-1] - expected[-2])
        expected.append(v - 0.05 * bowl_gradient(v, theta))
    agree(iterates, expected[1:])


def test_restarted_momentum_is_its_formula_and_finds_the_strong_convexity():
    problem = odl.problems.quadratic(condition=1000.0)
    descent = odl.gradient_descent(problem.objective, step_size=1.0)
    x0, theta = problem.x0 + 1.0, problem.theta
    iterates, solution = path(odl.nesterov(descent, restart=True), 200, x0, theta)
    gradient = jax.jit(jax.grad(problem.objective))
    x, previous, age, restarts, expected = np.asarray(x0), np.asarray(x0), 0, 0, [np.asarray(x0)]
    for _ in range(200):
        v = x + age / (age + 3) * (x - previous)
        new = v - np.asarray(gradient(v, theta))
        uphill = (v - new) @ (new - x) > 0
        previous, age = (new, 0) if uphill else (x, age + 1)
        restarts, x = restarts + uphill, new
        expected.append(x)
    agree(iterates, expected, 1e-10)
    assert restarts == 2
    assert int(solution.state.age) == age
    root = (1 - 1000.0**-0.5) / (1 + 1000.0**-0.5)
    walks = {
        "plain": odl.nesterov(descent),
        "restarted": odl.nesterov(descent, restart=True),
        "told": odl.nesterov(descent, momentum=root),
    }
    count = lambda walk: int(odl.until_converged(walk, tol=1e-10, max_steps=20_000)(x0, theta).num_steps)
    steps = {name: count(walk) for name, walk in walks.items()}
    assert steps["restarted"] < 0.5 * steps["plain"]
    assert steps["restarted"] < 2.0 * steps["told"]


# ---- Anderson, Broyden, SQUAREM --------------------------------------------------------------------------------------


def krylov(kind, steps):
    """The iterates of GMRES (kind 2) and FOM (kind 1) on (I - M) x = B from X0, spelled out on the Krylov basis."""
    A = np.eye(5) - M
    r = B - A @ X0
    basis, rows = [r], [X0]
    for _ in range(steps):
        V = np.linalg.qr(np.stack(basis, axis=1))[0]
        y = np.linalg.lstsq(A @ V, r, rcond=None)[0] if kind == 2 else np.linalg.solve(V.T @ A @ V, V.T @ r)
        rows.append(X0 + V @ y)
        basis.append(A @ basis[-1])
    return np.asarray(rows)


@pytest.mark.parametrize("kind", [1, 2])
def test_anderson_on_a_linear_map_is_a_krylov_method(kind):
    """Step k + 1 is T at the k-th iterate of GMRES (type II) or FOM (type I), and n + 1 steps solve n equations."""
    iterates, _ = path(odl.anderson(LINEAR, memory=6, kind=kind, regularization=0.0), 6, X0, B)
    agree(iterates[1:6], krylov(kind, 4) @ M.T + B, 1e-7)
    agree(iterates[6], FIXED, 1e-7)


@pytest.mark.parametrize("kind", [1, 2])
def test_anderson_is_the_secant_method_in_one_unknown(kind):
    """With two slots both types are the secant method on x - T(x)."""
    T = lambda x, theta: jnp.cos(x) * theta
    iterates, _ = path(odl.anderson(T, memory=2, kind=kind), 5, 0.3, 0.9)
    g = lambda x: x - 0.9 * np.cos(x)
    expected = [0.3, 0.9 * np.cos(0.3)]
    while len(expected) < 6:
        a, b = expected[-2:]
        expected.append(b - g(b) * (b - a) / (g(b) - g(a)))
    agree(iterates, expected, 1e-8)


@pytest.mark.parametrize("factor", [None, 0.9, 0.4])
def test_anderson_is_its_formula_with_mixing_regularisation_and_safeguard(factor):
    """The weights from the optimality conditions of the constrained least-squares problem, spelled out."""
    beta, ridge, memory = (lambda k: 0.6 + 0.05 * k.astype(float)), 0.03, 3
    walk = odl.anderson(LINEAR, memory, mixing=beta, regularization=ridge, safeguard=factor)
    iterates, _ = path(walk, 9, X0, B)
    xs, rs, rows, guard, taken_back = [], [], [X0], (None, np.inf, False), 0
    for k in range(9):
        x = rows[-1]
        r = M @ x + B - x
        xs, rs = [*xs, x][-memory:], [*rs, r][-memory:]
        n, R = len(rs), np.stack(rs)
        kkt = np.block([[R @ R.T + ridge * np.max(np.sum(R**2, 1)) * np.eye(n), np.ones((n, 1))], [np.ones(n), 0.0]])
        alpha = np.linalg.solve(kkt, np.append(np.zeros(n), 1.0))[:n]
        new = alpha @ (np.stack(xs) + (0.6 + 0.05 * k) * R)
        if factor is not None:
            plain, before, fast = guard
            size = np.linalg.norm(r)
            worse = fast and not size <= factor * before
            taken_back += worse
            new, guard = (plain if worse else new), (x + r, size, not worse)
        rows.append(new)
    agree(iterates, rows, 1e-9)
    assert factor is None or (taken_back > 0) == (factor < 0.9), taken_back


def test_accelerations_are_those_of_a_map_of_x():
    """Momentum is forgotten after each step, so that of the plain step is accelerated; Adam is refused."""
    f = lambda x, theta: 0.5 * x @ (jnp.asarray(Q) @ x) - theta @ x
    plain, heavy = odl.gradient_descent(f, 0.1), odl.heavy_ball(odl.gradient_descent(f, 0.1), 0.8)
    optaxs = odl.from_optax(f, optax.sgd(0.1, momentum=0.8))
    nested = odl.nesterov(heavy, 0.8, restart=True)
    for accelerate, walk in ((odl.anderson, optaxs), (odl.broyden, nested), (odl.squarem, heavy)):
        agree(path(accelerate(walk), 5, START, THETA)[0], path(accelerate(plain), 5, START, THETA)[0])
    adam = odl.anderson(odl.from_optax(f, optax.adam(0.1)))
    standard = jax.numpy_dtype_promotion("standard")  # optax knows no strict one
    with standard, pytest.raises(TypeError, match="needs steps that are a map of x; those of Adam"):
        odl.for_steps(adam, 2)(START, THETA)


def test_squarem_counts_three_steps_a_step():
    walk = odl.squarem(odl.krasnoselskii_mann(LINEAR, relaxation=lambda k: 1.0 / (k.astype(float) + 2.0)))
    T = lambda x, k: x + (M @ x + B - x) / (k + 2.0)

    def step(x, k):
        once = T(x, 3 * k)
        twice = T(once, 3 * k + 1)
        r, v = once - x, twice - 2 * once + x
        a = max(np.linalg.norm(r) / np.linalg.norm(v), 1.0)
        ahead = x + 2 * a * r + a * a * v
        target = T(ahead, 3 * k + 2)
        return target if np.linalg.norm(target - ahead) <= np.linalg.norm(r) else twice

    agree(path(walk, 5, X0, B)[0], walked(step, X0, 5), 1e-9)


def test_project_keeps_the_readout():
    T = odl.operators.Operator(lambda x, theta: 0.5 * x + theta, readout=lambda x, theta: 3.0 * x - theta)
    projected = odl.project(odl.fixed_point(T), lambda x, theta: jnp.minimum(x, 1.0))
    assert float(projected.operator.answer(1.0, 2.0)) == 1.0


D32 = np.array([1.0, 0.3, 0.1, 0.03], np.float32)


def scaled_walks():
    """On a quadratic in float32, whose steps scale with x and theta."""
    T = lambda x, theta: x - D32 * (x - theta)
    f = lambda x, theta: 0.5 * jnp.sum(D32 * (x - theta) ** 2)
    r = lambda x, theta: jnp.sqrt(D32) * (x - theta)
    soft = lambda v, theta, step_size: odl.prox.l1(v, 0.1 * theta[0], step_size)
    return {
        "restart": odl.nesterov(odl.gradient_descent(f, 1.0), restart=True),
        "anderson": odl.anderson(T, safeguard=0.5),
        "anderson type_1": odl.anderson(T, kind=1),
        "broyden": odl.broyden(T, 3),
        "squarem": odl.squarem(T),
        "hager_zhang": odl.line_search(odl.gradient_descent(f, 1.0), f, "hager_zhang"),
        "backtracking": odl.backtracking(f, soft, step_size=8.0),
        "gauss_newton": odl.gauss_newton(r, odl.linear.dense()),
        "levenberg_marquardt": odl.levenberg_marquardt(r, odl.linear.dense()),
        "hard_thresholding": odl.accelerated_hard_thresholding(f, 2, 0.9),
    }


@pytest.mark.parametrize("name", scaled_walks())
def test_units_do_not_matter(name):
    """Scaled by a power of two, 1e-30 to 1e30 in float32, where squares under- and overflow: the same digits."""
    units = 2.0 ** np.array([0, -100, -60, 60, 100], np.float32)
    x0, theta = np.array([[0.3, 0.1, 0.0, -0.2], [1.0, -2.0, 0.7, 3.0]], np.float32)
    solver = odl.for_steps(scaled_walks()[name], 10, record=lambda x, theta, k: x)
    rows = jax.jit(jax.vmap(lambda unit: solver(unit * x0, unit * theta).history.recorded))(jnp.asarray(units))
    relative = np.asarray(rows) / units[:, None, None]
    np.testing.assert_array_equal(relative[1:], np.broadcast_to(relative[0], relative[1:].shape))
    assert np.abs(np.diff(relative[0], axis=0)).max() > 0.1


def kinked(x, theta):
    """Nearly constant steps outside, fast convergence inside: secants across the kinks overshoot, to and fro."""
    return x - 0.5 * jnp.clip(x - theta, -1.0, 1.0) - 1e-3 * (x - theta)


@pytest.mark.parametrize("method", ["type I", "type II", "broyden"])
def test_the_safeguard_makes_secants_converge_across_kinks(method):
    make = {
        "type I": lambda safeguard: odl.anderson(kinked, memory=2, kind=1, safeguard=safeguard),
        "type II": lambda safeguard: odl.anderson(kinked, memory=2, safeguard=safeguard),
        "broyden": lambda safeguard: odl.broyden(kinked, safeguard=safeguard),
    }[method]
    bare, strict, plain = (
        odl.until_converged(walk, tol=1e-9, max_steps=500)(10.0, 0.3)
        for walk in (make(None), make(0.99), odl.fixed_point(kinked))
    )
    assert Status(int(bare.status)) is Status.STEP_BUDGET_SPENT
    assert float(bare.residual) > 0.5
    assert Status(int(strict.status)) is Status.CONVERGED
    assert int(strict.num_steps) <= 2 * int(plain.num_steps)
    agree(strict.x, 0.3, 1e-8)
    # Wherever the step is plain or kept, the residual has not grown: those that are taken back excepted.
    _, solution = path(make(0.99), 60, 10.0, 0.3)
    residuals = np.asarray(solution.history.residual)
    least = np.minimum.accumulate(residuals)
    assert (np.minimum(residuals[1:], residuals[:-1]) <= least[:-1] * (1 + 1e-9)).all()


def test_broyden_is_its_formula_with_the_inverse_spelled_out():
    """A new start from the identity each time the memory is full."""
    T = lambda x, theta: x - 0.08 * (jnp.asarray(Q) @ x - theta + x**3)
    g = lambda x: 0.08 * bowl_gradient(x, THETA)
    iterates, _ = path(odl.broyden(T, memory=3, safeguard=None), 10, START, THETA)
    x, H, used, expected = START, np.eye(3), 0, [START]
    for _ in range(10):
        new = x - H @ g(x)
        s, y = new - x, g(new) - g(x)
        if used == 3:
            H, used = np.eye(3), 0
        H, used = H + np.outer(s - H @ y, s @ H) / (s @ H @ y), used + 1
        x = new
        expected.append(x)
    agree(iterates, expected, 1e-10)


def test_broyden_solves_linear_equations_in_twice_their_number():
    """Gay's theorem: 2n steps at the most."""
    iterates, solution = path(odl.broyden(LINEAR, memory=10, safeguard=None), 11, X0, B)
    assert np.linalg.norm(iterates[9] - FIXED) > 1e-6
    agree(iterates[11], FIXED, 1e-9)
    assert float(solution.residual) < 1e-9


def test_squarem_never_steps_shorter_than_the_map():
    """On x -> -x/2 the ratio of the two differences is 2/3: held at 1, a step is three applications of the map."""
    iterates, _ = path(odl.squarem(odl.fixed_point(lambda x, theta: -0.5 * x)), 2, [1.0, 2.0], 0.0)
    agree(iterates[1], [-0.125, -0.25])


def test_squarem_is_its_formula_and_its_residual_does_not_grow():
    problem = odl.problems.quadratic(condition=50.0)
    matrix = np.asarray(jax.hessian(problem.objective)(problem.x0, problem.theta))
    T = lambda x: x - (matrix @ x - np.asarray(problem.theta))
    descent = odl.gradient_descent(problem.objective, step_size=1.0)
    iterates, _ = path(odl.squarem(descent, max_step=20.0), 12, problem.x0 + 1.0, problem.theta)
    fallen_back = 0

    def step(x, k):
        nonlocal fallen_back
        r = T(x) - x
        v = T(T(x)) - T(x) - r
        a = np.clip(np.linalg.norm(r) / np.linalg.norm(v), 1.0, 20.0)
        ahead = x + 2 * a * r + a * a * v
        better = np.linalg.norm(T(ahead) - ahead) <= np.linalg.norm(r)
        fallen_back += not better
        return T(ahead) if better else T(T(x))

    agree(iterates, walked(step, np.asarray(problem.x0) + 1.0, 12), 1e-10)
    assert 0 < fallen_back < 12, fallen_back
    residuals = np.linalg.norm([T(x) - x for x in iterates], axis=1)
    assert (np.diff(residuals) < 0).all()
    count = lambda walk: int(odl.until_converged(walk, tol=1e-9, max_steps=5000)(problem.x0, problem.theta).num_steps)
    assert 3 * count(odl.squarem(descent)) < 0.6 * count(descent)  # three steps each


# ---- line searches ---------------------------------------------------------------------------------------------------


def rosenbrock(x, theta):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (theta - x[0]) ** 2


def test_armijo_is_its_formula():
    iterates, _ = path(
        odl.line_search(odl.gradient_descent(rosenbrock, 1.0), rosenbrock, decrease=0.2, shrink=0.6),
        15,
        [-1.2, 1.0],
        1.0,
    )

    def step(x, k):
        g = np.array([-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)])
        t = 1.0
        while rosenbrock(x - t * g, 1.0) > rosenbrock(x, 1.0) - 0.2 * t * g @ g:
            t *= 0.6
        return x - t * g

    agree(iterates, walked(step, np.array([-1.2, 1.0]), 15), 1e-11)


def test_hager_zhang_meets_the_conditions_of_wolfe_and_lengthens_short_steps():
    for step_size in (1.0, 1e-5):
        descent = odl.gradient_descent(rosenbrock, step_size)
        iterates, _ = path(odl.line_search(descent, rosenbrock, "hager_zhang"), 40, [-1.2, 1.0], 1.0)
        gradient = jax.jit(jax.vmap(jax.grad(rosenbrock), in_axes=(0, None)))
        slopes = np.asarray(gradient(jnp.asarray(iterates), 1.0))
        values = np.array([rosenbrock(x, 1.0) for x in iterates])
        moves = np.diff(iterates, axis=0)
        before, after = np.sum(slopes[:-1] * moves, axis=1), np.sum(slopes[1:] * moves, axis=1)
        assert (before < 0).all()
        assert (after >= 0.9 * before).all()
        assert (values[1:] <= values[:-1] + 0.1 * before + 1e-12).all()
        assert values[-1] < 0.5 * values[1]


@pytest.mark.parametrize("rule", ["armijo", "hager_zhang"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_line_search_goes_down_to_rounding(rule, dtype):
    """Values of f cannot tell points apart below the root of the rounding unit; slopes can."""
    scales = jnp.asarray([1.0, 9.0], dtype)
    f = lambda x, theta: 0.5 * jnp.sum(scales * (x - theta) ** 2) + 10.0
    walk = odl.line_search(odl.gradient_descent(f, 1.0), f, rule)
    eps = float(jnp.finfo(dtype).eps)
    solution = odl.until_converged(walk, tol=60 * eps, max_steps=400)(jnp.zeros(2, dtype), jnp.ones(2, dtype))
    assert Status(int(solution.status)) is Status.CONVERGED
    assert solution.x.dtype == dtype
    agree(solution.x, np.ones(2), 60 * eps)


@pytest.mark.parametrize("rule", ["armijo", "hager_zhang"])
def test_a_step_that_climbs_is_searched_backwards(rule):
    climb = odl.line_search(lambda x, theta: x + 0.05 * (x - theta), lambda x, theta: (x - theta) ** 2, rule)
    reached = float(odl.for_steps(climb, 3)(2.0, 0.5).x)
    if rule == "armijo":
        agree(reached, 0.5 + 1.5 * 0.95**3)
    assert abs(reached - 0.5) <= (1.5 * 0.95**3 if rule == "armijo" else 1.5 * 0.75**3) + 1e-12
    # Newton's step at an indefinite Hessian (a saddle at 0) climbs; its reverse leads to the minimiser.
    double_well = lambda x, theta: jnp.sum(0.25 * x**4 - 0.5 * jnp.array([1.0, -2.0]) * x**2 - theta * x)
    walk = odl.line_search(odl.newton(double_well, odl.linear.dense()), double_well, rule)
    solution = odl.until_converged(walk, tol=1e-12, max_steps=30)(jnp.array([0.3, 0.2]), 0.0)
    assert Status(int(solution.status)) is Status.CONVERGED
    agree(solution.x, [1.0, 0.0], 1e-11)
    # Across the slope no length descends: x stays, and the walk ends before its budget.
    across = odl.line_search(lambda x, theta: x + jnp.array([1.0, 0.0]), lambda x, theta: x[1] + x[0] ** 2, rule)
    stuck = odl.until_converged(across, tol=1e-9, max_steps=5000)(jnp.zeros(2), None)
    assert Status(int(stuck.status)) is Status.STALLED
    assert int(stuck.num_steps) <= 200


def test_a_newton_step_that_is_too_long_is_cut():
    """Newton on sqrt(1 + x^2) maps x to -x^3."""
    f = lambda x, theta: jnp.sqrt(1.0 + (x - theta) ** 2)
    wild = odl.for_steps(odl.newton(f), 3)(2.5, 0.5)
    agree(wild.x, 0.5 - 2.0**27, 1.0)
    tame = odl.until_converged(odl.line_search(odl.newton(f), f), tol=1e-14, max_steps=12)(2.5, 0.5)
    assert Status(int(tame.status)) is Status.CONVERGED
    agree(tame.x, 0.5, 1e-13)


def test_backtracking_is_its_formula_and_its_momentum_is_fista():
    lam = 0.3
    soft = lambda v, t: np.sign(v) * np.maximum(np.abs(v) - t, 0)
    prox = lambda v, theta, step_size: odl.prox.l1(v, lam, step_size)
    f = lambda x: 0.5 * x @ Q @ x - THETA @ x + 0.25 * np.sum(x**4)
    for grow in (1.0, 1.5):
        iterates, solution = path(odl.backtracking(bowl, prox, step_size=1.0, grow=grow), 12, START, THETA)
        fraction = 1.0

        def step(x, k):
            nonlocal fraction
            g, fraction = bowl_gradient(x, THETA), grow * fraction
            while True:
                p = soft(x - fraction * g, fraction * lam)
                if f(p) <= f(x) + g @ (p - x) + (p - x) @ (p - x) / (2 * fraction):
                    return p
                fraction *= 0.5

        agree(iterates, walked(step, START, 12))
        agree(solution.state.fraction, fraction)
    walk = odl.backtracking(bowl, prox, step_size=1.0, grow=1.0)
    safe = odl.proximal_gradient(bowl, prox, 1 / 40)
    solve = lambda walk: odl.until_converged(walk, tol=1e-11, max_steps=3000)(START, THETA)
    solutions = [solve(walk) for walk in (walk, safe, odl.nesterov(walk, restart=True))]
    for solution in solutions:
        assert Status(int(solution.status)) is Status.CONVERGED
        agree(solution.x, solutions[1].x, 1e-9)
    assert float(solutions[0].state.fraction) > 0.01  # rounding near the solution has not shrunk it
    assert int(solutions[0].num_steps) < int(solutions[1].num_steps)
    shallow = lambda x, theta: 5e-3 * jnp.sum(jnp.array([1.0, 0.2, 0.1]) * (x - theta) ** 2)  # 1/L is 100
    count = lambda walk: int(odl.until_converged(walk, tol=1e-9, max_steps=20_000)(START, THETA).num_steps)
    assert 20 * count(odl.backtracking(shallow, step_size=1.0)) < count(odl.gradient_descent(shallow, 1.0))


def test_polyak_comes_nearer_at_each_step_without_a_constant():
    rows = np.random.default_rng(3).standard_normal((4, 3))
    f = lambda x, theta: jnp.sum(jnp.abs(rows @ (x - theta)))  # not smooth
    iterates, _ = path(odl.polyak(f), 60, np.zeros(3), THETA)

    def step(x, k):
        r = rows @ (x - THETA)
        g = rows.T @ np.sign(r)
        return x - np.abs(r).sum() / (g @ g) * g

    agree(iterates[:20], walked(step, np.zeros(3), 19), 1e-11)
    distances = np.linalg.norm(iterates - THETA, axis=1)
    assert (np.diff(distances) <= 1e-13).all()
    assert distances[-1] < 0.1 * distances[0]
    shifted = odl.polyak(lambda x, theta: (x - theta) ** 2 + theta, optimum=lambda theta: theta)
    agree(odl.for_steps(shifted, 3)(0.0, 8.0).x, 7.0)
    rest = odl.for_steps(shifted, 3)
    assert np.isfinite(jax.grad(lambda theta: rest(8.0, theta).x)(8.0))  # at rest from the first step


# ---- Newton-type steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, odl.linear.dense()], ids=["cg", "dense"])
def test_newton_is_its_formula_and_converges_quadratically(solver):
    iterates, solution = path(odl.newton(bowl, solver, damping=lambda k: 0.1 * 0.2 ** k.astype(float)), 4, START, THETA)

    def step(x, k, damping=0.1):
        hessian = Q + np.diag(3 * x**2) + damping * 0.2**k * np.eye(3)
        return x - np.linalg.solve(hessian, bowl_gradient(x, THETA))

    agree(iterates, walked(step, START, 4), 1e-11)
    truth = walked(lambda x, k: step(x, k, 0.0), START, 20)[-1]
    plain, _ = path(odl.newton(bowl, solver), 6, START, THETA)
    errors = np.linalg.norm(plain - truth, axis=1)
    assert (errors[1:] <= 1.5 * errors[:-1] ** 2 + 1e-14).all()
    assert errors[-1] < 1e-13
    np.testing.assert_allclose(solution.residual, np.linalg.norm(bowl_gradient(iterates[-1], THETA)), rtol=1e-9)


T_FIT = np.linspace(0.0, 2.0, 12)
DATA = 2.0 * np.exp(-1.3 * T_FIT) + 0.3 + 0.05 * np.random.default_rng(4).standard_normal(12)


def misfit(x, data):
    return x["a"] * jnp.exp(-x["b"] * T_FIT) + x["c"] - data


@pytest.mark.parametrize("name", ["gauss_newton", "levenberg_marquardt"])
def test_least_squares_agree_with_scipy(name):
    near = name == "gauss_newton"
    start = {"a": jnp.asarray(2.0 if near else 1.0), "b": jnp.asarray(1.0 if near else 0.5), "c": jnp.asarray(0.0)}
    walk = getattr(odl, name)(misfit, odl.linear.dense())
    solution = odl.until_converged(walk, tol=1e-13, max_steps=60)(start, jnp.asarray(DATA))
    model = lambda p: p[0] * np.exp(-p[1] * T_FIT) + p[2] - DATA
    peer = least_squares(model, [1.0, 0.5, 0.0], method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert float(solution.residual) < 1e-12
    agree([solution.x["a"], solution.x["b"], solution.x["c"]], peer.x, 1e-7)
    # To more digits than SciPy's differences have: the gradient by hand.
    p = np.array([solution.x["a"], solution.x["b"], solution.x["c"]])
    decay = np.exp(-p[1] * T_FIT)
    J = np.stack([decay, -p[0] * T_FIT * decay, np.ones(12)], axis=1)
    agree(J.T @ model(p), np.zeros(3), 1e-12)
    # The implicit derivative uses the full Hessian, not J^T J: against differences of solutions.
    solve = odl.implicit(odl.until_converged(walk, tol=1e-13, max_steps=60))
    slope = jax.jit(jax.grad(lambda scale: solve(start, DATA + (scale - 1) * T_FIT).x["b"]))(1.0)
    shifted = jax.jit(lambda scale: solve(start, DATA + (scale - 1) * T_FIT).x["b"])
    agree(slope, (shifted(1 + 1e-5) - shifted(1 - 1e-5)) / 2e-5, 1e-7)


def test_levenberg_marquardt_is_its_formula():
    r = lambda x: np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    ours = lambda x, theta: (10.0 * (x[1] - x[0] ** 2), theta - x[0])
    walk = odl.levenberg_marquardt(ours, odl.linear.dense(), damping=0.01)
    iterates, _ = path(walk, 60, [-1.2, 1.0], 1.0)
    factor, rejected = 1.0, 0

    def step(x, k, damping=0.01):
        nonlocal factor, rejected
        J = np.array([[-20 * x[0], 10], [-1, 0]])
        d = -np.linalg.solve(J.T @ J + damping * factor * np.eye(2), J.T @ r(x))
        gain = (r(x) @ r(x) - r(x + d) @ r(x + d)) / (r(x) @ r(x) - (r(x) + J @ d) @ (r(x) + J @ d))
        factor *= 1 / 3 if gain > 0.75 else 1.0 if gain >= 0.25 else 2.0
        rejected += gain <= 1e-4
        return x + d if gain > 1e-4 else x

    expected = walked(step, np.array([-1.2, 1.0]), 12)
    agree(iterates[:13], expected, 1e-9)
    assert rejected > 0
    agree(iterates[-1], [1.0, 1.0], 1e-12)
    # A damping that matters: steps too good are followed by longer ones.
    iterates, solution = path(odl.levenberg_marquardt(ours, odl.linear.dense(), damping=30.0), 6, [-1.2, 1.0], 1.0)
    factor, damped = 1.0, lambda x, k: step(x, k, 30.0)
    agree(iterates, walked(damped, np.array([-1.2, 1.0]), 6), 1e-9)
    assert float(solution.state.factor) == pytest.approx(factor, rel=1e-6)
    assert factor < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_levenberg_marquardt_gets_over_a_cautious_start(dtype):
    """Whatever the first damping, and the unit of the residual: a linear problem of condition 1e4 (that of J^T J)."""
    A, b = np.diag([1.0, 0.1, 0.01]).astype(dtype), np.ones(3, dtype)

    def solve(damping, unit):
        walk = odl.levenberg_marquardt(lambda x, theta: unit * (A @ x - b), odl.linear.dense(), damping=damping)
        return odl.for_steps(walk, 80)(np.zeros(3, dtype), None)

    cases = np.array([[1e-3, 1.0], [1e9, 1.0], [1e-3, 1e-8], [1e-3, 1e8]], dtype)
    solutions = jax.jit(jax.vmap(lambda case: solve(*case)))(jnp.asarray(cases))
    agree(solutions.x, np.tile([1.0, 10.0, 100.0], (4, 1)), 1e-10 if dtype == np.float64 else 1e-2)


# ---- optimistix ------------------------------------------------------------------------------------------------------


def optimistix_rows():
    import optimistix

    tight = {"rtol": 1e-12, "atol": 1e-12}
    residual = lambda x, theta: bowl_residual(x, theta)
    return {
        "minimise bfgs": (optimistix.BFGS(**tight), bowl, "minimise"),
        "minimise nonlinear_cg": (optimistix.NonlinearCG(**tight), bowl, "minimise"),
        "least_squares": (optimistix.LevenbergMarquardt(**tight), residual, "least_squares"),
        "root_find": (optimistix.Newton(**tight), residual, "root_find"),
        "root_find chord": (optimistix.Chord(**tight), residual, "root_find"),
        "fixed_point": (
            optimistix.FixedPointIteration(**tight),
            lambda x, theta: x - 0.08 * residual(x, theta),
            "fixed_point",
        ),
    }


def bowl_residual(x, theta):
    return jnp.asarray(Q) @ x - theta + x**3


@pytest.mark.parametrize(
    "name", ["minimise bfgs", "minimise nonlinear_cg", "least_squares", "root_find", "root_find chord", "fixed_point"]
)
def test_optimistix_walks_as_in_its_own_loop_and_is_differentiated_by_ours(name):
    import optimistix

    solver, function, problem = optimistix_rows()[name]
    start = jnp.asarray([0.3, -0.5, 0.1])
    tol = 1e-7 if problem == "minimise" else 1e-9  # searches that compare values stop at half the digits
    walk = odl.implicit(odl.until_converged(odl.from_optimistix(solver, function, problem), tol=tol, max_steps=400))
    x, jacobian = jax.jit(lambda t: (walk(start, t).x, jax.jacrev(lambda t: walk(start, t).x)(t)))(jnp.asarray(THETA))
    own = getattr(optimistix, problem)(function, solver, start, jnp.asarray(THETA), max_steps=400).value
    agree(x, own, 1e-7)
    agree(jacobian, np.linalg.inv(Q + np.diag(3 * np.asarray(x) ** 2)), 1e-6)


def test_optimistix_sees_complex_unknowns_as_pairs():
    import optimistix

    weights, target = np.array([1.0, 3.0], complex), jnp.asarray([1 + 2j, -0.5 + 0.7j])
    miss = lambda z, theta: jnp.sqrt(weights) * (z - theta)
    dogleg = odl.from_optimistix(optimistix.Dogleg(rtol=1e-9, atol=1e-9), miss, "least_squares")
    newton = odl.from_optimistix(optimistix.Newton(rtol=1e-12, atol=1e-12), lambda z, theta: z**2 - theta, "root_find")
    for walk, start, want in ((dogleg, 0.1 * target, target), (newton, np.sqrt(target) + 0.05, np.sqrt(target))):
        solution = odl.until_converged(walk, tol=1e-8, max_steps=50)(start, target)
        assert Status(int(solution.status)) is Status.CONVERGED
        agree(solution.x, want, 1e-8)


def test_optimistix_bisection():
    import optimistix

    with pytest.raises(ValueError, match=r"flip='detect'.* raises inside compiled code"):
        odl.from_optimistix(optimistix.Bisection(rtol=1e-9, atol=1e-9), lambda x, theta: x - theta, "root_find")
    solver = optimistix.Bisection(rtol=1e-13, atol=1e-13, flip=False)
    options = {"lower": jnp.asarray(0.0), "upper": jnp.asarray(4.0)}
    root = odl.from_optimistix(solver, lambda x, theta: x**3 - theta, "root_find", options=options)
    solve = odl.implicit(odl.until_converged(root, tol=1e-10, max_steps=80))
    value, slope = jax.value_and_grad(lambda theta: solve(1.0, theta).x)(8.0)
    agree(value, 2.0, 1e-11)
    agree(slope, 1 / 12, 1e-11)
    batch = jax.jit(jax.vmap(lambda theta: solve(1.0, theta)))(jnp.asarray([8.0, 125.0]))  # no root of the second
    assert Status(int(batch.status[0])) is Status.CONVERGED
    assert Status(int(batch.status[1])) in (Status.STALLED, Status.STEP_BUDGET_SPENT)


def test_optax_steps_that_end_elsewhere_have_no_operator():
    decayed = odl.for_steps(odl.from_optax(bowl, optax.adamw(1e-2)), 3)
    with pytest.raises(TypeError, match=r"from_optax \(whose tx moves x where the gradient is zero"):
        odl.implicit(decayed)
    for tx in (optax.adam(1e-2), optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9)), optax.lbfgs()):
        assert odl.from_optax(bowl, tx).operator is not None


@jax.custom_vjp
def reverse_only(x, theta):
    return bowl(x, theta)


reverse_only.defvjp(
    lambda x, theta: (bowl(x, theta), (x, theta)),
    lambda kept, c: jax.tree.map(lambda leaf: c * leaf, jax.grad(bowl, argnums=(0, 1))(*kept)),
)


@pytest.mark.parametrize(
    "build",
    [
        lambda f: odl.line_search(odl.gradient_descent(f, 0.1), f),
        lambda f: odl.line_search(odl.gradient_descent(f, 0.1), f, "hager_zhang"),
        lambda f: odl.backtracking(f, step_size=1.0),
        lambda f: odl.anderson(odl.gradient_descent(f, 0.05)),
        odl.newton,
    ],
)
def test_an_objective_with_reverse_mode_alone(build):
    """The same walk as on the plain objective, and the same implicit derivative by products with the transpose."""
    theta = jnp.array([1.0, 2.0, -1.0])

    def both(f):
        solver = odl.implicit(odl.until_converged(build(f), tol=1e-9, max_steps=500))
        return solver(jnp.zeros(3), theta), jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(3), theta).x ** 2))(theta)

    (came, gradient), (right, wanted) = both(reverse_only), both(bowl)
    assert int(came.status) == Status.CONVERGED
    assert int(came.num_steps) == int(right.num_steps)
    np.testing.assert_allclose(came.x, right.x, atol=1e-10)
    np.testing.assert_allclose(gradient, wanted, atol=1e-8)


def test_optax_line_searches_are_reached_through_optax():
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=20))
    for rule in (odl.forward, odl.unrolled):
        solver = rule(odl.for_steps(odl.from_optax(bowl, tx), 3))
        with pytest.raises(TypeError, match="line search in tx has no derivative through its steps"):
            jax.jvp(lambda theta: solver(START, theta).x, (jnp.asarray(THETA),), (jnp.asarray(THETA),))
    with jax.numpy_dtype_promotion("standard"):
        solver = odl.until_converged(odl.from_optax(bowl, tx), tol=1e-6, max_steps=100)
        solution = solver(jnp.asarray(START), jnp.asarray(THETA))
    assert Status(int(solution.status)) is Status.CONVERGED


# ---- the best so far -------------------------------------------------------------------------------------------------


def test_best_so_far_keeps_the_least_and_lets_the_walk_go_on():
    wild = odl.heavy_ball(odl.gradient_descent(bowl, 0.08), momentum=0.9)
    walk, _ = path(wild, 30, START, THETA)
    residuals = np.linalg.norm([bowl_gradient(x, THETA) for x in walk], axis=1)
    best, solution = path(odl.best_so_far(wild), 30, START, THETA)
    champions = [int(np.argmin(residuals[: k + 1])) for k in range(31)]
    agree(best, walk[champions])
    agree(solution.state.walk, walk[-1])
    assert len(set(champions)) > 3
    assert champions[-1] != 30 or champions[-2] != 29
    values = [bowl(jnp.asarray(x), THETA) for x in walk]
    by_value, _ = path(odl.best_so_far(wild, bowl), 30, START, THETA)
    agree(by_value[-1], walk[int(np.argmin(values))])


# ---- derivatives before convergence, NaN, dtypes ---------------------------------------------------------------------

DESCENT = odl.gradient_descent(bowl, 0.05)
UNROLLED = {
    "halpern": odl.halpern(DESCENT),
    "nesterov restart": odl.nesterov(odl.gradient_descent(bowl, 0.08), restart=True),
    "anderson type_1": odl.anderson(DESCENT, memory=3, kind=1),
    "anderson safeguarded": odl.anderson(DESCENT, memory=3, safeguard=0.3),
    "broyden": odl.broyden(DESCENT, memory=2, safeguard=0.3),
    "squarem": odl.squarem(DESCENT),
    "armijo": odl.line_search(odl.gradient_descent(bowl, 1.0), bowl),
    "backtracking": odl.backtracking(bowl, step_size=lambda theta: 0.7 + 0.1 * theta[0]),
    "polyak": odl.polyak(bowl, optimum=lambda theta: -5.0 - theta[1]),
    "newton": odl.newton(bowl, damping=lambda theta: theta[0]),
    "gauss_newton": odl.gauss_newton(bowl_residual, odl.linear.dense(), damping=0.3),
    "levenberg_marquardt": odl.levenberg_marquardt(bowl_residual, damping=lambda theta: 0.3 * theta[0]),
    "best_so_far": odl.best_so_far(odl.heavy_ball(odl.gradient_descent(bowl, 0.09), 0.8)),
}


@pytest.mark.parametrize("name", UNROLLED)
def test_the_derivative_of_a_few_steps_is_exact_and_a_nan_is_shown(name):
    """Step lengths, dampings, weights and choices included: reverse and forward mode against differences."""
    solver = odl.for_steps(UNROLLED[name], 5)
    along = jnp.asarray([0.6, -0.3, 0.7])

    @jax.jit
    def look(theta):
        value = lambda theta: jnp.sum(jnp.sin(solver(jnp.asarray(START), theta).x))
        return value(theta), jax.grad(value)(theta) @ along, jax.jvp(value, (theta,), (along,))[1]

    theta, h = jnp.asarray(THETA), 1e-4
    _, reverse, forward = look(theta)
    v = {i: float(look(theta + i * h * along)[0]) for i in (-2, -1, 1, 2)}
    difference = (v[-2] - 8 * v[-1] + 8 * v[1] - v[2]) / (12 * h)
    assert abs(difference) > 1e-3
    agree(reverse, difference, 2e-8)
    agree(forward, difference, 2e-8)
    assert np.isnan(look(theta + jnp.nan)[0])


def test_what_the_objective_of_a_line_search_closes_over_is_differentiated():
    def solve(theta):
        f = lambda x, _: bowl(x, theta)
        x = odl.for_steps(odl.line_search(odl.gradient_descent(f, 1.0), f), 5)(jnp.asarray(START), None).x
        return jnp.sum(odl.for_steps(odl.backtracking(f, step_size=1.0), 3)(x, None).x)

    def travels(theta):
        x = odl.for_steps(UNROLLED["armijo"], 5)(jnp.asarray(START), theta).x
        return jnp.sum(odl.for_steps(odl.backtracking(bowl, step_size=1.0), 3)(x, theta).x)

    both = jax.jit(lambda theta: (jax.grad(solve)(theta), jax.grad(travels)(theta)))(jnp.asarray(THETA))
    agree(both[0], both[1], 1e-13)


@pytest.mark.parametrize("name", ITERATIONS)
def test_float32_data_keep_state_and_iterate_in_float32(name):
    for problem in ("ridge", "lasso"):
        made = PROBLEMS[problem](jnp.float32)
        iteration = ITERATIONS[name](made)
        if iteration is None:
            continue
        state = jax.eval_shape(iteration.init, made.x0, made.theta)
        x, after = jax.eval_shape(iteration.step, made.x0, state, made.theta, jnp.zeros((), int))
        floats = [leaf.dtype for leaf in jax.tree.leaves((state, after)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert set(floats) | {x.dtype} == {np.dtype(np.float32)}


# ---- messages --------------------------------------------------------------------------------------------------------

f = lambda x, theta: x**2


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, r"halpern: weight must lie in \[0, 1\); 1.0 came", lambda: odl.halpern(LINEAR, 1.0)),
        (ValueError, "anderson: kind must be 1 or 2; 3 came", lambda: odl.anderson(LINEAR, kind=3)),
        (ValueError, "anderson: safeguard must lie in", lambda: odl.anderson(LINEAR, safeguard=0.0)),
        (ValueError, "broyden: memory must be a whole number of at least 1", lambda: odl.broyden(LINEAR, 0)),
        (ValueError, "broyden: safeguard must lie in", lambda: odl.broyden(LINEAR, safeguard=-1.0)),
        (ValueError, r"squarem: max_step must lie in \(1, inf\)", lambda: odl.squarem(LINEAR, 1.0)),
        (
            ValueError,
            "line_search: rule must be 'armijo' or 'hager_zhang'; 'exact' came",
            lambda: odl.line_search(LINEAR, f, "exact"),
        ),
        (ValueError, r"line_search: decrease must lie in \(0, 0.5\)", lambda: odl.line_search(LINEAR, f, decrease=0.5)),
        (ValueError, "line_search: curvature must lie in", lambda: odl.line_search(LINEAR, f, curvature=0.01)),
        (TypeError, r"line_search: objective must be a function of \(x, theta\)", lambda: odl.line_search(LINEAR, 3.0)),
        (ValueError, "backtracking: shrink must lie in", lambda: odl.backtracking(f, step_size=1.0, shrink=1.0)),
        (
            ValueError,
            r"backtracking: grow must lie in \[1, inf\)",
            lambda: odl.backtracking(f, step_size=1.0, grow=0.9),
        ),
        (ValueError, "backtracking: step_size must lie in", lambda: odl.backtracking(f, step_size=0.0)),
        (TypeError, "polyak: optimum must be a number; 'low' came", lambda: odl.polyak(f, "low")),
        (ValueError, r"newton: damping must lie in \[0, inf\)", lambda: odl.newton(f, damping=-1.0)),
        (TypeError, "newton: linear_solver must be a LinearSolver", lambda: odl.newton(f, odl.linear.cg)),
        (ValueError, "levenberg_marquardt: damping must lie in", lambda: odl.levenberg_marquardt(f, damping=0.0)),
        (TypeError, r"gauss_newton: residual must be a function of \(x, theta\)", lambda: odl.gauss_newton(None)),
        (
            TypeError,
            "best_so_far: iterates are compared by the residual of an operator, and layered.* has none",
            lambda: odl.best_so_far(odl.layered(f)),
        ),
        (
            TypeError,
            "from_optimistix: solver must be an AbstractIterativeSolver; an int came. Make one with optimistix",
            lambda: odl.from_optimistix(3, f, "minimise"),
        ),
    ],
)
def test_messages(error, words, call, request):
    config.update("jaxtyping_disable", True)  # the type checker, which the tests bring, would speak first
    request.addfinalizer(lambda: config.update("jaxtyping_disable", False))
    with pytest.raises(error, match=words):
        call()


def test_an_unknown_kind_of_problem():
    import optimistix

    with pytest.raises(ValueError, match=r"problem must be one of 'minimise', 'least_squares', .*; 'maximise' came"):
        odl.from_optimistix(optimistix.BFGS(rtol=1e-3, atol=1e-3), f, "maximise")
