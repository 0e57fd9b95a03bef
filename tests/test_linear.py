"""Linear solvers against NumPy, and what they say about themselves."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import odljax as odl
from odljax import Status, linear

N = 7
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((N, N)) / np.sqrt(N)
GENERAL = np.eye(N) + 0.25 * NOISE
SYMMETRIC = np.eye(N) + 0.12 * (NOISE + NOISE.T)
B = RNG.standard_normal(N)

# name: (constructor, the matrix it is for)
EXACT = {
    "cg": (linear.cg, SYMMETRIC),
    "gmres": (linear.gmres, GENERAL),
    "gmres_restarted": (lambda: linear.gmres(restart=4), GENERAL),
    "bicgstab": (linear.bicgstab, GENERAL),
    "neumann": (lambda: linear.neumann(60), GENERAL),
    "dense": (linear.dense, GENERAL),
    "lineax_gmres": (lambda: linear.from_lineax(lineax.GMRES(rtol=1e-12, atol=1e-12)), GENERAL),
    "lineax_cg": (
        lambda: linear.from_lineax(lineax.CG(rtol=1e-12, atol=1e-12), tags=lineax.positive_semidefinite_tag),
        SYMMETRIC,
    ),
}
SINGLE = EXACT | {
    "lineax_gmres": (lambda: linear.from_lineax(lineax.GMRES(rtol=1e-6, atol=1e-6)), GENERAL),
    "lineax_cg": (
        lambda: linear.from_lineax(lineax.CG(rtol=1e-6, atol=1e-6), tags=lineax.positive_semidefinite_tag),
        SYMMETRIC,
    ),
}
STOPPING = ["cg", "gmres", "gmres_restarted", "bicgstab"]
FINISHED = (Status.CONVERGED, Status.COMPLETED)

every = pytest.mark.parametrize("name", list(EXACT))


def product(matrix):
    matrix = jnp.asarray(matrix)
    return lambda v: matrix @ v


@functools.cache
def compiled(name, single=False):
    """``(matrix, b, guess) -> (v, info)``, compiled once for all tests."""
    solver = (SINGLE if single else EXACT)[name][0]()
    run = jax.jit(lambda matrix, b, guess: solver(lambda v: matrix @ v, b, guess))
    return lambda matrix, b, guess=None: run(matrix, b, np.zeros_like(b) if guess is None else guess)


def true_residual(matrix, v, b):
    return np.linalg.norm(np.asarray(b, float) - matrix @ np.asarray(v, float)) / np.linalg.norm(b)


def test_the_matrices_contract_and_are_definite():
    for matrix in (GENERAL, SYMMETRIC):
        assert np.abs(np.linalg.eigvals(np.eye(N) - matrix)).max() < 0.6
    assert np.linalg.eigvalsh(SYMMETRIC).min() > 0.4
    assert np.abs(GENERAL - GENERAL.T).max() > 0.1


# ---- the answer ------------------------------------------------------------------------------------------------------


@every
def test_float64(name):
    matrix = EXACT[name][1]
    v, info = compiled(name)(matrix, B)
    assert v.dtype == jnp.float64
    np.testing.assert_allclose(v, np.linalg.solve(matrix, B), rtol=0, atol=1e-10)
    assert Status(int(info.status)) in FINISHED
    assert info.residual.shape == info.num_steps.shape == info.status.shape == ()
    assert info.num_steps.dtype == info.status.dtype == jnp.int32
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, B), rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "gmres_restarted"])
def test_float32(name):
    matrix, b = SINGLE[name][1].astype(np.float32), B.astype(np.float32)
    v, info = compiled(name, single=True)(matrix, b)
    assert v.dtype == info.residual.dtype == jnp.float32
    want = np.linalg.solve(matrix.astype(float), b.astype(float))
    np.testing.assert_allclose(v, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert Status(int(info.status)) in FINISHED


def test_float32_without_x64(float32_only):
    for name in ("cg", "gmres"):
        solver, matrix = EXACT[name][0](), EXACT[name][1]
        v, info = jax.jit(lambda matrix, b: solver(lambda v: matrix @ v, b))(matrix, B)
        assert v.dtype == jnp.float32
        np.testing.assert_allclose(v, np.linalg.solve(matrix, B), rtol=0, atol=2e-6)
        assert Status(int(info.status)) is Status.CONVERGED


def tree(dtypes):
    """N numbers as a 0-d, a size-1 and a two-dimensional leaf."""
    scalar, one, rest = dtypes
    return {
        "scalar": np.asarray(B[0], scalar),
        "one": np.asarray(B[1:2], one),
        "rest": (np.asarray(B[2:6].reshape(2, 2), rest), np.asarray(B[6:], rest)),
    }


def tree_product(matrix, like):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), like)
    _, unravel = ravel_pytree(wide)

    def apply(v):
        flat = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), v))[0]
        return jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), unravel(jnp.asarray(matrix) @ flat), like)

    return apply


def flat_double(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "neumann", "dense"])
@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [((np.float64,) * 3, 1e-10), ((np.float64, np.float32, np.float64), 1e-6)],
    ids=["float64", "mixed"],
)
def test_pytrees(name, dtypes, tolerance):
    make, matrix = EXACT[name]
    b = tree(dtypes)
    v, info = jax.jit(lambda b: make()(tree_product(matrix, b), b))(b)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), v) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), b
    )
    np.testing.assert_allclose(flat_double(v), np.linalg.solve(matrix, flat_double(b)), rtol=0, atol=tolerance)
    # A tolerance that no leaf of lower precision can meet would turn a good solve into a failed one.
    assert Status(int(info.status)) in FINISHED
    assert int(info.num_steps) < 100


@every
def test_one_unknown(name):
    solver = EXACT[name][0]()
    answers = jax.jit(lambda *rights: [solver(lambda v: 1.25 * v, b) for b in rights])(jnp.asarray(5.0), jnp.ones(1))
    for (v, info), shape, want in zip(answers, [(), (1,)], [4.0, 0.8], strict=True):
        assert v.shape == shape
        np.testing.assert_allclose(v, np.full(shape, want), rtol=0, atol=1e-11)
        assert Status(int(info.status)) in FINISHED


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "neumann", "dense"])
def test_vmap_and_jit_change_nothing(name):
    make, matrix = EXACT[name]
    solver = make()
    scales, rights = np.array([1.0, 1.1, 0.9]), np.random.default_rng(1).standard_normal((3, N))

    def solve(scale, b):
        return solver(lambda v: scale * (matrix @ v), b)

    batch, infos = jax.jit(jax.vmap(solve))(scales, rights)
    assert infos.status.shape == infos.residual.shape == (3,)
    for i in range(3):
        v, info = compiled(name)(scales[i] * matrix, rights[i])
        np.testing.assert_allclose(batch[i], v, rtol=0, atol=1e-11)
        assert int(infos.num_steps[i]) == int(info.num_steps)
        assert int(infos.status[i]) == int(info.status)
    if name in ("cg", "neumann"):
        eager, _ = solve(jnp.asarray(scales[0]), jnp.asarray(rights[0]))
        np.testing.assert_allclose(batch[0], eager, rtol=0, atol=1e-11)


def test_identity_returns_the_right_side():
    v, info = linear.identity()(product(GENERAL), jnp.asarray(B))
    np.testing.assert_array_equal(v, B)
    assert (int(info.num_steps), Status(int(info.status))) == (0, Status.COMPLETED)
    np.testing.assert_allclose(info.residual, true_residual(GENERAL, B, B), rtol=1e-12)


@pytest.mark.parametrize("terms", [0, 1, 5])
def test_neumann_is_the_truncated_series(terms):
    v, info = linear.neumann(terms)(product(GENERAL), jnp.asarray(B))
    power = np.eye(N) - GENERAL
    want = sum(np.linalg.matrix_power(power, i) @ B for i in range(terms + 1))
    np.testing.assert_allclose(v, want, rtol=0, atol=1e-14)
    left = np.linalg.norm(np.linalg.matrix_power(power, terms + 1) @ B) / np.linalg.norm(B)
    np.testing.assert_allclose(info.residual, left, rtol=1e-10)
    assert (int(info.num_steps), Status(int(info.status))) == (terms, Status.COMPLETED)
    # One rate q in all directions: the residual is q^(terms + 1) itself.
    _, info = linear.neumann(terms)(lambda v: 0.7 * v, jnp.asarray(B))
    np.testing.assert_allclose(info.residual, 0.3 ** (terms + 1), rtol=1e-12)


@pytest.mark.parametrize(("rank", "regularisation"), [(N, 1e-10), (N + 5, 1e-2), (3, 0.3), (1, 2.0)])
def test_nystrom_is_its_formula_and_has_the_predicted_bias(rank, regularisation):
    """Against Woodbury's formula in NumPy, and with all columns against the regularised inverse."""
    solver = linear.nystrom(rank, regularisation, jax.random.key(4))
    v, info = jax.jit(lambda b: solver(product(SYMMETRIC), b))(B)
    chosen = np.asarray(jax.random.permutation(jax.random.key(4), N))[:rank]
    C, W = SYMMETRIC[:, chosen], SYMMETRIC[np.ix_(chosen, chosen)]
    want = B / regularisation - C @ np.linalg.solve(W + C.T @ C / regularisation, C.T @ B) / regularisation**2
    np.testing.assert_allclose(v, want, rtol=0, atol=1e-9 if regularisation > 1e-3 else 1e-2)  # Woodbury cancels
    np.testing.assert_allclose(info.residual, true_residual(SYMMETRIC, v, B), rtol=1e-3, atol=1e-15)
    bad = float(info.residual) >= 1
    assert bad == (rank == 3)  # what lies outside the columns is divided by the regularisation alone
    assert Status(int(info.status)) is (Status.STALLED if bad else Status.COMPLETED)
    assert int(info.num_steps) == min(rank, N)
    if rank >= N:
        exact = np.linalg.solve(SYMMETRIC + regularisation * np.eye(N), B)
        np.testing.assert_allclose(v, exact, rtol=0, atol=1e-12)
        least = np.linalg.eigvalsh(SYMMETRIC).min()
        bias = np.linalg.norm(v - np.linalg.solve(SYMMETRIC, B))
        assert bias <= regularisation / (least + regularisation) / least * np.linalg.norm(B)
        assert float(info.residual) <= regularisation / (least + regularisation) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nystrom_is_exact_on_a_matrix_of_its_rank(dtype):
    """Three columns hold all of a matrix of rank three; six hold no more, and must not spoil it."""
    low = np.random.default_rng(2).standard_normal((N, 3)).astype(dtype)
    want = np.linalg.solve(low.astype(float) @ low.T.astype(float) + 0.1 * np.eye(N), B)
    for rank in (3, 6):
        solver = linear.nystrom(rank, 0.1)
        v, _ = jax.jit(lambda low, b: solver(lambda v: low @ (low.T @ v), b))(low, B.astype(dtype))
        assert v.dtype == dtype
        tolerance = 1e-9 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(v, want, rtol=0, atol=tolerance * np.abs(want).max())
    b = tree((np.float64, np.float32, np.float64))
    v, _ = jax.jit(lambda b: linear.nystrom(N, 1e-9)(tree_product(SYMMETRIC, b), b))(b)
    np.testing.assert_allclose(flat_double(v), np.linalg.solve(SYMMETRIC, flat_double(b)), rtol=0, atol=1e-6)


