"""The thirteen stochastic estimators: their formulas in NumPy, and the limits, rates and floors that theory gives."""

import ends
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax.hypergradients._directions import refresh_period
from odljax.hypergradients._minibatches import minibatches

h = odl.hypergradients

# ---- a problem that is not quadratic, so that each point matters -----------------------------------------------------
# f_i = (r_i x - b_i)^2 / 2 + (r_i x)^4 / 12 + sum e^theta x^2 / 2,  F_j = |x - c_j|^2 / 2 + |theta|^2 / 2 + theta x / 4

N, SIZE, RATE, UPDATES, KEY = 12, 3, 0.05, 20, 7
_random = np.random.default_rng(0)
R, B, C = _random.normal(size=(N, SIZE)) / 2, _random.normal(size=N), 1 + _random.normal(size=(N, SIZE))
X0, THETA = _random.normal(size=SIZE), _random.normal(size=SIZE) / 3
DATA = ({"r": jnp.asarray(R), "b": jnp.asarray(B)}, jnp.asarray(C))


def inner(x, theta, data):
    s = data["r"] @ x
    return jnp.mean((s - data["b"]) ** 2 / 2 + s**4 / 12) + jnp.sum(jnp.exp(theta) * x**2) / 2


def outer(x, theta, c):
    return jnp.mean(jnp.sum((x[None] - c) ** 2, axis=1)) / 2 + jnp.sum(theta**2) / 2 + jnp.sum(theta * x) / 4


def f_x(x, theta, i):
    s = R[i] @ x
    return R[i].T @ (s - B[i] + s**3 / 3) / len(i) + np.exp(theta) * x


def f_theta(x, theta, i):
    return np.exp(theta) * x**2 / 2


def hv(x, v, theta, i):
    s = R[i] @ x
    return R[i].T @ ((1 + s**2) * (R[i] @ v)) / len(i) + np.exp(theta) * v


def jv(x, v, theta, i):
    return np.exp(theta) * x * v


def F_x(x, theta, j):
    return x - C[j].mean(0) + theta / 4


def F_theta(x, theta, j):
    return theta + x / 4


ALL = np.arange(N)


class Draws:
    """The rows that an estimator draws, drawn from outside; and its other random numbers."""

    def __init__(self, sizes, fixed=False):
        self.samplers = [odl.sampling.epochs(N, b, fixed_batches=fixed) if b else None for b in sizes]
        self.draw = [jax.jit(s.draw) if s else None for s in self.samplers]
        self.states = [
            s.init(k) if s else None for s, k in zip(self.samplers, jax.random.split(jax.random.key(KEY)), strict=True)
        ]
        # The third of three streams: the samplers split the key, what else is random folds a 2 into it.
        self.fixed, self.key = fixed, jax.random.fold_in(jax.random.key(KEY), 2)

    def batch(self, side):
        if self.samplers[side] is None:
            return 0, ALL
        batch, self.states[side] = self.draw[side](self.states[side])
        size = self.samplers[side].batch_size
        return int(np.ravel(batch)[0]), (np.arange(size) + batch * size if self.fixed else np.asarray(batch))

    def inner(self):
        return self.batch(0)[1]

    def outer(self):
        return self.batch(1)[1]

    def length(self, num_terms):
        self.key, now = jax.random.split(self.key)
        return int(jax.random.randint(now, (), 0, num_terms))

    def directions(self, num):
        self.key, now = jax.random.split(self.key)
        return np.asarray(jax.random.normal(now, (num, SIZE)))


# ---- the thirteen formulas: (theta_t) -> gradient, with what they remember in s --------------------------------------
A, AV, K, Q = 0.2, 0.15, 3, 4  # steps of x and v, inner steps, adjoint steps


def five(x, v, theta, i, j):
    return f_x(x, theta, i), hv(x, v, theta, i) + F_x(x, theta, j), jv(x, v, theta, i) + F_theta(x, theta, j)


def soba(s, theta, d, t):
    i, j = d.inner(), d.outer()
    G, D, g = five(s.x, s.v, theta, i, j)
    s.x, s.v = s.x - A * G, s.v - AV * D
    return g


