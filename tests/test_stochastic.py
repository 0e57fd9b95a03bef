"""The thirteen stochastic estimators: their formulas in NumPy, and the limits, rates and floors that theory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax.hypergradients._directions import own_key, truncation_length
from odljax.hypergradients._pzobo import gaussians

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
        self.fixed, self.key = fixed, own_key(jax.random.key(KEY))

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
        q, self.key = truncation_length(self.key, num_terms)
        return int(q)

    def directions(self, num):
        u, self.key = gaussians(self.key, jnp.zeros(SIZE), num)
        return np.asarray(u)


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


class Remembered:
    pass


@pytest.mark.parametrize("sizes", [(None, None), (4, 3)], ids=["full", "minibatches"])
@pytest.mark.parametrize("name", FORMULAS)
def test_twenty_updates_are_those_of_the_formula(name, sizes):
    update, options = FORMULAS[name]
    hyper = getattr(h, name)(
        inner, outer, batch_size=None if sizes[0] is None else sizes, key=jax.random.key(KEY), **options
    )

    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *DATA)
        return (theta - RATE * gradient, state), (gradient, info.x)

    start = jnp.asarray(THETA), hyper.init(jnp.asarray(THETA), jnp.asarray(X0), *DATA)
    _, (gradients, xs) = jax.jit(lambda start: jax.lax.scan(body, start, length=UPDATES))(start)

    s, theta, draws = Remembered(), THETA, Draws(sizes, fixed=name == "saba")
    s.x, s.v, s.sizes = X0, np.zeros(SIZE), sizes
    s.period = 3 if name == "vrbo" else max(1, (2 * N) // sum(sizes) if sizes[0] else 1)
    for t in range(UPDATES):
        gradient = update(s, theta, draws, t)
        np.testing.assert_allclose(gradients[t], gradient, rtol=1e-9, atol=1e-9, err_msg=f"gradient {t}")
        np.testing.assert_allclose(xs[t], s.x, rtol=1e-9, atol=1e-9, err_msg=f"x {t}")
        theta = theta - RATE * gradient