def test_nystrom_in_an_implicit_derivative():
    problem = odl.problems.ridge(30, 4)
    solver = odl.for_steps(odl.gradient_descent(problem.objective, problem.step_size), 240)
    value = lambda solver: lambda theta: problem.outer(solver(problem.x0, theta).x, theta)
    nystrom = odl.implicit(solver, linear.nystrom(4, 1e-12))
    want = problem.hypergradient(problem.theta)
    np.testing.assert_allclose(jax.jit(jax.grad(value(nystrom)))(problem.theta), want, rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(value(nystrom), (problem.theta,), (jnp.ones(()),))[1], want, rtol=1e-9)
    with pytest.raises(TypeError, match=r"implicit: nystrom\(2\) needs a symmetric .* is not declared symmetric"):
        odl.implicit(odl.for_steps(odl.fixed_point(problem.T), 5), linear.nystrom(2))
    with pytest.raises(ValueError, match=r"nystrom: rank must be a whole number of at least 1; 0 came"):
        linear.nystrom(0)
    with pytest.raises(ValueError, match=r"nystrom: regularisation must lie in \(0, inf\); 0.0 came"):
        linear.nystrom(2, 0.0)


def test_float32_at_condition_1e4():
    """Regularised least squares; the reference is float64 on the same data."""
    rng = np.random.default_rng(0)
    A, penalty = (rng.standard_normal((40, 60)) / np.sqrt(40)).astype(np.float32), np.float32(4.4e-4)
    matrix = A.astype(float).T @ A.astype(float) + float(penalty) * np.eye(60)
    assert 9e3 < np.linalg.cond(matrix) < 1.1e4
    b = rng.standard_normal(60).astype(np.float32)
    v, info = jax.jit(lambda A, b: linear.cg()(lambda v: A.T @ (A @ v) + penalty * v, b))(A, b)
    want = np.linalg.solve(matrix, b.astype(float))
    assert np.linalg.norm(np.asarray(v, float) - want) < 1e-5 * np.linalg.norm(want)
    # The right side is a thousand times smaller than the solution: rounding alone leaves a residual of 1e-4 or so, and
    # a solve as good as float32 permits must not be reported as a failed one.
    assert 1e-5 < float(info.residual) < 1e-3
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, b), rtol=0.2)
    assert Status(int(info.status)) is Status.CONVERGED


