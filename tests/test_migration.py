"""Leaving JAXopt: each counterpart gives JAXopt's answer and derivative, and the guide forgets no name."""

import importlib
import inspect
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
from scipy.optimize import minimize

import odljax as odl
from odljax import operators, prox

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAXopt says on import that it is no longer maintained
    import jaxopt
    from jaxopt import linear_solve, projection
    from jaxopt import prox as their_prox

GUIDE = (pathlib.Path(__file__).parents[1] / "docs" / "migrating_from_jaxopt.md").read_text()
RNG = np.random.default_rng(0)
M, N = 20, 5
A, B = jnp.asarray(RNG.standard_normal((M, N))), jnp.asarray(RNG.standard_normal(M))
START = jnp.asarray(0.1 * RNG.standard_normal(N))
LIPSCHITZ = float(np.linalg.norm(np.asarray(A), 2) ** 2) / M
STEP = 0.9 / (LIPSCHITZ + 1)
SCALE = jnp.asarray(0.2)
DEEP = {"tol": 1e-13, "maxiter": 20000}  # what JAXopt is asked for, so that its answer is exact too


@pytest.fixture(autouse=True)
def as_jaxopt_was_written():
    """JAXopt knows neither strict dtype promotion nor refused rank promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(x):
    return 0.5 * jnp.mean((A @ x - B) ** 2)


def ridge(x, theta):
    return fit(x) + 0.5 * theta * jnp.sum(x**2)


def logistic(x, theta):
    return jnp.mean(jnp.logaddexp(0.0, -jnp.sign(B) * (A @ x))) + 0.5 * theta * jnp.sum(x**2)


def residual(x, theta):
    return jnp.concatenate([jnp.tanh(A @ x) - 0.3 * B, jnp.sqrt(theta) * x])


def cubic(x, theta):
    return x**3 + x - theta


def contraction(x, theta):
    return x - STEP * jax.grad(ridge)(x, theta)


def solution(iteration, start=START, tol=1e-12, max_steps=20000, linear_solver=None):
    """theta -> the answer of the iteration, differentiated implicitly."""
    solver = odl.implicit(odl.until_converged(iteration, tol=tol, max_steps=max_steps), linear_solver)

    def answer(theta):
        end = solver(start, theta)
        return solver.iteration.operator.answer(end.x, theta)

    return answer


def theirs(solver, start=START, *extra):
    """theta -> JAXopt's answer."""
    return lambda theta: solver.run(start, *extra, theta).params


def exactly(rule):
    """The linear solve of JAXopt's derivative, by LU rather than its default, the normal equations."""
    return {**DEEP, "implicit_diff_solve": linear_solve.solve_lu, **rule}


def with_l1(x, theta, scaling=1.0):
    return their_prox.prox_lasso(x, theta, scaling)


PROGRAM_P = jnp.asarray(np.cov(np.asarray(A).T)) + 0.5 * jnp.eye(N)


def program(theta):
    """A portfolio: shares that sum to one, none negative."""
    rows = jnp.concatenate([jnp.ones((1, N)), jnp.eye(N)])
    lower = jnp.concatenate([jnp.ones(1), jnp.zeros(N)])
    upper = jnp.concatenate([jnp.ones(1), jnp.full(N, jnp.inf)])
    return operators.QuadraticProgram(PROGRAM_P, -theta * B[:N], rows, lower, upper)


def of_program(theta):
    solver = odl.implicit(odl.until_converged(odl.quadratic_program(program), tol=1e-11, max_steps=20000))
    return solver(operators.QPVariables.zeros(N, N + 1), theta).x.x


def osqp(theta):
    run = jaxopt.OSQP(tol=1e-10, maxiter=20000).run
    equal, inequal = (jnp.ones((1, N)), jnp.ones(1)), (-jnp.eye(N), jnp.zeros(N))
    return run(None, params_obj=(PROGRAM_P, -theta * B[:N]), params_eq=equal, params_ineq=inequal).params.primal


def box_osqp(theta):
    data = program(theta)
    finite = jnp.where(jnp.isinf(data.upper), 1e3, data.upper)
    run = jaxopt.BoxOSQP(tol=1e-10, maxiter=20000).run
    return run(None, params_obj=(data.P, data.q), params_eq=data.A, params_ineq=(data.lower, finite)).params.primal[0]