def saba(s, theta, d, t):
    if t == 0:
        cut = lambda b: [np.arange(k, k + b) for k in range(0, N, b)]
        inner_batches, outer_batches = cut(s.sizes[0] or N), cut(s.sizes[1] or N)
        zero = np.zeros(SIZE)
        s.f = [np.stack([f_x(s.x, THETA, i), hv(s.x, zero, THETA, i), jv(s.x, zero, THETA, i)]) for i in inner_batches]
        s.F = [np.stack([F_x(s.x, THETA, j), F_theta(s.x, THETA, j)]) for j in outer_batches]
    (k, i), (m, j) = d.batch(0), d.batch(1)
    new = np.stack([f_x(s.x, theta, i), hv(s.x, s.v, theta, i), jv(s.x, s.v, theta, i)])
    G, Hv, Jv = new - s.f[k] + np.mean(s.f, axis=0)
    s.f[k] = new
    new = np.stack([F_x(s.x, theta, j), F_theta(s.x, theta, j)])
    Fx, Ft = new - s.F[m] + np.mean(s.F, axis=0)
    s.F[m] = new
    s.x, s.v = s.x - A * G, s.v - AV * (Hv + Fx)
    return Jv + Ft


def srba(s, theta, d, t):
    if t % s.period == 0:
        s.d = five(s.x, s.v, theta, ALL, ALL)
    else:
        i, j = d.inner(), d.outer()
        new, old = five(s.x, s.v, theta, i, j), five(*s.last, i, j)
        s.d = tuple(m + n - o for m, n, o in zip(s.d, new, old, strict=True))
    s.last = (s.x, s.v, theta)
    s.x, s.v = s.x - A * s.d[0], s.v - AV * s.d[1]
    return s.d[2]


def fsla(s, theta, d, t, eta=0.3):
    x = s.x - A * f_x(s.x, theta, d.inner())
    i, j = d.inner(), d.outer()
    v = s.v - AV * (hv(x, s.v, theta, i) + F_x(x, theta, j))
    i, j = d.inner(), d.outer()
    new = jv(x, v, theta, i) + F_theta(x, theta, j)
    if t == 0:
        s.d = new
    else:
        s.d = new + (1 - eta) * (s.d - jv(s.x, s.v, s.theta, i) - F_theta(s.x, s.theta, j))
    s.x, s.v, s.theta = x, v, theta
    return s.d


def walk(s, theta, d, num_steps=K):
    for _ in range(num_steps):
        s.x = s.x - A * f_x(s.x, theta, d.inner())


def amigo(s, theta, d, t):
    walk(s, theta, d)
    j = d.outer()
    for _ in range(Q):
        s.v = s.v - AV * (hv(s.x, s.v, theta, d.inner()) + F_x(s.x, theta, j))
    return jv(s.x, s.v, theta, d.inner()) + F_theta(s.x, theta, j)


def neumann(points, d, q=None):
    """Values (inner direction, outer direction) at each point on the same rows; q: the random length."""
    j = d.outer()
    batches = [d.inner() for _ in range(Q if q is None else q)]
    last = d.inner()
    out = []
    for x, theta in points:
        term = total = -AV * F_x(x, theta, j)
        if q is None:  # sum over q of the products of the last q factors
            total = np.zeros(SIZE)
            for first in range(Q + 1):
                term = -AV * F_x(x, theta, j)
                for i in batches[first:]:
                    term = term - AV * hv(x, term, theta, i)
                total = total + term
        else:
            for i in batches:
                total = total - AV * hv(x, total, theta, i)
            total = Q * total
        out.append((f_x(x, theta, last), jv(x, total, theta, last) + F_theta(x, theta, j)))
    return out


def stocbio(s, theta, d, t):
    walk(s, theta, d)
    return neumann([(s.x, theta)], d)[0][1]


def bsa(s, theta, d, t):
    q = d.length(Q)
    walk(s, theta, d)
    return neumann([(s.x, theta)], d, q)[0][1]


def ttsa(s, theta, d, t):
    q = d.length(Q)
    walk(s, theta, d, 1)
    return neumann([(s.x, theta)], d, q)[0][1]