# ---- starts and stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STOPPING, "lineax_gmres", "lineax_cg"])
def test_no_step_from_the_exact_guess(name):
    matrix = np.diag(2.0 ** np.arange(N))
    guess = np.array([3.0, -1.0, 0.5, 0.0, 7.0, -2.0, 1.0])
    v, info = compiled(name)(matrix, matrix @ guess, guess)
    np.testing.assert_array_equal(v, guess)
    assert Status(int(info.status)) is Status.CONVERGED
    assert float(info.residual) == 0
    if name in STOPPING:
        assert int(info.num_steps) == 0


@pytest.mark.parametrize("name", ["cg", "gmres_restarted", "bicgstab"])
def test_a_near_guess_saves_steps(name):
    matrix = EXACT[name][1]
    want = np.linalg.solve(matrix, B)
    _, cold = compiled(name)(matrix, B)
    v, warm = compiled(name)(matrix, B, want + 1e-9 * np.random.default_rng(0).standard_normal(N))
    np.testing.assert_allclose(v, want, rtol=0, atol=1e-11)
    assert int(warm.num_steps) < int(cold.num_steps)


@every
def test_right_side_zero(name):
    """Whatever the guess, and whatever the product says of it."""
    for matrix in (EXACT[name][1], np.full((N, N), np.nan)):
        for guess in (np.zeros(N), B):
            v, info = compiled(name)(matrix, np.zeros(N), guess)
            np.testing.assert_array_equal(v, np.zeros(N))
            assert float(info.residual) == float(info.error) == 0
            assert Status(int(info.status)) is Status.CONVERGED
            if name in STOPPING:
                assert int(info.num_steps) == 0


@pytest.mark.parametrize("name", STOPPING)
def test_a_guess_that_is_no_better_than_zero_is_not_used(name):
    matrix = EXACT[name][1]
    cold, want = compiled(name)(matrix, B)
    for guess in (1e6 * B, np.full(N, np.nan)):
        v, info = compiled(name)(matrix, B, guess)
        np.testing.assert_array_equal(v, cold)
        assert int(info.num_steps) == int(want.num_steps)


@pytest.mark.parametrize(
    ("name", "solver", "steps"),
    [
        ("cg", linear.cg(max_steps=2), 2),
        ("gmres", linear.gmres(max_steps=3, restart=2), 4),  # whole cycles
        ("bicgstab", linear.bicgstab(max_steps=2), 2),
    ],
)
def test_step_budget_spent(name, solver, steps):
    matrix = EXACT[name][1]
    v, info = jax.jit(lambda b: solver(lambda v: matrix @ v, b))(B)
    assert Status(int(info.status)) is Status.STEP_BUDGET_SPENT
    assert int(info.num_steps) == steps
    assert 1e-3 < float(info.residual) < 1
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, B), rtol=1e-12)


def test_the_tolerance_is_that_asked_for():
    def solve(b):
        return [linear.cg(tol=tol)(lambda v: SYMMETRIC @ v, b)[1] for tol in (1e-2, 1e-8)]

    loose, tight = jax.jit(solve)(B)
    assert 1e-6 < float(loose.residual) <= 1e-2
    assert float(tight.residual) <= 1e-8
    assert int(loose.num_steps) < int(tight.num_steps)


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "neumann"])
def test_converged_is_within_the_tolerance(name):
    """Twice the tolerance is too much, and a tolerance of 1 asks for nothing."""
    steps = {"cg": 3, "gmres": 3, "bicgstab": 4, "neumann": 3}[name]
    make = {
        "cg": lambda tol: linear.cg(tol=tol, max_steps=steps),
        "gmres": lambda tol: linear.gmres(tol=tol, max_steps=steps, restart=steps),
        "bicgstab": lambda tol: linear.bicgstab(tol=tol, max_steps=steps),
        "neumann": lambda tol: linear.neumann(steps, tol),
    }[name]
    solve = jax.jit(lambda b, tol: make(tol)(lambda v: SYMMETRIC @ v, b))
    left = float(solve(B, 1e-9)[1].residual)
    for tol, status in ((left / 2, Status.STEP_BUDGET_SPENT), (left / 8, Status.STEP_BUDGET_SPENT)):
        v, info = solve(B, tol)
        np.testing.assert_allclose(info.residual, left, rtol=1e-12)
        assert (Status(int(info.status)), int(info.num_steps)) == (status, steps)
    assert Status(int(solve(B, 1.01 * left)[1].status)) is Status.CONVERGED  # met by the last step of the budget
    for tol in (1.0, 2.0, 0.0, -1e-3):
        v, info = solve(B, tol)
        assert Status(int(info.status)) is Status.NON_FINITE
        assert np.isnan(v).all()
        with pytest.raises(ValueError, match=rf"{name}: tol must lie in \(0, 1\); {tol} came"):
            make(tol)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_excuses_no_singular_matrix(dtype):
    singular, b = jnp.asarray([1.0, 0.5, 0.0], dtype), jnp.asarray([1.0, 1.0, 0.6], dtype)
    for solver in (linear.cg(), linear.gmres(), linear.bicgstab()):
        v, info = jax.jit(lambda diagonal, b, solver=solver: solver(lambda v: diagonal * v, b))(singular, b)
        assert v.dtype == dtype
        assert Status(int(info.status)) is not Status.CONVERGED
    v, info = jax.jit(lambda b: linear.cg()(lambda v: jnp.asarray([1.0, 0.5, 0.25], dtype) * v, b))(b)
    np.testing.assert_allclose(v.astype(float), [1.0, 2.0, 2.4], rtol=4 * float(jnp.finfo(dtype).eps))
    assert Status(int(info.status)) is Status.CONVERGED


