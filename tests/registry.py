"""The rows of the derivative matrix: a newcomer adds one line here and is tested against everything."""

import itertools

import jax
import jax.numpy as jnp
import optax

import odljax as odl

# Steps after which every iteration below has converged to rounding on every problem.
NUM_STEPS = 240

PROBLEMS = {
    "ridge": lambda dtype=None: odl.problems.ridge(30, 4, dtype=dtype),
    "quadratic": lambda dtype=None: odl.problems.quadratic(4.0, 3, dtype=dtype),
    "lasso": lambda dtype=None: odl.problems.lasso(40, 5, dtype=dtype),
    "line": lambda dtype=None: odl.problems.line(dtype=dtype),
    "square_root": lambda dtype=None: odl.problems.square_root(dtype=dtype),
    "tree": lambda dtype=None: odl.problems.tree(dtype=dtype),
    "partial": lambda dtype=None: partial(dtype),
}


def partial(dtype=None):
    """Theta moves one leaf, the outer loss sees the other: tangents and cotangents reach some leaves only."""
    start = jnp.zeros((), dtype or float)
    return odl.problems.Problem(
        name="partial",
        T=lambda x, theta: {"a": 0.5 * x["a"] + theta, "b": 0.25 * x["b"] + x["a"]},
        outer=lambda x, theta: jnp.sin(x["b"]),
        x0={"a": start, "b": start},
        theta=start + jnp.asarray(0.3, start.dtype),
        solution=lambda theta: {"a": 2 * theta, "b": 8 / 3 * theta},
    )


def base(problem):
    """The plainest iteration that knows the structure of the problem."""
    if problem.objective is None:
        return odl.fixed_point(problem.T)
    if problem.prox is not None:
        return odl.proximal_gradient(problem.objective, problem.prox, problem.step_size)
    return odl.gradient_descent(problem.objective, problem.step_size)


def smooth_only(build):
    return lambda p: build(p) if p.objective is not None and p.prox is None else None


def gap(p):
    """``x - T(x, theta)``: a residual that vanishes at the solution."""
    return lambda x, theta: jax.tree.map(jnp.subtract, x, p.T(x, theta))


def half_gap(p):
    """Half its square: an objective whose least value is zero."""
    return lambda x, theta: 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gap(p)(x, theta)))


def optimistix_newton(p):
    import optimistix

    dtype = jax.tree.leaves(p.x0)[0].dtype
    if dtype == jnp.bfloat16:  # which optimistix' linear solves do not know
        return None
    tight = float(jnp.finfo(dtype).eps) ** 0.6
    return odl.from_optimistix(optimistix.Newton(rtol=tight, atol=tight), gap(p), "root_find")


# A second word tells rows of one constructor apart.
ITERATIONS = {
    "fixed_point": lambda p: odl.fixed_point(p.T),
    "gradient_descent": smooth_only(lambda p: odl.gradient_descent(p.objective, p.step_size)),
    "proximal_gradient": lambda p: odl.proximal_gradient(p.objective, p.prox, p.step_size) if p.prox else None,
    "from_optax": smooth_only(lambda p: odl.from_optax(p.objective, optax.sgd(p.step_size, momentum=0.2))),
    "krasnoselskii_mann": lambda p: odl.krasnoselskii_mann(base(p), relaxation=0.9),
    "nesterov": lambda p: odl.nesterov(base(p), momentum=0.3),
    "heavy_ball": lambda p: odl.heavy_ball(base(p), momentum=0.2),
    # On the quadratically convergent map there is nothing to accelerate: differences vanish within three steps.
    "anderson": lambda p: odl.anderson(base(p), memory=3) if p.name != "square_root" else None,
    "anderson type_1": lambda p: (
        odl.anderson(base(p), memory=3, kind=1, safeguard=1.0) if p.name != "square_root" else None
    ),
    "project": lambda p: odl.project(base(p), lambda x, theta: odl.prox.box(x, (-50.0, 50.0))),
    # On a contraction the error falls like the weight.
    "halpern": lambda p: odl.halpern(base(p), weight=lambda k: 0.25 * 0.5 ** k.astype(float)),
    "nesterov restart": lambda p: odl.nesterov(base(p), restart=True),
    "broyden": lambda p: odl.broyden(base(p), memory=3),
    "squarem": lambda p: odl.squarem(base(p)),
    "best_so_far": lambda p: odl.best_so_far(odl.nesterov(base(p), momentum=0.3)),
    "line_search": smooth_only(
        lambda p: odl.line_search(odl.gradient_descent(p.objective, 1.9 * p.step_size), p.objective)
    ),
    "line_search hager_zhang": smooth_only(
        lambda p: odl.line_search(odl.gradient_descent(p.objective, p.step_size), p.objective, "hager_zhang")
    ),
    "backtracking": lambda p: (
        odl.backtracking(p.objective, p.prox, step_size=1.9 * p.step_size) if p.objective is not None else None
    ),
    "polyak": lambda p: odl.polyak(half_gap(p)),
    "newton": smooth_only(lambda p: odl.newton(p.objective)),
    "gauss_newton": lambda p: odl.gauss_newton(gap(p)),
    "levenberg_marquardt": lambda p: odl.levenberg_marquardt(gap(p)),
    "from_optimistix": optimistix_newton,
}