def storm(s, theta, d, t, q=None):
    if t == 0:
        s.last = (s.x, theta)
    new, old = neumann([(s.x, theta), s.last], d, q)
    eta = 1 if t == 0 else 0.5 / (t + 1) ** (2 / 3)
    if t == 0:
        s.d = new
    s.d = tuple(n + (1 - eta) * (m - o) for m, n, o in zip(s.d, new, old, strict=True))
    s.last = (s.x, theta)
    s.x = s.x - A * s.d[0]
    return s.d[1]


def sustain(s, theta, d, t):
    return storm(s, theta, d, t, d.length(Q))


def vrbo(s, theta, d, t):
    for k in range(K):
        if k == 0 and t % s.period == 0:
            s.d = neumann([(s.x, theta)], Draws((None, None)))[0]
        else:
            new, old = neumann([(s.x, theta), s.last], d)
            s.d = tuple(m + n - o for m, n, o in zip(s.d, new, old, strict=True))
        s.last = (s.x, theta)
        s.x = s.x - A * s.d[0]
    return s.d[1]


def f2sa(s, theta, d, t):
    if t == 0:
        s.y, s.penalty = s.x, 1.5
    for _ in range(K):
        i, j = d.inner(), d.outer()
        s.y = s.y - 0.05 * (s.penalty * f_x(s.y, theta, i) + F_x(s.y, theta, j))
        s.x = s.x - A * f_x(s.x, theta, i)
    i, j = d.inner(), d.outer()
    g = F_theta(s.y, theta, j) + s.penalty * (f_theta(s.y, theta, i) - f_theta(s.x, theta, i))
    s.penalty += 0.1 / (t + 1) ** (1 / 7)
    return g


def pzobo(s, theta, d, t, mu=0.1, num=5):
    u = d.directions(num)
    near = [theta, *(theta + mu * u)]
    xs = [s.x] * (num + 1)
    for _ in range(K):
        i = d.inner()
        xs = [x - A * f_x(x, p, i) for x, p in zip(xs, near, strict=True)]
    s.x, j = xs[0], d.outer()
    slopes = [(x - s.x) / mu @ F_x(s.x, theta, j) for x in xs[1:]]
    return F_theta(s.x, theta, j) + np.array(slopes) @ u / num


steps = {"step_size": A, "adjoint_step_size": AV}
loops = {**steps, "num_steps": K, "num_adjoint_steps": Q}
FORMULAS = {
    "soba": (soba, steps),
    "saba": (saba, steps),
    "srba": (srba, {**steps}),
    "fsla": (fsla, {**steps, "momentum": 0.3}),
    "amigo": (amigo, loops),
    "stocbio": (stocbio, loops),
    "bsa": (bsa, {**steps, "num_steps": K, "num_terms": Q}),
    "ttsa": (ttsa, {**steps, "num_terms": Q}),
    "sustain": (sustain, {**steps, "num_terms": Q}),
    "mrbo": (storm, {**steps, "num_adjoint_steps": Q}),
    "vrbo": (vrbo, {**loops, "refresh_every": 3}),
    "f2sa": (f2sa, {"step_size": A, "penalised_step_size": 0.05, "num_steps": K, "penalty": 1.5}),
    "pzobo": (pzobo, {"step_size": A, "num_steps": K, "num_directions": 5}),
}


FIXED = ("saba", "fsla", "amigo", "ttsa", "mrbo", "f2sa", "pzobo")


class Remembered:
    pass