@pytest.mark.parametrize("name", [name for name in EXACT if "lineax" not in name] + ["nystrom"])
def test_nothing_to_solve_for(name):
    solver = linear.nystrom(3) if name == "nystrom" else EXACT[name][0]()
    v, info = solver(lambda v: v, {"empty": jnp.zeros((0, 3))})
    assert v["empty"].shape == (0, 3)
    assert (Status(int(info.status)), int(info.num_steps), float(info.residual)) == (Status.CONVERGED, 0, 0.0)


# ---- units -----------------------------------------------------------------------------------------------------------

# The unit of A and that of b; v has the unit of b / A.
UNITS = np.array(
    [(1, 1), (1, 1e-30), (1, 1e30), (1e-30, 1), (1e30, 1), (1e-30, 1e-30), (1e30, 1e30), (1e-20, 1e10), (1e10, 1e-20)]
)
UNIT_FREE = {
    "cg": (lambda unit: linear.cg(), SYMMETRIC),
    "cg, preconditioned": (lambda unit: linear.cg(preconditioner=lambda v: v / (2 * unit)), SYMMETRIC),
    "cg, sketched": (lambda unit: linear.cg(preconditioner=linear.nystrom_preconditioner(3, 0.1 * unit)), SYMMETRIC),
    "gmres": (lambda unit: linear.gmres(restart=4), GENERAL),
    "gmres, preconditioned": (lambda unit: linear.gmres(restart=4, preconditioner=lambda v: v / (2 * unit)), GENERAL),
    "bicgstab": (lambda unit: linear.bicgstab(), GENERAL),
    "dense": (lambda unit: linear.dense(), GENERAL),
    "nystrom": (lambda unit: linear.nystrom(N, 0.1 * unit), SYMMETRIC),
    "neumann": (lambda unit: linear.neumann(40), GENERAL),
    "neumann, stopping": (lambda unit: linear.neumann(40, 1e-6), GENERAL),
}


@pytest.mark.parametrize("name", list(UNIT_FREE))
def test_units_do_not_matter(name):
    """In float32: the same digits, steps, statuses and relative errors, cold and from a guess."""
    make, matrix = UNIT_FREE[name]
    units = UNITS[:3] if "neumann" in name else UNITS  # I - A has no unit
    bias = 0.1 * np.eye(N) if name == "nystrom" else 0.0
    want = np.linalg.solve(matrix + bias, B)

    def solve(scale, unit, guess):
        low = jnp.asarray(matrix, jnp.float32)
        return make(scale)(lambda v: scale * (low @ v), unit * jnp.asarray(B, jnp.float32), guess)

    solve = jax.jit(jax.vmap(solve))
    for near in (0.0, 1 - 1e-3 * np.arange(N)):
        guesses = (units[:, 1:] / units[:, :1] * near * want).astype(np.float32)
        v, info = solve(*units.T.astype(np.float32), guesses)
        digits = np.asarray(v, float) * units[:, :1] / units[:, 1:]
        np.testing.assert_allclose(digits, np.broadcast_to(want, v.shape), rtol=0, atol=1e-5)
        assert len(set(np.asarray(info.num_steps).tolist())) == 1
        assert set(np.asarray(info.status).tolist()) <= {int(status) for status in FINISHED}
        assert np.ptp(np.log2(np.maximum(info.error, 1e-8))) < 6


# ---- how far the answer is from the truth ----------------------------------------------------------------------------


@functools.cache
def ill_conditioned(condition):
    """A matrix of this condition in float32, right sides of two kinds, and the solutions."""
    rng = np.random.default_rng(int(np.log10(condition)))
    basis, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    low = ((basis * np.logspace(0, -np.log10(condition), 30)) @ basis.T).astype(np.float32)
    matrix, rights = low.astype(float), rng.standard_normal((8, 30))
    rights[1::2] = rights[1::2] @ matrix  # of a solution without a direction of its own
    rights = rights.astype(np.float32)
    return low, rights, np.linalg.solve(matrix, rights.astype(float).T).T


@pytest.mark.parametrize("name", ["dense", "cg", "gmres", "bicgstab"])
def test_an_ill_conditioned_solve_is_told(name):
    """In float32: no success whose error is above 1e-4, no failure where it is far below, and an estimate near it."""
    solver = {"gmres": linear.gmres, "cg": linear.cg, "bicgstab": linear.bicgstab, "dense": linear.dense}[name]()
    solve = jax.jit(jax.vmap(lambda matrix, b: solver(lambda v: matrix @ v, b), in_axes=(None, 0)))
    seen, ratios = [], []
    for condition in (1e2, 1e3, 1e4, 1e5, 1e6, 1e7):
        matrix, rights, want = ill_conditioned(condition)
        v, info = solve(matrix, rights)
        errors = np.linalg.norm(np.asarray(v, float) - want, axis=1) / np.linalg.norm(want, axis=1)
        statuses = np.asarray(info.status)
        finished = np.isin(statuses, [Status.CONVERGED, Status.ILL_CONDITIONED])
        assert (errors[statuses == Status.CONVERGED] < 1e-4).all(), (condition, errors, info.error)
        # GMRES bounds the error of a right side without small directions by that of the worst.
        assert (statuses[errors < 1e-5] == Status.CONVERGED).all() or name == "gmres", (condition, errors, info.error)
        ratios += (np.asarray(info.error) / errors)[finished].tolist()
        seen.append(set(statuses.tolist()))
    assert seen[0] == {Status.CONVERGED}
    assert all(Status.CONVERGED not in statuses for statuses in seen[4:])
    assert Status.ILL_CONDITIONED in set().union(*seen)
    assert 0.5 < np.exp(np.mean(np.log(ratios))) < 5, ratios
    assert min(ratios) > 0.02, ratios
    assert max(ratios) < 40, ratios


