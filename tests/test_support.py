"""Derivatives on the support: closed forms of sparse problems, the dense implicit derivative, finite differences."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import odljax as odl
from odljax import Status, linear, prox
from odljax.operators import Operator

N, P = 20, 12
RNG = np.random.default_rng(0)
A = RNG.standard_normal((N, P)) / np.sqrt(N)
TRUTH = np.array([1.0, -2.0, 0, 0, 1.5, 0, 0, 0, 0, 0, 0.5, 0])
B = A @ TRUTH + 0.1 * RNG.standard_normal(N)
SIGNS = np.sign(B)
STEP = float(1 / np.linalg.norm(A, 2) ** 2)
TARGET = RNG.standard_normal(P)
CAPACITY = 9  # a little more than any support below

THETA = {"lam": jnp.asarray(0.1), "gamma": jnp.asarray(0.7), "A": jnp.asarray(A), "b": jnp.asarray(B)}


def solved(iteration):
    return odl.until_converged(iteration, tol=1e-13, max_steps=5000)


def standing(iteration):
    """For starts at the solution: the derivative does not know the road, and one step compiles faster."""
    return odl.for_steps(iteration, 1)


def squares(x, theta):
    return 0.5 * jnp.sum((theta["A"] @ x - theta["b"]) ** 2)


def columns(theta, indices):
    return theta | {"A": theta["A"][:, indices]}


def l1(v, theta, step_size):
    return prox.l1(v, theta["lam"], step_size)


def elastic(v, theta, step_size):
    return prox.elastic_net(v, (theta["lam"], theta["gamma"]), step_size)


def logistic(x, theta):
    return jnp.sum(jax.nn.softplus(-jnp.asarray(SIGNS) * (theta["A"] @ x)))


# name: (smooth part, prox, step)
PROBLEMS = {
    "lasso": (squares, l1, STEP),
    "elastic net": (squares, elastic, STEP),
    "sparse logistic": (logistic, l1, 4 * STEP),
}


def walk(name):
    return odl.proximal_gradient(*PROBLEMS[name])


def restricted(name):
    """The same steps from the columns of the support alone."""
    operator = walk(name).operator
    return lambda indices: Operator(
        lambda x, theta: operator(x, columns(theta, indices)),
        lambda x, theta: operator.displacement(x, columns(theta, indices)),
    )


@functools.cache
def solution(name):
    with jax.ensure_compile_time_eval():  # whoever asks first may be traced
        x = np.asarray(jax.jit(solved(walk(name)))(jnp.zeros(P), THETA).x)
    assert 3 <= np.count_nonzero(x) < CAPACITY
    return x


def closed_form(name, theta, order=1):
    """The solution near theta, of which support and signs are known: Newton's method on its equations."""
    start = solution(name)
    support, signs = np.flatnonzero(start), np.sign(start[start != 0])
    smooth, _, _ = PROBLEMS[name]
    on = columns(theta, support)

    def value(x):
        ridge = 0.5 * theta["lam"] * theta["gamma"] * jnp.sum(x**2) if name == "elastic net" else 0.0
        return smooth(x, on) + theta["lam"] * jnp.sum(signs * x) + ridge

    x = jnp.asarray(start[support])
    for _ in range(order):  # the start is exact, and each step makes one more derivative right
        x = x - jnp.linalg.solve(jax.hessian(value)(x), jax.grad(value)(x))
    return jnp.zeros(P).at[support].set(x)


def outer(x, theta):
    return jnp.sum((x - TARGET) ** 2) + jnp.sum(x**3) * theta["lam"]


def value_of(solver, x0, theta):
    return outer(solver(x0, theta).x, theta)


WAYS = {
    "gmres": {},
    "bicgstab": {"linear_solver": linear.bicgstab()},
    "cg": {"symmetric": True},
    "restrict, cg": {"symmetric": True, "restrict": restricted},
    "restrict, dense": {"linear_solver": linear.dense(), "restrict": restricted},
}
CASES = [("lasso", way) for way in WAYS if way != "bicgstab"]
CASES += [("elastic net", "bicgstab"), ("elastic net", "restrict, cg"), ("sparse logistic", "restrict, cg")]


