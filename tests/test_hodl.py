"""HODL against exact minimisers, against NumPy, and against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import odljax as odl

hodl = odl.hypergradients.hodl


def affine_root(gradient):
    """Where a gradient that is affine in w vanishes."""
    at_zero, at_one = gradient(jnp.asarray(0.0)), gradient(jnp.asarray(1.0))
    return float(-at_zero / (at_one - at_zero))


def phi_minimiser(num_steps):
    """The minimiser of phi_K that the library's gradient points to, as a function of numbers: one compilation a K."""

    @jax.jit
    def gradient(w, c, weight, scale, power):
        problem = odl.problems.p_c(1.0)
        outer = lambda u, w: problem.outer(u, w) + 0.5 * (c - 1) * w**2
        schedule = lambda k: scale / (k.astype(float) + 1) ** power
        hyper = hodl(problem.T, outer, num_steps=num_steps, relaxation=0.5, weight=weight, step_size=schedule)
        return hyper.update(w, hyper.init(w, problem.x0))[0]

    return lambda *numbers: affine_root(lambda w: gradient(w, *map(jnp.asarray, numbers)))


@pytest.mark.parametrize("num_steps", [1, 10, 100, 1000])
def test_the_minimiser_of_phi_is_exact(num_steps):
    minimiser = phi_minimiser(num_steps)
    for c in (0.0, 1.0):
        for weight in (0.0, 0.3, 0.5, 0.8):
            for scale, power in ((0.5, 0.0), (1.0, 1.0), (0.7, 0.5), (1.0, 0.75)):
                expected = odl.problems.p_c_minimiser(
                    c, num_steps, weight=weight, step_size=lambda k: scale / (k + 1) ** power
                )
                assert minimiser(c, weight, scale, power) == pytest.approx(expected, abs=1e-9)