def test_a_tolerance_that_was_loosened_asks_for_no_digits():
    matrix, rights, want = ill_conditioned(1e6)
    v, info = jax.jit(lambda b: linear.cg(tol=1e-2)(lambda v: jnp.asarray(matrix) @ v, b))(rights[1])
    assert Status(int(info.status)) is Status.CONVERGED
    error = np.linalg.norm(np.asarray(v, float) - want[1]) / np.linalg.norm(want[1])
    assert 0.1 < float(info.error) / error < 10


def test_the_error_of_biased_solvers_is_estimated():
    def solve(b):
        slow = linear.neumann(5)(lambda v: 0.3 * v, b)
        solvers = linear.neumann(4), linear.identity(), linear.nystrom(N, 1e-2), linear.neumann(50, 1e-3)
        lost = linear.identity()(lambda v: -v, b)[1].error
        return slow, [solver(product(SYMMETRIC), b) for solver in solvers], lost

    (slow, slow_info), answers, lost = jax.jit(solve)(B)
    # With one rate in all directions the estimate is exact.
    np.testing.assert_allclose(slow_info.error, np.linalg.norm(slow - B / 0.3) / np.linalg.norm(slow), rtol=1e-9)
    want = np.linalg.solve(SYMMETRIC, B)
    for v, info in answers:
        assert 0.3 < float(info.error) / (np.linalg.norm(v - want) / np.linalg.norm(v)) < 5
    assert lost == np.inf  # a series that does not converge
    assert compiled("lineax_gmres")(GENERAL, B)[1].error == np.inf  # nothing is known


def test_cg_stalls_on_an_indefinite_matrix():
    matrix, b = np.diag([3.0, 2.0, -1.0, 1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    v, info = compiled("cg")(matrix, b)
    assert Status(int(info.status)) is Status.STALLED
    assert np.isfinite(v).all()
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, b), rtol=1e-12)
    v, info = compiled("cg")(-np.eye(N), B)  # the very first direction shows it
    assert (Status(int(info.status)), float(info.residual), int(info.num_steps)) == (Status.STALLED, 1.0, 1)
    np.testing.assert_array_equal(v, np.zeros(N))


@pytest.mark.parametrize("name", STOPPING)
def test_a_singular_system_stalls(name):
    matrix = np.diag([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0])
    v, info = compiled(name)(matrix, np.ones(N))
    assert Status(int(info.status)) is Status.STALLED
    assert np.isfinite(v).all()
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, np.ones(N)), rtol=1e-12)
    if name == "gmres":
        np.testing.assert_allclose(info.residual, 1 / np.sqrt(N), rtol=1e-12)  # the least-squares residual


@pytest.mark.parametrize("name", STOPPING)
def test_a_singular_but_consistent_system_is_solved(name):
    b = np.array([1.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0])
    v, info = compiled(name)(np.diag([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0]), b)
    np.testing.assert_allclose(v, [1.0, 0.5, 2.0, 1.5, 4.0, 0.0, 0.0], rtol=0, atol=1e-12)
    assert Status(int(info.status)) is Status.CONVERGED


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite(name, bad):
    right, broken = B.copy(), EXACT[name][1].copy()
    right[2] = broken[1, 1] = bad
    for matrix, b in ((EXACT[name][1], right), (broken, B)):
        v, info = compiled(name)(matrix, b)
        assert Status(int(info.status)) is Status.NON_FINITE
        assert not np.isfinite(v).all()  # never replaced by a zero


def test_a_singular_matrix_breaks_dense_and_a_divergent_series_neumann():
    _, info = linear.dense()(product(np.diag([1.0, 0.0])), jnp.ones(2))
    assert Status(int(info.status)) is Status.NON_FINITE
    _, info = linear.neumann(2000)(lambda v: -v, jnp.ones(2))
    assert Status(int(info.status)) is Status.NON_FINITE
    _, info = linear.neumann(3)(lambda v: -v, jnp.ones(2))  # 2^4
    assert (float(info.residual), Status(int(info.status))) == (16.0, Status.DIVERGED)
    _, info = linear.identity()(lambda v: 3.0 * v, jnp.ones(2))
    assert (float(info.residual), Status(int(info.status))) == (2.0, Status.DIVERGED)


def test_lineax_out_of_steps_is_reported():
    solver = linear.from_lineax(lineax.GMRES(rtol=1e-12, atol=1e-12, max_steps=1, restart=2))
    v, info = solver(product(GENERAL), jnp.asarray(B))
    assert Status(int(info.status)) is Status.STEP_BUDGET_SPENT
    np.testing.assert_allclose(info.residual, true_residual(GENERAL, v, B), rtol=1e-12)
    assert solver.name == "lineax.GMRES"
    assert not solver.symmetric
    assert linear.from_lineax(lineax.CG(rtol=1e-6, atol=1e-6)).symmetric


# ---- hard cases for the non-symmetric methods ------------------------------------------------------------------------

TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])


def test_gmres_on_exact_early_breakdown():
    for matrix, b in (
        (np.eye(N), B),
        (np.diag([2.0, 2.0, 5.0, 5.0, 5.0, 5.0, 2.0]), np.ones(N)),
        (np.triu(np.ones((N, N))), np.eye(N)[0]),
    ):
        v, info = compiled("gmres")(matrix, b)
        np.testing.assert_allclose(v, np.linalg.solve(matrix, b), rtol=0, atol=1e-13)
        assert Status(int(info.status)) is Status.CONVERGED
        assert int(info.num_steps) == N


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0)])
def test_gmres_on_rotations(sizes):
    matrix, b = np.eye(N), np.arange(1.0, N + 1)
    matrix[:6, :6] = np.kron(np.diag(sizes), TURN)
    v, info = compiled("gmres")(matrix, b)
    np.testing.assert_allclose(v, np.linalg.solve(matrix, b), rtol=0, atol=1e-12)
    assert Status(int(info.status)) is Status.CONVERGED