def on_support(name, way="restrict, cg", capacity=CAPACITY, stop=standing, **more):
    options = WAYS[way] | more
    if "restrict" in options:
        options = options | {"restrict": options["restrict"](name)}
    return odl.on_support(stop(walk(name)), capacity, **options)


def close(got, want, tolerance=1e-9):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


# ---- exact on the support --------------------------------------------------------------------------------------------


@functools.cache
def reference(name):
    """Gradient and Jacobian product of the closed form."""
    direction = jax.tree.map(lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape)), THETA)
    value = lambda theta: outer(closed_form(name, theta), theta)
    push = jax.jvp(lambda theta: closed_form(name, theta), (THETA,), (direction,))[1]
    return jax.tree.map(np.asarray, (jax.jit(jax.grad(value))(THETA), direction, push))


@pytest.mark.parametrize(("name", "way"), CASES)
def test_both_modes_are_those_of_the_closed_form(name, way):
    solver, x = on_support(name, way), jnp.asarray(solution(name))
    gradient, direction, want = reference(name)

    @jax.jit
    def both(theta, direction):
        push = jax.jvp(lambda theta: solver(x, theta).x, (theta,), (direction,))[1]
        return jax.grad(functools.partial(value_of, solver, x))(theta), push

    got, push = both(THETA, direction)
    close(got, gradient)
    close(push, want)
    assert (np.asarray(push)[solution(name) == 0] == 0).all()


def lasso_slope(x):
    """dx_S / dlam = -(A_S' A_S)^-1 sign(x_S)."""
    support, slope = np.flatnonzero(x), np.zeros(P)
    on = A[:, support]
    slope[support] = -np.linalg.solve(on.T @ on, np.sign(x[support]))
    return slope


def test_hessians():
    solver, x = on_support("elastic net"), jnp.asarray(solution("elastic net"))
    few = {"lam": THETA["lam"], "gamma": THETA["gamma"]}
    value = lambda few: value_of(solver, x, THETA | few)
    hessian = jax.jit(jax.hessian(value))(few)
    want = jax.jit(jax.hessian(lambda few: outer(closed_form("elastic net", THETA | few, 2), THETA | few)))(few)
    close(hessian, want)


def grouped(theta):
    return odl.proximal_gradient(
        lambda x, theta: squares(x.ravel(), theta),
        lambda v, theta, step_size: prox.group_lasso(v, theta["lam"], step_size),
        STEP,
    )


def smooth_groups(indices):
    """The objective of the group lasso on its support, where it is smooth."""

    def objective(x, theta):
        norms = jax.vmap(lambda row: jnp.where(jnp.any(row != 0), jnp.sum(row**2), 0.0))(x.reshape(-1, 3))
        positive = norms > 0
        lengths = jnp.where(positive, jnp.sqrt(jnp.where(positive, norms, 1.0)), 0.0)
        return squares(x, columns(theta, indices)) + theta["lam"] * jnp.sum(lengths)

    return odl.operators.gradient(objective, STEP)


@pytest.mark.parametrize(
    "options",
    [{"linear_solver": linear.bicgstab()}, {"symmetric": True, "restrict": smooth_groups}],
    ids=["T", "objective"],
)
def test_group_lasso_against_finite_differences_and_dense(options):
    theta = THETA | {"lam": jnp.asarray(0.55)}
    base, plain, start = standing(grouped(theta)), jax.jit(solved(grouped(theta))), jnp.zeros((4, 3))
    x = plain(start, theta).x
    active = np.asarray(jnp.any(x != 0, axis=1))
    assert 1 < active.sum() < 4
    solver = odl.on_support(base, 9, rows=True, **options)
    value = lambda solver: lambda theta, x0: outer(solver(x0, theta).x.ravel(), theta)
    got = jax.jit(jax.grad(value(solver)))(theta, x)
    dense = jax.jit(jax.grad(value(odl.implicit(base, linear.dense()))))(theta, x)
    close(got, dense)
    h = 1e-5
    at = [
        outer(plain(x, theta | {"lam": theta["lam"] + s}).x.ravel(), theta | {"lam": theta["lam"] + s}) for s in (h, -h)
    ]
    np.testing.assert_allclose(got["lam"], (at[0] - at[1]) / (2 * h), rtol=1e-7)


