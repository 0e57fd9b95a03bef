"""MAML and its relatives against NumPy on quadratic tasks, against each other, and against what theory says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl

h = odl.hypergradients

RNG = np.random.default_rng(0)
N, SIZE, STEP, RATE = 5, 3, 0.2, 0.3
_ROOTS = RNG.standard_normal((N, SIZE, SIZE))
HESSIANS = 0.3 * np.eye(SIZE) + _ROOTS @ _ROOTS.transpose(0, 2, 1) / SIZE
GOALS = RNG.standard_normal((N, SIZE))
CENTRES = GOALS + 0.3 * RNG.standard_normal((N, SIZE))
THETA = RNG.standard_normal(SIZE)
INNER = {"H": jnp.asarray(HESSIANS), "b": jnp.asarray(GOALS)}
OUTER = jnp.asarray(CENTRES)
ONE = np.eye(SIZE)


def inner(x, theta, task):
    """(x - b)'H(x - b)/2 + 0.1 <x, theta>^2 / 2: theta reaches the tasks not only by their start."""
    away = x - task["b"]
    return 0.5 * jnp.dot(away, task["H"] @ away) + 0.05 * jnp.dot(x, theta) ** 2


def plain(x, theta, task):
    away = x - task["b"]
    return 0.5 * jnp.dot(away, task["H"] @ away)


def outer(x, theta, centre):
    return 0.5 * jnp.sum((x - centre) ** 2) + 0.1 * jnp.dot(x, theta)


def by_hand(name, K, theta, penalty=0.7, coupling=0.1):
    """Gradient, end points and largest inner residual."""
    gradients, ends, residuals = [], [], []
    for H, b, c in zip(HESSIANS, GOALS, CENTRES, strict=True):
        slope = lambda x: H @ (x - b) + coupling * (x @ theta) * theta
        A = H + coupling * np.outer(theta, theta)
        cross = lambda x: coupling * (np.outer(theta, x) + (x @ theta) * ONE)  # d slope / d theta
        x, D = theta, ONE
        if name == "imaml":
            x = np.linalg.solve(A + penalty * ONE, H @ b + penalty * theta)
            D = np.linalg.solve(A + penalty * ONE, penalty * ONE - cross(x))
            residuals.append(0.0)
        else:
            for _ in range(K):
                x, D = x - STEP * slope(x), D - STEP * (A @ D + cross(x))
            residuals.append(np.linalg.norm(slope(x)))
        if name == "fomaml":
            D = ONE
        if name == "reptile":
            gradients.append(theta - x)
        else:
            gradients.append(0.1 * x + D.T @ (x - c + 0.1 * theta))
        ends.append(x)
    return np.mean(gradients, axis=0), np.stack(ends), max(residuals)


def built(name, K, f=inner, **options):
    extra = {"penalty": 0.7} if name == "imaml" else {}
    extra |= {"start": lambda theta: theta} if name == "anil" else {}
    return getattr(h, name)(f, outer, num_steps=K, step_size=STEP, **extra | options)


def updates(hyper, theta, num_updates, *data):
    def body(carry, _):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state, *data)
        return (theta - RATE * gradient, state), (gradient, info.x, info.inner_residual)

    return jax.jit(lambda: jax.lax.scan(body, (theta, hyper.init(theta, None, *data)), length=num_updates)[1])()


@pytest.mark.parametrize(
    ("name", "K"), [("maml", 1), ("maml", 3), ("anil", 3), ("fomaml", 3), ("reptile", 3), ("imaml", 200)]
)
def test_twenty_updates_against_numpy(name, K):
    gradients, ends, residuals = updates(built(name, K), jnp.asarray(THETA), 20, INNER, OUTER)
    theta = THETA
    for t in range(20):
        gradient, x, residual = by_hand(name, K, theta)
        np.testing.assert_allclose(gradients[t], gradient, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ends[t], x, rtol=0, atol=1e-9)
        np.testing.assert_allclose(residuals[t], residual, rtol=0, atol=1e-9)
        theta = theta - RATE * gradient


def gradient_of(hyper, theta, *data):
    return jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, None, *data), *data)[0])(theta)


def test_the_bias_of_fomaml_is_the_missing_power():
    """On quadratic tasks maml carries (I - s H)^K where fomaml carries the identity."""
    theta, K = jnp.asarray(THETA), 4
    first_order = gradient_of(built("fomaml", K, plain), theta, INNER, OUTER)
    exact = gradient_of(built("maml", K, plain), theta, INNER, OUTER)
    _, ends, _ = by_hand("maml", K, THETA, coupling=0.0)
    missing = [
        (ONE - np.linalg.matrix_power(ONE - STEP * H, K)) @ (x - c + 0.1 * THETA)
        for H, x, c in zip(HESSIANS, ends, CENTRES, strict=True)
    ]
    np.testing.assert_allclose(first_order - exact, np.mean(missing, axis=0), atol=1e-12)


def test_no_tasks_have_no_mean():
    none = jax.tree.map(lambda leaf: leaf[:0], (INNER, OUTER))
    for name in ("maml", "reptile"):
        with pytest.raises(ValueError, match=rf"{name}: the mean over no task is no number; the data hold 0"):
            built(name, 1).init(jnp.asarray(THETA), None, *none)


def test_reptile_with_one_step_is_a_gradient_step_of_the_mean_inner_loss():
    theta = jnp.asarray(THETA)
    mean = lambda theta, held: jnp.mean(jax.vmap(lambda task: inner(theta, held, task))(INNER))
    np.testing.assert_allclose(
        gradient_of(built("reptile", 1), theta, INNER, OUTER), STEP * jax.grad(mean)(theta, theta), atol=1e-14
    )