def test_an_optax_loop_ends_at_the_minimiser():
    problem = odl.problems.p_c(1.0)
    hyper = hodl(problem.T, problem.outer, num_steps=100)
    tx = optax.sgd(0.3, momentum=0.5)

    @jax.jit
    def update(w, state, opt_state):
        gradient, state, info = hyper.update(w, state)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(w, updates), state, opt_state, info

    w = problem.theta
    state, opt_state, changes = hyper.init(w, problem.x0), tx.init(w), []
    for _ in range(100):
        w, state, opt_state, info = update(w, state, opt_state)
        changes.append(float(info.outer_change))
    assert float(w) == pytest.approx(odl.problems.p_c_minimiser(1.0, 100), abs=1e-6)
    # Joint convergence: the outer walk comes to rest, the inner residual falls along k.
    assert np.isinf(changes[0])
    assert changes[-1] < 1e-6 < changes[1]
    residual = np.asarray(info.history.residual)
    assert residual.shape == (100,)
    assert info.inner_residual < residual[-1] < 0.1 * residual[0]
    assert odl.Status(int(info.status)) is odl.Status.COMPLETED


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_limits(c):
    """The simple variant ends at the wrong point whatever K; aggregation approaches the truth as K grows."""
    truth, start = 1 / (1 + c), 0.01
    wrong = (1 + start) / (2 + c)
    assert phi_minimiser(100)(c, 0.0, 1.0, 1.0) == pytest.approx(wrong, abs=1e-9)
    assert abs(wrong - truth) > 0.1
    errors = [abs(phi_minimiser(K)(c, 0.5, 1.0, 1.0) - truth) for K in (10, 100, 1000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    if c == 1.0:  # a constant step balances inner and outer loss for ever
        r = 0.25 / (0.25 + 0.5)
        assert phi_minimiser(1000)(c, 0.5, 0.5, 0.0) == pytest.approx(r**2 / (1 + r**2), abs=1e-9)


def numpy_phi(theta, K, alpha, mu, s, u0):
    """The algorithm once more, by hand: a metric that depends on theta, a projection on a hyperplane in that metric."""
    A = np.array([[2.0, 0.3], [0.3, 1.0]])
    G = np.array([[1.5 + theta[0] ** 2, 0.4], [0.4, 1.0 + np.exp(theta[1])]])
    inverse, normal, level = np.linalg.inv(G), np.array([1.0, -0.5]), 0.3
    u = u0
    for k in range(K):
        D = u - inverse @ (A @ u - theta)
        lower = u + alpha(theta, k) * (D - u)
        upper = u - s(theta, k) * inverse @ (u - np.array([1.0, 2.0]) + 0.1 * theta)
        v = mu(theta, k) * upper + (1 - mu(theta, k)) * lower
        u = v - inverse @ normal * (normal @ v - level) / (normal @ inverse @ normal)
    return 0.5 * np.sum((u - np.array([1.0, 2.0]) + 0.1 * theta) ** 2) + 0.05 * theta @ theta, u


@pytest.mark.parametrize("metric", ["given inverse", "operator's inverse", "conjugate gradients"])
def test_metric_projection_and_coefficients_against_numpy(metric):
    alpha = lambda theta, k: 0.4 + 0.1 * theta[0]
    mu = lambda theta, k: 0.5 / (k + 1.0) ** 0.5
    s = lambda theta, k: (0.3 + 0.1 * theta[1] ** 2) / (k + 1.0)
    theta, u0 = np.array([0.4, -0.3]), np.array([0.2, -0.7])
    A, target = jnp.asarray([[2.0, 0.3], [0.3, 1.0]]), jnp.asarray([1.0, 2.0])
    normal, level = jnp.asarray([1.0, -0.5]), 0.3

    def G(theta):
        return jnp.asarray([[1.5, 0.4], [0.4, 1.0]]) + jnp.diag(jnp.stack([theta[0] ** 2, jnp.exp(theta[1])]))

    inverse = lambda v, theta: jnp.linalg.solve(G(theta), v)
    operator = odl.Operator(
        lambda u, theta: u - inverse(A @ u - theta, theta),
        metric=lambda v, theta: G(theta) @ v,
        metric_inverse=inverse if metric == "operator's inverse" else None,
    )
    hyper = hodl(
        operator,
        lambda u, theta: 0.5 * jnp.sum((u - target + 0.1 * theta) ** 2) + 0.05 * jnp.sum(theta**2),
        num_steps=7,
        relaxation=lambda theta: alpha(theta, 0),
        weight=lambda k: mu(None, k.astype(float)),
        step_size=lambda theta, k: s(theta, k.astype(float)),
        metric_inverse=inverse if metric == "given inverse" else None,
        projection=lambda v, theta: (
            v - inverse(normal, theta) * (normal @ v - level) / (normal @ inverse(normal, theta))
        ),
    )
    gradient, _, info = jax.jit(lambda t, u: hyper.update(t, hyper.init(t, u)))(jnp.asarray(theta), jnp.asarray(u0))
    value, u = numpy_phi(theta, 7, alpha, mu, s, u0)
    np.testing.assert_allclose(info.value, value, atol=1e-12)
    np.testing.assert_allclose(info.x, u, atol=1e-12)
    h = 1e-3
    for i, direction in enumerate(np.eye(2)):
        at = [numpy_phi(theta + m * h * direction, 7, alpha, mu, s, u0)[0] for m in (-2, -1, 1, 2)]
        np.testing.assert_allclose(gradient[i], (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h), atol=1e-9)


def test_the_inner_residual_is_that_of_the_base_operator():
    problem = odl.problems.p_c(1.0)
    hyper = hodl(problem.T, problem.outer, num_steps=5)
    _, _, info = hyper.update(problem.theta, hyper.init(problem.theta, problem.x0))
    u = np.asarray(problem.x0)
    for k in range(5):
        D = np.asarray(problem.T(jnp.asarray(u), problem.theta))
        np.testing.assert_allclose(info.history.residual[k], np.linalg.norm(u - D), atol=1e-14)
        slope = np.asarray(jax.grad(problem.outer)(jnp.asarray(u), problem.theta))
        u = 0.5 * (u - slope / (k + 1)) + 0.5 * (u + 0.5 * (D - u))
    np.testing.assert_allclose(info.x, u, atol=1e-14)
    np.testing.assert_allclose(
        info.inner_residual, np.linalg.norm(u - np.asarray(problem.T(jnp.asarray(u), problem.theta))), atol=1e-14
    )


def test_a_coefficient_may_be_a_number_a_schedule_or_a_function_of_theta():
    problem = odl.problems.p_c(0.5, copies=3)
    theta = jnp.asarray([0.2, 0.4, 0.6])

    def gradient(**coefficients):
        hyper = hodl(problem.T, problem.outer, num_steps=4, **coefficients)
        return hyper.update(theta, hyper.init(theta, problem.x0))[0]

    plain = gradient(relaxation=0.4, weight=0.25, step_size=0.1)
    for constant in (
        {"relaxation": lambda k: 0.4, "weight": lambda k: 0.25, "step_size": optax.constant_schedule(0.1)},
        {"relaxation": lambda theta: jnp.asarray(0.4), "weight": jnp.asarray(0.25), "step_size": np.float32(0.1)},
        {"relaxation": lambda theta, k: 0.4, "weight": np.float64(0.25), "step_size": lambda theta, k: 0.1},
    ):
        np.testing.assert_allclose(gradient(**constant), plain, atol=1e-8)
    # A coefficient that depends on theta contributes to the gradient.
    assert not np.allclose(gradient(relaxation=0.4, weight=0.25, step_size=lambda theta: jnp.mean(theta) / 4), plain)


def test_an_iteration_takes_the_place_of_the_operator_and_weight_zero_is_plain_unrolling():
    problem = odl.problems.ridge()
    iteration = odl.nesterov(odl.gradient_descent(problem.objective, problem.step_size))
    simple = hodl(iteration, problem.outer, num_steps=12, relaxation=0.7, weight=0.0)
    plain = odl.unrolled(odl.for_steps(odl.krasnoselskii_mann(iteration, 0.7), 12))
    gradient, _, info = simple.update(problem.theta, simple.init(problem.theta, problem.x0))
    expected = jax.grad(lambda theta: problem.outer(plain(problem.x0, theta).x, theta))(problem.theta)
    np.testing.assert_allclose(gradient, expected, atol=1e-14)
    zero = hodl(iteration, problem.outer, num_steps=12, relaxation=0.7, weight=jnp.asarray(0.0))
    np.testing.assert_allclose(
        zero.update(problem.theta, zero.init(problem.theta, problem.x0))[0], gradient, atol=1e-14
    )
    assert info.history.residual.shape == (12,)


def test_checkpointing_changes_nothing_and_a_warm_start_goes_on():
    problem = odl.problems.p_c(1.0)
    plain = hodl(problem.T, problem.outer, num_steps=10)
    segments = hodl(problem.T, problem.outer, num_steps=10, checkpoint_every=3)
    state = plain.init(problem.theta, problem.x0)
    np.testing.assert_allclose(
        segments.update(problem.theta, state)[0], plain.update(problem.theta, state)[0], atol=1e-14
    )
    warm = hodl(problem.T, problem.outer, num_steps=10, warm_start=True)
    _, state, info = warm.update(problem.theta, warm.init(problem.theta, problem.x0))
    np.testing.assert_array_equal(state.x, info.x)
    _, _, further = warm.update(problem.theta, state)
    assert further.history.residual[0] == info.inner_residual


@pytest.mark.parametrize("name", ["hodl", "bda"])
def test_a_warm_start_keeps_the_last_finite_iterate(name):
    problem = odl.problems.p_c(1.0)
    if name == "hodl":
        hyper = hodl(problem.T, problem.outer, num_steps=4, warm_start=True)
    else:
        hyper = odl.hypergradients.bda(problem.objective, problem.outer, num_steps=4, step_size=0.5, warm_start=True)
    start = hyper.init(problem.theta, problem.x0)
    _, state, info = hyper.update(jnp.asarray(jnp.nan), start)
    assert int(info.status) == odl.Status.NON_FINITE
    np.testing.assert_array_equal(state.x, problem.x0)
    _, after, info = hyper.update(problem.theta, state)
    np.testing.assert_array_equal(after.x, info.x)
    assert np.isfinite(after.x).all()


@pytest.mark.parametrize("name", ["hodl", "bda"])
def test_the_default_step_knows_the_units_of_the_outer_loss(name):
    """A mean is a sum: c, and the answer, have nothing to do with each other."""
    problem = odl.problems.p_c(1.0)

    def update(w, c, **options):
        outer = lambda u, w: c * problem.outer(u, w)
        if name == "hodl":
            hyper = hodl(problem.T, outer, num_steps=100, **options)
        else:
            hyper = odl.hypergradients.bda(problem.objective, outer, num_steps=100, step_size=0.25, **options)
        gradient, _, info = hyper.update(w, hyper.init(w, problem.x0))
        return gradient / c, info.x

    batched = jax.jit(jax.vmap(update))
    w, c = jnp.meshgrid(jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 1e-3, 1e3, 1e-30, 1e30]), indexing="ij")
    gradients, x = batched(w.ravel(), c.ravel())
    gradients, x = gradients.reshape(2, -1), x.reshape(2, 5, 2)
    np.testing.assert_allclose(gradients, np.repeat(gradients[:, :1], 5, 1), rtol=1e-9)
    np.testing.assert_allclose(x, np.repeat(x[:, :1], 5, 1), rtol=1e-9)
    roots = -gradients[0] / (gradients[1] - gradients[0])
    if name == "hodl":
        np.testing.assert_allclose(roots, odl.problems.p_c_minimiser(1.0, 100), rtol=1e-9)  # L = 1
    assert (abs(roots - 0.5) < 0.03).all()  # the simple variant ends at 0.337


