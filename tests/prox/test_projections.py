"""Projections whose sets are not on any [2, N]: the promises of the protocol, and values against other programs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from odljax import prox


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


A, G = draw(1, 2, 5), draw(2, 7, 5)
INSIDE = draw(3, 5) / 3
POLYHEDRON = (A, A @ INSIDE, G, G @ INSIDE + np.array([0.0, 0.1, 0.5, 1.0, 2.0, 0.2, 0.3]))
SUMS = (np.array([0.5, 0.9, 1.1]), np.array([0.4, 0.6, 1.0, 0.5]))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An operator, the shape of one v, a parameter, and whether it is a projection in the Euclidean sense."""

    prox: Callable
    shape: tuple
    parameter: Any
    euclidean: bool = True

    def __str__(self):
        return self.prox.__name__


CASES = [
    Case(prox.affine_set, (5,), (A, np.array([0.5, -1.0]))),
    Case(prox.polyhedron, (5,), POLYHEDRON),
    Case(prox.transport, (3, 4), SUMS),
    Case(prox.kl_transport, (3, 4), SUMS, euclidean=False),
    Case(prox.psd_cone, (4, 4), None),
    Case(prox.exponential_cone, (3,), None),
    Case(prox.total_variation_2d, (4, 5), np.array(0.3)),
]
EXPONENTIAL = CASES[5]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def batched(case):
    return jax.jit(lambda v, parameter: case.prox(v, parameter))


@functools.cache
def derivatives(case):
    """On one vector of (v, parameter): values and gradients of a stack, and Jacobians both ways with the Hessian."""
    _, rebuild = ravel_pytree(jax.tree.map(jnp.asarray, (np.zeros(case.shape), case.parameter)))

    def function(x):
        return case.prox(*rebuild(x)).ravel()

    def weighted(x):
        return draw(9, np.prod(case.shape)) @ function(x)

    values = jax.jit(jax.vmap(lambda x: (function(x), jax.grad(weighted)(x))))
    return values, jax.jit(lambda x: (jax.jacfwd(function)(x), jax.jacrev(function)(x), jax.hessian(weighted)(x)))