@pytest.mark.parametrize("sizes", [(None, None), (4, 3)], ids=["full", "minibatches"])
@pytest.mark.parametrize("name", FORMULAS)
def test_twenty_updates_are_those_of_the_formula(name, sizes):
    """Half of the estimators with rows from everywhere, half with fixed batches, as SABA's always are."""
    update, options = FORMULAS[name]
    fixed = sizes[0] is not None and name in FIXED
    if fixed and name != "saba":
        options = {**options, "fixed_batches": True}
    hyper = getattr(h, name)(
        inner, outer, batch_size=None if sizes[0] is None else sizes, key=jax.random.key(KEY), **options
    )

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *DATA)
        return (theta - RATE * gradient, state), (gradient, info.x)

    start = jnp.asarray(THETA), hyper.init(jnp.asarray(THETA), jnp.asarray(X0), *DATA)
    _, (gradients, xs) = jax.jit(lambda start: jax.lax.scan(body, start, length=UPDATES))(start)

    s, theta, draws = Remembered(), THETA, Draws(sizes, fixed=fixed)
    s.x, s.v, s.sizes = X0, np.zeros(SIZE), sizes
    s.period = 3 if name == "vrbo" else max(1, (2 * N) // sum(sizes) if sizes[0] else 1)
    for t in range(UPDATES):
        gradient = update(s, theta, draws, t)
        np.testing.assert_allclose(gradients[t], gradient, rtol=1e-9, atol=1e-9, err_msg=f"gradient {t}")
        np.testing.assert_allclose(xs[t], s.x, rtol=1e-9, atol=1e-9, err_msg=f"x {t}")
        theta = theta - RATE * gradient


@pytest.mark.parametrize("name", ["soba", "srba", "amigo", "stocbio"])
def test_schedules_and_relative_residuals(name, monkeypatch):
    """A step for every t, over three updates; and an outer loss in units seven times smaller changes no residual."""
    update, options = FORMULAS[name]
    sizes, adjoint_sizes = np.array([0.2, 0.05, 0.11]), np.array([0.15, 0.07, 0.02])
    options = {
        **options,
        "step_size": lambda k: jnp.asarray(sizes)[k],
        "adjoint_step_size": lambda k: jnp.asarray(adjoint_sizes)[k],
    }

    def gradients(scale):
        hyper = getattr(h, name)(inner, lambda x, theta, c: scale * outer(x, theta, c), **options)
        theta, state, out = jnp.asarray(THETA), hyper.init(jnp.asarray(THETA), jnp.asarray(X0), *DATA), []
        for _ in range(3):
            gradient, state, info = hyper.update(theta, state, *DATA)
            theta = theta - RATE / scale * gradient
            out.append((gradient, info.x, info.adjoint_residual))
        return out

    one, seven = jax.jit(lambda: (gradients(1.0), gradients(7.0)))()
    s, theta = Remembered(), THETA
    s.x, s.v, s.period = X0, np.zeros(SIZE), 1
    for t in range(3):
        monkeypatch.setitem(globals(), "A", sizes[t])
        monkeypatch.setitem(globals(), "AV", adjoint_sizes[t])
        gradient = update(s, theta, Draws((None, None)), t)
        np.testing.assert_allclose(one[t][0], gradient, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(one[t][1], s.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(seven[t][2], one[t][2], rtol=1e-9)
        theta = theta - RATE * gradient


# ---- full batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_variance_reduction_without_batches_is_soba(name):
    run = lambda name: descend(getattr(h, name)(inner, outer, **steps), DATA, jnp.asarray(THETA), jnp.asarray(X0), 9)[0]
    np.testing.assert_array_equal(run(name), run("soba"))


@pytest.mark.parametrize("name", ["bsa", "ttsa"])
def test_the_random_series_has_the_right_mean(name):
    """Over its N lengths, each once: exactly the series of N terms."""
    num_terms, theta, x0 = 5, jnp.asarray(THETA), jnp.asarray(X0)

    def gradient(key):
        hyper = getattr(h, name)(inner, outer, **steps, num_terms=num_terms, key=key)
        return hyper.update(theta, hyper.init(theta, x0, *DATA), *DATA)[0]

    drawn = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), 200)))
    each = np.unique(drawn.round(12), axis=0)
    assert len(each) == num_terms
    whole = h.stocbio(inner, outer, **steps, num_steps=10 if name == "bsa" else 1, num_adjoint_steps=num_terms - 1)
    expected = whole.update(theta, whole.init(theta, x0, *DATA), *DATA)[0]
    np.testing.assert_allclose(each.mean(0), expected, atol=1e-11)