def test_a_row_is_active_as_a_whole():
    """A column of zeros holds one entry of an active group at zero: it belongs to the support all the same."""
    theta = THETA | {"lam": jnp.asarray(0.3), "A": THETA["A"].at[:, 1].set(0.0)}
    base = standing(grouped(theta))
    solver = odl.on_support(base, 12, linear.bicgstab(), rows=True)
    x = jax.jit(solved(grouped(theta)))(jnp.zeros((4, 3)), theta).x
    assert x[0, 1] == 0
    assert x[0, 0] != 0
    value = lambda solver: lambda theta: outer(solver(x, theta).x.ravel(), theta)
    close(*(jax.jit(jax.grad(value(s)))(theta) for s in (solver, odl.implicit(base, linear.dense()))))


# ---- bounds that move ------------------------------------------------------------------------------------------------

Q = (lambda F: F @ F.T + 0.3 * np.eye(8))(np.random.default_rng(5).standard_normal((8, 3)))
BOX = {"C": jnp.asarray(0.8), "Q": jnp.asarray(Q)}


def dual(Q, rows=slice(None), rest=None):
    """The dual of a support vector machine without bias, on some rows, the rest held."""
    step = 0.9 / np.linalg.norm(np.asarray(BOX["Q"]), 2)

    def objective(a, theta):
        linear_part = 1.0 if rest is None else 1.0 - (0.5 * (theta["Q"] + theta["Q"].T) @ rest)[rows]
        part = theta["Q"] if rest is None else theta["Q"][rows][:, rows]
        return 0.5 * a @ (part @ a) - jnp.sum(linear_part * a)

    return odl.proximal_gradient(objective, lambda v, theta, _: prox.box(v, (0.0, theta["C"])), step)


def inside(a, theta):
    return (a > 0) & (a < theta["C"])


def box_loss(a, theta):
    return jnp.sum(jnp.sin(a)) * theta["C"]


@functools.cache
def dual_solution():
    """The solution, and the gradient of the loss by the dense implicit derivative."""
    a = jax.jit(solved(dual(None)))(jnp.zeros(8), BOX).x
    solver = odl.implicit(standing(dual(None)), linear.dense())
    return np.asarray(a), jax.jit(jax.grad(lambda theta: box_loss(solver(a, theta).x, theta)))(BOX)


@pytest.mark.parametrize(
    "restrict", [None, lambda indices, rest: dual(None, indices, rest).operator], ids=["T", "restricted"]
)
def test_dual_support_vector_machine(restrict):
    """Entries at C move with C, and pull those inside: d a_S / dC = -Q_SS^-1 Q_SB 1."""
    solver = odl.on_support(standing(dual(None)), 6, active=inside, symmetric=True, restrict=restrict)
    a, dense = dual_solution()
    held, free = np.isclose(a, 0.8, atol=1e-14), (a > 0) & (a < 0.8)
    assert held.sum() >= 2
    assert free.sum() >= 2
    want = held.astype(float)
    want[free] = -np.linalg.solve(Q[np.ix_(free, free)], Q[np.ix_(free, held)].sum(1))
    close(jax.jit(jax.jacfwd(lambda C: solver(jnp.asarray(a), BOX | {"C": C}).x))(BOX["C"]), want)
    close(jax.jit(jax.grad(lambda theta: box_loss(solver(jnp.asarray(a), theta).x, theta)))(BOX), dense)
    pull = jax.jit(lambda cotangent: solver.adjoint.pull_back(jnp.asarray(a), BOX, cotangent, None))
    moved, adjoint, info = pull(jnp.cos(a) * BOX["C"])
    close(moved["Q"], dense["Q"])
    assert (np.asarray(adjoint)[held] == 0).all()
    assert Status(int(info.status)) is Status.CONVERGED


