"""What every proximal operator promises, checked on every row of one table (rows.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from rows import BASIC, STEP, N, total
from rows_penalties import PENALTIES
from rows_projections import ELSEWHERE, PROJECTIONS

from odljax import prox

ROWS = [*BASIC, *PENALTIES, *PROJECTIONS]
LEAFWISE = [row for row in ROWS if row.leafwise]
CONVEX = [row for row in ROWS if row.convex]
CALCULUS = ["conjugate", "from_projection", "moreau_envelope", "scale", "separable", "translate"]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_convex_row = pytest.mark.parametrize("row", CONVEX, ids=str)
every_row_of_any_length = pytest.mark.parametrize("row", [row for row in ROWS if not row.lengths], ids=str)
every_leafwise_row = pytest.mark.parametrize("row", LEAFWISE, ids=str)
near_and_far = pytest.mark.parametrize("size", [0.3, 2.0])  # most entries below, and above, the thresholds and bounds


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def on_stack(row):
    """The operator on a stack of points; one compilation serves several tests."""
    return jax.jit(jax.vmap(row.operator, in_axes=(0, None, None)))


@functools.cache
def on_vector(row):
    """For the operator as a map f of one vector x, (v, parameter, step size) in a row, two compiled functions:

    f and the gradient of a weighted sum of f, on a stack of x; the Jacobian forward and reverse and the sum's Hessian.
    """
    _, rebuild = ravel_pytree(jax.tree.map(jnp.asarray, (np.zeros((2, N)), row.parameter, STEP)))

    def function(x):
        return row.operator(*rebuild(x)).ravel()

    def weighted(x):
        return draw(9, 2 * N) @ function(x)

    values = jax.jit(jax.vmap(lambda x: (function(x), jax.grad(weighted)(x))))
    return values, jax.jit(lambda x: (jax.jacfwd(function)(x), jax.jacrev(function)(x), jax.hessian(weighted)(x)))


def vector(row, size):
    return np.concatenate([np.ravel(part) for part in jax.tree.leaves((size * draw(0, 2, N), row.parameter, STEP))])


def central_differences(stacked, x, step=1e-5):
    shifts = step * np.eye(x.size)
    ahead, behind = stacked(x + shifts), stacked(x - shifts)
    return [np.asarray(a - b).T / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def scalars(row):
    """The row's parameter with every array in it replaced by one number, which fits any tree."""
    return jax.tree.map(lambda array: float(np.mean(array)), row.parameter)


def others(row, v, y):
    """Points that compete with y, near and far."""
    z = row.feasible(y + np.repeat([1e-3, 0.1, 3.0], 30)[:, None, None] * draw(2, 90, 2, N), row.parameter)
    if row.convex:
        return z
    kept, swapped = draw(10, 2, 200, 2, N) > 0  # what is not convex is compared with points of its own kind as well
    return np.concatenate([z, np.where(kept, y, np.where(swapped, v, 0)), np.where(kept, y, 0.7 * v)])


@every_row
def test_is_the_minimiser(row):
    """v - prox(v) is step * a subgradient of h at prox(v), which characterises the minimiser where h is convex."""
    points = 2 * draw(1, 20, 2, N)
    for v, y in zip(points, np.asarray(on_stack(row)(points, row.parameter, STEP)), strict=True):
        np.testing.assert_allclose(row.feasible(y[None], row.parameter)[0], y, atol=1e-12)
        z = others(row, v, y)
        rise = STEP * (row.penalty(z, row.parameter) - row.penalty(y, row.parameter))
        slope = total((v - y) * (z - y)) - (0 if row.convex else total((z - y) ** 2) / 2)
        assert np.all(rise >= slope - 1e-12)


@every_convex_row
def test_is_firmly_non_expansive(row):
    u, v = 2 * draw(3, 100, 2, N), 2 * draw(4, 100, 2, N)
    moved = np.asarray(on_stack(row)(u, row.parameter, STEP) - on_stack(row)(v, row.parameter, STEP))
    assert np.all(total(moved * (u - v)) >= total(moved**2) - 1e-12)


@every_convex_row
def test_moreau_identity(row):
    """With w the operator of the conjugate at v, x = (v - w) / s has w as a subgradient of h: <x, w> = h(x) + h*(w)."""
    points = 2 * draw(1, 20, 2, N)
    of_conjugate = jax.jit(jax.vmap(lambda v: prox.conjugate(row.operator)(v, row.parameter, STEP)))
    for v, w in zip(points, np.asarray(of_conjugate(points)), strict=True):
        x = (v - w) / STEP
        z = others(row, v, row.feasible(x[None], row.parameter)[0])
        np.testing.assert_allclose(row.feasible(x[None], row.parameter)[0], x, atol=1e-12)
        x = row.feasible(x[None], row.parameter)[0]  # the difference leaves rounding where x is on the boundary
        assert np.all(row.penalty(z, row.parameter) - row.penalty(x, row.parameter) >= total(w * (z - x)) - 1e-11)


@every_row
def test_derivatives_are_finite_at_zero_and_at_ties(row):
    _, derivatives = on_vector(row)
    rest = vector(row, 0.0)[2 * N :]
    ties = [np.zeros(2 * N), np.ones(2 * N), -np.ones(2 * N), np.eye(2 * N)[0], np.tile([1.0, -1.0], N)]
    for v in ties:
        for derivative in derivatives(np.concatenate([v, rest])):
            assert np.all(np.isfinite(derivative))


