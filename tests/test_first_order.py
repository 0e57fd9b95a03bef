"""Value functions, envelopes, multipliers and the baseline: each against NumPy, and what its theory promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import config

import odljax as odl
from odljax import hypergradients as h

# f = x'Hx/2 - x'B theta + sum x^4 / 40, F = |x - c|^2/2 + |theta|^2/2 + x'D theta
H = np.array([[1.2, 0.3], [0.3, 0.7]])
B = np.array([[0.8, -0.4, 0.3], [0.1, 0.6, -0.5]])
D = np.array([[0.2, 0.1, -0.3], [-0.1, 0.4, 0.2]])
C = np.array([0.9, -0.6])
X0, THETA0 = np.array([0.5, -0.3]), np.array([0.4, -0.2, 0.7])
A, RATE, STEPS = 0.3, 0.1, 20


def inner(x, w):
    return 0.5 * x @ jnp.asarray(H) @ x - x @ jnp.asarray(B) @ w + jnp.sum(x**4) / 40


def outer(x, w):
    return 0.5 * jnp.sum((x - C) ** 2) + 0.5 * jnp.sum(w**2) + x @ jnp.asarray(D) @ w


f = lambda x, w: 0.5 * x @ H @ x - x @ B @ w + np.sum(x**4) / 40
f_x = lambda x, w: H @ x - B @ w + x**3 / 10
f_w = lambda x, w: -B.T @ x
f_xx = lambda x: H + np.diag(3 * x**2 / 10)
F = lambda x, w: 0.5 * np.sum((x - C) ** 2) + 0.5 * np.sum(w**2) + x @ D @ w
F_x = lambda x, w: x - C + D @ w
F_w = lambda x, w: w + D.T @ x
ball = lambda x, radius: x / max(1.0, np.linalg.norm(x) / radius)
jax_ball = lambda x, w: odl.prox.l2_ball(x, 0.45)


def walked(x, w, num_steps, step, project=lambda x: x):
    for _ in range(num_steps):
        x = project(x - step * f_x(x, w))
    return x


# Each reference: (theta, memory, k) -> (gradient, memory), the memory's first entry being x.


def alternating(w, m, k):
    (x,) = m
    x = walked(x, w, 2, A)
    return F_w(x, w), (x,)


def bamm(w, m, k):
    x, v = m
    mu, eta = 0.9 / (k + 1) ** 0.1, A * (k + 1) ** (-1 / 80)
    g = F_w(x, w) - (mu * D.T @ v - (1 - mu) * B.T @ v)
    hessian = mu * np.eye(2) + (1 - mu) * f_xx(x)
    return g, (x - A * (mu * F_x(x, w) + (1 - mu) * f_x(x, w)), v - eta * (hessian @ v - F_x(x, w)))


def bvfsm(w, m, k):
    x, z = m
    sigma, delta, reg, t = 0.3 / (k + 1) ** 0.5, 1 / (k + 1), 0.01 / (k + 1), 0.01 / (k + 1)
    for _ in range(6):
        z = z - A * (f_x(z, w) + 2 * reg * z)
    best = f(z, w) + reg * z @ z

    def whole(x):
        gap = best - f(x, w) + delta
        return F(x, w) - sigma * np.log(gap) + t * x @ x if gap > 0 else np.inf

    enough = 0 if best - f(x, w) + delta > 0 else delta / 2
    for _ in range(6):
        if best - f(x, w) + delta <= enough:
            x = x - A * f_x(x, w)
    if best - f(x, w) + delta <= 0:
        x = z
    for _ in range(4):
        gap = best - f(x, w) + delta
        slope = F_x(x, w) + sigma / gap * f_x(x, w) + 2 * t * x
        for i in range(31):
            new = x - A * 0.5**i * slope
            if whole(new) <= whole(x) + 1e-4 * slope @ (new - x):
                x = new
                break
    return F_w(x, w) + sigma / (best - f(x, w) + delta) * (f_w(x, w) - f_w(z, w)), (x, z)


def bome(barrier):
    def step(w, m, k):
        (x,) = m
        end = walked(x, w, 3, 0.2)
        q = np.concatenate([f_x(x, w), f_w(x, w) - f_w(end, w)])
        slope = np.concatenate([F_x(x, w), F_w(x, w)])
        p = 0.5 * (q @ q if barrier == "gradient_norm" else f(x, w) - f(end, w))
        d = slope + max(p - slope @ q, 0) / (q @ q) * q
        return d[2:], (x - A * d[:2],)

    return step


def pbgd_gap(w, m, k):
    x, end = m
    gamma = np.sqrt(k + 1)
    end = walked(end, w, 3, 0.2)
    g = F_w(x, w) + gamma * (f_w(x, w) - f_w(end, w))
    return g, (x - A / (1 + gamma) * (F_x(x, w) + gamma * f_x(x, w)), end)


def pbgd_norm(w, m, k):
    (x,) = m
    gamma, s = np.sqrt(k + 1), f_x(x, w)
    g = F_w(x, w) - 2 * gamma * B.T @ s
    return g, (x - A / (1 + gamma) * (F_x(x, w) + 2 * gamma * f_xx(x) @ s),)


def l1(x, w, size):
    """The prox of exp(w[0]) |x|_1 / 5."""
    level = size * np.exp(w[0]) / 5
    return np.sign(x) * np.maximum(np.abs(x) - level, 0)


def meha(w, m, k):
    x, p = m
    c, gamma = (k + 1) ** 0.25, 0.8
    p = l1(p - 0.2 * (f_x(p, w) + (p - x) / gamma), w, 0.2)
    h_w = lambda x: np.array([np.exp(w[0]) / 5 * np.abs(x).sum(), 0, 0])
    g = F_w(x, w) / c + f_w(x, w) + h_w(x) - f_w(p, w) - h_w(p)
    return g, (l1(x - A * (F_x(x, w) / c + f_x(x, w) - (x - p) / gamma), w, A), p)


E = np.array([[0.5, -1.0, 0.2]])


def levels(x, w):
    """x1^2 + x2 + E w <= 0.2"""
    return np.array([x[0] ** 2 + x[1] - 0.2]) + E @ w


def gap_function(w, m, k):
    x, p, z = m
    c, g1, g2 = (k + 1) ** 0.25, 0.8, 0.6
    slope = lambda x: np.array([[2 * x[0], 1.0]]).T
    p = ball(p - 0.2 * (f_x(p, w) + slope(p) @ z + (p - x) / g1), 0.45)
    lam = np.maximum(z + g2 * levels(x, w), 0)
    g = F_w(x, w) / c + f_w(x, w) + E.T @ lam - f_w(p, w) - E.T @ z
    new = ball(x - A * (F_x(x, w) / c + f_x(x, w) + slope(x) @ lam - (x - p) / g1), 0.45)
    return g, (new, p, np.clip(z - 0.4 * ((lam - z) / g2 - levels(p, w)), 0, 2.0))


def jax_levels(x, w):
    return x[:1] ** 2 + x[1:] - 0.2 + jnp.asarray(E) @ w


def gap_residual(x, w, m):
    """The gradient mapping in x of the Lagrangian, under the ball."""
    slope = f_x(x, w) + np.array([2 * x[0], 1.0]) * np.maximum(m[2] + 0.6 * levels(x, w), 0)
    return np.linalg.norm(x - ball(x - A * slope, 0.45)) / A


def bamm_residual(x, w, m, k):
    """The misfit of the aggregated adjoint system over its right side."""
    mu = 0.9 / (k + 1) ** 0.1
    hessian = mu * np.eye(2) + (1 - mu) * f_xx(x)
    return np.linalg.norm(hessian @ m[1] - F_x(x, w)) / np.linalg.norm(F_x(x, w))


PAIRS = {
    "alternating": (h.alternating(inner, outer, step_size=A, num_steps=2), alternating, (X0,)),
    "bamm": (h.bamm(inner, outer, step_size=A), bamm, (X0, 0 * X0)),
    "bvfsm": (h.bvfsm(inner, outer, step_size=A, num_steps=6, num_barrier_steps=4), bvfsm, (X0, X0)),
    "bome": (h.bome(inner, outer, step_size=A, inner_step_size=0.2, num_steps=3), bome("gradient_norm"), (X0,)),
    "bome, value gap": (
        h.bome(inner, outer, step_size=A, inner_step_size=0.2, num_steps=3, barrier="value_gap"),
        bome("value_gap"),
        (X0,),
    ),
    "pbgd": (h.pbgd(inner, outer, step_size=A, inner_step_size=0.2, num_steps=3), pbgd_gap, (X0,)),
    "pbgd, warm": (
        h.pbgd(inner, outer, step_size=A, inner_step_size=0.2, num_steps=3, warm_start=True),
        pbgd_gap,
        (X0, X0),
    ),
    "pbgd, gradient norm": (h.pbgd(inner, outer, step_size=A, form="gradient_norm"), pbgd_norm, (X0,)),
    "meha": (
        h.meha(
            inner,
            outer,
            step_size=A,
            proximal_step_size=0.2,
            smoothing=0.8,
            prox=lambda v, w, size: odl.prox.l1(v, jnp.exp(w[0]) / 5, size),
            nonsmooth=lambda x, w: jnp.exp(w[0]) / 5 * jnp.sum(jnp.abs(x)),
        ),
        meha,
        (X0, X0),
    ),
    "gap_function": (
        h.gap_function(
            inner,
            outer,
            step_size=A,
            proximal_step_size=0.2,
            multiplier_step_size=0.4,
            smoothing=0.8,
            multiplier_smoothing=0.6,
            constraints=jax_levels,
            projection=jax_ball,
            multiplier_bound=2.0,
        ),
        gap_function,
        (X0, X0, np.zeros(1)),
    ),
}


def run(hyper, theta, x0, num_updates, rate, *data):
    """SGD on theta, a number or a schedule, as one compiled scan: ``(theta, state), (thetas, gradients, infos)``."""

    def body(carry, k):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *data)
        size = rate(k) if callable(rate) else rate
        new = jax.tree.map(lambda leaf, g: leaf - size * g, theta, gradient)
        return (new, state), (theta, gradient, info)

    start = jax.tree.map(jnp.asarray, (theta, x0))
    scan = lambda: jax.lax.scan(body, (start[0], hyper.init(*start, *data)), jnp.arange(num_updates))
    return jax.jit(scan)()


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_updates_equal_numpy(name):
    hyper, reference, memory = PAIRS[name]
    _, (thetas, gradients, infos) = run(hyper, THETA0, X0, STEPS, RATE)
    w, kept = THETA0, "warm" in name or "pbgd" not in name
    for k in range(STEPS):
        np.testing.assert_allclose(thetas[k], w, rtol=0, atol=1e-9)
        if not kept and name == "pbgd":
            memory = (memory[0], memory[0])  # cold: w starts at x
        before = memory
        g, memory = reference(w, memory, k)
        np.testing.assert_allclose(gradients[k], g, rtol=0, atol=1e-9)
        np.testing.assert_allclose(infos.x[k], memory[0], rtol=0, atol=1e-9)
        # Where the walk comes first, the residual is that of its end; elsewhere that of the x the update began with.
        x = (memory if name in ("alternating", "bvfsm") else before)[0]
        if name != "meha":
            residual = gap_residual(x, w, before) if name == "gap_function" else np.linalg.norm(f_x(x, w))
            np.testing.assert_allclose(infos.inner_residual[k], residual, rtol=0, atol=1e-9)
        if name == "bamm":
            np.testing.assert_allclose(infos.adjoint_residual[k], bamm_residual(x, w, before, k), rtol=1e-9)
        w = w - RATE * g
    assert int(infos.status.max()) == odl.Status.COMPLETED
    assert bool(jnp.all(jnp.isfinite(infos.inner_residual)))


# ---- theory, on f = (x - theta)^2/2 times h, F = (x - 1)^2/2 + p (theta - 2)^2/2 ---------------------------------

quadratic = lambda x, theta: 0.5 * (x - theta) ** 2
target = lambda x, theta: 0.5 * (x - 1.0) ** 2
both_targets = lambda x, theta: 0.5 * (x - 1.0) ** 2 + 0.5 * (theta - 2.0) ** 2


def settled(hyper, theta=0.2, num_updates=400):
    """The gradient once x has settled, theta held."""
    _, (_, gradients, infos) = run(hyper, theta, 0.0, num_updates, 0.0)
    return float(gradients[-1]), infos


def test_the_penalty_approaches_the_hypergradient_like_one_over_gamma():
    """With H = A = 1 the value gap gives (1 + 1/gamma)^-1 of it, the gradient norm (1 + 1/(2 gamma))^-1."""
    truth = 0.2 - 1.0
    for gamma in (1.0, 10.0, 1000.0):
        gap = lambda g: h.pbgd(quadratic, target, step_size=0.9, penalty=g, warm_start=True)
        norm = lambda g: h.pbgd(quadratic, target, step_size=0.4, penalty=g, form="gradient_norm")
        assert settled(gap(gamma))[0] == pytest.approx(truth / (1 + 1 / gamma), abs=1e-9)
        assert settled(norm(gamma))[0] == pytest.approx(truth / (1 + 1 / (2 * gamma)), abs=1e-9)
    # From x, few steps leave a bias that no penalty removes: the walk covers 1 - (1 - a)^T of the way.
    cold = h.pbgd(quadratic, target, step_size=0.9, inner_step_size=0.5, num_steps=1, penalty=1e6)
    assert settled(cold)[0] == pytest.approx(0.5 * truth, rel=1e-5)


def test_the_gradient_norm_is_no_detached_graph():
    """Detached, the gradient of the penalty in theta would vanish, and theta would stay where it is."""
    hyper = h.pbgd(quadratic, target, step_size=0.4, penalty=5.0, form="gradient_norm")
    (theta, _), _ = run(hyper, 0.0, 0.0, 1500, 0.02)
    assert float(theta) == pytest.approx(1.0, abs=1e-6)


def test_meha_and_gap_function_approach_the_hypergradient_like_one_over_c():
    """c g = (x - 1)-slope over 1 + 2/c, since f - v has curvature 1/2 for gamma = 1."""
    truth = 0.2 - 1.0
    for c in (4.0, 400.0):
        for build in (h.meha, h.gap_function):
            g, _ = settled(build(quadratic, target, step_size=0.5, penalty=c), num_updates=800)
            assert c * g == pytest.approx(truth / (1 + 2 / c), abs=1e-8)


def test_meha_differentiates_a_moving_nonsmooth_part():
    """x(theta) = max(3 - theta, 0) for f = (x - 3)^2/2 + theta |x|; its hypergradient is -(x - 1)."""
    build = lambda **o: h.meha(lambda x, t: 0.5 * (x - 3.0) ** 2, target, step_size=0.3, penalty=1e4, **o)
    hyper = build(
        prox=lambda v, theta, size: odl.prox.l1(v, theta, size), nonsmooth=lambda x, theta: theta * jnp.abs(x)
    )
    g, infos = settled(hyper, theta=0.5, num_updates=800)
    assert 1e4 * g == pytest.approx(-1.5, rel=1e-3)
    assert float(infos.inner_residual[-1]) < 1e-3
    with pytest.raises(ValueError, match="theta does not enter"):  # without it f does not move
        settled(build(), theta=0.5)
    with pytest.raises(TypeError, match="prox and nonsmooth describe the same function and come together"):
        build(prox=odl.prox.l1)
    with pytest.raises(TypeError, match="prox and projection came"):
        build(prox=odl.prox.l1, nonsmooth=lambda x, theta: 0.0, projection=lambda x, theta: x)


def test_gap_function_follows_a_constraint_that_moves():
    """min (x - 3)^2/2 subject to x <= theta: x = theta while theta < 3, so the hypergradient is theta - 1."""
    build = lambda c: h.gap_function(
        lambda x, t: 0.5 * (x - 3.0) ** 2, target, step_size=0.1, penalty=c, constraints=lambda x, theta: x - theta
    )
    hyper = build(1000.0)
    _, (_, gradients, infos) = run(hyper, 1.5, 0.0, 4000, 0.0)
    assert 1000 * float(gradients[-1]) == pytest.approx(0.5, rel=0.02)
    assert float(infos.x[-1]) == pytest.approx(1.5, abs=0.01)


def test_bome_closes_the_gap():
    """q goes to 0 with decaying steps, to a floor of the order of the step with constant ones."""
    build = lambda s: h.bome(quadratic, both_targets, step_size=s, inner_step_size=0.5)
    residual = lambda s: np.asarray(run(build(s), 0.0, 0.0, 4000, s)[1][2].inner_residual)[-50:].max()
    floors = [residual(s) for s in (0.04, 0.01)]
    assert floors[1] < 0.3 * floors[0]
    decaying = lambda k: 0.2 / jnp.sqrt(k.astype(float) + 1)
    (theta, _), (_, _, infos) = run(build(decaying), 0.0, 0.0, 4000, decaying)
    gap = 0.5 * np.asarray(infos.inner_residual) ** 2
    assert gap[-1] < 1e-4 < 1e-2 < gap[:20].max()
    assert float(theta) == pytest.approx(1.5, abs=0.01)


def test_bome_leaves_a_descent_direction_alone():
    """Where descending F shrinks q fast enough by itself, the direction is that of F: F = 3 f."""
    hyper = h.bome(quadratic, lambda x, theta: 3 * quadratic(x, theta), step_size=0.1)
    g, _, _ = hyper.update(0.3, hyper.init(0.3, 2.0))
    assert float(g) == pytest.approx(-3 * (2.0 - 0.3))


def test_the_barrier_is_on_the_gap():
    """x solves (x - 1) + sigma/gap (x - theta) = 0, gap = slack - (x - theta)^2/2, by a root of a cubic."""
    theta, sigma, slack = 0.2, 0.02, 0.08
    hyper = h.bvfsm(
        quadratic, target, step_size=0.5, num_barrier_steps=100, barrier=sigma, slack=slack, regularization=0.0,
        outer_regularization=0.0,
    )  # fmt: skip
    g, infos = settled(hyper, theta, num_updates=20)
    roots = np.roots([-0.5, 0.5 * (1 - theta), slack + sigma, -slack * (1 - theta)])
    d = next(r.real for r in roots if abs(r.imag) < 1e-12 and r.real > 0 and r.real**2 / 2 < slack)
    assert float(infos.x[-1]) == pytest.approx(theta + d, abs=1e-6)
    # Its multiplier is exact: g = -(sigma/gap) (x - theta) = x - 1, off by the distance the slack allows.
    assert g == pytest.approx(theta + d - 1, abs=1e-5)
    assert abs(g - (theta - 1)) <= np.sqrt(2 * slack)
    # Less slack and barrier, less bias, like the square root.
    finer = h.bvfsm(
        quadratic, target, step_size=0.5, num_barrier_steps=100, barrier=sigma / 100, slack=slack / 100,
        regularization=0.0, outer_regularization=0.0,
    )  # fmt: skip
    assert settled(finer, theta, num_updates=20)[0] - (theta - 1) == pytest.approx(d / 10, rel=0.2)


def test_the_barrier_is_never_left():
    """Any step size, and a theta that jumps: the iterate stays inside, and nothing is infinite."""
    hyper = h.bvfsm(quadratic, target, step_size=0.5, barrier_step_size=100.0, num_barrier_steps=5)
    (_, _), (_, gradients, infos) = run(hyper, 8.0, -20.0, 60, 1.5)
    assert int(infos.status.max()) == odl.Status.COMPLETED
    assert bool(jnp.all(jnp.isfinite(gradients)))


def test_bamm_without_weight_is_soba():
    """v has the opposite sign; gradients and iterates agree to rounding."""
    ours = run(h.bamm(inner, outer, step_size=A, adjoint_step_size=0.2, weight=0.0), THETA0, X0, STEPS, RATE)
    soba = run(h.soba(inner, outer, step_size=A, adjoint_step_size=0.2), THETA0, X0, STEPS, RATE)
    np.testing.assert_allclose(ours[1][1], soba[1][1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[0][1].adjoint, -soba[0][1].adjoint, rtol=0, atol=1e-12)


def test_bamm_lets_the_outer_loss_choose():
    """x2 is free inside; SOBA leaves it, the average moves it. A constant weight is off by a known amount."""
    problem = odl.problems.p_c(1.0)
    f, F = problem.objective, problem.outer
    sizes = {"step_size": 0.5, "adjoint_step_size": 0.5}
    (theta, _), _ = run(h.bamm(f, F, weight=0.01, **sizes), 0.5, problem.x0, 8000, 0.002)
    # theta (1 + c) - 1 = 0 to the order of the weight
    assert float(theta) == pytest.approx(0.5, abs=0.01)
    (wrong, _), _ = run(h.bamm(f, F, weight=0.0, **sizes), 0.5, problem.x0, 2000, 0.02)
    assert abs(float(wrong) - 0.5) > 0.1


def test_the_papers_outer_rate():
    k = np.arange(0, 2000, 400)
    expected = 0.1 * (k + 1) ** (-1.5 / 40) * (0.9 * (k + 1) ** -0.1) ** 3
    np.testing.assert_allclose(jax.vmap(h.bamm_rate())(jnp.asarray(k)), expected, rtol=1e-12)
    state = optax.sgd(h.bamm_rate()).init(jnp.zeros(2))
    updates, _ = optax.sgd(h.bamm_rate()).update(jnp.ones(2), state)
    np.testing.assert_allclose(updates, -0.0729, rtol=1e-12)


def test_alternating_ends_at_the_equilibrium_of_the_players():
    """x = theta and theta = 2, where the solution is theta = 3/2."""
    (theta, _), _ = run(h.alternating(quadratic, both_targets, step_size=0.5), 0.0, 0.0, 400, 0.1)
    assert float(theta) == pytest.approx(2.0, abs=1e-9)


CONSTRAINED = {
    "bome": lambda **o: h.bome(quadratic, both_targets, step_size=0.01, inner_step_size=0.3, **o),
    "pbgd": lambda **o: h.pbgd(quadratic, both_targets, step_size=0.3, penalty=20.0, **o),
    "bamm": lambda **o: h.bamm(quadratic, both_targets, step_size=0.3, weight=0.0, **o),
    "bvfsm": lambda **o: h.bvfsm(quadratic, both_targets, step_size=0.3, num_steps=8, num_barrier_steps=4, **o),
    "meha": lambda **o: h.meha(quadratic, both_targets, step_size=0.3, **o),
    "gap_function": lambda **o: h.gap_function(quadratic, both_targets, step_size=0.3, **o),
    "alternating": lambda **o: h.alternating(quadratic, both_targets, step_size=0.3, **o),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_projection_keeps_x_inside(name):
    """min over x in [-1/2, 1/2]; theta = 2: x ends at 1/2, and the gradient mapping vanishes there."""
    hyper = CONSTRAINED[name](projection=lambda x, theta: jnp.clip(x, -0.5, 0.5))
    _, (_, _, infos) = run(hyper, 2.0, -0.4, 200, 0.0)
    assert float(jnp.abs(infos.x).max()) <= 0.5
    assert float(infos.x[-1]) == pytest.approx(0.5)
    assert float(infos.inner_residual[-1]) < 1e-12
    with pytest.raises(TypeError, match="projection must be a function of \\(x, theta\\)"):
        CONSTRAINED[name](projection=lambda x: x)


def mixed_inner(x, theta):
    fit = 0.5 * jnp.sum((x["a"] - theta["w"]) ** 2)
    return fit.astype(jnp.float32) + 0.5 * jnp.sum(x["b"] ** 2)


def mixed_outer(x, theta):
    return 0.5 * jnp.sum((x["a"] - 1) ** 2).astype(jnp.float32) + jnp.sum(x["b"]) * theta["v"]


soften = lambda v, theta, size: jax.tree.map(lambda leaf: odl.prox.l1(leaf, jnp.asarray(0.1, leaf.dtype), size), v)
MIXED = {
    "alternating": {},
    "bamm": {},
    "bome": {"barrier": "value_gap"},
    "bvfsm": {"num_steps": 2, "num_barrier_steps": 2},
    "gap_function": {"constraints": lambda x, theta: {"c": x["b"] - theta["v"]}, "multiplier_bound": 3},
    "meha": {"prox": soften, "nonsmooth": lambda x, theta: 0.1 * jnp.sum(jnp.abs(x["b"]))},
    "pbgd": {"warm_start": True},
}


@pytest.mark.parametrize("name", MIXED)
def test_trees_of_two_dtypes_and_coefficients_of_theta(name):
    """A bfloat16 and a float32 leaf, float64 on, a step size that is a function of theta in float32."""
    build = getattr(h, name)
    hyper = build(mixed_inner, mixed_outer, step_size=lambda theta: 0.1 * jnp.exp(theta["v"]), **MIXED[name])
    x0 = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    theta = {"w": jnp.zeros(3, jnp.bfloat16), "v": jnp.zeros((), jnp.float32)}
    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    state = hyper.init(theta, x0)
    gradient, new_state, info = jax.jit(hyper.update)(theta, state)
    assert signature(gradient) == signature(theta)
    assert signature(new_state) == signature(state)
    assert int(info.status) == odl.Status.COMPLETED


def test_options_are_checked(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # it would speak first
    with pytest.raises(ValueError, match="barrier must be"):
        h.bome(inner, outer, step_size=A, barrier="log")
    with pytest.raises(ValueError, match="form must be"):
        h.pbgd(inner, outer, step_size=A, form="norm")
    with pytest.raises(ValueError, match="warm_start and projection belong to"):
        h.pbgd(inner, outer, step_size=A, form="gradient_norm", warm_start=True)
    with pytest.raises(ValueError, match="weight must lie in"):
        h.bamm(inner, outer, weight=1.0)
    with pytest.raises(ValueError, match="multiplier_bound must lie in"):
        h.gap_function(inner, outer, step_size=A, multiplier_bound=0.0)
    with pytest.raises(ValueError, match="tau must lie in"):
        h.bamm_rate(tau=1.0)