# ---- transforms ------------------------------------------------------------------------------------------------------


def test_vmap_over_different_supports():
    solver = on_support("lasso", capacity=P, stop=solved)
    answer = lambda lam: solver(jnp.zeros(P), THETA | {"lam": lam}).x
    push = jax.jit(jax.vmap(lambda lam: jax.jvp(answer, (lam,), (jnp.ones(()),))))
    pull = jax.jit(jax.vmap(jax.grad(lambda lam: TARGET @ answer(lam))))
    lams = jnp.asarray([0.05, 0.2, 0.5, 20.0])
    points, slopes = push(lams)
    assert len({int(jnp.sum(x != 0)) for x in points}) == 4
    assert not points[3].any()
    for x, slope, product in zip(points, slopes, pull(lams), strict=True):
        close(slope, lasso_slope(np.asarray(x)))
        close(product, TARGET @ lasso_slope(np.asarray(x)))


def test_data_may_be_closed_over():
    """The matrix is a tracer of the outer function, in the loss and in the restricted problem."""

    def value(matrix):
        inner = lambda matrix: odl.proximal_gradient(
            lambda x, lam: 0.5 * jnp.sum((matrix @ x - B) ** 2), lambda v, lam, t: prox.l1(v, lam, t), STEP
        )
        restrict = lambda indices: inner(matrix[:, indices]).operator
        solver = odl.on_support(standing(inner(matrix)), CAPACITY, symmetric=True, restrict=restrict)
        return jnp.sum((solver(jnp.asarray(solution("lasso")), 0.1).x - TARGET) ** 2)

    truth = lambda matrix: jnp.sum((closed_form("lasso", THETA | {"A": matrix}) - TARGET) ** 2)
    close(*(jax.jit(jax.grad(function))(THETA["A"]) for function in (value, truth)))


def test_trees_and_dtypes():
    """The entries of both leaves are counted as one vector; each leaf keeps its dtype."""

    def objective(x, theta):
        return squares(jnp.concatenate([x["one"], x["rest"].ravel().astype(float)]), theta)

    def shrink(v, theta, step_size):
        return jax.tree.map(lambda leaf: prox.l1(leaf, theta["lam"].astype(leaf.dtype), step_size), v)

    x0 = {"one": jnp.zeros(4), "rest": jnp.zeros((2, 4), jnp.float32)}
    base = odl.for_steps(odl.proximal_gradient(objective, shrink, STEP), 400)
    solver = odl.on_support(base, CAPACITY, linear.cg(tol=1e-6), symmetric=True)

    @jax.jit
    def value(lam):
        x = solver(x0, THETA | {"lam": lam}).x
        return jnp.concatenate([x["one"], x["rest"].ravel().astype(float)]), x

    slope, x = jax.jit(jax.jacrev(value, has_aux=True))(THETA["lam"])
    assert (x["one"].dtype, x["rest"].dtype) == (np.float64, np.float32)
    close(slope, lasso_slope(solution("lasso")), 1e-4)


def test_no_x64(float32_only):
    solver = odl.on_support(odl.for_steps(walk("lasso"), 400), CAPACITY, symmetric=True, restrict=restricted("lasso"))
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), THETA)

    def both(lam):
        x = solver(jnp.zeros(P), theta | {"lam": lam}).x
        return x, x

    slope, x = jax.jit(jax.jacrev(both, has_aux=True))(theta["lam"])
    assert slope.dtype == jnp.float32
    close(slope, lasso_slope(np.asarray(x)), 1e-4)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def inner_jaxprs(jaxpr):
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield equation.primitive.name, inner
                    yield from inner_jaxprs(inner)