def test_imaml_is_maml_of_the_tied_problem_with_many_steps():
    theta = jnp.asarray(THETA)

    def tied(x, theta, task):
        return inner(x, theta, task) + 0.35 * jnp.sum((x - theta) ** 2)

    implicit = gradient_of(built("imaml", 200), theta, INNER, OUTER)
    np.testing.assert_allclose(implicit, gradient_of(built("maml", 200, tied), theta, INNER, OUTER), atol=1e-9)
    # A learned penalty: its gradient is that of the closed form.
    both = {"start": theta, "penalty": jnp.asarray(0.7)}
    hyper = h.imaml(
        lambda x, theta, task: plain(x, theta, task),
        lambda x, theta, centre: 0.5 * jnp.sum((x - centre) ** 2),
        num_steps=200, step_size=STEP, penalty=lambda theta: theta["penalty"], start=lambda theta: theta["start"],
    )  # fmt: skip

    def value(both):
        lam, start = both["penalty"], both["start"]
        x = jax.vmap(lambda task: jnp.linalg.solve(task["H"] + lam * ONE, task["H"] @ task["b"] + lam * start))(INNER)
        return 0.5 * jnp.mean(jnp.sum((x - OUTER) ** 2, axis=1))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
        gradient_of(hyper, both, INNER, OUTER), jax.grad(value)(both),
    )  # fmt: skip


def test_imaml_tells_how_well_it_solved():
    theta = jnp.asarray(THETA)
    few = built("imaml", 2, linear_solver=odl.linear.cg(max_steps=1))
    _, _, info = few.update(theta, few.init(theta, None, INNER, OUTER), INNER, OUTER)
    assert int(info.status) == odl.Status.STEP_BUDGET_SPENT
    assert float(info.adjoint_residual) > 1e-3
    assert float(info.inner_residual) > 1e-3
    many = built("imaml", 200)
    _, _, info = many.update(theta, many.init(theta, None, INNER, OUTER), INNER, OUTER)
    assert int(info.status) == odl.Status.COMPLETED
    assert max(float(info.adjoint_residual), float(info.inner_residual)) < 1e-11


def test_anil_is_maml_restricted_to_the_head():
    """A network whose body is shared: MAML on head and body with the body's inner gradient masked."""
    theta = {"body": jnp.asarray(RNG.standard_normal((2, SIZE))), "head": jnp.asarray([0.3, -0.8])}
    inputs, targets = jnp.asarray(RNG.standard_normal((N, 4, SIZE))), jnp.asarray(RNG.standard_normal((N, 4)))
    data = ({"in": inputs, "out": targets}, {"in": inputs + 0.1, "out": targets})

    def fit(head, body, task):
        return jnp.mean((jnp.tanh(task["in"] @ body.T) @ head - task["out"]) ** 2)

    ours = h.anil(
        lambda head, theta, task: fit(head, theta["body"], task),
        lambda head, theta, task: fit(head, theta["body"], task),
        start=lambda theta: theta["head"], num_steps=3, step_size=STEP,
    )  # fmt: skip
    masked = h.maml(
        lambda x, theta, task: fit(x["head"], jax.lax.stop_gradient(x["body"] - theta["body"]) + theta["body"], task),
        lambda x, theta, task: fit(x["head"], x["body"], task),
        num_steps=3, step_size=STEP,
    )  # fmt: skip
    a, b = gradient_of(ours, theta, *data), gradient_of(masked, theta, *data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), a, b)
    # A head that is everything is MAML.
    whole = lambda x, theta, task: fit(x["head"], x["body"], task)
    full = {"num_steps": 3, "step_size": STEP}
    a = gradient_of(h.anil(whole, whole, start=lambda theta: theta, **full), theta, *data)
    b = gradient_of(h.maml(whole, whole, **full, checkpoint_every=2), theta, *data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), a, b)


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "imaml"])
def test_no_data_is_one_task(name):
    task, centre = jax.tree.map(lambda leaf: leaf[0], INNER), OUTER[0]
    alone = getattr(h, name)(
        lambda x, theta: inner(x, theta, task), lambda x, theta: outer(x, theta, centre),
        num_steps=3, step_size=STEP, **({"penalty": 0.7} if name == "imaml" else {}),
    )  # fmt: skip
    theta = jnp.asarray(THETA)
    data = (jax.tree.map(lambda leaf: leaf[:1], INNER), OUTER[:1])
    np.testing.assert_allclose(gradient_of(alone, theta), gradient_of(built(name, 3), theta, *data), atol=1e-14)
    assert alone.update(theta, alone.init(theta))[2].x.shape == (SIZE,)


def test_an_inner_step_size_is_learned():
    """Through the steps, by finite differences."""
    theta = {"start": jnp.asarray(THETA), "log_step": jnp.asarray(np.log(STEP))}
    hyper = h.maml(
        plain, lambda x, theta, centre: 0.5 * jnp.sum((x - centre) ** 2),
        num_steps=3, step_size=lambda theta: jnp.exp(theta["log_step"]), start=lambda theta: theta["start"],
    )  # fmt: skip
    update = jax.jit(lambda theta: hyper.update(theta, hyper.init(theta, None, INNER, OUTER), INNER, OUTER)[::2])
    gradient, _ = update(theta)
    at = lambda e: float(update(theta | {"log_step": theta["log_step"] + e})[1].value)
    np.testing.assert_allclose(gradient["log_step"], (at(1e-4) - at(-1e-4)) / 2e-4, rtol=1e-6)


def test_tasks_must_match():
    theta = jnp.asarray(THETA)
    with pytest.raises(ValueError, match="the inner data hold 5, the outer data 4"):
        built("maml", 1).init(theta, None, INNER, OUTER[:4])
    with pytest.raises(ValueError, match="penalty must lie in"):
        built("imaml", 1, penalty=0.0)