def test_restarted_gmres_stalls_where_theory_says():
    _, info = linear.gmres(restart=1)(product(TURN), jnp.ones(2))  # b is orthogonal to A b
    assert (Status(int(info.status)), int(info.num_steps)) == (Status.STALLED, 1)
    np.testing.assert_allclose(info.residual, 1.0, rtol=1e-15)
    shift = np.roll(np.eye(N), 1, axis=0)  # no progress before the last of n steps
    v, info = compiled("gmres_restarted")(shift, np.eye(N)[0])
    assert Status(int(info.status)) is Status.STALLED
    assert np.isfinite(v).all()
    v, info = compiled("gmres")(shift, np.eye(N)[0])
    np.testing.assert_allclose(v, shift.T @ np.eye(N)[0], rtol=0, atol=1e-14)
    assert Status(int(info.status)) is Status.CONVERGED


def test_restarted_gmres_takes_whole_cycles():
    v, info = compiled("gmres_restarted")(GENERAL, B)
    np.testing.assert_allclose(v, np.linalg.solve(GENERAL, B), rtol=0, atol=1e-10)
    assert int(info.num_steps) % 4 == 0
    assert int(info.num_steps) > N


def test_bicgstab_breaks_down_visibly_where_gmres_does_not():
    matrix = np.eye(N)
    matrix[:6, :6] = np.kron(np.eye(3), TURN)
    b = np.append(np.ones(N - 1), 0.0)
    v, info = compiled("bicgstab")(matrix, b)
    assert Status(int(info.status)) is Status.STALLED
    assert np.isfinite(v).all()
    np.testing.assert_allclose(info.residual, true_residual(matrix, v, b), rtol=1e-12)
    v, info = compiled("gmres")(matrix, b)
    assert Status(int(info.status)) is Status.CONVERGED


# ---- transposition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "neumann", "dense"])
def test_transposes_inside_custom_linear_solve(name):
    make, matrix = EXACT[name]
    solver = make()

    def solve(matvec, b):
        return solver(matvec, b)[0]

    def value(scale, b):
        def matvec(v):
            return scale * (matrix @ v)

        v = jax.lax.custom_linear_solve(matvec, b, solve, solve, symmetric=solver.symmetric)
        return jnp.sum(jnp.sin(v))

    scales, rights = np.full(2, 1.1), np.stack([B, np.zeros(N)])
    slopes = jax.jit(jax.vmap(jax.grad(value, argnums=(0, 1))))(scales, rights)
    v = np.linalg.solve(1.1 * matrix, B)
    adjoint = np.linalg.solve(1.1 * matrix.T, np.cos(v))
    np.testing.assert_allclose(slopes[1][0], adjoint, rtol=0, atol=1e-10)
    np.testing.assert_allclose(slopes[0][0], -adjoint @ (matrix @ v), rtol=1e-10)
    np.testing.assert_allclose(slopes[1][1], np.linalg.solve(1.1 * matrix.T, np.ones(N)), rtol=0, atol=1e-10)
    np.testing.assert_allclose(slopes[0][1], 0.0, rtol=0, atol=1e-12)


# ---- sharding --------------------------------------------------------------------------------------------------------

SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import odljax as odl

jax.config.update("jax_enable_x64", True)
assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
A = rng.standard_normal((32, 16)) / np.sqrt(32)
b, theta = rng.standard_normal(32), 0.1 * rng.standard_normal(16) - 1.0

# Product, then sum: this is how explicit sharding wants a contraction over a sharded axis to be written.
def apply(A, x):
    return jnp.sum(A * x[None, :], axis=1)

def solve(A, b, theta):
    matvec = lambda v: jnp.sum(A * apply(A, v)[:, None], axis=0) + jnp.exp(theta) * v
    return odl.linear.cg()(matvec, jnp.sum(A * b[:, None], axis=0))