def sizes_in_loops(way):
    """The axes of all arrays in the loop of the adjoint solve."""
    solver = on_support("lasso", way, capacity=7)
    pull = lambda x, theta, cotangent: solver.adjoint.pull_back(x, theta, cotangent, None)
    jaxpr = jax.make_jaxpr(pull)(jnp.asarray(solution("lasso")), THETA, jnp.ones(P)).jaxpr
    axes, carried = set(), set()
    for name, inner in inner_jaxprs(jaxpr):
        if name == "while":
            carried |= {axis for var in inner.outvars for axis in var.aval.shape}
            axes |= {axis for equation in inner.eqns for var in equation.outvars for axis in var.aval.shape}
    return axes, carried


def test_the_adjoint_solve_sees_vectors_of_the_capacity():
    axes, carried = sizes_in_loops("restrict, cg")
    assert max(carried) == 7  # the rest are the few numbers that conjugate gradients note of the matrix
    assert {7, N} <= axes  # the support's columns and the data's rows
    assert P not in axes
    axes, carried = sizes_in_loops("cg")
    assert max(carried) == 7
    assert P in axes  # the products are those of T


def test_no_more_products_than_the_support_has_entries():
    x = jnp.asarray(solution("lasso"))
    solver = on_support("lasso")
    info = jax.jit(lambda x: solver.adjoint.pull_back(x, THETA, jnp.asarray(TARGET), None)[2])(x)
    assert int(info.num_steps) <= np.count_nonzero(solution("lasso")) + 1


# ---- estimators ------------------------------------------------------------------------------------------------------


@functools.cache
def pulled(way):
    solver = on_support("lasso", way)
    return jax.jit(lambda x, theta, guess: solver.adjoint.pull_back(x, theta, jnp.asarray(TARGET), guess))


@pytest.mark.parametrize("way", ["restrict, cg", "bicgstab"])
def test_the_adjoint_starts_warm(way):
    pull, x = pulled(way), jnp.asarray(solution("lasso"))
    moved, adjoint, cold = pull(x, THETA, jnp.zeros(P))
    assert (np.asarray(adjoint)[solution("lasso") == 0] == 0).all()
    again, _, warm = pull(x, THETA, adjoint)
    close(again, moved)
    assert int(warm.num_steps) == 0 < int(cold.num_steps)
    other = THETA | {"lam": jnp.asarray(0.3)}  # another support
    there = jax.jit(solved(walk("lasso")))(x, other).x
    assert np.count_nonzero(there) != np.count_nonzero(x)
    close(pull(there, other, adjoint)[0], pull(there, other, jnp.zeros(P))[0])


def test_estimators_report_the_adjoint():
    solver = on_support("lasso")
    for make in (odl.hypergradients.through, odl.hypergradients.warm_started):
        hyper = make(solver, outer)
        gradient, _, info = jax.jit(hyper.update)(THETA, hyper.init(THETA, jnp.asarray(solution("lasso"))))
        close(gradient, reference("lasso")[0])
        assert Status(int(info.status)) is Status.COMPLETED
        assert float(info.adjoint_residual) < 1e-11
    with pytest.raises(ValueError, match=r"a learned start needs .* on_support\(.* differentiates at the solution"):
        odl.hypergradients.through(solver, outer, start=lambda theta: theta["b"])


# ---- never silently wrong --------------------------------------------------------------------------------------------


def finished(call):
    result = jax.block_until_ready(call())
    jax.effects_barrier()  # the warning comes from the host
    return result


def test_a_support_beyond_the_capacity_is_nan_and_reported():
    solver = on_support("lasso", capacity=3)
    size = np.count_nonzero(solution("lasso"))
    x = jnp.asarray(solution("lasso"))
    value = jax.jit(jax.value_and_grad(lambda lam: value_of(solver, x, THETA | {"lam": lam})))
    with pytest.warns(RuntimeWarning, match=f"on_support: the support has {size} entries and the capacity is 3"):
        got, slope = finished(lambda: value(THETA["lam"]))
    assert np.isfinite(got)
    assert np.isnan(slope)
    hyper = odl.hypergradients.warm_started(solver, outer)
    state = hyper.init(THETA, x)
    gradient, state, info = jax.jit(hyper.update)(THETA, state)
    assert np.isnan(gradient["A"]).all()
    assert Status(int(info.status)) is Status.NON_FINITE
    assert np.isfinite(state.adjoint).all()  # not a start for the next
    kept = odl.hypergradients.through(solver, outer, on_adjoint_failure="zero")
    assert float(jax.jit(kept.update)(THETA, kept.init(THETA, x))[0]["lam"]) == 0.0