def equality_theirs(theta):
    run = jaxopt.EqualityConstrainedQP(tol=1e-13).run
    return run(None, params_obj=(PROGRAM_P, -theta * B[:N]), params_eq=(jnp.ones((1, N)), jnp.ones(1))).params.primal


def equality_ours(theta):
    return operators.equality_quadratic_program(PROGRAM_P, -theta * B[:N], jnp.ones((1, N)), jnp.ones(1)).x


def box_qp_theirs(theta):
    start, box = jnp.zeros(N), (jnp.zeros(N), jnp.ones(N))
    run = jaxopt.BoxCDQP(tol=1e-12, maxiter=2000).run
    return run(start, params_obj=(PROGRAM_P, -theta * B[:N]), params_ineq=box).params


def box_qp_ours(theta):
    sweep = operators.box_quadratic_program(PROGRAM_P, lambda theta: -theta * B[:N], jnp.zeros(N), jnp.ones(N))
    return solution(odl.fixed_point(sweep), jnp.zeros(N))(theta)


def block_theirs(theta):
    run = jaxopt.BlockCoordinateDescent(jaxopt.objective.least_squares, their_prox.prox_lasso, **exactly({})).run
    return run(START, theta, (A, B)).params


def block_ours(theta):
    loss = lambda z, theta: 0.5 * jnp.mean((z - B) ** 2)
    l1 = lambda v, theta, step_size: prox.l1(v, theta, step_size)
    return solution(odl.fixed_point(operators.coordinate_descent(loss, A, l1, lipschitz=1 / M)))(theta)


def scipy_ours(theta):
    """An answer from elsewhere: one step of an operator that has it as its fixed point carries the derivative."""
    matrix, right = np.asarray(A), np.asarray(B)

    def outside(theta):
        miss = lambda x: matrix @ x - right
        value = lambda x: 0.5 * np.mean(miss(x) ** 2) + 0.5 * theta * np.sum(x**2)
        slope = lambda x: matrix.T @ miss(x) / M + theta * x
        return minimize(value, np.zeros(N), jac=slope, tol=1e-12).x

    x = jax.pure_callback(outside, jax.ShapeDtypeStruct((N,), float), jax.lax.stop_gradient(theta))
    return odl.implicit(odl.for_steps(odl.gradient_descent(ridge, STEP), 1))(x, theta).x


def simplex_mirror(step_size):
    return jaxopt.MirrorDescent(
        lambda x, theta: ridge(x, theta),
        jaxopt.MirrorDescent.make_projection_grad(lambda v, _: jax.nn.softmax(v), lambda x: jnp.log(x) + 1),
        stepsize=step_size,
        **exactly({}),
    )


UNIFORM = jnp.full(N, 1 / N)
l1 = lambda v, theta, step_size: prox.l1(v, theta, step_size)
on_simplex = lambda v, theta, step_size: prox.simplex(v)
in_box = lambda v, theta, step_size: prox.box(v, (-0.1, 0.1))

