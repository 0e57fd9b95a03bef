"""No unit is special, no failure is silent, and nothing is compiled twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import STEP, N
from test_prox_protocol import ROWS, draw

from odljax import prox

# How the parameter moves with the unit c of v where it is not c times as large; None: h has a scale of its own.
POWERS = {
    "ridge": 0,
    "elastic_net": (1, -1),
    "non_negative_ridge": 0,
    "huber": (0, 1),
    "log_barrier": None,  # lam in squared units leaves the range of float32
    "entropy": None,
    "l0": None,
    "lq": None,
    "scad": (1, 0),
    "mcp": (1, 0),
    "hyperplane": (0, 1),
    "halfspace": (0, 1),
    "span": 0,
    "box_section": (1, 1, 0, 1),
}
HOMOGENEOUS = [row for row in ROWS if POWERS.get(row.prox.__name__, 1) is not None]
UNITS = np.float32(2.0) ** np.array([0, -100, -66, -33, 33, 66, 100], np.float32)


@pytest.mark.parametrize("row", HOMOGENEOUS, ids=str)
def test_units_play_no_part(row):
    """prox(c v; c lam) = c prox(v; lam), and its derivative in v, forward and reverse, does not know c."""
    powers = POWERS.get(row.prox.__name__, 1)
    leaves, structure = jax.tree.flatten(row.parameter)
    exponents = powers if isinstance(powers, tuple) else (powers,) * len(leaves)
    v, push = (jnp.asarray(x, jnp.float32) for x in (draw(0, 2, N), draw(1, 2, N)))

    @jax.jit
    @jax.vmap
    def everything(c):
        moved = [jnp.asarray(a, jnp.float32) * c**e for a, e in zip(leaves, exponents, strict=True)]
        parameter = jax.tree.unflatten(structure, moved)

        def operator(v):
            return row.operator(v, parameter, jnp.float32(STEP))

        y, along = jax.jvp(operator, (c * v,), (push,))
        return y / c, along, jax.vjp(operator, c * v)[1](push)[0]

    for of_units in everything(UNITS):
        np.testing.assert_allclose(of_units[1:], np.broadcast_to(of_units[0], of_units[1:].shape), atol=2e-5)


@pytest.mark.parametrize("operator", [prox.l2_ball, prox.l2_sphere])
def test_norms_near_the_largest_number(operator):
    v = np.array([0.6, -0.8, 0.0], "float32")
    for fraction in (0.2, 0.5):
        largest = np.float32(fraction) * np.finfo("float32").max
        np.testing.assert_allclose(jax.jit(operator)(v * largest, 1.0), v, rtol=1e-6)


# ---- overlapping groups ----

WINDOWS = [list(range(i, i + 3)) for i in range(10)]


def by_sweeps(v, lam, sweeps=3000):
    """Block descent on the dual, and the duality gap, which bounds half the squared distance from the solution."""
    u, x = np.zeros((len(WINDOWS), *v.shape)), v.copy()
    for _ in range(sweeps):
        for i, group in enumerate(WINDOWS):
            r = x[:, group] + u[i][:, group]
            new = r * np.minimum(1, lam / np.linalg.norm(r, axis=1, keepdims=True))
            x[:, group] -= new - u[i][:, group]
            u[i][:, group] = new
    penalty = lam * sum(np.linalg.norm(x[:, group], axis=1) for group in WINDOWS)
    gap = np.sum((x - v) ** 2, 1) / 2 + penalty - np.sum(v**2 - x**2, 1) / 2
    return x, np.sqrt(2 * np.maximum(gap, 0))


def test_sliding_windows_against_many_sweeps():
    v = draw(1, 40, 12)
    right, error = by_sweeps(v, 0.6)
    operator = jax.jit(lambda v: prox.overlapping_group_lasso(v, (0.6, WINDOWS)))
    y = np.asarray(operator(v))
    assert np.all(np.linalg.norm(y - right, axis=1) <= error + 1e-9)
    for unit in (1e-6, 1.0):
        narrow = np.asarray(
            jax.jit(lambda v, lam: prox.overlapping_group_lasso(v, (lam, WINDOWS)))(
                (unit * v).astype("float32"), np.float32(0.6 * unit)
            )
        )
        there = ~np.isnan(narrow).any(1)  # a row may be given up, but not be wrong
        assert there.mean() > 0.9
        np.testing.assert_allclose(narrow[there] / unit, y[there], atol=1e-5)


def test_short_windows_that_overlap_those_that_are_zero():
    """Where almost all is zero the way to the answer is long in float32: right to 1e-5, or NaN, and seldom that."""
    windows = [list(range(i, i + 4)) for i in range(0, 17, 2)]
    rng = np.random.default_rng(0)
    rng.standard_normal(2400), rng.uniform(size=200)  # of those that follow one row ends beside its solution
    v, lam = rng.standard_normal((200, 20)), 10 ** rng.uniform(-2, 0.5, 200)
    operator = jax.jit(jax.vmap(lambda v, lam: prox.overlapping_group_lasso(v, (lam, windows))))
    right = np.asarray(operator(v, lam))
    assert np.isfinite(right).all()
    assert np.mean(np.all(right[:, 4:8] == 0, axis=1)) > 0.1
    narrow = np.asarray(operator(v.astype("float32"), lam.astype("float32")))
    there = ~np.isnan(narrow).any(1)
    assert there.mean() > 0.95
    np.testing.assert_allclose(narrow[there], right[there], atol=1e-5)


def test_groups_that_only_just_are_zero_beside_others():
    """Tied numbers in float32: the right answer is 0, and what comes near it is none."""
    ring = [[i, (i + 1) % 8] for i in range(8)]
    for v, lam, groups in (
        ([1.0, 0, 2, 0], np.ones(4), [[0, 1], [0, 1, 2], [1, 2, 3], [0, 3]]),
        ([1.0, 0, 2, 0, 0, 0, 1, -1], [0, 6.5, 5, 1, 2.5, 0.5, 5.5, 1], ring),
    ):
        v, lam = np.asarray(v, "float32"), np.asarray(lam, "float32")
        y = np.asarray(prox.overlapping_group_lasso(v, (lam, groups)))
        assert np.isnan(y).all() or np.abs(y).max() <= 1e-5 * np.linalg.norm(v)
    zero = prox.overlapping_group_lasso(np.array([1.0, 0, 2, 0]), (np.ones(4), [[0, 1], [0, 1, 2], [1, 2, 3], [0, 3]]))
    np.testing.assert_allclose(zero, 0, atol=1e-8)


def test_a_group_that_only_just_is_zero():
    v, windows = np.array([0.5, 0.3, -0.1, -0.1]), [[0, 1], [1, 2], [2, 3]]
    np.testing.assert_allclose(prox.overlapping_group_lasso(v, (0.3, windows)), [0.2, 0, 0, 0], atol=1e-8)


# ---- polyhedra and transport ----


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"), [("float32", 2.0, 1e-5), ("float32", 200.0, 1e-3), ("float64", 200.0, 1e-9)]
)
def test_a_capped_box_against_its_one_multiplier(dtype, size, tolerance):
    n, points = 16, size * draw(2, 64, 16)
    G, h = np.concatenate([np.eye(n), -np.eye(n), np.ones((1, n))]), np.concatenate([np.ones(n), np.zeros(n), [n / 2]])
    operator = jax.jit(lambda v: prox.polyhedron(v, (None, None, G.astype(dtype), h.astype(dtype))))
    low, high = np.zeros((64, 1)), np.full((64, 1), np.abs(points).max())
    for _ in range(100):
        tau = (low + high) / 2
        above = np.clip(points - tau, 0, 1).sum(1, keepdims=True) > n / 2
        low, high = np.where(above, tau, low), np.where(above, high, tau)
    within = np.clip(points, 0, 1).sum(1, keepdims=True) <= n / 2
    right = np.clip(np.where(within, points, points - high), 0, 1)
    np.testing.assert_allclose(operator(points.astype(dtype)), right, atol=tolerance)


def test_polyhedra_without_equations_inequalities_or_rows():
    v, G, h = draw(3, 3, 2), np.array([[1.0, 1.0], [-1.0, 0.0]]), np.array([1.0, 0.0])
    none = np.zeros((0, 2)), np.zeros(0)
    rows = prox.polyhedron(v, (None, None, G, h))
    np.testing.assert_allclose(rows[1], prox.polyhedron(v[1], (None, None, G, h)), atol=1e-12)
    np.testing.assert_array_equal(prox.polyhedron(v, (*none, G, h)), rows)
    np.testing.assert_array_equal(prox.affine_set(v, none), v)
    onto = prox.polyhedron(v, (np.ones((1, 2)), np.ones(1), *none))
    np.testing.assert_allclose(onto, v - (v.sum(1, keepdims=True) - 1) / 2, atol=1e-12)
    assert prox.polyhedron(v[:0], (None, None, G, h)).shape == (0, 2)


def test_equations_have_units_of_their_own():
    v, units = draw(4, 30).astype("float32"), np.float32(10.0) ** np.arange(-6, 6)
    A, b = draw(5, 12, 30).astype("float32"), draw(6, 12).astype("float32")
    y = np.asarray(prox.affine_set(v, (A * units[:, None], b * units)), float)
    right = v - np.linalg.pinv(A.astype(float)) @ (A.astype(float) @ v - b)
    np.testing.assert_allclose(y, right, atol=1e-5)


@pytest.mark.parametrize("small", [1e-2, 1e-4])
def test_transport_with_small_sums(small):
    rng = np.random.default_rng(0)
    sums = [np.concatenate([[small, small], 0.1 + rng.random(n - 2)]) for n in (6, 9)]
    rows, columns = (side / side.sum() for side in sums)
    v = draw(7, 20, 6, 9)
    plans = np.asarray(jax.jit(lambda v: prox.transport(v, (rows, columns)))(v))
    assert np.all(plans >= 0)
    np.testing.assert_allclose(plans.sum(2), np.broadcast_to(rows, (20, 6)), atol=1e-12)
    np.testing.assert_allclose(plans.sum(1), np.broadcast_to(columns, (20, 9)), atol=1e-12)
    for plan, scores in zip(plans, v, strict=True):  # no other plan has a larger inner product with what is left
        other = np.outer(rows, columns)
        assert np.sum((scores - plan) * (other - plan)) <= 1e-9


# ---- failures ----

APART = np.array([[1.0, 0.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("operator", "v", "parameter"),
    [
        (prox.polyhedron, np.ones(2), (None, None, APART, np.array([0.0, -1.0]))),
        (prox.box_section, np.ones(2), (0.0, 1.0, 1.0, 3.0)),
        (prox.hyperplane, np.ones(2), (0.0, 1.0)),
        (prox.halfspace, np.ones(2), (0.0, -1.0)),
        (prox.transport, np.ones((2, 2)), (np.ones(2), np.full(2, 1.5))),
        (prox.kl_transport, np.ones((2, 2)), (np.ones(2), np.full(2, 1.5))),
        (prox.overlapping_group_lasso, np.array([1.0, np.nan, 0.0]), (0.1, [[0, 1], [1, 2]])),
    ],
)
def test_where_there_is_no_answer_there_is_no_derivative(operator, v, parameter):
    by_v = [jax.jit(mode(lambda v: operator(v, parameter))) for mode in (jax.jacfwd, jax.jacrev)]
    assert np.all(np.isnan(operator(v, parameter)))
    for jacobian in by_v:
        assert np.all(np.isnan(jacobian(v)))


def test_a_row_that_is_masked_costs_the_others_nothing():
    v, h = np.ones((2, 2)), np.array([[0.0, -1.0], [0.0, 2.0]])

    def loss(G):
        y = prox.polyhedron(v, (None, None, G, h))
        return jnp.sum(jnp.where(jnp.isnan(y), 0, y))

    alone = jax.grad(lambda G: jnp.sum(prox.polyhedron(v[1], (None, None, G, h[1]))))(APART)
    np.testing.assert_allclose(jax.grad(loss)(APART), alone, atol=1e-12)


def test_a_traced_negative_penalty_shows():
    for operator in (prox.l1, prox.ridge, prox.group_lasso, prox.l0, prox.l2_ball, prox.simplex):
        assert np.all(np.isnan(jax.jit(operator)(jnp.ones(2), -1.0)))


def test_hard_thresholding_at_no_penalty_has_a_derivative():
    f = functools.partial(prox.l0, jnp.array([3.0, 0.0, -0.5]))
    for lam, step in ((0.0, 1.0), (1.0, 0.0)):
        np.testing.assert_array_equal(jax.jacfwd(f, 1)(lam, step), 0)
        np.testing.assert_array_equal(jax.jacrev(f, 0)(lam, step), 0)


# ---- complex numbers ----


def test_complex_numbers_are_pairs_of_real_ones():
    v = draw(8, 4, 5) + 1j * draw(9, 4, 5)
    size = np.abs(v)
    np.testing.assert_allclose(prox.huber(v, (1.0, 0.5)), np.where(size < 1, v / 2, v - v / size / 2), atol=1e-14)
    u, s, vt = np.linalg.svd(v, full_matrices=False)
    np.testing.assert_allclose(prox.nuclear(v, 0.7), (u * np.maximum(s - 0.7, 0)) @ vt, atol=1e-13)
    for y in (np.asarray(prox.total_variation_2d(v, 0.3)), np.asarray(prox.total_variation_1d(v[:1], 0.3))):
        own = v[: len(y)]
        rises = np.abs(np.diff(y, axis=0, append=y[-1:])), np.abs(np.diff(y, axis=1, append=y[:, -1:]))
        value = 0.3 * np.sum(np.hypot(*rises)) + np.sum(np.abs(y - own) ** 2) / 2
        np.testing.assert_allclose(value, np.sum(np.abs(own) ** 2 - np.abs(y) ** 2) / 2, rtol=1e-9)


# ---- compilations ----


@pytest.mark.parametrize(
    ("operator", "parameter"),
    [
        (prox.isotonic, None),
        (prox.slope, 0.5),
        (prox.k_largest, (0.5, 2)),
        (prox.lq, (0.5, 0.5)),
        (prox.total_variation_1d, 0.5),
        (prox.box_section, (0.0, 1.0, 1.0, 2.0)),
        (prox.polyhedron, (None, None, np.ones((2, 4)), np.ones(2))),
        (prox.overlapping_group_lasso, (0.5, [[0, 1], [1, 2]])),
        (prox.exponential_cone, None),
        (prox.total_variation_2d, 0.5),
        (prox.transport, (1.0, 1.0)),
    ],
)
def test_a_second_eager_call_compiles_nothing(operator, parameter):
    shape = {"exponential_cone": (3,), "total_variation_2d": (3, 3), "transport": (2, 2)}.get(operator.__name__, (4,))
    v, compilations = draw(10, *shape), []
    operator(v, parameter)

    def listen(event, duration, **_):
        compilations.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        operator(v + 1, parameter)
        assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