def both(A, b, theta):
    def objective(x, theta):
        return 0.5 * jnp.sum((apply(A, x) - b) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    inner = odl.gradient_descent(objective, step_size=0.3)
    solver = odl.implicit(odl.until_converged(inner, tol=1e-11, max_steps=500))

    def outer(theta):
        solution = solver(jnp.zeros_like(theta), theta)
        return jnp.sum((solution.x - 1.0) ** 2), solution.status

    gradient, status = jax.grad(outer, has_aux=True)(theta)
    v, info = solve(A, b, theta)
    return {"cg": v, "implicit": gradient}, {"cg": info.status, "implicit": status}

rows = []
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    jax.set_mesh(mesh)
    for split, specs in {"data": (P("i", None), P("i"), P()), "parameters": (P(None, "i"), P(), P("i"))}.items():
        arguments = [jax.device_put(jnp.asarray(a), NamedSharding(mesh, s)) for a, s in zip((A, b, theta), specs)]
        compiled = jax.jit(both).lower(*arguments).compile()
        answers, status = compiled(*arguments)
        for name, answer in answers.items():
            rows.append({
                "case": f"{name} {split} {kind.name}",
                "answer": np.asarray(answer).tolist(),
                "split": not answer.sharding.is_fully_replicated,
                "gathers": compiled.as_text().count("all-gather"),
                "reduces": compiled.as_text().count("all-reduce"),
                "status": int(status[name]),
            })
print(json.dumps(rows))
"""


def test_sharded_data_and_parameters_give_the_same_answer_without_gathering():
    source = Path(odl.__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(source),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 8

    rng = np.random.default_rng(0)
    A = rng.standard_normal((32, 16)) / np.sqrt(32)
    b, theta = rng.standard_normal(32), 0.1 * rng.standard_normal(16) - 1.0
    hessian = A.T @ A + np.diag(np.exp(theta))
    x = np.linalg.solve(hessian, A.T @ b)
    want = {"cg": x, "implicit": -np.linalg.solve(hessian, 2 * (x - 1)) * np.exp(theta) * x}
    for row in rows:
        name, split, _ = row["case"].split()
        np.testing.assert_allclose(row["answer"], want[name], rtol=0, atol=1e-9, err_msg=row["case"])
        assert row["status"] == Status.CONVERGED, row["case"]
        assert row["split"] == (split == "parameters"), row["case"]
        assert row["gathers"] == 0, row["case"]
        assert row["reduces"] > 0, row["case"]


# ---- preconditioners -------------------------------------------------------------------------------------------------

WIDE = np.random.default_rng(8).standard_normal((60, 40)) * 10.0 ** -np.linspace(0, 4, 40)  # eigenvalues over 8 decades
RIDGE = WIDE.T @ WIDE + 1e-4 * np.eye(40)
RIGHT = np.random.default_rng(9).standard_normal(40)
DIAGONAL = jnp.asarray(np.diag(RIDGE))
# The Jacobi preconditioner undoes the bad scaling of the columns; the other one is right on paper and not symmetric.
SLANTED = np.linalg.inv(np.triu(RIDGE))
PRECONDITIONED = {
    "cg": (linear.cg, lambda v: v / DIAGONAL),
    "gmres": (linear.gmres, lambda v: v / DIAGONAL),
    "gmres, not symmetric": (linear.gmres, lambda v: jnp.asarray(SLANTED) @ v),
    "bicgstab": (linear.bicgstab, lambda v: v / DIAGONAL),
}


@functools.cache
def on_the_ridge(name, preconditioned):
    make, preconditioner = PRECONDITIONED[name]
    solver = make(tol=1e-10, max_steps=4000, **({"preconditioner": preconditioner} if preconditioned else {}))
    return jax.jit(lambda b: solver(lambda v: jnp.asarray(RIDGE) @ v, b))


@pytest.mark.parametrize("name", list(PRECONDITIONED))
def test_a_preconditioner_saves_steps_on_an_ill_conditioned_ridge(name):
    assert np.linalg.cond(RIDGE) > 1e5
    v, info = on_the_ridge(name, True)(RIGHT)
    assert Status(int(info.status)) is Status.CONVERGED
    want = np.linalg.solve(RIDGE, RIGHT)
    np.testing.assert_allclose(v, want, rtol=0, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(info.residual, true_residual(RIDGE, v, RIGHT), rtol=1e-2)
    assert 0.1 < float(info.error) / (np.linalg.norm(v - want) / np.linalg.norm(want)) < 1e3
    if "not" not in name:
        _, plain = on_the_ridge(name, False)(RIGHT)
        assert int(info.num_steps) < 0.5 * int(plain.num_steps)


def test_nystrom_preconditioner_saves_steps_and_leaves_no_bias():
    matvec, want = (lambda v: jnp.asarray(RIDGE) @ v), np.linalg.solve(RIDGE, RIGHT)

    def solve(b):
        made = [linear.nystrom_preconditioner(rank, 1e-4) for rank in (5, 20, 100)]
        solvers = [linear.cg(tol=1e-10, max_steps=4000, preconditioner=one) for one in (None, *made)]
        return [solver(matvec, b) for solver in solvers]

    answers = jax.jit(solve)(RIGHT)
    for v, info in answers:
        assert Status(int(info.status)) is Status.CONVERGED
        np.testing.assert_allclose(v, want, rtol=0, atol=1e-6 * np.abs(want).max())
    plain, five, twenty, full = (int(info.num_steps) for _, info in answers)
    # The products of the sketch are counted; with all columns the preconditioned matrix is the identity.
    assert plain > 100
    assert five < 0.9 * plain
    assert twenty < 0.6 * plain
    assert 40 < full <= 43


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nystrom_preconditioner_is_its_formula(dtype):
    """Against NumPy on a matrix of rank three, which three directions hold, and six hold no better."""
    low = np.random.default_rng(2).standard_normal((N, 3))
    values, U = np.linalg.eigh(low @ low.T)
    values, U, mu = values[-3:], U[:, -3:], 0.1
    inverse = np.eye(N) + U @ np.diag((values[0] + mu) / (values + mu) - 1) @ U.T
    matrix = jnp.asarray(low @ low.T + mu * np.eye(N), dtype)
    b = jnp.asarray(B, dtype)

    def applied(b, rank):
        apply, products = linear.nystrom_preconditioner(rank, mu, jax.random.key(3)).build(lambda v: matrix @ v, b)
        assert products == rank
        return apply(b)

    for v in jax.jit(lambda b: [applied(b, rank) for rank in (3, 6)])(b):
        assert v.dtype == dtype
        np.testing.assert_allclose(v, inverse @ B, rtol=0, atol=1e-10 if dtype == np.float64 else 1e-4)


def test_nystrom_preconditioner_on_trees_and_on_nothing():
    b = tree((np.float64, np.float32, np.float64))
    solver = linear.cg(preconditioner=linear.nystrom_preconditioner(3, 0.1))
    v, info = jax.jit(lambda b: solver(tree_product(SYMMETRIC, b), b))(b)
    np.testing.assert_allclose(flat_double(v), np.linalg.solve(SYMMETRIC, flat_double(b)), rtol=0, atol=1e-6)
    assert v["rest"][0].dtype == np.float64
    assert v["one"].dtype == np.float32
    v, info = jax.jit(lambda b: linear.cg(preconditioner=linear.nystrom_preconditioner(3))(lambda v: 0.0 * v, b))(B)
    assert Status(int(info.status)) is Status.STALLED  # a matrix of zeros
    v, info = jax.jit(lambda b: linear.cg(preconditioner=linear.nystrom_preconditioner(3))(lambda v: v * np.nan, b))(B)
    assert Status(int(info.status)) is Status.NON_FINITE
    assert np.isnan(v).any()


def test_preconditioned_adjoints_are_right_in_both_modes():
    """An implicit derivative whose system is A' in reverse mode; the preconditioner is that of A."""
    walk = odl.fixed_point(lambda x, theta: x - (jnp.asarray(GENERAL) @ x - theta))
    slanted = jnp.asarray(np.linalg.inv(np.triu(GENERAL)))
    base, weights = odl.for_steps(walk, 60), np.random.default_rng(3).standard_normal(N)
    inverse = np.linalg.inv(GENERAL)
    for make in (linear.gmres, linear.bicgstab):
        solver = odl.implicit(base, make(preconditioner=lambda v: slanted @ v))
        value = lambda theta, solver=solver: jnp.sum(weights * solver(jnp.zeros(N), theta).x)
        both = jax.jit(lambda theta, value=value: (jax.grad(value)(theta), jax.jvp(value, (theta,), (theta,))[1]))
        gradient, along = both(jnp.asarray(B))
        np.testing.assert_allclose(gradient, inverse.T @ weights, rtol=0, atol=1e-10)
        np.testing.assert_allclose(along, weights @ inverse @ B, rtol=0, atol=1e-10)


def test_an_indefinite_preconditioner_stalls_cg():
    solver = linear.cg(preconditioner=lambda v: -v)
    v, info = jax.jit(lambda b: solver(lambda v: jnp.asarray(SYMMETRIC) @ v, b))(B)
    assert Status(int(info.status)) is Status.STALLED
    assert np.isfinite(v).all()


def test_preconditioners_that_are_none_are_refused():
    for make in (linear.cg, linear.gmres, linear.bicgstab):
        with pytest.raises(TypeError, match=rf"{make.__name__}: preconditioner must be a function of \(v\)"):
            make(preconditioner=lambda matvec, b: None)
    with pytest.raises(TypeError, match="the preconditioner must keep the shapes and dtypes of v"):
        linear.cg(preconditioner=lambda v: v[:1])(product(SYMMETRIC), jnp.asarray(B))
    with pytest.raises(ValueError, match=r"nystrom_preconditioner: rank must be a whole number of at least 1; 0 came"):
        linear.nystrom_preconditioner(0)
    with pytest.raises(ValueError, match=r"nystrom_preconditioner: regularisation must lie in \[0, inf\); -1.0 came"):
        linear.nystrom_preconditioner(2, -1.0)


# ---- the series with a stop test -------------------------------------------------------------------------------------


@functools.cache
def series(terms, tol):
    solver = linear.neumann(terms, tol)
    return jax.jit(lambda matrix, b, guess: solver(lambda v: matrix @ v, b, guess))


def test_neumann_stops_at_its_tolerance():
    zero = np.zeros(N)
    v, info = series(200, 1e-11)(GENERAL, B, zero)
    np.testing.assert_allclose(v, np.linalg.solve(GENERAL, B), rtol=0, atol=1e-10)
    assert Status(int(info.status)) is Status.CONVERGED
    assert int(info.num_steps) < 60
    assert float(info.residual) <= 1e-11
    _, again = series(200, 1e-11)(GENERAL, B, np.asarray(v))
    assert int(again.num_steps) == 0  # warm
    short, info = series(4, 1e-11)(GENERAL, B, zero)
    want = sum(np.linalg.matrix_power(np.eye(N) - GENERAL, i) @ B for i in range(5))
    np.testing.assert_allclose(short, want, rtol=0, atol=1e-13)
    assert (Status(int(info.status)), int(info.num_steps)) == (Status.STEP_BUDGET_SPENT, 4)


def test_neumann_says_that_it_does_not_converge():
    _, info = series(200, 1e-11)(-np.eye(N), B, np.zeros(N))  # the terms double
    assert Status(int(info.status)) is Status.DIVERGED
    assert int(info.num_steps) == 20
    broken = GENERAL.copy()
    broken[1, 1] = np.nan
    v, info = series(200, 1e-11)(broken, B, np.zeros(N))
    assert Status(int(info.status)) is Status.NON_FINITE
    assert not np.isfinite(v).all()
    v, info = series(200, 1e-11)(GENERAL, np.zeros(N), np.zeros(N))
    assert (Status(int(info.status)), int(info.num_steps), float(np.abs(v).max())) == (Status.CONVERGED, 0, 0.0)
    with pytest.raises(ValueError, match=r"neumann: tol must lie in \(0, 1\); 0.0 came"):
        linear.neumann(3, 0.0)


def test_a_preconditioner_may_close_over_traced_values():
    """Data, theta itself, what a loop brings: taken along, without a derivative of its own."""

    def summed(scales, theta):
        loss = lambda x, theta: 0.5 * jnp.sum(scales * x**2) - jnp.sum(theta * x)
        inner = odl.until_converged(odl.gradient_descent(loss, 0.15), tol=1e-12, max_steps=500)
        return jnp.sum(
            odl.implicit(inner, linear.cg(preconditioner=lambda v: v / (scales * theta)))(jnp.zeros(3), theta).x
        )

    scales, theta = jnp.asarray([1.0, 2.0, 5.0]), jnp.asarray(2.0)
    looped = lambda theta: jax.lax.scan(lambda c, row: (c + summed(row, theta), None), 0.0, jnp.stack([scales] * 2))[0]
    np.testing.assert_allclose(jax.grad(jax.jit(summed), 1)(scales, theta), 1.7, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(summed, 0)(scales, theta), -2.0 / scales**2, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(looped)(theta), 3.4, rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(summed, (scales, theta), (0 * scales, theta / 2))[1], 1.7, rtol=1e-9)


@pytest.mark.parametrize("derivative", [odl.implicit, odl.one_step])
def test_reverse_over_forward_mode_where_theta_moves_one_leaf(derivative):
    loss = lambda x, theta: 0.5 * (x["a"] - theta) ** 2 + 0.25 * x["a"] ** 4 + 0.5 * (x["b"] - 1.0) ** 2
    solver = derivative(odl.until_converged(odl.gradient_descent(loss, 0.3), tol=1e-13))
    value = lambda theta: jnp.sin(solver({"a": 0.0, "b": 0.0}, theta).x["a"])
    forward_over_reverse = jax.jacfwd(jax.grad(value))(0.7)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.jacfwd(value)))(0.7), forward_over_reverse, rtol=1e-9)


def test_bicgstab_ends_within_the_number_of_unknowns():
    """Two products a step; in exact arithmetic the residual is zero after n steps, whatever the matrix."""
    rng = np.random.default_rng(4)
    for n in (4, 8, 12):
        A = jnp.asarray(np.eye(n) + 0.4 * rng.standard_normal((n, n)))
        _, info = odl.linear.bicgstab(tol=1e-9)(lambda v, A=A: A @ v, jnp.asarray(rng.standard_normal(n)))
        assert int(info.status) == odl.Status.CONVERGED
        assert int(info.num_steps) <= 2 * n + 8


def test_the_residual_is_relative_to_the_right_side():
    rng = np.random.default_rng(5)
    A, b = np.eye(9) + 0.3 * rng.standard_normal((9, 9)), 30.0 * rng.standard_normal(9)
    for solver in (odl.linear.bicgstab(max_steps=2), odl.linear.gmres(restart=2, max_steps=2), odl.linear.neumann(2)):
        v, info = solver(lambda v: A @ v, jnp.asarray(b))
        want = np.linalg.norm(b - A @ np.asarray(v)) / np.linalg.norm(b)
        assert want > 1e-3
        np.testing.assert_allclose(info.residual, want, rtol=1e-12)