SOLVERS = {
    "FixedPointIteration": (
        theirs(jaxopt.FixedPointIteration(contraction, **exactly({}))),
        solution(odl.fixed_point(contraction)),
    ),
    "AndersonAcceleration": (
        theirs(jaxopt.AndersonAcceleration(contraction, ridge=1e-12, **exactly({"maxiter": 200}))),
        solution(odl.anderson(contraction)),
    ),
    "AndersonWrapper": (
        theirs(jaxopt.AndersonWrapper(jaxopt.FixedPointIteration(contraction, **exactly({})), ridge=1e-12)),
        solution(odl.anderson(odl.gradient_descent(ridge, STEP))),
    ),
    "GradientDescent": (
        theirs(jaxopt.GradientDescent(ridge, stepsize=STEP, **exactly({}))),
        solution(odl.nesterov(odl.gradient_descent(ridge, STEP), restart=True)),
    ),
    "ProximalGradient": (
        lambda theta: (
            jaxopt.ProximalGradient(lambda x: fit(x), with_l1, stepsize=STEP, **exactly({})).run(START, theta).params
        ),
        solution(odl.nesterov(odl.proximal_gradient(lambda x, theta: fit(x), l1, STEP), restart=True)),
    ),
    "ProjectedGradient": (
        lambda theta: (
            jaxopt.ProjectedGradient(ridge, projection.projection_simplex, stepsize=STEP, **exactly({}))
            .run(UNIFORM, 1.0, theta)
            .params
        ),
        solution(odl.nesterov(odl.proximal_gradient(ridge, on_simplex, STEP), restart=True), UNIFORM),
    ),
    "BlockCoordinateDescent": (block_theirs, block_ours),
    "MirrorDescent": (
        lambda theta: simplex_mirror(1.0).run(UNIFORM, None, theta).params,
        solution(odl.fixed_point(operators.entropic(ridge, 1.0)), UNIFORM),
    ),
    "BFGS": (
        theirs(jaxopt.BFGS(logistic, **exactly({"maxiter": 500, "tol": 1e-11}))),
        solution(odl.from_optimistix(optimistix.BFGS(rtol=1e-12, atol=1e-12), logistic, "minimise"), tol=1e-9),
    ),
    "LBFGS": (
        theirs(jaxopt.LBFGS(logistic, **exactly({"maxiter": 500, "tol": 1e-11}))),
        solution(odl.from_optax(logistic, optax.lbfgs()), tol=1e-10, max_steps=200),
    ),
    "LBFGSB": (
        lambda theta: (
            jaxopt.LBFGSB(ridge, maxiter=500, tol=1e-11)
            .run(jnp.zeros(N), (jnp.full(N, -0.1), jnp.full(N, 0.1)), theta)
            .params
        ),
        solution(odl.nesterov(odl.proximal_gradient(ridge, in_box, STEP), restart=True), jnp.zeros(N)),
    ),
    "NonlinearCG": (
        theirs(jaxopt.NonlinearCG(logistic, **exactly({"maxiter": 500, "tol": 1e-10}))),
        solution(odl.from_optimistix(optimistix.NonlinearCG(rtol=1e-12, atol=1e-12), logistic, "minimise"), tol=1e-9),
    ),
    "Broyden": (
        theirs(jaxopt.Broyden(jax.grad(logistic), **exactly({"maxiter": 500, "tol": 1e-11}))),
        solution(odl.broyden(odl.gradient_descent(logistic, 1.0))),
    ),
    "GaussNewton": (
        theirs(jaxopt.GaussNewton(residual, **exactly({"maxiter": 100}))),
        solution(odl.gauss_newton(residual), tol=1e-11),
    ),
    "LevenbergMarquardt": (
        theirs(jaxopt.LevenbergMarquardt(residual, **exactly({"maxiter": 200, "tol": 1e-11}))),
        solution(odl.levenberg_marquardt(residual), tol=1e-11),
    ),
    "ArmijoSGD": (
        theirs(jaxopt.ArmijoSGD(logistic, **exactly({"implicit_diff": True, "tol": 1e-11}))),
        solution(odl.line_search(odl.gradient_descent(logistic, 1.0), logistic), tol=1e-11),
    ),
    "PolyakSGD": (
        theirs(jaxopt.PolyakSGD(lambda x, theta: jnp.sum((x - theta) ** 2), **exactly({"implicit_diff": True}))),
        solution(odl.polyak(lambda x, theta: jnp.sum((x - theta) ** 2))),
    ),
    "OptaxSolver": (
        theirs(jaxopt.OptaxSolver(ridge, optax.sgd(STEP, momentum=0.3), **exactly({"implicit_diff": True}))),
        solution(odl.from_optax(ridge, optax.sgd(STEP, momentum=0.3))),
    ),
    "OSQP": (osqp, of_program),
    "BoxOSQP": (box_osqp, of_program),
    "EqualityConstrainedQP": (equality_theirs, equality_ours),
    "BoxCDQP": (box_qp_theirs, box_qp_ours),
    "ScipyMinimize": (
        theirs(jaxopt.ScipyMinimize(fun=ridge, tol=1e-12, implicit_diff_solve=linear_solve.solve_lu)),
        scipy_ours,
    ),
    "Bisection": (
        theirs(jaxopt.Bisection(cubic, 0.0, 2.0, maxiter=100, tol=1e-13, check_bracket=False), None),
        solution(
            odl.from_optimistix(
                optimistix.Bisection(rtol=1e-14, atol=1e-14, flip=False),
                cubic,
                "root_find",
                options={"lower": 0.0, "upper": 2.0},
            ),
            jnp.asarray(1.0),
        ),
    ),
}
# JAXopt's quadratic programs differentiate by the normal equations, its searches stop early.
ACCURACY = {"BFGS": 1e-8, "LBFGSB": 1e-8, "LevenbergMarquardt": 1e-7, "NonlinearCG": 1e-6, "ScipyMinimize": 1e-7}
ACCURACY |= {"BoxOSQP": 1e-6, "EqualityConstrainedQP": 1e-6, "OSQP": 1e-6}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_and_its_counterpart_agree(name):
    their, our = SOLVERS[name]
    weights = jnp.arange(1.0, N + 1)
    compiled = jax.jit if name != "ScipyMinimize" else lambda f: f  # JAXopt's calls SciPy without a callback
    both = lambda f: compiled(jax.value_and_grad(lambda theta: jnp.sum(weights * f(theta))))
    tolerance = ACCURACY.get(name, 1e-9)
    for got, want in zip(both(our)(SCALE), both(their)(SCALE), strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


V = jnp.asarray(RNG.standard_normal((4, 6)))
ROW = V[0]
MATRIX = jnp.asarray(RNG.standard_normal((2, 6)))
MARGINALS = (jnp.asarray([0.3, 0.2, 0.4, 0.1]), jnp.asarray([0.2, 0.1, 0.2, 0.1, 0.25, 0.15]))
each_row = jax.vmap

PROXES = {
    "prox_none": (lambda v: their_prox.prox_none(v), lambda v: prox.identity(v), V),
    "prox_lasso": (lambda v: their_prox.prox_lasso(v, 0.4, 0.7), lambda v: prox.l1(v, 0.4, 0.7), V),
    "prox_non_negative_lasso": (
        lambda v: their_prox.prox_non_negative_lasso(v, 0.4, 0.7),
        lambda v: prox.non_negative_l1(v, 0.4, 0.7),
        V,
    ),
    "prox_elastic_net": (
        lambda v: their_prox.prox_elastic_net(v, (0.4, 0.3), 0.7),
        lambda v: prox.elastic_net(v, (0.4, 0.3), 0.7),
        V,
    ),
    "prox_group_lasso": (
        each_row(lambda v: their_prox.prox_group_lasso(v, 0.9, 0.7)),
        lambda v: prox.group_lasso(v, 0.9, 0.7),
        V,
    ),
    "prox_ridge": (lambda v: their_prox.prox_ridge(v, 0.4, 0.7), lambda v: prox.ridge(v, 0.4, 0.7), V),
    "prox_non_negative_ridge": (
        lambda v: their_prox.prox_non_negative_ridge(v, 0.4, 0.7),
        lambda v: prox.non_negative_ridge(v, 0.4, 0.7),
        V,
    ),
    "make_prox_from_projection": (
        lambda v: their_prox.make_prox_from_projection(projection.projection_l2_ball)(v, 0.8, 1.0),
        lambda v: prox.from_projection(lambda v, radius: prox.l2_ball(v, radius))(v, 0.8, 1.0),
        V,
    ),
    "projection_non_negative": (lambda v: projection.projection_non_negative(v), lambda v: prox.non_negative(v), V),
    "projection_box": (lambda v: projection.projection_box(v, (-0.3, 0.5)), lambda v: prox.box(v, (-0.3, 0.5)), V),
    "projection_hypercube": (lambda v: projection.projection_hypercube(v, 0.6), lambda v: prox.hypercube(v, 0.6), V),
    "projection_simplex": (
        each_row(lambda v: projection.projection_simplex(v, 1.5)),
        lambda v: prox.simplex(v, 1.5),
        V,
    ),
    "projection_sparse_simplex": (
        lambda v: projection.projection_sparse_simplex(v, 3, value=1.5),
        lambda v: prox.sparse_simplex(v, (3, 1.5)),
        ROW,
    ),
    "projection_l1_ball": (
        lambda v: projection.projection_l1_ball(v, 1.5),
        lambda v: prox.l1_ball(v, 1.5),
        ROW,
    ),
    "projection_l2_ball": (lambda v: projection.projection_l2_ball(v, 1.5), lambda v: prox.l2_ball(v, 1.5), V),
    "projection_linf_ball": (lambda v: projection.projection_linf_ball(v, 0.5), lambda v: prox.linf_ball(v, 0.5), V),
    "projection_l1_sphere": (lambda v: projection.projection_l1_sphere(v, 1.5), lambda v: prox.l1_sphere(v, 1.5), ROW),
    "projection_l2_sphere": (lambda v: projection.projection_l2_sphere(v, 1.5), lambda v: prox.l2_sphere(v, 1.5), V),
    "projection_hyperplane": (
        lambda v: projection.projection_hyperplane(v, (MATRIX[0], 0.7)),
        lambda v: prox.hyperplane(v, (MATRIX[0], 0.7)),
        ROW,
    ),
    "projection_halfspace": (
        lambda v: projection.projection_halfspace(v, (MATRIX[0], -2.0)),
        lambda v: prox.halfspace(v, (MATRIX[0], -2.0)),
        ROW,
    ),
    "projection_affine_set": (
        lambda v: projection.projection_affine_set(v, (MATRIX, jnp.asarray([0.7, -0.2]))),
        lambda v: prox.affine_set(v, (MATRIX, jnp.asarray([0.7, -0.2]))),
        ROW,
    ),
    "projection_polyhedron": (
        lambda v: projection.projection_polyhedron(
            v, (MATRIX[:1], jnp.asarray([0.7]), -jnp.eye(6), jnp.zeros(6)), check_feasible=False
        ),
        lambda v: prox.polyhedron(v, (MATRIX[:1], jnp.asarray([0.7]), -jnp.eye(6), jnp.zeros(6))),
        ROW,
    ),
    "projection_box_section": (
        lambda v: projection.projection_box_section(v, (jnp.zeros(6), jnp.ones(6), jnp.arange(1.0, 7.0), 5.0)),
        lambda v: prox.box_section(v, (jnp.zeros(6), jnp.ones(6), jnp.arange(1.0, 7.0), 5.0)),
        ROW,
    ),
    "projection_transport": (
        lambda v: projection.projection_transport(v, MARGINALS),
        lambda v: prox.transport(v, MARGINALS),
        V,
    ),
    "projection_birkhoff": (lambda v: projection.projection_birkhoff(v), lambda v: prox.birkhoff(v), V[:, :4]),
    "kl_projection_transport": (
        lambda v: projection.kl_projection_transport(v, MARGINALS),
        lambda v: prox.kl_transport(v, MARGINALS),
        V,
    ),
    "kl_projection_birkhoff": (lambda v: projection.kl_projection_birkhoff(v), lambda v: prox.kl_birkhoff(v), V[:, :4]),
    "isotonic_l2_pav": (lambda v: jaxopt.isotonic.isotonic_l2_pav(v), lambda v: prox.isotonic(v), ROW),
}
# JAXopt solves these by loops with tolerances of its own; ours are exact (tests/prox).
PROX_ACCURACY = {"projection_polyhedron": 1e-3, "projection_transport": 1e-4, "projection_birkhoff": 1e-4}
PROX_ACCURACY |= {"kl_projection_transport": 1e-3, "kl_projection_birkhoff": 1e-3, "projection_box_section": 1e-5}
PROX_ACCURACY |= {"isotonic_l2_pav": 1e-8}


@pytest.mark.parametrize("name", PROXES)
def test_a_proximal_operator_and_its_counterpart_agree(name):
    their, our, v = PROXES[name]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(v.shape))
    both = lambda f: jax.jit(jax.value_and_grad(lambda v: jnp.vdot(weights, f(v))))(v)
    (value, gradient), (wanted, wanted_gradient) = both(our), both(their)
    tolerance = PROX_ACCURACY.get(name, 1e-10)
    np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance)
    if name != "projection_birkhoff":  # JAXopt's has no derivative: see below
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=10 * tolerance, atol=10 * tolerance)


