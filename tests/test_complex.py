"""Complex variables are pairs of real numbers: every complex run equals the real one of twice the size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import odljax as odl
from odljax import prox

RNG = np.random.default_rng(0)
M, N = 9, 3


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape))


A, B, TARGET, X0 = draw(M, N), draw(M), draw(N), draw(N)
STEP = 1.4 / (float(np.linalg.norm(np.asarray(A), 2)) ** 2 + 2)
THETA = jnp.asarray(0.3)


def squared(x):
    return jnp.sum(x.real**2 + x.imag**2)


def objective(x, theta):
    return 0.5 * squared(A @ x - B) + 0.5 * jnp.exp(theta) * squared(x)


def l1(v, theta, step_size):
    return prox.l1(v, 2.0 * jnp.exp(theta), step_size)


def prox_of_square(v, theta, step_size):
    return prox.ridge(v, 1.0, step_size)


def outer(x, theta):
    d = x - TARGET
    return jnp.sum(d.real**2 + 3 * d.imag**2 + d.real * d.imag) + jnp.sin(theta)


def as_real(x):
    return jnp.stack([x.real, x.imag])


def as_complex(x):
    return jax.lax.complex(x[0], x[1])


def of_real(function):
    return lambda x, *rest: function(as_complex(x), *rest)


ITERATIONS = {
    "gradient_descent": lambda f, h: odl.gradient_descent(f, STEP),
    "proximal_gradient": lambda f, h: odl.proximal_gradient(f, h, STEP),
    "krasnoselskii_mann": lambda f, h: odl.krasnoselskii_mann(odl.gradient_descent(f, STEP), 0.9),
    "nesterov": lambda f, h: odl.nesterov(odl.proximal_gradient(f, h, STEP), 0.3),
    "heavy_ball": lambda f, h: odl.heavy_ball(odl.gradient_descent(f, STEP), 0.2),
    "anderson": lambda f, h: odl.anderson(odl.gradient_descent(f, STEP), 3),
    "from_optax": lambda f, h: odl.from_optax(f, optax.sgd(STEP, momentum=0.2)),
}
DERIVATIVES = {
    "implicit": odl.implicit,
    "gmres": lambda s: odl.implicit(s, odl.linear.gmres()),
    "bicgstab": lambda s: odl.implicit(s, odl.linear.bicgstab()),
    "dense": lambda s: odl.implicit(s, odl.linear.dense()),
    "unrolled": odl.unrolled,
    "forward": odl.forward,
}
# Each iteration with a derivative, each derivative with an iteration.
PAIRS = [(i, d) for a, i in enumerate(ITERATIONS) for b, d in enumerate(DERIVATIVES) if (a + b) % 4 == 0]


def derivatives_of(value):
    along = jnp.ones(())
    return jax.jit(
        lambda theta: (
            jax.grad(value)(theta),
            jax.jvp(value, (theta,), (along,))[1],
            jax.jvp(jax.grad(value), (theta,), (along,))[1],
        )
    )(THETA)


@functools.cache
def real_twin(sparse):
    """The converged solution, and the derivatives of its outer loss, in real numbers only."""
    h = lambda v, theta, step_size: as_real(l1(as_complex(v), theta, step_size)) if sparse else v
    solver = odl.unrolled(odl.for_steps(odl.proximal_gradient(of_real(objective), h, STEP), 200))
    value = lambda theta: of_real(outer)(solver(as_real(X0), theta).x, theta)
    return solver(as_real(X0), THETA).x, derivatives_of(value)


@pytest.mark.parametrize(("iteration", "derivative"), PAIRS)
def test_a_complex_solve_is_the_real_one_of_twice_the_size(iteration, derivative):
    solver = DERIVATIVES[derivative](odl.for_steps(ITERATIONS[iteration](objective, l1), 200))
    x, moved = solver(X0, THETA).x, derivatives_of(lambda theta: outer(solver(X0, theta).x, theta))
    x_real, moved_real = real_twin(sparse=iteration in ("proximal_gradient", "nesterov"))
    np.testing.assert_allclose(x, as_complex(x_real), rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved, moved_real, rtol=1e-9, atol=1e-9)
    if iteration == "gradient_descent":
        matrix, right = np.asarray(A), np.asarray(A.conj().T @ B)
        normal = matrix.conj().T @ matrix + np.exp(0.3) * np.eye(N)
        np.testing.assert_allclose(x, np.linalg.solve(normal, right), rtol=0, atol=1e-12)


def test_adjoints_of_complex_maps_are_conjugated():
    x, y, K = np.asarray(X0), np.asarray(draw(M)), np.asarray(A)
    T = odl.operators.chambolle_pock(
        prox_of_square, prox_of_square, lambda x, theta: A @ x, step_size=0.1, dual_step_size=0.2
    )
    got = jax.jit(T)(odl.operators.PrimalDual(X0, jnp.asarray(y)), THETA)
    new = (x - 0.1 * K.conj().T @ y) / 1.1
    np.testing.assert_allclose(got.x, new, rtol=0, atol=1e-13)
    point = y + 0.2 * K @ (2 * new - x)
    np.testing.assert_allclose(got.y, point - 0.2 * (point / 0.2) / (1 + 1 / 0.2), rtol=0, atol=1e-13)


def test_hypergradients_of_complex_solves():
    inner = odl.gradient_descent(objective, STEP)

    def solution(theta):
        eye = jnp.eye(N, dtype=complex) * jnp.exp(theta).astype(complex)
        return jnp.linalg.solve(A.conj().T @ A + eye, A.conj().T @ B)

    truth = jax.grad(lambda theta: outer(solution(theta), theta))(THETA)
    converged = odl.until_converged(inner, tol=1e-13)
    for hyper in (
        odl.hypergradients.through(odl.implicit(converged), outer),
        odl.hypergradients.warm_started(odl.unrolled(odl.for_steps(inner, 300)), outer),
        odl.hypergradients.hodl(inner.operator, outer, num_steps=300, weight=0.0, step_size=0.1),
    ):
        gradient, _, info = jax.jit(hyper.update)(THETA, hyper.init(THETA, X0))
        np.testing.assert_allclose(gradient, truth, rtol=1e-9)
        odl.check(info)
    # A bound on the error of a solve that was cut short.
    short = odl.until_converged(inner, tol=1e-2)
    hyper = odl.hypergradients.through(odl.implicit(short), outer, error_estimate=True)
    gradient, _, info = jax.jit(hyper.update)(THETA, hyper.init(THETA, X0))
    assert abs(gradient - truth) <= info.error <= 10 * abs(gradient - truth)


def test_the_matrix_may_be_differentiated_and_complex_data_stay_single():
    def loss(matrix, derivative):
        f = lambda x, matrix: 0.5 * squared(matrix @ x - B) + 0.5 * squared(x)
        return outer(derivative(odl.for_steps(odl.gradient_descent(f, STEP), 200))(X0, matrix).x, 1.0)

    def exact(matrix):
        normal = matrix.conj().T @ matrix + jnp.eye(N)
        return outer(jnp.linalg.solve(normal, matrix.conj().T @ B), 1.0)

    with jax.numpy_dtype_promotion("standard"):
        truth = jax.grad(exact)(A)
    for derivative in (odl.implicit, odl.unrolled, odl.forward):
        np.testing.assert_allclose(jax.jit(jax.grad(loss), static_argnums=1)(A, derivative), truth, atol=1e-9)
    single = odl.until_converged(odl.gradient_descent(objective_single, STEP), tol=1e-3)(X0.astype("complex64"), THETA)
    assert (single.x.dtype, single.residual.dtype) == (jnp.complex64, jnp.float32)
    assert odl.Status(int(single.status)) is odl.Status.CONVERGED


def objective_single(x, theta):
    return 0.5 * squared(A.astype(jnp.complex64) @ x - B.astype(jnp.complex64))


@pytest.mark.parametrize("linear_solver", [odl.linear.gmres(), odl.linear.bicgstab(), odl.linear.dense()], ids=str)
def test_a_slow_rotation_is_a_system_of_two_unknowns(linear_solver):
    turn = 0.999 * np.exp(0.05j)
    solver = odl.implicit(
        odl.until_converged(odl.fixed_point(lambda x, theta: turn * x + theta), tol=1e-9), linear_solver
    )
    start = jnp.asarray([1 / (1 - turn)])
    slope = jax.grad(lambda theta: jnp.sum(solver(start, theta.astype(complex)).x.imag))(jnp.ones(()))
    np.testing.assert_allclose(slope, (1 / (1 - turn)).imag, rtol=1e-9)


def test_least_squares_of_complex_residuals():
    """A linear residual is solved by one step of Gauss-Newton, and by Levenberg-Marquardt."""
    want = np.linalg.lstsq(np.asarray(A), np.asarray(B), rcond=None)[0]
    for walk, steps in (
        (odl.gauss_newton(lambda x, theta: A @ x - B), 1),
        (odl.levenberg_marquardt(lambda x, theta: A @ x - B), 30),
    ):
        np.testing.assert_allclose(odl.for_steps(walk, steps)(X0, None).x, want, rtol=0, atol=1e-6)


def test_the_expansion_of_a_complex_operator():
    probe = odl.diagnostics.expansion(odl.operators.gradient(objective, STEP), X0, THETA, num_steps=400)
    sizes = np.linalg.eigvalsh(np.asarray(A.conj().T @ A)) + np.exp(0.3)
    np.testing.assert_allclose(probe.factor, np.abs(1 - STEP * sizes).max(), rtol=1e-9)


@pytest.mark.parametrize(
    ("operator", "parameter"),
    [(prox.l1, 0.8), (prox.ridge, 0.8), (prox.elastic_net, (0.8, 0.5)), (prox.group_lasso, 0.8), (prox.l2_ball, 1.3)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_proximal_operators_of_complex_numbers(operator, parameter):
    """Those that shrink lengths: optimal against random competitors, finite at zero, precision kept."""
    v = np.array([[1.5 - 0.2j, 0.1 + 0.3j, -2.0j], [0.4, -0.3 + 0.1j, 0.0]])
    y = np.asarray(operator(jnp.asarray(v), parameter, 0.7))
    h = {
        "l1": lambda x: 0.8 * np.sum(np.abs(x), axis=(-2, -1)),
        "ridge": lambda x: 0.4 * np.sum(np.abs(x) ** 2, axis=(-2, -1)),
        "elastic_net": lambda x: np.sum(0.8 * np.abs(x) + 0.2 * np.abs(x) ** 2, axis=(-2, -1)),
        "group_lasso": lambda x: 0.8 * np.sum(np.linalg.norm(x, axis=-1), axis=-1),
        "l2_ball": lambda x: np.where(np.linalg.norm(x, axis=(-2, -1)) <= 1.3 + 1e-9, 0.0, np.inf),
    }[operator.__name__]
    value = lambda x: 0.7 * h(x) + 0.5 * np.sum(np.abs(x - v) ** 2, axis=(-2, -1))
    noise = RNG.standard_normal((200, 2, 3)) + 1j * RNG.standard_normal((200, 2, 3))
    for size in (1e-4, 1e-2, 1.0):
        assert np.all(value(y + size * noise) >= value(y) - 1e-12)
    for zero in (jnp.zeros((2, 3), complex), jnp.asarray(v)):
        _, tangent = jax.jvp(lambda v: operator(v, parameter, 0.7), (zero,), (jnp.full_like(zero, 1 + 1j),))
        assert np.all(np.isfinite(tangent))
    assert operator(jnp.asarray(v, jnp.complex64), parameter, 0.7).dtype == jnp.complex64


def test_where_the_method_knows_real_numbers_only_complex_ones_are_refused():
    soba = odl.hypergradients.soba(lambda x, theta: squared(x - theta), lambda x, theta: squared(x), step_size=0.1)
    with pytest.raises(TypeError, match=r"soba: x0 must be real floating point; leaf \(itself\) is complex128\[3\]"):
        soba.init(THETA, X0)
    undo = odl.hypergradients.reversible(lambda x, theta: squared(x - theta), outer, num_steps=3, step_size=0.1)
    with pytest.raises(TypeError, match="reversible: x0 must be real"):
        undo.init(THETA, X0)
    squares = lambda prediction, theta: jnp.sum(prediction.real**2)
    for operator, x in (
        (odl.operators.coordinate_descent(squares, jnp.eye(N)), X0),
        (odl.operators.entropic(lambda x, theta: squared(x), 0.1), X0),
        (odl.operators.box_quadratic_program(jnp.eye(N), jnp.ones(N), jnp.zeros(N), jnp.ones(N)), X0),
        (
            odl.operators.quadratic_program(
                odl.operators.QuadraticProgram(jnp.eye(N), jnp.ones(N), jnp.eye(N), jnp.zeros(N), jnp.ones(N))
            ),
            odl.operators.QPVariables(X0, X0, X0),
        ),
    ):
        with pytest.raises(TypeError, match=f"{operator.name}: x must be real floating point"):
            operator(x, THETA)
    hyper = odl.hypergradients.through(odl.implicit(odl.for_steps(odl.gradient_descent(objective, STEP), 3)), outer)
    with pytest.raises(TypeError, match="through: theta is differentiated and must be real"):
        hyper.init(X0, X0)
    for operator, parameter in ((prox.simplex, 1.0), (prox.box, (0.0, 1.0)), (prox.non_negative, None)):
        with pytest.raises(TypeError, match=f"prox.{operator.__name__} needs real floating-point leaves in v"):
            operator(X0, parameter)
