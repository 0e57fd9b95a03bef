"""Ends of the range of the operators: thresholds of 0 and inf, tiny and huge numbers, no entries, many derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odljax import prox


def single(*values):
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


# ---- total variation -----------------------------------------------------------------------------------------------

SIGNAL = jax.jit(jax.jacrev(prox.total_variation_1d))
IMAGE = jax.jit(
    lambda v, lam, step, by_v, by_lam: jax.jvp(
        lambda *moved: prox.total_variation_2d(*moved, step), (v, lam), (by_v, by_lam)
    )
)


@pytest.mark.parametrize(("lam", "step"), [(0.0, 1.0), (1.0, 0.0)])
def test_total_variation_of_no_weight_is_the_identity(lam, step):
    np.testing.assert_array_equal(SIGNAL(jnp.full(4, 2.0), lam, step), np.eye(4))
    image, push = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 4.0]]), jnp.arange(6.0).reshape(2, 3)
    y, along = IMAGE(image, lam, step, push, 0.0)
    by_lam = IMAGE(image, lam, step, 0 * push, 1.0)[1]
    np.testing.assert_allclose(y, image, atol=1e-14)
    np.testing.assert_allclose(along, push, atol=1e-14)
    # the directions of D v: (3, 0) above the 4, (0, 3) on its left
    np.testing.assert_allclose(by_lam, step * np.array([[0, 0, 1], [0, 1, -2]]), atol=1e-14)


def test_the_weights_of_slope_come_in_any_order():
    v = jnp.array([3.0, -1.0, 2.0])
    right = [3.0 - 1.5, -(1.0 - 0.2), 2.0 - 0.7]  # the greatest weight goes with the greatest number
    for weights in ([1.5, 0.7, 0.2], [0.2, 1.5, 0.7], [0.7, 0.2, 1.5]):
        np.testing.assert_allclose(prox.slope(v, jnp.array(weights)), right, atol=1e-12)


def test_a_weight_beyond_the_sum_leaves_nothing_of_the_largest_entry():
    """prox of t max |x| is zero from t = |v|_1 on, and the derivative with it."""
    v = jnp.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(prox.linf(v, 3.3), [0.2 / 3, -0.2 / 3, 0.2 / 3], atol=1e-12)
    np.testing.assert_array_equal(prox.linf(v, 3.6), 0)
    np.testing.assert_array_equal(jax.jacobian(prox.linf)(v, 3.6), 0)


def test_total_variation_of_one_entry_hands_on_a_nan():
    operator = jax.jit(prox.total_variation_1d)
    assert np.isnan(operator(jnp.array([3.0]), jnp.nan)[0])
    assert operator(jnp.array([3.0]), 2.0)[0] == operator(jnp.array([3.0]), jnp.inf)[0] == 3


# ---- tiny and huge numbers -----------------------------------------------------------------------------------------


@jax.jit
def across(v, a, b):
    calls = ((prox.halfspace, (a, 0.0)), (prox.hyperplane, (a, b)), (prox.halfspace, (-a, b)), (prox.span, a))
    return [(operator(v, parameter), jax.jacrev(operator)(v, parameter)) for operator, parameter in calls]


@pytest.mark.parametrize("unit", [1e-25, 1e-19, 1.0, 1e23])
def test_normals_of_any_length(unit):
    expected = [([0, 1], [0, 1]), ([1, 1], [0, 1]), ([3, 1], [1, 1]), ([3, 0], [1, 0])]
    for (y, jacobian), (value, slopes) in zip(across(*single([3.0, 1.0], [unit, 0.0], unit)), expected, strict=True):
        np.testing.assert_allclose(y, value, atol=1e-6)
        np.testing.assert_allclose(jacobian, np.diag(slopes), atol=1e-6)


RELATIVE = jax.jit(prox.kullback_leibler)
BY_ALL = jax.jit(jax.jacrev(lambda v, t, q: prox.kullback_leibler(v, (t, q)), argnums=(0, 1, 2)))
TWICE = jax.jit(jax.hessian(lambda v, t, q: prox.kullback_leibler(v, (t, q)), argnums=(0, 1, 2)))


@pytest.mark.parametrize(
    ("v", "t", "q"), [(-9.0, 0.1, 1e4), (1e3, 1e-36, 1.0), (1e4, 1e-35, 0.37), (-1e3, 1e-36, 1.0), (2.0, 1e-3, 1.0)]
)
def test_relative_entropy_far_out(v, t, q):
    point = single(v, t, q)
    x = RELATIVE(point[0], point[1:])
    wide = float(RELATIVE(jnp.float64(v), (jnp.float64(t), jnp.float64(q))))
    np.testing.assert_allclose(x, wide, rtol=1e-4 if wide < 1e-30 else 1e-6)
    tiny = wide == 0
    exact = (0, 0, 0) if tiny else np.array([1, -np.log(wide) + np.log(q), t / q]) * (wide / (wide + t))
    np.testing.assert_allclose(BY_ALL(*point), exact, rtol=1e-3 if wide < 1e-30 else 1e-5, atol=1e-37)
    assert np.all(np.isfinite(jax.tree.leaves(TWICE(*point))))


def test_entropy_far_out():
    v, t = single(1e4, 1e-35)
    x, by = jax.jit(jax.value_and_grad(prox.entropy, argnums=(0, 1)))(v, t)
    np.testing.assert_allclose((x, *by), (1e4, 1, -1 - np.log(1e4)), rtol=1e-6)


TWICE_EXPONENTIAL = jax.jit(jax.jacfwd(jax.jacrev(prox.exponential_cone)))


@pytest.mark.parametrize("row", [(1e-8, -1.0, 1.0), (0.0, 1e-20, -1.0), (1.0, 1.0, 1.0)])
def test_exponential_cone_has_second_derivatives_where_the_root_runs_off(row):
    assert np.all(np.isfinite(TWICE_EXPONENTIAL(*single(row))))


@pytest.mark.parametrize("operator", [prox.scad, prox.mcp])
def test_concave_penalties_of_infinite_extent_are_l1(operator):
    v, step = jnp.array([-3.0, -0.4, 0.2, 1.1, 1e6]), 0.5
    evaluate = jax.jit(
        lambda parameter: (operator(v, parameter, step), jax.jacrev(operator, (0, 1))(v, parameter, step))
    )
    y, (by_v, (by_lam, by_extent)) = evaluate((1.0, jnp.inf))
    np.testing.assert_allclose(y, prox.l1(v, 1.0, step), rtol=1e-15)
    np.testing.assert_allclose(by_v, np.diag([1, 0, 0, 1, 1]), rtol=1e-15)
    np.testing.assert_allclose(by_lam, np.array([1, 0, 0, -1, -1]) * step, rtol=1e-15)
    np.testing.assert_array_equal(by_extent, 0)
    np.testing.assert_array_equal(evaluate((0.0, jnp.inf))[0], v)


# ---- no entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "parameter"),
    [
        (prox.linf, 1.0),
        (prox.k_largest, (1.0, 2)),
        (prox.l1_ball, 1.0),
        (prox.slope, 1.0),
        (prox.isotonic, None),
        (prox.total_variation_1d, 1.0),
        (prox.group_lasso, 1.0),
    ],
)
def test_rows_without_entries_stay_so(operator, parameter):
    v = jnp.zeros((2, 0), jnp.float32)
    y = operator({"w": v}, parameter)["w"]
    assert (y.shape, y.dtype) == (v.shape, v.dtype)


@pytest.mark.parametrize("operator", [prox.l1_sphere, prox.l2_sphere])
def test_no_sphere_without_entries(operator):
    with pytest.raises(ValueError, match=r"needs at least one entry; v\['w'\] has shape \(2, 0\); no sphere"):
        operator({"w": jnp.zeros((2, 0))})
    assert operator({}) == {}


# ---- many derivatives ----------------------------------------------------------------------------------------------


def nth(operator, order):
    def along(a):
        return jnp.sum(operator(jnp.diag(jnp.array([1.0, 1.0, -2.0])) + a * jnp.ones((3, 3))))

    for _ in range(order):
        along = jax.grad(along)
    return along


@pytest.mark.parametrize(
    ("operator", "name"), [(prox.psd_cone, "psd_cone"), (lambda v: prox.nuclear(v, 0.5), "nuclear")]
)
def test_third_derivatives_of_spectra_are_refused(operator, name):
    assert np.isfinite(jax.jit(nth(operator, 2))(0.0))
    with pytest.raises(NotImplementedError, match=f"prox.{name}: third derivatives are not defined"):
        jax.eval_shape(nth(operator, 3), 0.0)


# ---- the calculus --------------------------------------------------------------------------------------------------


def test_separable_hands_no_parameter_on_by_default():
    both = prox.separable({"a": prox.non_negative, "b": prox.identity})
    y = both({"a": jnp.array([-1.0]), "b": jnp.array([-1.0])})
    assert (y["a"][0], y["b"][0]) == (0, -1)


def test_moreau_envelope_of_what_is_closed_over():
    v, scale = jnp.array([3.0, -0.5, 0.2]), jnp.array([1.0, 2.0, 0.5])

    def closed(v, lam):
        count = jnp.asarray(lam > 0, int)  # a whole number that is traced
        return prox.moreau_envelope(
            lambda x, _: lam * count.astype(x.dtype) * jnp.sum(jnp.abs(x)), lambda v, _, s: prox.l1(v, lam, s)
        )(v, None, 0.7)

    def exact(v, lam):
        size = jnp.abs(v)
        return jnp.sum(jnp.where(size > 0.7 * lam, lam * size - 0.7 * lam**2 / 2, size**2 / 1.4))

    def orders(envelope):
        by = (0, 1)
        swept = jax.vmap(jax.grad(envelope, 1), (0, None))(jnp.outer(scale, v), 1.0)
        scanned = jax.grad(
            lambda lam: jax.lax.scan(lambda c, k: (c + k * jax.grad(envelope, 1)(v, c * lam), None), lam, scale)[0]
        )(1.1)
        return envelope(v, 1.0), jax.grad(envelope, by)(v, 1.0), jax.hessian(envelope, by)(v, 1.0), swept, scanned

    def compare(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)

    jax.tree.map(compare, *jax.jit(lambda: (orders(closed), orders(exact)))())


def test_calculus_takes_steps_of_each_part():
    v = {"a": jnp.array([3.0, -0.5]), "b": jnp.array([2.0])}
    steps = {"a": 0.5, "b": 2}
    conjugate = prox.conjugate(prox.ridge)
    y = conjugate(v, 2.0, steps)
    for name, step in steps.items():
        np.testing.assert_allclose(y[name], conjugate(v[name], 2.0, step), rtol=1e-15)
        np.testing.assert_allclose(y[name], v[name] / (1 + step / 2), rtol=1e-15)
    with pytest.raises(ValueError, match=r"step_size must lie in \(0, inf\)"):
        conjugate(v, 2.0, {"a": 0.5, "b": 0.0})
    scaled = prox.scale(prox.l1, 0.5)(v, 2.0, steps)
    np.testing.assert_allclose(scaled["a"], prox.l1(v["a"], 1.0, 0.5), rtol=1e-15)
    np.testing.assert_allclose(scaled["b"], prox.l1(v["b"], 1.0, 2), rtol=1e-15)