@every_row
@near_and_far
def test_derivatives_match_the_closed_form_and_finite_differences(row, size):
    stacked, derivatives = on_vector(row)
    x = vector(row, size)
    forward, reverse, hessian = derivatives(x)
    np.testing.assert_allclose(forward, reverse, atol=1e-12)
    if row.jacobian is not None:
        exact = row.jacobian(size * draw(0, 2, N), row.parameter, STEP)
        np.testing.assert_allclose(forward[:, : 2 * N], exact, atol=1e-9)
    first, second = central_differences(stacked, x)
    np.testing.assert_allclose(forward, first, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(hessian, second, rtol=1e-6, atol=1e-8)


@every_row
def test_the_derivative_of_a_batch_is_the_batch_of_derivatives(row):
    stacked, derivatives = on_vector(row)
    points = np.stack([vector(row, 0.3), vector(row, 2.0)])
    for gradient, x in zip(stacked(points)[1], points, strict=True):
        np.testing.assert_allclose(gradient, draw(9, 2 * N) @ derivatives(x)[1], atol=1e-12)


@every_row
def test_vmap_is_a_loop_and_jit_changes_nothing(row):
    points = draw(5, 3, 2, N)
    for v, y in zip(points, on_stack(row)(points, row.parameter, STEP), strict=True):
        np.testing.assert_allclose(row.operator(v, row.parameter, STEP), y, rtol=1e-13, atol=1e-13)


@every_row
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_leaf_decides_the_dtype(row, dtype, tolerance):
    """Coefficients stay in float64 here; the result has the leaf's dtype, and so have its derivatives."""
    v = draw(6, 2, N).astype(jnp.dtype(dtype))

    @jax.jit
    def both(v):
        y, pullback = jax.vjp(lambda v: row.operator(v, row.parameter, STEP), v)
        return y, pullback(y)[0], row.operator(v.astype("float64"), row.parameter, STEP)

    y, cotangent, exact = both(v)
    assert y.dtype == dtype == cotangent.dtype
    np.testing.assert_allclose(y.astype("float64"), exact, rtol=tolerance, atol=tolerance)


@every_row_of_any_length
def test_a_mixed_tree_keeps_its_structure_shapes_and_dtypes(row):
    v = {"a": jnp.ones((2, 3), "float32"), "b": (jnp.full(1, -2.0, "bfloat16"), jnp.array(0.5), None), "c": 1.5}

    def operator(v):
        return row.operator(v, scalars(row), jnp.float32(STEP))

    @jax.jit
    def everything(v):
        return *jax.jvp(operator, (v,), (v,)), jax.tree.map(operator, v)

    y, tangent, one_by_one = everything(v)
    for out in (y, tangent):
        assert jax.tree.structure(out) == jax.tree.structure(v)
        for x, like in zip(jax.tree.leaves(out), jax.tree.leaves(v), strict=True):
            assert (x.shape, x.dtype) == (jnp.shape(like), jnp.result_type(like))
    if row in LEAFWISE:
        assert jax.tree.all(jax.tree.map(np.array_equal, y, one_by_one))


@every_leafwise_row
def test_a_parameter_may_be_a_tree_like_v(row):
    v, operator = {"x": 2 * draw(7, 2, N), "y": draw(8, 2, N)}, jax.jit(row.operator)
    doubled = jax.tree.map(lambda array: 2 * array, row.parameter)
    y = operator(v, jax.tree.map(lambda x, y: {"x": x, "y": y}, row.parameter, doubled), STEP)
    for name, parameter in {"x": row.parameter, "y": doubled}.items():
        np.testing.assert_allclose(y[name], operator(v[name], parameter, STEP), rtol=1e-13, atol=1e-14)


@every_row_of_any_length
def test_a_single_entry_has_the_same_answer_in_any_rank(row):
    """And finite first and second derivatives at 0, which is a kink or a tie of most."""
    shapes = [(), (1,), (1, 1)]

    def values(v, parameter):
        return jnp.stack([jnp.sum(row.operator(jnp.full(shape, v), parameter, STEP)) for shape in shapes])

    everything = jax.jit(
        lambda *args: (values(*args), jax.jacrev(values)(*args), jax.jacfwd(jax.jacrev(values))(*args))
    )
    for v in (0.0, 0.5, -2.0):
        for entries in everything(v, jax.tree.map(jnp.asarray, scalars(row))):
            assert np.all(np.isfinite(entries))
            np.testing.assert_allclose(entries, np.broadcast_to(entries[:1], entries.shape), rtol=1e-14, atol=1e-15)


@every_row
def test_an_empty_tree_stays_empty(row):
    assert row.operator({}, scalars(row), STEP) == {}


@every_row
def test_a_nan_is_never_swallowed(row):
    v = draw(0, 1, 2, N)
    leaves, structure = jax.tree.flatten(row.parameter)
    for i, leaf in enumerate(leaves):
        poisoned = jax.tree.unflatten(structure, [*leaves[:i], np.full_like(leaf, np.nan), *leaves[i + 1 :]])
        assert np.all(np.isnan(on_stack(row)(v, poisoned, STEP)))
    v[0, 1, 2] = np.nan
    assert np.isnan(on_stack(row)(v, row.parameter, STEP)[0, 1, 2])


@every_row
def test_integers_are_refused(row):
    with pytest.raises(
        TypeError, match=rf"prox.{row.prox.__name__} needs real (or complex )?floating-point .* v\['w'\] is int64\[3\]"
    ):
        row.operator({"w": jnp.arange(3)}, scalars(row), STEP)


def test_every_public_operator_has_a_row():
    assert sorted({row.prox.__name__ for row in ROWS} | {*CALCULUS, *ELSEWHERE}) == sorted(prox.__all__)
