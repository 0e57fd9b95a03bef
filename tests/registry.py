"""The rows of the derivative matrix: a newcomer adds one line here and is tested against everything."""

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
    "project": lambda p: odl.project(base(p), lambda x, theta: odl.prox.box(x, (-50.0, 50.0))),
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
}

SOLVERS = {
    "for_steps": lambda iteration: odl.for_steps(iteration, NUM_STEPS),
    "until_converged": lambda iteration: odl.until_converged(iteration, tol=1e-14, max_steps=NUM_STEPS),
}


# Pairs without a meaning: (iteration, derivative): reason.
EXCLUDED = {
    ("anderson", "truncated"): "at the solution Anderson's weights are ratios of rounding errors",
}


def triples():
    """Every meaningful iteration x derivative x problem."""
    for problem in PROBLEMS:
        for iteration, build in ITERATIONS.items():
            if build(PROBLEMS[problem]()) is None:
                continue
            for derivative in DERIVATIVES:
                if (iteration, derivative) not in EXCLUDED:
                    yield problem, iteration, derivative


def direction(theta, seed=3):
    leaves, structure = jax.tree.flatten(theta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(structure, [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in pairs])


def moved(theta, amount, along):
    return jax.tree.map(lambda leaf, d: leaf + jnp.asarray(amount, leaf.dtype) * d, theta, along)