@every_case
def test_derivatives_match_finite_differences(case):
    values, exact = derivatives(case)
    x = np.concatenate([np.ravel(part) for part in jax.tree.leaves((draw(5, *case.shape), case.parameter))])
    forward, reverse, hessian = exact(x)
    np.testing.assert_allclose(forward, reverse, atol=1e-9)
    shifts = 1e-5 * np.eye(x.size)
    first, second = (np.asarray(a - b).T / 2e-5 for a, b in zip(values(x + shifts), values(x - shifts), strict=True))
    np.testing.assert_allclose(forward, first, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(hessian, second, rtol=1e-5, atol=2e-5)


@every_case
def test_a_batch_is_a_loop_and_the_operator_firmly_non_expansive(case):
    u, v = 2 * draw(7, 40, *case.shape), 2 * draw(8, 40, *case.shape)
    pu, pv = np.asarray(batched(case)(u, case.parameter)), np.asarray(batched(case)(v, case.parameter))
    np.testing.assert_allclose(jax.jit(case.prox)(u[0], case.parameter), pu[0], atol=1e-9)
    assert np.all(np.isfinite(pu))
    if case.euclidean:
        axes = tuple(range(1, u.ndim))
        assert np.all(np.sum((pu - pv) * (u - v), axes) >= np.sum((pu - pv) ** 2, axes) - 1e-8)
    if case.euclidean and case.prox is not prox.total_variation_2d:
        np.testing.assert_allclose(batched(case)(pu, case.parameter), pu, atol=1e-8)


@every_case
def test_the_leaf_decides_the_dtype_and_a_nan_comes_out(case):
    v = draw(4, 40, *case.shape)
    half = v.astype(jnp.bfloat16)
    y = jax.jit(case.prox)({"a": [v.astype("float32")], "b": half}, case.parameter)
    assert (y["a"][0].dtype, y["b"].dtype) == ("float32", "bfloat16")
    exact, of_half = batched(case)(v, case.parameter), batched(case)(half.astype("float64"), case.parameter)
    np.testing.assert_allclose(y["a"][0], exact, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(y["b"].astype("float64"), of_half, rtol=1e-2, atol=1e-2)
    v[(1, *(0 for _ in case.shape))] = np.nan
    y = batched(case)(v, case.parameter)
    assert np.all(np.isnan(y[(1, *(0 for _ in case.shape))]))
    assert np.all(np.isfinite(y[0]))


def certificate(v, y, **constraints):
    """max <v - y, z - y> over z of a polytope: zero exactly if y, a member, is the projection."""
    program = scipy.optimize.linprog(-(v - y).ravel(), **constraints)
    return -program.fun - np.sum((v - y) * y)


def test_a_polyhedron_against_linear_programs():
    points = 3 * draw(10, 25, 5)
    A, b, G, h = POLYHEDRON
    for v, y in zip(points, batched(CASES[1])(points, POLYHEDRON), strict=True):
        np.testing.assert_allclose(A @ y, b, atol=1e-12)
        assert np.all(G @ y <= h + 1e-12)
        bounds = {"bounds": [(-1e3, 1e3)] * 5}
        assert abs(certificate(v, np.asarray(y), A_ub=G, b_ub=h, A_eq=A, b_eq=b, **bounds)) <= 1e-8


def test_redundant_constraints_do_no_harm_and_empty_sets_give_nan():
    A, b, G, h = POLYHEDRON

    def double(x, factor):
        return np.concatenate([x, factor * x])

    v = 3 * draw(11, 4, 5)
    redundant = (double(A, -2.0), double(b, -2.0), double(G, 3.0), double(h, 3.0))
    y, rank_deficient = jax.jit(prox.polyhedron)(v, redundant), jax.jit(prox.affine_set)(v, redundant[:2])
    np.testing.assert_allclose(y, batched(CASES[1])(v, POLYHEDRON), atol=1e-10)
    np.testing.assert_allclose(rank_deficient, jax.jit(prox.affine_set)(v, (A, b)), atol=1e-12)
    jacobian = jax.jit(jax.jacfwd(lambda v: prox.polyhedron(v, redundant)))(v[0])
    np.testing.assert_allclose(jacobian, jax.jit(jax.jacfwd(lambda v: prox.polyhedron(v, POLYHEDRON)))(v[0]), atol=1e-9)
    apart = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert np.all(np.isnan(prox.polyhedron(np.ones(2), (None, None, apart, np.array([0.0, -1.0])))))
    assert prox.polyhedron(np.ones(2), (None, None, apart, np.array([0.0, np.inf]))).tolist() == [0.0, 1.0]


def test_a_slice_of_a_box_against_a_polyhedron_and_its_edges():
    v, weights = 3 * draw(12, 6), np.array([1.0, -2.0, 0.5, 0.0, 1.0, 3.0])
    eye = np.eye(6)
    as_polyhedron = (weights[None], np.array([0.7]), np.concatenate([eye, -eye]), np.ones(12))
    section = jax.jit(prox.box_section)
    np.testing.assert_allclose(
        section(v, (-1.0, 1.0, weights, 0.7)), compiled(prox.polyhedron)(v, as_polyhedron), atol=1e-12
    )
    np.testing.assert_allclose(section(v, (0.0, np.inf, 1.0, 2.0)), prox.simplex(v, 2.0), atol=1e-14)
    np.testing.assert_allclose(section(v, (-np.inf, np.inf, 1.0, 2.0)), v - (v.sum() - 2) / 6, atol=1e-14)
    np.testing.assert_allclose(section(v, (0.0, 1.0, 1.0, 6.0)), np.ones(6))
    assert np.all(np.isnan(section(v, (0.0, 1.0, 1.0, 6.1))))


@pytest.mark.parametrize(
    ("operator", "parameter", "sums"),
    [
        (prox.simplex, 1.0, lambda y: y.sum()),
        (prox.l1_ball, 1.0, lambda y: np.abs(y).sum()),
        (prox.l1_sphere, 1.0, lambda y: np.abs(y).sum()),
        (prox.box_section, (0.0, 1.0, 1.0, 1.0), lambda y: y.sum()),
        (prox.hyperplane, (1.0, 1.0), lambda y: y.sum()),
        (prox.l2_sphere, 1.0, lambda y: np.square(y).sum()),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_long_sums_are_accumulated_in_float32(operator, parameter, sums, spread):
    v = jnp.asarray((5 * (operator is not prox.hyperplane) + spread * draw(0, 4096)), "bfloat16")
    y = np.asarray(jax.jit(operator)(v, parameter), np.float64)
    limit = 2**-8 * max(1, np.abs(y).sum() if operator is prox.hyperplane else 1)
    assert abs(sums(y) - 1) <= limit


def test_spheres_and_the_sparse_simplex():
    v = {"a": np.array([0.1, -0.2]), "b": np.array(0.4)}
    y = prox.l1_sphere(v, 1.0)
    np.testing.assert_allclose(y["a"], [0.2, -0.3])
    np.testing.assert_allclose(y["b"], 0.5)
    np.testing.assert_allclose(prox.l2_sphere(v, 2.0)["a"], 2 * v["a"] / np.sqrt(0.21))
    points, best = draw(13, 20, 4), functools.partial(prox.sparse_simplex, parameter=(2, 1.0))
    for x, y in zip(points, jax.jit(best)(points), strict=True):
        assert np.count_nonzero(y) <= 2
        np.testing.assert_allclose(np.sum(y), 1, rtol=1e-14)
        grid = np.linspace(0, 1, 101)
        for i in range(4):
            for j in range(i):  # no other pair of weights on the grid is nearer
                others = np.zeros((101, 4))
                others[:, i], others[:, j] = grid, 1 - grid
                assert np.all(np.sum((y - x) ** 2) <= np.sum((others - x) ** 2, -1) + 1e-12)


@pytest.mark.parametrize(
    ("operator", "v", "parameter", "by_v"),
    [
        (prox.l2_sphere, np.zeros(3), 1.0, np.zeros((3, 3))),
        (prox.l1_sphere, np.zeros(2), 1.0, [[0.5, -0.5], [-0.5, 0.5]]),
        (prox.l1_ball, np.array([1.0, 0.0]), 1.0, [[0, 0], [0, 0]]),
        (prox.l1_ball, np.zeros(2), 0.0, np.zeros((2, 2))),
        (prox.halfspace, np.array([1.0, 0.0]), (np.array([1.0, 0.0]), 1.0), [[0, 0], [0, 1]]),
        (prox.halfspace, np.ones(2), (np.zeros(2), 1.0), np.eye(2)),
        (prox.hyperplane, np.ones(2), (np.zeros(2), 0.0), np.eye(2)),
        (prox.span, np.ones(2), np.zeros(2), np.zeros((2, 2))),
        (prox.second_order_cone, np.zeros(3), None, np.eye(3) / 2),
        (prox.second_order_cone, np.array([1.0, 1.0, 0.0]), None, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]),
        (prox.exponential_cone, np.zeros(3), None, np.eye(3)),
        (prox.exponential_cone, np.array([-1.0, -1.0, 0.0]), None, np.diag([1.0, 0, 0])),
        (prox.psd_cone, np.zeros((1, 1)), None, np.zeros((1, 1, 1, 1))),
        (prox.isotonic, np.zeros(2), None, np.eye(2)),
        (prox.total_variation_1d, np.zeros(2), 1.0, np.full((2, 2), 0.5)),
        (prox.hypercube, np.array([0.0, 1.0]), 1.0, np.zeros((2, 2))),
        (prox.linf_ball, np.array([-1.0, 0.5]), 1.0, np.diag([0.0, 1])),
        (prox.box_section, np.array([0.5, 0.5]), (0.5, 0.5, 1.0, 1.0), np.zeros((2, 2))),
        (prox.affine_set, np.ones(2), (np.zeros((1, 2)), np.zeros(1)), np.eye(2)),
        (prox.transport, np.eye(2), (np.ones(2), np.ones(2)), None),
        (prox.total_variation_2d, np.eye(2), 0.0, None),
        (prox.kl_transport, 1e4 * np.eye(2), (np.ones(2), np.ones(2)), None),
    ],
)
def test_derivatives_at_kinks(operator, v, parameter, by_v):
    differentiated = (0,) if parameter is None else (0, 1)
    parameter = jax.tree.map(lambda x: jnp.asarray(x, float), parameter)
    both = jax.jit(lambda *args: [mode(operator, differentiated)(*args) for mode in (jax.jacfwd, jax.jacrev)])
    for jacobian in both(v, parameter):
        assert jax.tree.all(jax.tree.map(lambda x: np.all(np.isfinite(x)), jacobian))
        if by_v is not None:
            np.testing.assert_allclose(jacobian[0], by_v, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_exponential_cone_by_moreau(scale, dtype):
    """y in the cone, v - y in its polar and orthogonal to y, for rows of entries of very different sizes."""
    v = (scale * draw(14, 500, 3) * 10 ** np.random.default_rng(1).uniform(-4, 4, (500, 3))).astype(dtype)
    y = np.asarray(batched(EXPONENTIAL)(v, None), np.float64)
    unit, eps = np.max(np.abs(v), -1).astype(float), 4 * np.finfo(dtype).eps
    x, u = y / unit[:, None], (v - y) / unit[:, None]
    assert np.all(np.abs(np.sum(x * u, -1)) <= eps)
    assert np.all(x[:, 1] >= -eps)
    x = x[(x[:, 1] > 0) & (x[:, 2] >= 10 * eps)]
    room = np.log(x[:, 2]) - np.log(x[:, 1]) - x[:, 0] / x[:, 1]
    assert np.all(room >= -eps * (2 + np.abs(x[:, 0] / x[:, 1])) * (1 + 1 / x[:, 1] + 1 / x[:, 2]))


def test_eigenvalues_are_cut_off_also_where_they_repeat():
    q = np.linalg.qr(draw(15, 4, 4))[0]
    v = q @ np.diag([2.0, 2.0, -1.0, -1.0]) @ q.T
    np.testing.assert_allclose(prox.psd_cone(v), q @ np.diag([2.0, 2.0, 0, 0]) @ q.T, atol=1e-13)
    moved = jax.jit(lambda e: jax.jvp(prox.psd_cone, (v,), (e,))[1])
    e = draw(16, 4, 4)
    numeric = (prox.psd_cone(v + 1e-6 * e) - prox.psd_cone(v - 1e-6 * e)) / 2e-6
    np.testing.assert_allclose(moved(e), numeric, atol=1e-8)


@functools.cache
def compiled(operator):
    return jax.jit(operator)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e3])
def test_transport_against_linear_programs_and_sinkhorn_conditions(size):
    v = size * draw(18, 3, 4)
    sums = np.concatenate([np.kron(np.eye(3), np.ones((1, 4))), np.kron(np.ones((1, 3)), np.eye(4))])
    y = np.asarray(compiled(prox.transport)(v, SUMS))
    np.testing.assert_allclose(sums @ y.ravel(), np.concatenate(SUMS), atol=1e-11 * (1 + size))
    assert np.all(y >= 0)
    assert abs(certificate(v, y, A_eq=sums, b_eq=np.concatenate(SUMS))) <= 1e-10 * (1 + size) ** 2
    x = np.asarray(compiled(prox.kl_transport)(v, SUMS))
    np.testing.assert_allclose(sums @ x.ravel(), np.concatenate(SUMS), atol=1e-11 * (1 + size))
    # log x - v is f_i + g_j wherever exp does not underflow
    if size <= 30:
        potential = np.log(x) - v
        centred = potential - potential.mean(0) - potential.mean(1, keepdims=True) + potential.mean()
        np.testing.assert_allclose(centred, 0, atol=1e-9)
    narrow = compiled(prox.kl_transport)(v.astype("float32"), jax.tree.map(np.float32, SUMS))
    np.testing.assert_allclose(narrow, x, atol=1e-5 * (1 + size / 10))


def test_birkhoff_is_transport_with_equal_sums_and_totals_must_agree():
    v = draw(19, 3, 3, 3)
    sums = tuple(np.array([[1.2], [1.0], [0.0]]) + np.array([[0.0], [delta], [0.0]]) for delta in (0.0, 0.1))
    sums = tuple(np.repeat(side, 3, axis=1) for side in sums)
    scales = np.array([1.2, 1.0, 0.0])
    for special, general in ((prox.birkhoff, prox.transport), (prox.kl_birkhoff, prox.kl_transport)):
        y, ours = compiled(general)(v, sums), compiled(special)(v, scales)
        np.testing.assert_allclose(ours[0], y[0], atol=1e-12)
        assert np.all(np.isnan(y[1]))
        assert np.all(y[2] == 0)
        np.testing.assert_allclose(ours.sum(-1), np.repeat(scales[:, None], 3, 1), atol=1e-12)


def test_total_variation_in_one_dimension_by_its_dual():
    """u = cumsum(v - y) lies in [-t, t], is 0 at the end, and t sign(rise) wherever y rises: exactly then y is it."""
    for n, size in ((2, 1.0), (50, 1.0), (400, 3.0)):
        v = size * draw(20, n)
        for t in (0.0, 0.3, 2.0, 1e3):
            y = np.asarray(compiled(prox.total_variation_1d)(v, t))
            u, rise = np.cumsum(v - y), np.diff(y)
            np.testing.assert_allclose(u[-1], 0, atol=1e-11)
            assert np.all(np.abs(u) <= t + 1e-10)
            np.testing.assert_allclose(u[:-1][rise != 0], -t * np.sign(rise[rise != 0]), atol=1e-10)


def test_total_variation_in_two_dimensions_by_its_duality_gap():
    v, t = draw(21, 8, 9) + np.kron(draw(22, 2, 3) * 2, np.ones((4, 3))), 0.5
    y = np.asarray(compiled(prox.total_variation_2d)(v, t))
    dx, dy = np.diff(y, axis=0, append=y[-1:]), np.diff(y, axis=1, append=y[:, -1:])
    value = t * np.sum(np.hypot(dx, dy)) + np.sum((y - v) ** 2) / 2
    # the least value of the dual is (|v|^2 - |y|^2) / 2 at y = v - D'p, for any p on the discs
    np.testing.assert_allclose(value, (np.sum(v**2) - np.sum(y**2)) / 2, rtol=1e-9)
    np.testing.assert_allclose(y.mean(), v.mean(), rtol=1e-12)
    np.testing.assert_allclose(compiled(prox.total_variation_2d)(v, 100.0), np.full((8, 9), v.mean()), atol=1e-9)
    row = np.repeat(draw(23, 1, 9), 8, axis=0)  # no differences down the columns: each row is a signal
    signals = compiled(prox.total_variation_1d)(row[0], t)
    np.testing.assert_allclose(compiled(prox.total_variation_2d)(row, t)[0], signals, atol=1e-9)


def test_a_million_entries():
    v = draw(24, 1_000_000).astype("float32")
    y = jax.jit(lambda v: (prox.simplex(v), prox.l1_ball(v), prox.box_section(v, (0.0, 1.0, 1.0, 5.0))))(v)
    sums = [float(np.sum(np.abs(x), dtype=np.float64)) for x in y]
    np.testing.assert_allclose(sums, [1, 1, 5], rtol=1e-5)


def test_isotonic_regression_both_ways():
    v = draw(17, 200)
    ours = jax.jit(prox.isotonic)(v)
    np.testing.assert_allclose(ours, scipy.optimize.isotonic_regression(v).x, atol=1e-13)
    falling = scipy.optimize.isotonic_regression(v, increasing=False).x
    np.testing.assert_allclose(prox.isotonic(v, "decreasing"), falling, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: prox.isotonic(np.ones(3), "upwards"), ValueError, r'"increasing" or "decreasing"; it is \'upwards\''),
        (lambda: prox.sparse_simplex(np.ones(3), (0, 1.0)), ValueError, "k must be a whole number of at least 1"),
        (lambda: prox.exponential_cone(np.ones(4)), ValueError, r"rows \(x, y, z\); v has shape \(4,\)"),
        (lambda: prox.psd_cone(np.ones((2, 3))), ValueError, r"square matrices .* v has shape \(2, 3\)"),
        (lambda: prox.birkhoff({"p": np.ones((2, 3))}), ValueError, r"v\['p'\] has shape \(2, 3\)"),
        (
            lambda: prox.transport(np.ones(3), (1.0, 1.0)),
            ValueError,
            r"matrices on the last two axes; v has shape \(3,",
        ),
        (lambda: prox.transport(np.ones((2, 2)), (-1.0, 1.0)), ValueError, "row_sums >= 0"),
        (lambda: prox.total_variation_2d(np.ones(3), 1.0), ValueError, "images on the last two axes"),
        (lambda: prox.affine_set(np.ones(3), (np.ones((2, 4)), 0.0)), ValueError, r"A of shape \[..., m, 3\]"),
        (lambda: prox.polyhedron(np.ones(3), (A, None, G, 1.0)), ValueError, "both of A and b, or neither"),
        (lambda: prox.polyhedron(np.ones(3), (G, 1.0)), ValueError, r"parameter = \(A, b, G, h\)"),
        (lambda: prox.box_section(np.ones(3), (0.0, 1.0)), ValueError, r"\(lower, upper, weights, total\)"),
        (lambda: prox.hyperplane(np.ones(3), (np.ones(2), 0.0)), ValueError, r"a that broadcasts to shape \(3,\)"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_traced_count_is_refused():
    with pytest.raises(TypeError, match="k fixes the program"):
        jax.jit(prox.sparse_simplex)(np.ones(3), (1, 1.0))