def test_the_default_step_is_the_inverse_lipschitz_constant_in_the_metric():
    """One step from u_0 against NumPy: eigenvalues of G^-1 H; a linear outer loss moves as far as the inner step."""
    H, G = np.diag([1.0, 4.0, 9.0]), np.diag([2.0, 1.0, 30.0])
    D = lambda u, theta: 0.5 * u + theta
    u0, slope = np.array([1.0, -2.0, 0.5]), np.array([3.0, -1.0, 2.0])
    below = 0.5 * u0 + 0.3

    def end(outer, inverse=None):
        hyper = hodl(D, outer, num_steps=1, relaxation=1.0, metric_inverse=inverse)
        gradient, _, info = hyper.update(0.3, hyper.init(0.3, jnp.asarray(u0)))
        assert np.isfinite(gradient)
        return np.asarray(info.x)

    quadratic = lambda u, theta: 0.5 * u @ (H @ u)
    for metric, inverse in ((np.eye(3), None), (G, lambda v, theta: v / jnp.diag(G))):
        operator = np.linalg.solve(metric, H)
        size = 1 / np.abs(np.linalg.eigvals(operator)).max()
        np.testing.assert_allclose(end(quadratic, inverse), 0.5 * (u0 - size * operator @ u0) + 0.5 * below, rtol=1e-3)
    size = np.linalg.norm(u0 - below) / np.linalg.norm(slope)
    for c in (1.0, 1e-9):
        np.testing.assert_allclose(
            end(lambda u, theta, c=c: c * (slope @ u)), 0.5 * (u0 - size * slope) + 0.5 * below, rtol=1e-9
        )
    np.testing.assert_array_equal(end(lambda u, theta: theta), 0.5 * u0 + 0.5 * below)


def test_data_reaches_the_outer_loss_and_its_aggregation():
    problem = odl.problems.p_c(1.0)
    outer = lambda u, w, shift: problem.outer(u, w) + jnp.sum(shift * u)
    hyper = hodl(problem.T, outer, num_steps=6)
    shift = jnp.asarray([0.3, -0.2])
    closed_over = hodl(problem.T, lambda u, w: outer(u, w, shift), num_steps=6)
    state = hyper.init(problem.theta, problem.x0)
    a, b = hyper.update(problem.theta, state, shift)[0], closed_over.update(problem.theta, state)[0]
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        jax.vmap(lambda s: hyper.update(problem.theta, state, s)[0])(jnp.stack([shift, shift]))[1], a, atol=1e-14
    )
