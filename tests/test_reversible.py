"""Exactly reversible momentum: bits that come back, the gradient of the rounded walk, and bytes that stay."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax.hypergradients._reversible import Walk, buffer_words, make_grid, take_step, there_and_back

reversible = odl.hypergradients.reversible


def close(a, b, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("ratio", [Fraction(9, 10), Fraction(1, 2), Fraction(997, 1000), Fraction(1, 32767)], ids=str)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_every_step_is_undone_bit_for_bit(dtype, ratio):
    """Iterates, velocities and buffers, there and back; against whole numbers of any length in Python."""
    num_steps, rng = 60, np.random.default_rng(0)
    pushes = rng.integers(-(2**20), 2**20, (num_steps, 4)).astype(dtype)
    x = rng.integers(-(2**20), 2**20, 4).astype(dtype)
    start = Walk(x, np.zeros_like(x), np.zeros((buffer_words(ratio, num_steps), 4), np.uint16))

    def run(start):
        def ahead(walk, push):
            return take_step(walk, push, ratio, jnp.asarray(False)), walk

        def back(walk, push):
            walk = take_step(walk, push, ratio, jnp.asarray(True))
            return walk, walk

        end, forth = jax.lax.scan(ahead, start, pushes)
        first, returned = jax.lax.scan(back, end, pushes, reverse=True)
        return end, forth, first, returned

    end, forth, first, returned = jax.jit(run)(start)
    jax.tree.map(np.testing.assert_array_equal, first, start)
    jax.tree.map(np.testing.assert_array_equal, returned, forth)
    n, d = ratio.numerator, ratio.denominator
    for entry in range(4):
        at, u, buffer = int(x[entry]), 0, 0
        for push in pushes[:, entry]:
            buffer, digit = divmod(buffer * d + u % d, n)
            u = u // d * n + digit - int(push)
            at += u
        words = np.asarray(end.buffer[:, entry])
        assert (at, u) == (int(end.x[entry]), int(end.velocity[entry]))
        assert buffer == sum(int(word) << (16 * i) for i, word in enumerate(words))


def losses(A, y):
    half = lambda like: jnp.asarray(0.5, like.dtype)
    inner = lambda x, t: jnp.sum(jnp.log(jnp.cosh(A @ x - y))) + half(x) * jnp.exp(t) * jnp.sum(x**2)
    outer = lambda x, t: jnp.sum(jnp.sin(x)) + t**2
    return inner, outer


def data(dtype=np.float64, rows=12, columns=5):
    rng = np.random.default_rng(1)
    A, y = rng.standard_normal((rows, columns)) / 2, rng.standard_normal(rows)
    return jnp.asarray(A, dtype), jnp.asarray(y, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_gradient_is_that_of_the_rounded_walk(dtype):
    """Unrolled over the same whole numbers, whose rounding has the derivative of the identity."""
    inner, outer = losses(*data(dtype))
    theta, x0, num_steps, ratio = jnp.asarray(-0.5, dtype), jnp.zeros(5, dtype), 40, Fraction(9, 10)
    push = lambda x, theta: jnp.asarray(0.2, dtype) * jnp.exp(theta) * jax.grad(inner)(x, theta)
    grid = make_grid("", x0, None)

    def rounded(theta):
        walk = Walk(*(grid.encode(x0)[0],) * 2, jnp.zeros((buffer_words(ratio, num_steps), 5), jnp.uint16))
        walk = walk._replace(velocity=jnp.zeros_like(walk.x))

        def body(carry, _):
            walk, x, u = carry
            step = push(x, theta)
            walk = take_step(walk, grid.encode(step)[0], ratio, jnp.asarray(False))
            u = jnp.asarray(0.9, dtype) * u - step
            x = x + u
            straight = lambda value, whole: value + jax.lax.stop_gradient(grid.decode(whole) - value)
            return (walk, straight(x, walk.x), straight(u, walk.velocity)), None

        x = jax.lax.scan(body, (walk, x0, jnp.zeros_like(x0)), length=num_steps)[0][1]
        return outer(x, theta), x

    options = {"step_size": lambda theta: 0.2 * jnp.exp(theta), "momentum": 0.9, "num_steps": num_steps}
    hyper = reversible(inner, outer, **options)
    gradient, _, info = jax.jit(hyper.update)(theta, hyper.init(theta, x0))
    (value, x), want = jax.jit(jax.value_and_grad(rounded, has_aux=True))(theta)
    np.testing.assert_allclose(info.x, x, rtol=0, atol=2.0 ** (-38 if dtype == np.float64 else -18))
    close((info.value, gradient), (value, want), 1e-9 if dtype == np.float64 else 2e-5)
    close(info.inner_residual, jnp.linalg.norm(jax.grad(inner)(info.x, theta)), 1e-4)
    assert gradient.dtype == info.x.dtype == dtype
    assert (int(info.num_steps), odl.Status(int(info.status)).name) == (num_steps, "COMPLETED")
    # Of the exact walk it is the gradient up to the resolution and what the walk makes of it.
    descent = odl.gradient_descent(inner, lambda theta: 0.2 * jnp.exp(theta))
    exact = odl.for_steps(odl.heavy_ball(descent, 0.9), num_steps)
    close(gradient, jax.grad(lambda t: outer(exact(x0, t).x, t))(theta), 1e-9 if dtype == np.float64 else 1e-3)


def test_trees_data_schedules_and_a_learned_start():
    """Leaves of two dtypes; every argument that a step depends on is differentiated."""
    A, y = data()

    def inner(x, theta, rows):
        fit = rows[0] @ x["w"] + x["b"].astype(jnp.float64) - rows[1]
        return jnp.sum(fit**2) / 24 + jnp.exp(theta["decay"]) * jnp.sum(x["w"] ** 2)

    outer = lambda x, theta, rows: jnp.sum((rows[0] @ x["w"] - rows[1]) ** 2) + x["b"].astype(jnp.float64)
    step_size = lambda theta, k: jnp.exp(theta["rate"]) / (k.astype(float) + 2.0)
    start = lambda theta: {"w": jnp.tanh(theta["w"]), "b": jnp.float32(0.25)}
    theta = {"decay": jnp.asarray(-2.0), "rate": jnp.asarray(0.3), "w": jnp.linspace(-1.0, 1.0, 5)}
    hyper = reversible(inner, outer, step_size=step_size, momentum=Fraction(2, 3), num_steps=15, start=start)
    rows = (A, y), (A[:3], y[:3])
    gradient, state, info = jax.jit(hyper.update)(theta, hyper.init(theta, None, *rows), *rows)
    assert state.x is None
    assert {"w": info.x["w"].dtype, "b": info.x["b"].dtype} == {"w": jnp.float64, "b": jnp.float32}
    descent = odl.gradient_descent(lambda x, theta: inner(x, theta, rows[0]), step_size)
    solver = odl.for_steps(odl.heavy_ball(descent, 2 / 3), 15)
    plain = odl.hypergradients.through(solver, outer, start=start)
    want, _, at = jax.jit(plain.update)(theta, plain.init(theta, None), rows[1])
    close((gradient, info.value), (want, at.value), 2e-5)  # one leaf has 20 bits
    assert float(jnp.abs(want["rate"])) > 1e-3


@pytest.mark.usefixtures("optimised")
def test_the_bytes_are_those_of_one_step_and_of_the_buffer():
    rows, columns = 300, 200

    def temporary_bytes(num_steps):
        def gradient(A, y, theta):
            hyper = reversible(*losses(A, y), step_size=1e-3, num_steps=num_steps)
            return hyper.update(theta, hyper.init(theta, jnp.zeros(columns)))[0]

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in ((rows, columns), (rows,), ())]
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(10), temporary_bytes(1000)
    digits = [2 * columns * buffer_words(Fraction(9, 10), n) for n in (10, 1000)]
    assert few <= 8 * (6 * rows + 20 * columns)
    assert many - few <= 5 * (digits[1] - digits[0])
    assert many < 8 * 1000 * (rows + columns) / 50  # of what the steps would store


def test_without_x64(float32_only):
    inner, outer = losses(*data(np.float32))
    hyper = reversible(inner, outer, step_size=0.2, num_steps=30, fraction_bits=24)
    theta = jnp.asarray(-0.5)
    gradient, _, info = jax.jit(hyper.update)(theta, hyper.init(theta, jnp.zeros(5)))
    solver = odl.for_steps(odl.heavy_ball(odl.gradient_descent(inner, 0.2), 0.9), 30)
    close(gradient, jax.grad(lambda t: outer(solver(jnp.zeros(5), t).x, t))(theta), 1e-4)
    assert odl.Status(int(info.status)).name == "COMPLETED"


def test_what_leaves_the_range_is_told():
    hyper = reversible(lambda x, t: -(x**2), lambda x, t: x * t, step_size=1.0, num_steps=60)
    for x0, theta, name in ((1.0, 1.0, "DIVERGED"), (1e9, 1.0, "DIVERGED"), (np.nan, 1.0, "NON_FINITE")):
        gradient, _, info = hyper.update(theta, hyper.init(theta, x0))
        assert odl.Status(int(info.status)).name == name
        assert np.isnan(gradient)
        assert np.isnan(info.value)
    assert not jax.eval_shape(lambda: hyper.init(1.0, 1.0)).x.weak_type


def test_a_walk_that_is_not_undone_is_noticed():
    """A gradient that depends on the direction of travel: what two compiled copies might do."""
    grid = make_grid("", jnp.zeros(()), None)

    def move(k):
        return lambda x, theta: x + jax.pure_callback(lambda _: np.float64(next(noise)), jnp.zeros(()), k)

    seed = lambda x: (x, (x, x))
    for values, exact in (([0.0] * 8, True), ([0.0] * 7 + [1e-9], False)):
        noise = iter(values)
        _, same = jax.jit(lambda: there_and_back(grid, move, seed, jnp.ones(()), jnp.ones(()), Fraction(1, 2), 4))()
        assert bool(same) is exact


def test_a_gradient_of_a_walk_that_is_not_undone_is_none(monkeypatch):
    from odljax.hypergradients import _reversible

    sweeps = _reversible.there_and_back
    for exact in (True, False):
        monkeypatch.setattr(
            _reversible, "there_and_back", lambda *inputs, e=exact: (sweeps(*inputs)[0], jnp.asarray(e))
        )
        hyper = reversible(lambda x, t: (x - t) ** 2, lambda x, t: x, step_size=0.2, momentum=0.5, num_steps=3)
        gradient, _, info = hyper.update(1.0, hyper.init(1.0, 0.0))
        assert bool(jnp.isfinite(gradient)) is exact
        assert odl.Status(int(info.status)) is (odl.Status.COMPLETED if exact else odl.Status.NON_FINITE)


def test_refusals():
    make = lambda **options: reversible(
        lambda x, t: (x - t) ** 2, lambda x, t: x, **({"step_size": 0.1, "num_steps": 2} | options)
    )
    for momentum, words in (
        (1.0, r"momentum must lie in \(0, 1\); 1.0 came"),
        (0.0, r"momentum must lie in \(0, 1\); 0.0 came"),
        (np.sqrt(0.5), r"momentum must be a fraction n/d, .* Round it, for instance to Fraction\(9, 10\)"),
        (Fraction(1, 10**6), r"with d up to 1000 for a float and below 32768 for a fractions\.Fraction"),
    ):
        with pytest.raises(ValueError, match=f"reversible: .*{words}"):
            make(momentum=momentum)
    with pytest.raises(ValueError, match=r"reversible: num_steps must be a whole number of at least 1; 0 came"):
        make(num_steps=0)
    with pytest.raises(TypeError, match=r"reversible: momentum fixes the program and must be a number; a traced value"):
        jax.jit(lambda beta: make(momentum=beta))(0.5)
    hyper = make(fraction_bits=40)
    words = (
        r"reversible: fraction_bits is 40, but a leaf of float32 is kept in 32 bits\. Ask for at most 28, or pass x0"
    )
    with pytest.raises(ValueError, match=words):
        hyper.update(1.0, hyper.init(1.0, np.float32(1)))