DERIVATIVES = {
    "implicit": lambda s: odl.implicit(s),
    "implicit(gmres)": lambda s: odl.implicit(s, odl.linear.gmres()),
    "implicit(bicgstab)": lambda s: odl.implicit(s, odl.linear.bicgstab()),
    "implicit(dense)": lambda s: odl.implicit(s, odl.linear.dense()),
    "implicit(neumann)": lambda s: odl.implicit(s, odl.linear.neumann(NUM_STEPS)),
    "unrolled": lambda s: odl.unrolled(s),
    "unrolled(checkpoint)": lambda s: odl.unrolled(s, checkpoint_every=16),
    "truncated": lambda s: odl.truncated(s, num_steps=200),
    "forward": lambda s: odl.forward(s),
    "on_support": lambda s: odl.on_support(s, 64),
}

SOLVERS = {
    "for_steps": lambda iteration: odl.for_steps(iteration, NUM_STEPS),
    "until_converged": lambda iteration: odl.until_converged(iteration, tol=1e-14, max_steps=NUM_STEPS),
}


# Pairs without a meaning: (iteration, derivative): reason.
EXCLUDED = {
    ("anderson", "truncated"): "at the solution Anderson's weights are ratios of rounding errors",
    ("anderson type_1", "truncated"): "as those of type II",
    ("from_optimistix", "truncated"): "its own stop test has come before the last steps, which leave it where it is",
    ("best_so_far", "truncated"): "the best came before the last steps, which leave it where it is",
    **{
        ("polyak", name): "the derivative of a step length that is a ratio of vanishing numbers need not settle"
        for name in ("unrolled", "unrolled(checkpoint)", "truncated", "forward")
    },
    **{
        (name, "implicit(neumann)"): "on the quadratic, J^T J has the squared condition: more terms than NUM_STEPS"
        for name in ("polyak", "gauss_newton", "levenberg_marquardt")
    },
}


def triples():
    """Triples problem, iteration, derivative in which every meaningful pair of two of them occurs.

    Each iteration meets each derivative once, on the problem that brings the most pairs not seen yet; what is left over
    is added. The linear solvers of ``implicit`` see a matrix and no iteration: each iteration meets two of them.
    """
    fits = {name: [p for p in PROBLEMS if build(PROBLEMS[p]()) is not None] for name, build in ITERATIONS.items()}
    others = [name for name in DERIVATIVES if name.startswith("implicit(")]
    skipped = {(it, d) for i, it in enumerate(ITERATIONS) for j, d in enumerate(others) if (i - j) % len(others)}
    pairs = [p for p in itertools.product(ITERATIONS, DERIVATIVES) if p not in EXCLUDED and p not in skipped]
    chosen, seen = [], set()

    def choose(candidates):
        new = lambda triple: len(set(itertools.combinations(triple, 2)) - seen)
        best = max(candidates, key=new)
        if new(best):
            seen.update(itertools.combinations(best, 2))
            chosen.append(best)

    for number, (iteration, derivative) in enumerate(pairs):
        turn = number % len(fits[iteration])
        choose([(p, iteration, derivative) for p in fits[iteration][turn:] + fits[iteration][:turn]])
    for iteration, derivative in pairs:
        for p in fits[iteration]:
            missing = {(p, iteration), (p, derivative)} - seen
            if missing:
                choose([(p, iteration, derivative)])
    return chosen


def direction(theta, seed=3):
    leaves, structure = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(structure, [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in pairs])


def moved(theta, amount, along):
    return jax.tree.map(lambda leaf, d: leaf + jnp.asarray(amount, leaf.dtype) * d, theta, along)