def test_random_directions_have_the_derivative_of_the_steps_as_mean():
    """Through K steps of a quadratic from the warm start: dx_K/dtheta = (I - (I - a H)^K) B, whatever the width."""
    problem = odl.problems.finite_sum()
    hyper = h.pzobo(problem.inner, problem.outer, step_size=0.2, num_steps=4, num_directions=40_000, smoothing=3.0)
    data, theta = (problem.inner_data, problem.outer_data), jnp.array([0.4, -0.3])
    gradient, _, info = jax.jit(hyper.update)(theta, hyper.init(theta, problem.x0, *data), *data)
    p, one = ends.Parts(problem), np.eye(3)
    response = (one - np.linalg.matrix_power(one - 0.2 * p.H, 4)) @ p.B
    pull = response.T @ (info.x - p.c.mean(0))
    spread = np.sqrt((np.sum(pull**2) + pull**2) / 40_000)
    assert np.all(np.abs(gradient - theta - pull) < 5 * spread)
    assert np.all(5 * spread < 0.1 * np.linalg.norm(pull))


def test_the_growing_penalty_takes_the_bias_away():
    problem = odl.problems.finite_sum()
    data = (problem.inner_data, problem.outer_data)
    hyper = h.f2sa(problem.inner, problem.outer, step_size=problem.step_size, num_steps=3)
    thetas = descend(hyper, data, problem.theta, problem.x0, 600)[0]
    errors = np.linalg.norm(np.asarray(thetas) - np.asarray(problem.minimiser), axis=1)
    penalties = 1 + 0.1 * np.cumsum(np.arange(1, 601) ** (-1 / 7))
    for t in (150, 300, 599):  # the closed form of the bias at the penalty of that time
        bias = np.linalg.norm(ends.value_gap(problem, penalties[t]) - np.asarray(problem.minimiser))
        assert bias * 0.9 < errors[t] < bias * 1.3
    assert errors[599] < 0.4 * errors[150]


# ---- noise -----------------------------------------------------------------------------------------------------------


def descend(hyper, data, theta, x0, num_updates, rate=RATE):
    """The thetas of SGD and the infos."""

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *data)
        theta = theta - rate * gradient
        return (theta, state), (theta, info)

    start = (theta, hyper.init(theta, x0, *data))
    return jax.jit(lambda start: jax.lax.scan(body, start, length=num_updates)[1])(start)


def minibatch_errors(name, problem, end, num_updates, **options):
    """Distances from the end, as (run, update), of three runs with batches of 4 in 24 rows and constant steps."""
    data = (problem.inner_data, problem.outer_data)

    def run(key):
        hyper = getattr(h, name)(problem.inner, problem.outer, batch_size=4, key=key, **options)
        return descend(hyper, data, problem.theta, problem.x0, num_updates)[0]

    thetas = jax.vmap(run)(jax.random.split(jax.random.key(0), 3))
    return np.linalg.norm(np.asarray(thetas) - np.asarray(end), axis=-1)


VARIANCE_REDUCED = {
    "saba": ({}, lambda p: p.minimiser),
    "srba": ({}, lambda p: p.minimiser),
    "vrbo": ({"num_steps": 2, "num_adjoint_steps": 3}, lambda p: ends.neumann(p, 4)),
}


@pytest.mark.parametrize("name", VARIANCE_REDUCED)
def test_variance_reduction_reaches_machine_precision_linearly(name):
    problem = odl.problems.finite_sum()
    options, end = VARIANCE_REDUCED[name]
    a = problem.step_size
    errors = minibatch_errors(
        name, problem, end(problem), 700, step_size=a / 2, adjoint_step_size=a if name == "vrbo" else a / 2, **options
    )
    assert errors[:, -1].max() < 1e-13
    logarithm = np.log10(errors.max(0)[50:-1:50])
    falling = logarithm[logarithm > -13]
    assert len(falling) >= 4
    assert np.all(np.diff(falling) < -0.5)  # by at least 3 every 50 updates, all the way down


def test_soba_with_the_same_steps_stops_at_its_noise():
    problem = odl.problems.finite_sum()
    errors = minibatch_errors("soba", problem, problem.minimiser, 700, step_size=problem.step_size / 2)
    assert errors[:, 350:].mean() > 1e-2


