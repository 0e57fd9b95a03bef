"""DARTS' difference, the rank-one Hessian and BDA against NumPy, and what theory says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl

h = odl.hypergradients

H = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.8]])
J = np.array([[0.5, -0.3], [0.2, 0.4], [-0.6, 0.1]])
C = np.array([[0.3, 0.0], [-0.2, 0.5], [0.1, 0.2]])
c = np.array([1.0, -0.5, 0.7])
STEP, RATE = 0.35, 0.15
START, THETA = np.array([0.3, -0.2, 0.5]), np.array([0.6, -0.4])


def inner(x, theta):
    """Not quadratic in theta and x together: 0.1 theta_0^2 |x|^2 / 2 + theta_1 sum(x^3) / 30 beside the quadratic."""
    bent = 0.05 * theta[0] ** 2 * jnp.sum(x**2) + theta[1] * jnp.sum(x**3) / 30
    return 0.5 * jnp.dot(x, jnp.asarray(H) @ x) + jnp.dot(x, jnp.asarray(J) @ theta) + bent


def outer(x, theta):
    return 0.5 * jnp.sum((x - c) ** 2) + 0.5 * jnp.sum(theta**2) + jnp.dot(x, jnp.asarray(C) @ theta)


def f_x(x, w):
    return H @ x + J @ w + 0.1 * w[0] ** 2 * x + w[1] * x**2 / 10


def f_w(x, w):
    return J.T @ x + np.array([0.1 * w[0] * x @ x, np.sum(x**3) / 30])


def f_xx(x, w):
    return H + 0.1 * w[0] ** 2 * np.eye(3) + np.diag(w[1] * x / 5)


def f_xw(x, w):
    return J + np.stack([0.2 * w[0] * x, x**2 / 10], axis=1)


def F_x(x, w):
    return x - c + C @ w


def F_w(x, w):
    return w + C.T @ x


def run(hyper, theta=THETA, x0=START, num_updates=20, rate=RATE):
    """The gradients and inner iterates of SGD."""

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state)
        return (theta - rate * gradient, state), (gradient, info.x, info.inner_residual)

    theta, x0 = jnp.asarray(theta), jnp.asarray(x0)
    return jax.jit(lambda: jax.lax.scan(body, (theta, hyper.init(theta, x0)), length=num_updates)[1])()


def by_hand(update, num_updates=20, rate=RATE):
    x, w, rows = START, THETA, []
    for t in range(num_updates):
        gradient, x, residual = update(x, w, t)
        rows.append((gradient, x, residual))
        w = w - rate * gradient
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_finite_difference_against_numpy(num_steps):
    step = lambda k: STEP / (1 + 0.1 * k)
    radius = lambda t: 0.05 / (1 + t)

    def update(y, w, t):
        for k in range(num_steps - 1):
            y = y - step(k) * f_x(y, w)
        s = step(num_steps - 1)
        x = y - s * f_x(y, w)
        v = F_x(x, w)
        e = radius(t) / np.linalg.norm(v)
        gradient = F_w(x, w) - s * (f_w(y + e * v, w) - f_w(y - e * v, w)) / (2 * e)
        return gradient, x, np.linalg.norm(f_x(y, w))

    hyper = h.finite_difference(
        inner,
        outer,
        step_size=lambda k: step(k.astype(float)),
        num_steps=num_steps,
        radius=lambda count: radius(count.astype(float)),
    )
    assert_same(run(hyper), by_hand(update))


def test_finite_difference_tends_to_the_last_step_of_the_unrolled_gradient():
    """At the rate of the square of the radius; with nothing to pass on it passes nothing on."""
    theta, x0 = jnp.asarray(THETA), jnp.asarray(START)
    last = odl.truncated(odl.for_steps(odl.gradient_descent(inner, STEP), 3), num_steps=1)
    exact = h.through(last, outer).update(theta, h.through(last, outer).init(theta, x0))[0]

    @jax.jit
    def miss(radius):
        hyper = h.finite_difference(inner, outer, step_size=STEP, num_steps=3, radius=radius)
        return hyper.update(theta, hyper.init(theta, x0))[0] - exact

    errors = [float(jnp.abs(miss(radius)).max()) for radius in (0.4, 0.2, 0.1)]
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=1e-6)
    np.testing.assert_allclose(errors[1] / errors[2], 4, rtol=1e-6)
    idle = h.finite_difference(inner, lambda x, theta: jnp.sum(theta**2), step_size=STEP)
    gradient, _, info = idle.update(theta, idle.init(theta, x0))
    np.testing.assert_array_equal(gradient, 2 * theta)
    assert int(info.status) == odl.Status.COMPLETED


@pytest.mark.parametrize("num_steps", [1, 3])
def test_rank_one_against_numpy(num_steps):
    def update(x, w, t):
        for _ in range(num_steps):
            x = x - STEP * f_x(x, w)
        slope = f_x(x, w)
        gradient = F_w(x, w) - (F_x(x, w) @ slope) / (slope @ slope) * f_w(x, w)
        return gradient, x, np.linalg.norm(slope)

    rate = 0.003  # the least value of f depends on theta: the gradient is large, see below
    ours = run(h.rank_one(inner, outer, step_size=STEP, num_steps=num_steps), rate=rate)
    assert_same(ours, by_hand(update, rate=rate))


def test_rank_one_is_exact_in_one_dimension_and_falls_silent_at_the_solution():
    solution = lambda theta: jnp.sin(theta[0]) + theta[1] ** 2
    f = lambda x, theta: jnp.cosh(x - solution(theta)) - 1.0
    F = lambda x, theta: 0.5 * (x - 1.0) ** 2 + 0.5 * jnp.sum(theta**2)
    theta = jnp.asarray([0.3, 0.8])
    hyper = h.rank_one(f, F, step_size=0.3)
    gradient, _, info = hyper.update(theta, hyper.init(theta, 3.0))
    x = float(info.x)
    expected = theta + (x - 1.0) * jax.grad(solution)(theta)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    # At the solution 0/0: the term is left out, and the residual says so.
    gradient, _, info = hyper.update(theta, hyper.init(theta, solution(theta)))
    np.testing.assert_array_equal(gradient, theta)
    assert float(info.inner_residual) == 0.0
    assert int(info.status) == odl.Status.COMPLETED
    # The least value of f moves with theta: nothing cancels, and the gradient grows as f is solved.
    floating = h.rank_one(lambda x, theta: f(x, theta) + theta[0], F, step_size=0.3, num_steps=20)
    assert float(jnp.abs(floating.update(theta, floating.init(theta, 3.0))[0][0])) > 10


def test_bda_against_numpy():
    """The gradient through the steps by the forward recursion of dx/dtheta, with coefficients that decay."""
    alpha, s, gamma = (lambda k: 0.4 * 0.8**k), (lambda k: 0.3 / (k + 1)), (lambda k: STEP / (1 + 0.1 * k))
    K = 5

    def update(x, w, t):
        D = np.zeros((3, 2))
        for k in range(K):
            a, b = alpha(k) * s(k), (1 - alpha(k)) * gamma(k)
            D = D - a * (D + C) - b * (f_xx(x, w) @ D + f_xw(x, w))
            x = x - a * F_x(x, w) - b * f_x(x, w)
        return F_w(x, w) + D.T @ F_x(x, w), x, np.linalg.norm(f_x(x, w))

    options = {
        "num_steps": K,
        "step_size": lambda k: gamma(k.astype(float)),
        "outer_step_size": lambda k: s(k.astype(float)),
        "weight": lambda k: alpha(k.astype(float)),
    }
    warm = run(h.bda(inner, outer, warm_start=True, **options))
    assert_same(warm, by_hand(update))
    cold = run(h.bda(inner, outer, checkpoint_every=2, **options))
    assert_same(cold, by_hand(lambda x, w, t: update(START, w, t)))


def test_bda_is_hodl_on_a_gradient_step():
    problem = odl.problems.p_c(1.0)
    descent = odl.gradient_descent(problem.objective, 0.5)
    weight, step = (lambda k: 0.5 / (k.astype(float) + 1)), (lambda k: 1 / (k.astype(float) + 2))
    ours = h.bda(problem.objective, problem.outer, num_steps=40, step_size=0.5, outer_step_size=step)
    theirs = h.hodl(descent, problem.outer, num_steps=40, relaxation=1.0, weight=weight, step_size=step)
    a, b = (hyper.update(problem.theta, hyper.init(problem.theta, problem.x0)) for hyper in (ours, theirs))
    np.testing.assert_allclose(a[0], b[0], atol=1e-14)
    np.testing.assert_allclose(a[2].x, b[2].x, atol=1e-14)
    # Without a step of its own the outer loss is descended with 1/L, and this one has L = 1.
    ours = h.bda(problem.objective, problem.outer, num_steps=40, step_size=0.5, weight=0.3)
    theirs = h.hodl(descent, problem.outer, num_steps=40, relaxation=1.0, weight=0.3, step_size=1.0)
    a, b = (hyper.update(problem.theta, hyper.init(problem.theta, problem.x0)) for hyper in (ours, theirs))
    np.testing.assert_allclose(a[0], b[0], atol=1e-14)


def test_bda_with_a_learned_start():
    problem = odl.problems.p_c(1.0)
    theta = {"w": jnp.asarray(0.5), "u": problem.x0}
    below = lambda u, theta: problem.objective(u, theta["w"])
    above = lambda u, theta: problem.outer(u, theta["w"])
    hyper = h.bda(below, above, num_steps=4, step_size=0.5, start=lambda theta: theta["u"])
    fixed = h.bda(problem.objective, problem.outer, num_steps=4, step_size=0.5)
    gradient = hyper.update(theta, hyper.init(theta, None))[0]
    np.testing.assert_allclose(
        gradient["w"], fixed.update(theta["w"], fixed.init(theta["w"], problem.x0))[0], atol=1e-14
    )
    assert float(jnp.abs(gradient["u"]).min()) > 1e-4
    with pytest.raises(ValueError, match="both came"):
        h.bda(below, above, num_steps=4, step_size=0.5, start=lambda theta: theta["u"], warm_start=True)
    with pytest.raises(ValueError, match="bda: weight must lie in"):
        h.bda(below, above, num_steps=4, step_size=0.5, weight=1.0)