SPD = PROGRAM_P
LINEAR = {
    "solve_cg": (linear_solve.solve_cg, odl.linear.cg(tol=1e-12), SPD),
    "solve_gmres": (linear_solve.solve_gmres, odl.linear.gmres(tol=1e-12), SPD + 0.1 * A[:N]),
    "solve_bicgstab": (linear_solve.solve_bicgstab, odl.linear.bicgstab(tol=1e-12), SPD + 0.1 * A[:N]),
    "solve_lu": (linear_solve.solve_lu, odl.linear.dense(), SPD + 0.1 * A[:N]),
    "solve_inv": (linear_solve.solve_inv, odl.linear.dense(), SPD + 0.1 * A[:N]),
    "solve_cholesky": (linear_solve.solve_cholesky, odl.linear.dense(), SPD),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_solver_and_its_counterpart_agree(name):
    their, ours, matrix = LINEAR[name]
    options = {"tol": 1e-12} if name in ("solve_cg", "solve_gmres", "solve_bicgstab") else {}
    want = their(lambda v: matrix @ v, B[:N], **options)
    np.testing.assert_allclose(ours(lambda v: matrix @ v, B[:N])[0], want, rtol=1e-9, atol=1e-9)


def test_custom_root_and_custom_fixed_point_are_operators():
    root = jaxopt.implicit_diff.custom_root(jax.grad(ridge), solve=linear_solve.solve_lu)
    point = jaxopt.implicit_diff.custom_fixed_point(contraction, solve=linear_solve.solve_lu)
    closed = lambda x0, theta: jnp.linalg.solve(A.T @ A / M + theta * jnp.eye(N), A.T @ B / M)
    want = jax.jacobian(closed, argnums=1)(None, SCALE)
    for decorate in (root, point):
        np.testing.assert_allclose(jax.jacobian(decorate(closed), argnums=1)(None, SCALE), want, rtol=1e-9)

    def ours(theta):  # a black box, whose fixed-point equation is known
        x = jax.lax.stop_gradient(closed(None, theta))
        return odl.implicit(odl.for_steps(odl.fixed_point(contraction), 1))(x, theta).x

    np.testing.assert_allclose(jax.jacobian(ours)(SCALE), want, rtol=1e-9)


# ---- where JAXopt is wrong -------------------------------------------------------------------------------------------


def test_its_derivatives_at_zero_are_nan_and_ours_are_not():
    zero = jnp.zeros(3)
    for their, ours in (
        (lambda v: their_prox.prox_group_lasso(v, 0.5), lambda v: prox.group_lasso(v, 0.5)),
        (lambda v: projection.projection_l2_ball(v, 1.0), lambda v: prox.l2_ball(v, 1.0)),
        (lambda v: projection.projection_l2_sphere(v, 1.0), lambda v: prox.l2_sphere(v, 1.0)),
    ):
        assert np.isnan(jax.jacobian(their)(zero)).any()
        assert np.isfinite(jax.jacobian(ours)(zero)).all()


def test_its_birkhoff_projection_has_the_derivative_zero_and_ours_has_not():
    v, direction = V[:, :4], V[:, 2:]
    their, ours = (lambda t, f=f: f(v + t * direction) for f in (projection.projection_birkhoff, prox.birkhoff))
    slope = (ours(1e-6) - ours(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jacobian(ours)(0.0), slope, atol=1e-8)
    assert float(jnp.abs(slope).max()) > 0.1
    assert not np.any(jax.jacobian(their)(0.0))


def test_its_complex_gradient_descent_is_wrong_and_ours_is_not():
    target = jnp.asarray(1.0 + 2.0j)
    objective = lambda x, theta: 0.5 * jnp.abs(x - target) ** 2
    their = jaxopt.GradientDescent(objective, stepsize=0.1, acceleration=False, maxiter=300).run(jnp.asarray(0j), None)
    ours = odl.until_converged(odl.gradient_descent(objective, 0.1), tol=1e-12)(jnp.asarray(0j), None)
    assert not abs(complex(their.params) - complex(target)) < 1.0
    np.testing.assert_allclose(ours.x, target, rtol=1e-10)


def test_its_bfloat16_simplex_leaves_the_simplex_and_ours_does_not():
    v = jnp.asarray(np.random.default_rng(0).random(4096), jnp.bfloat16)
    total = lambda y: float(jnp.sum(y.astype(jnp.float32)))
    assert abs(total(projection.projection_simplex(v)) - 1) > 0.05
    assert abs(total(prox.simplex(v)) - 1) < 0.005


def test_its_default_adjoint_squares_the_condition():
    """Ridge in float32: the normal equations of the adjoint system lose what plain conjugate gradients keep."""
    scales = np.geomspace(1.0, 1e-2, N)
    matrix = np.asarray(A) * scales
    design = jnp.asarray(matrix, jnp.float32)

    def objective(x, theta):
        return 0.5 * jnp.sum((design @ x - B.astype(jnp.float32)) ** 2) + 0.5 * theta * jnp.sum(x**2)

    small = 1e-4
    normal = matrix.T @ matrix + small * np.eye(N)
    x = np.linalg.solve(normal, matrix.T @ np.asarray(B))
    truth = -np.linalg.solve(normal, x).sum()
    step = float(1.0 / np.linalg.norm(normal, 2))
    start, theta = jnp.asarray(x, jnp.float32), jnp.float32(small)
    gradient = jaxopt.GradientDescent(objective, stepsize=step, maxiter=1, acceleration=False)
    their = jax.grad(lambda theta: jnp.sum(gradient.run(start, theta).params))(theta)
    solver = odl.implicit(odl.for_steps(odl.gradient_descent(objective, step), 1))
    ours = jax.grad(lambda theta: jnp.sum(solver(start, theta).x))(theta)
    assert abs(float(ours) / truth - 1) < 1e-3
    assert abs(float(their) / truth - 1) > 3 * abs(float(ours) / truth - 1)


def test_what_the_guide_says_of_rows_of_tolerances_and_of_steps_by_hand():
    """Rows or all entries; a tolerance that is the gradient's, whatever the step; the loop that JAXopt calls update."""
    v = jnp.asarray([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    for name in ("l1_ball", "l1_sphere", "l2_ball", "l2_sphere"):
        together = getattr(prox, name)(v, 1.0)
        want = getattr(projection, f"projection_{name}")(v.ravel(), 1.0).reshape(v.shape)
        np.testing.assert_allclose(together, want, atol=1e-12)
        rows = jnp.stack([getattr(prox, name)(row, 1.0) for row in v])
        assert float(jnp.abs(together - rows).max()) > 0.1
    for step in (STEP, 0.05 * STEP):
        their = jaxopt.GradientDescent(ridge, stepsize=step, acceleration=False, tol=1e-5, maxiter=5000)
        theirs, descent = their.run(START, SCALE).state, odl.gradient_descent(ridge, step)
        ours = odl.until_converged(descent, tol=1e-5, max_steps=5000)
        assert abs(int(theirs.iter_num) - int(ours(START, SCALE).num_steps)) <= 1
    walk = odl.gradient_descent(ridge, STEP)
    x, state = START, walk.init(START, SCALE)
    for k in range(3):
        x, state = walk.step(x, state, SCALE, jnp.asarray(k))
    np.testing.assert_allclose(x, odl.for_steps(walk, 3)(START, SCALE).x, rtol=1e-12)


# ---- the guide -------------------------------------------------------------------------------------------------------

MODULES = ["", ".projection", ".prox", ".loss", ".objective", ".linear_solve", ".implicit_diff", ".perturbations"]
MODULES += [".isotonic", ".loop", ".tree_util", ".base", ".cond"]


def public_names():
    for suffix in MODULES:
        module = importlib.import_module("jaxopt" + suffix)
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("jaxopt")
            if not name.startswith("_") and own and (inspect.isclass(value) or inspect.isfunction(value)):
                yield name


def test_the_guide_has_a_row_for_each_public_name():
    first_cells = "\n".join(line.split("|")[1] for line in GUIDE.splitlines() if "|" in line)
    rows = set(re.findall(r"`([A-Za-z_0-9]+)`", first_cells))
    missing = sorted(set(public_names()) - rows)
    assert not missing, f"the guide lacks {missing}"


def test_the_names_that_the_guide_gives_exist():
    for library, dotted in set(re.findall(r"\b(odl|optax|optimistix)((?:\.\w+)+)", GUIDE)):
        value = {"odl": odl, "optax": optax, "optimistix": optimistix}[library]
        for part in dotted[1:].split("."):
            value = getattr(value, part)


def test_each_counterpart_of_the_guide_is_tested_here():
    """A row that says "yes" in its last column names a test above."""
    tested = {*SOLVERS, *PROXES, *LINEAR, "custom_root", "custom_fixed_point"}
    lines = [line.split("|") for line in GUIDE.splitlines() if line.startswith("| `")]
    claimed = {name for cells in lines if cells[-2].strip() == "yes" for name in re.findall(r"`(\w+)`", cells[1])}
    assert claimed == tested