LARGE = odl.problems.finite_sum(3000, 2, 2)  # so many rows that a run hardly meets one twice: independent draws
SAFE = LARGE.step_size
FLOORS = {
    "soba": ({}, lambda p: p.minimiser),
    "fsla": ({"momentum": 0.3}, lambda p: p.minimiser),
    "amigo": ({"num_steps": 2, "num_adjoint_steps": 2}, lambda p: p.minimiser),
    "stocbio": (
        {"num_steps": 2, "num_adjoint_steps": 3, "adjoint_step_size": SAFE},
        lambda p: ends.neumann(p, 4),
    ),
    "bsa": ({"num_steps": 2, "num_terms": 3, "adjoint_step_size": SAFE}, lambda p: ends.neumann(p, 3)),
    "ttsa": ({"num_terms": 3, "adjoint_step_size": SAFE}, lambda p: ends.neumann(p, 3)),
    "sustain": ({"num_terms": 3, "adjoint_step_size": SAFE, "momentum": 0.3}, lambda p: ends.neumann(p, 3)),
    "mrbo": ({"num_adjoint_steps": 3, "adjoint_step_size": SAFE, "momentum": 0.3}, lambda p: ends.neumann(p, 4)),
    "f2sa": ({"num_steps": 2, "penalty": 5.0, "penalty_increment": 0.0}, lambda p: ends.value_gap(p, 5.0)),
}


@pytest.mark.parametrize("name", FLOORS)
def test_halving_the_steps_halves_the_noise_floor(name):
    """The mean squared distance from the end, in which the bias of a cut series or of a penalty is counted in."""
    options, end = FLOORS[name]
    data, end = (LARGE.inner_data, LARGE.outer_data), jnp.asarray(end(LARGE))
    num_updates, runs = 3000, 16

    def run(scale, key):
        hyper = getattr(h, name)(LARGE.inner, LARGE.outer, step_size=0.15 * scale, batch_size=1, key=key, **options)

        def body(carry, _):
            theta, state = carry
            gradient, state, _ = hyper.update(theta, state, *data)
            theta = theta - 0.04 * scale * gradient
            return (theta, state), theta - end

        start = (end, hyper.init(end, LARGE.solution(end), *data))
        return jax.lax.scan(body, start, length=num_updates)[1]

    keys = jax.random.split(jax.random.key(0), runs)
    run = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
    away = np.asarray(run(jnp.array([1.0, 0.5]), keys))[:, :, num_updates // 4 :]
    large, small = np.mean(np.sum(away**2, axis=-1), axis=(1, 2))
    assert 1.6 < large / small < 2.6
    # And it is noise: the mean is the end, up to what the mean of so many correlated draws can tell.
    assert np.linalg.norm(away[1].mean((0, 1))) < 0.35 * np.sqrt(small)


def test_the_floor_of_random_directions_falls_with_the_step_and_with_their_number():
    """Without minibatches; at the end, where grad_x F does not vanish."""
    problem = odl.problems.finite_sum()
    data, p, one = (problem.inner_data, problem.outer_data), ends.Parts(problem), np.eye(3)
    response = (one - np.linalg.matrix_power(one - 0.2 * p.H, 3)) @ p.B
    end = jnp.asarray(ends.root(lambda w: w + response.T @ (p.B @ w + p.z - p.c.mean(0)), 2))

    def floor(rate, num_directions):
        def run(key):
            hyper = h.pzobo(
                problem.inner, problem.outer, step_size=0.2, num_steps=3, num_directions=num_directions, key=key
            )
            thetas = descend(hyper, data, end, problem.solution(end), 1000, rate)[0]
            return jnp.mean(jnp.sum((thetas[200:] - end[None]) ** 2, axis=-1))

        return float(jnp.mean(jax.vmap(run)(jax.random.split(jax.random.key(0), 16))))

    base = floor(0.1, 4)
    assert 1.6 < base / floor(0.05, 4) < 2.6
    assert 1.6 < base / floor(0.1, 8) < 2.6


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "expected"), [((4, 3), 3), (12, 1), ((11, 5), 1), (1, 12), (None, 1)])
def test_default_refresh_period(sizes, expected):
    """The rows of both sets over those of a draw, and never 0."""
    assert refresh_period("srba", None, minibatches("srba", sizes, None), DATA) == expected
    assert refresh_period("srba", 5, minibatches("srba", sizes, None), DATA) == 5


def test_default_refresh_period_without_data():
    assert refresh_period("srba", None, minibatches("srba", None, None), ()) == 1