def test_in_a_batch_only_the_overfull_support_fails():
    solver = on_support("lasso", "cg", capacity=4, stop=solved)
    slope = jax.jit(jax.vmap(jax.grad(lambda lam: value_of(solver, jnp.zeros(P), THETA | {"lam": lam}))))
    with pytest.warns(RuntimeWarning, match="on_support: in 1 of 2 elements, first the support has") as caught:
        got = finished(lambda: slope(jnp.asarray([0.05, 0.6])))
    assert len(caught) == 1
    assert np.isnan(got[0])
    assert np.isfinite(got[1])


def test_an_accidental_zero_is_found_out():
    """A smooth problem: its zero moves, so it is no support that the derivative may be restricted to."""
    hessian = jnp.asarray([[2.0, 1.0], [1.0, 3.0]])
    objective = lambda x, theta: 0.5 * x @ (hessian @ x) - theta * (2.0 * x[0] + x[1])
    solver = odl.on_support(standing(odl.gradient_descent(objective, 0.25)), 2, linear.bicgstab())
    start = jnp.asarray([1.0, 0.0])
    with pytest.warns(RuntimeWarning, match=r"on_support: the adjoint solve failed \(STALLED"):
        finished(lambda: jax.jit(jax.grad(lambda theta: jnp.sum(solver(start, theta).x)))(1.0))
    hyper = odl.hypergradients.through(solver, lambda x, theta: jnp.sum(x))
    _, _, info = jax.jit(hyper.update)(1.0, hyper.init(1.0, start))
    assert info.x.tolist() == [1.0, 0.0]
    assert Status(int(info.status)) is Status.STALLED
    assert float(info.adjoint_residual) > 0.05


def test_nan_stays_and_silence_can_be_had():
    solver, x = on_support("lasso", capacity=3, on_failure="ignore"), jnp.asarray(solution("lasso")).at[2].set(jnp.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope = finished(lambda: jax.jit(jax.grad(functools.partial(value_of, solver, x)))(THETA))
    assert np.isnan(slope["lam"])


def test_messages():
    base = solved(walk("lasso"))
    with pytest.raises(ValueError, match="on_support: capacity must be a whole number of at least 1; 0 came"):
        odl.on_support(base, 0)
    with pytest.raises(TypeError, match=r"on_support: cg needs a symmetric .* or pass symmetric=True if it is"):
        odl.on_support(base, 3, linear.cg())
    with pytest.raises(TypeError, match=r"needs an operator, and layered.* has none"):
        odl.on_support(odl.for_steps(odl.layered(lambda x, theta: x), 2), 3)
    with pytest.raises(TypeError, match=r"restrict must be a function of \(indices, rest\)"):
        odl.on_support(base, 3, restrict=lambda indices: None, active=lambda x, theta: x > 0)
    with pytest.raises(ValueError, match="on_failure must be 'warn', 'ignore' or 'raise'; 'stop' came"):
        odl.on_support(base, 3, on_failure="stop")
    for mask, words in (
        (lambda x, theta: x, "booleans of the shape of x"),
        (lambda x, theta: (x > 0,), "a mask like x"),
    ):
        with pytest.raises(TypeError, match=f"on_support: active must return {words}"):
            odl.on_support(base, 3, active=mask)(jnp.zeros(P), THETA)
    wrong = odl.on_support(base, 3, restrict=lambda indices: lambda x, theta: x[:1])
    with pytest.raises(TypeError, match="must keep the shapes and dtypes of x"):
        wrong(jnp.zeros(P), THETA)