@pytest.mark.parametrize("name", FORMULAS)
def test_trees_of_several_dtypes_and_schedules(name):
    """Traced only: the structure and each dtype survive, under strict promotion."""

    def inner(x, theta):
        pull = jnp.sum((x["a"] - theta["u"]) ** 2).astype(float) + (x["b"] - theta["w"]) ** 2
        return pull / 2 + 0.1 * (x["b"] * jnp.sum(x["a"]).astype(float)) ** 2

    def outer(x, theta):
        return (jnp.sum(x["a"] ** 2).astype(float) + (x["b"] - 1) ** 2) / 2 + theta["w"] ** 2

    x = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(())}
    theta = {"u": jnp.ones(2, jnp.float32), "w": jnp.zeros(())}
    hyper = getattr(h, name)(inner, outer, step_size=lambda k: 0.1 / (k.astype(float) + 1))
    state = hyper.init(theta, x)
    gradient, new_state, info = jax.eval_shape(hyper.update, theta, state)
    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert signature(gradient) == signature(theta)
    assert signature(new_state) == signature(state)
    assert signature(info.x) == signature(x)


SMALL = {name: {k: 2 if k.startswith("num_") else v for k, v in o.items()} for name, (_, o) in FORMULAS.items()}
SMALL["srba"] = {**SMALL["srba"], "refresh_every": 2}


def kept(state):
    """All but the draws and the outer walk."""
    return [part for name, part in state._asdict().items() if name not in ("batches", "key", "outer")]


@pytest.mark.parametrize("name", FORMULAS)
def test_one_bad_theta_does_not_spoil_the_walk(name):
    """Nor does one update with NaN in its data, be it the first, which sets the memories, or a later one."""
    hyper = getattr(h, name)(inner, outer, batch_size=(4, 3), **SMALL[name])
    theta, x0 = jnp.asarray(THETA), jnp.asarray(X0)

    @jax.jit
    def run(thetas, scales):
        def body(state, now):
            theta, scale = now
            data = jax.tree.map(lambda leaf: leaf * scale, DATA)
            gradient, new, info = hyper.update(theta, state, *data)
            return new, (gradient, info.status, kept(new), new.outer)

        return jax.lax.scan(body, hyper.init(theta, x0, *DATA), (thetas, scales))[1]

    completed, bad = int(odl.Status.COMPLETED), int(odl.Status.NON_FINITE)
    for which in (0, 2):
        spoiled = jnp.ones(5).at[which].set(jnp.nan)
        thetas = theta[None] + 0.1 * jnp.arange(5.0)[:, None]
        for arguments in ((thetas * spoiled[:, None], jnp.ones(5)), (thetas, spoiled)):
            gradients, statuses, states, walks = run(*arguments)
            assert statuses.tolist() == [bad if t == which else completed for t in range(5)]
            if arguments[0] is not thetas:
                assert bool(jnp.all(jnp.isnan(gradients[which])))  # told, not repaired
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((states, walks)))
            assert walks.t.tolist() == ([0, 1, 2, 3, 4] if which == 0 else [1, 2, 3, 4, 5])
            if which:
                for leaf in jax.tree.leaves((states, walks.theta)):
                    np.testing.assert_array_equal(leaf[which], leaf[which - 1])


@pytest.mark.parametrize("name", ["srba", "fsla", "mrbo", "vrbo"])
def test_memories_start_at_the_first_good_update(name):
    hyper = getattr(h, name)(inner, outer, **SMALL[name])
    theta, x0 = jnp.asarray(THETA), jnp.asarray(X0)
    update, state = jax.jit(hyper.update), hyper.init(jnp.asarray(THETA), x0, *DATA)
    gradient, fresh, info = update(theta, state, *DATA)
    again, late, late_info = update(theta, update(theta * jnp.nan, state, *DATA)[1], *DATA)
    expected = jax.tree.leaves((gradient, kept(fresh), fresh.outer, info))
    for one, other in zip(expected, jax.tree.leaves((again, kept(late), late.outer, late_info)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_not_finite_beside_the_gradient_is_told():
    """The new adjoint overflows; gradient, value and x do not."""
    hyper = h.soba(lambda x, y: (x - y) ** 2 / 2, lambda x, y: 1e200 * x, step_size=0.1, adjoint_step_size=1e200)
    gradient, state, info = hyper.update(1.0, hyper.init(1.0, 0.0))
    assert bool(jnp.all(jnp.isfinite(jnp.stack([gradient, info.value, info.x]))))
    assert int(info.status) == odl.Status.NON_FINITE
    assert (float(state.x), float(state.adjoint)) == (0.0, 0.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_reverse_mode_through_updates(name):
    """A level above differentiates gradients and states in what the losses close over; against a difference."""

    @jax.jit
    @jax.value_and_grad
    def total(s):
        bent_inner = lambda x, theta, data: inner(x, theta, data) + jnp.sum(jnp.sin(s * x))
        bent_outer = lambda x, theta, data: s * outer(x, theta, data)
        hyper = getattr(h, name)(bent_inner, bent_outer, batch_size=(4, 3), **SMALL[name])

        def body(carry, _):
            theta, state = carry
            gradient, state, _ = hyper.update(theta, state, *DATA)
            return (theta - RATE * gradient, state), jnp.sum(gradient)

        theta = jnp.asarray(THETA)
        (theta, state), told = jax.lax.scan(body, (theta, hyper.init(theta, jnp.asarray(X0), *DATA)), length=3)
        state = state._replace(outer=state.outer._replace(first=None))  # what divergence is judged by has no derivative
        floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.sum(told) + sum(jnp.sum(jnp.cos(leaf)) for leaf in floats)

    width = 1e-5
    difference = (total(0.7 + width)[0] - total(0.7 - width)[0]) / (2 * width)
    gradient = total(0.7)[1]
    assert abs(float(gradient)) > 1e-3
    np.testing.assert_allclose(gradient, difference, rtol=1e-7, atol=1e-8)


def test_f2sas_own_step_falls_as_its_penalty_grows():
    """One step on F + lambda f by a / lambda, with lambda 1.5, then 2.0."""
    hyper = h.f2sa(inner, outer, step_size=A, penalty=1.5, penalty_increment=0.5, num_steps=1)
    theta, state = jnp.asarray(THETA), hyper.init(jnp.asarray(THETA), jnp.asarray(X0), *DATA)
    y = jnp.asarray(X0)
    for penalty in (1.5, 2.0):
        y -= A / penalty * jax.grad(lambda y, c=penalty: outer(y, theta, DATA[1]) + c * inner(y, theta, DATA[0]))(y)
        _, state, _ = hyper.update(theta, state, *DATA)
        np.testing.assert_allclose(state.penalised, y, rtol=0, atol=1e-12)


def test_messages():
    with pytest.raises(ValueError, match="5 does not divide 12"):
        h.saba(inner, outer, step_size=0.1, batch_size=5).init(jnp.asarray(THETA), jnp.asarray(X0), *DATA)
    for name in ("fsla", "sustain", "mrbo"):
        with pytest.raises(ValueError, match=f"{name}: momentum must lie in"):
            getattr(h, name)(inner, outer, step_size=0.1, momentum=1.5)
    with pytest.raises(ValueError, match="fsla: step_size, here the momentum too, must lie in"):
        h.fsla(inner, outer, step_size=1.5)
    assert h.fsla(inner, outer, step_size=1.5, momentum=0.5).name == "fsla"
    for name, option in (
        ("srba", "refresh_every"),
        ("vrbo", "refresh_every"),
        ("amigo", "num_steps"),
        ("stocbio", "num_adjoint_steps"),
        ("bsa", "num_terms"),
        ("ttsa", "num_terms"),
        ("mrbo", "num_adjoint_steps"),
        ("sustain", "num_terms"),
        ("f2sa", "num_steps"),
        ("pzobo", "num_directions"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {option} must be a whole number of at least 1"):
            getattr(h, name)(inner, outer, step_size=0.1, **{option: 0})
    with pytest.raises(ValueError, match="f2sa: penalty must lie in"):
        h.f2sa(inner, outer, step_size=0.1, penalty=0.0)
    with pytest.raises(ValueError, match="f2sa: penalty_increment must lie in"):
        h.f2sa(inner, outer, step_size=0.1, penalty_increment=-1.0)
    with pytest.raises(ValueError, match="pzobo: smoothing must lie in"):
        h.pzobo(inner, outer, step_size=0.1, smoothing=0.0)
