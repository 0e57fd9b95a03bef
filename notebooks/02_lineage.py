# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lineage: the papers' own test problems, solved and failed
#
# Most papers on bilevel methods bring a small problem whose answer is known, because it shows what the method can do
# and earlier ones could not. Here are six of them, in `odl.problems`. On each, the methods for which theory promises
# the answer walk to it, and the others walk elsewhere: to where theory says that *they* end.
#
# Everywhere below, $x$ is the inner variable, $\theta$ the hyper-variable, $f$ the inner loss and $F$ the outer one.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import odljax as odl

jax.config.update("jax_enable_x64", True)
h = odl.hypergradients
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.titlesize": 10, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8})
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
ORANGE, PINK, GREY, INK = "#D55E00", "#CC79A7", "#8A8A8A", "#222222"


def number(k):
    return k.astype(float) + 1


def walk(hyper, problem, rate, num_updates, theta=None, x0=None):
    """Projected gradient descent on theta: every theta and every inner iterate on the way, the start first.

    Methods that do not see theta in the inner problem are shown, too: ``allow_unused``.
    """
    theta = problem.theta if theta is None else jnp.asarray(theta, float)
    x0 = problem.x0 if x0 is None else jnp.asarray(x0, float)
    project = getattr(problem, "project", lambda theta: theta)

    def body(carry, k):
        theta, state = carry
        gradient, state, info = hyper.update(theta, state)
        size = rate(k) if callable(rate) else rate
        theta = project(theta - size * gradient)
        return (theta, state), (theta, info.x)

    @jax.jit
    def run():
        _, path = jax.lax.scan(body, (theta, hyper.init(theta, x0, allow_unused=True)), jnp.arange(num_updates))
        return path

    thetas, xs = run()
    return np.concatenate([[theta], thetas]), np.concatenate([[x0], xs])


def implicit(problem, step_size=0.5, max_steps=200):
    steps = odl.gradient_descent(problem.inner, step_size=step_size)
    return h.warm_started(odl.implicit(odl.until_converged(steps, tol=1e-9, max_steps=max_steps)), problem.outer)


def show(path, axes, name, colour, every=1, **style):
    """A trajectory in the (theta, x) plane: a line, its start open, its end filled."""
    thetas, xs = path[0][::every], np.reshape(path[1], (len(path[1]), -1))[::every, 0]
    axes.plot(thetas, xs, color=colour, lw=1.4, label=name, zorder=3, **style)
    axes.plot(thetas[0], xs[0], "o", ms=5, mfc="white", mec=colour, zorder=4)
    axes.plot(path[0][-1], np.reshape(path[1][-1], -1)[0], "o", ms=6, color=colour, mec="white", mew=0.6, zorder=5)


def landscape(axes, problem, thetas, xs, levels=18):
    """The contours of the outer loss in the (theta, x) plane."""
    value = jax.vmap(lambda x: jax.vmap(lambda t: problem.outer(jnp.full(problem.x0.shape, x), t))(thetas))(xs)
    axes.contourf(thetas, xs, value, levels=levels, cmap="Greys", alpha=0.35, zorder=0)
    axes.set(xlabel=r"$\theta$", ylabel="$x$", xlim=(thetas[0], thetas[-1]), ylim=(xs[0], xs[-1]))


def star(axes, theta, x):
    axes.plot(theta, x, "*", ms=15, color="#F0C000", mec=INK, mew=0.8, zorder=6)


# %% [markdown]
# ## 1. Strongly convex: everyone who is right agrees
#
# The problem of sl-BAMM: $f = x^2/2 - \theta x$, $F = x^2/2 + (\theta - 1)^2/2$, with answer $\theta = 1/2$, from
# the start $(2, 2)$. Implicit differentiation, penalties, barriers and envelopes all arrive, first-order ones at the
# pace of their penalty. Three do not, and end where a line of algebra puts them:
#
# - *alternating* descent takes the partial derivative of $F$ for the total one, and ends at 1;
# - *DARTS* replaces the inverse Hessian by a step $s = 1/2$, and ends at $1/(1 + s) = 2/3$;
# - *BAMM with the paper's weight* $\mu_k = 0.9\,(k+1)^{-1/10}$ is at $1/(1 + (1 - \mu_k)^2)$: on its way, but after
#   2,000 updates $\mu$ is still 0.42. With $\mu_k = 0.9/(k+1)$ it arrives.

# %%
problem = odl.problems.lineage_bamm()
f, F = problem.inner, problem.outer


def grow(k):
    return jnp.minimum(number(k), 200.0)


def shrink(k):
    return 0.1 / jnp.sqrt(number(k))


right = {
    "implicit": (implicit(problem), 0.1, BLUE),
    "SOBA": (h.soba(f, F, step_size=0.5), 0.1, SKY),
    "BAMM, weight 0.9/(k+1)": (h.bamm(f, F, step_size=0.5, weight=lambda k: 0.9 / number(k)), 0.1, GREEN),
    "PBGD": (h.pbgd(f, F, step_size=0.5, penalty=grow), lambda k: 0.5 / (1 + grow(k)), YELLOW),
    "BOME": (h.bome(f, F, step_size=shrink, inner_step_size=0.5), shrink, ORANGE),
    "BVFSM": (h.bvfsm(f, F, step_size=0.5), 0.1, PINK),
    "MEHA": (h.meha(f, F, step_size=0.3, penalty=lambda k: 2 * number(k) ** 0.49), 0.3, GREY),
}
wrong = {
    "alternating": (h.alternating(f, F, step_size=0.5), 1.0, ORANGE),
    "DARTS, one step": (h.finite_difference(f, F, step_size=0.5), 2 / 3, PINK),
    "BAMM, the paper's weight": (h.bamm(f, F, step_size=0.5), None, GREEN),
}
figure, (left, middle, right_axes) = plt.subplots(1, 3, figsize=(11.5, 3.5), width_ratios=(1.05, 1, 1.15))
landscape(left, problem, np.linspace(-0.2, 2.2, 80), np.linspace(-0.2, 2.2, 80))
left.plot([-0.2, 2.2], [-0.2, 2.2], color=INK, lw=0.8, ls=":", label="inner solutions $x = \\theta$")
star(left, 0.5, 0.5)
for name, (hyper, rate, colour) in right.items():
    path = walk(hyper, problem, rate, 2000)
    middle.loglog(np.arange(1, 2002), np.abs(path[0][:, 0] - 0.5) + 1e-17, color=colour, lw=1.4, label=name)
    print(f"{name:26s} theta = {path[0][-1, 0]:.6f}")
    if name in ("SOBA", "BOME", "PBGD"):
        show((path[0][:, 0], path[1]), left, name, colour)
for name, (hyper, end, colour) in wrong.items():
    path = walk(hyper, problem, 0.1, 2000)
    right_axes.semilogx(np.arange(1, 2002), path[0][:, 0], color=colour, lw=1.6, label=name)
    print(f"{name:26s} theta = {path[0][-1, 0]:.6f}")
    if end is None:
        mu = 0.9 / np.arange(1, 2002) ** 0.1
        right_axes.plot(np.arange(1, 2002), 1 / (1 + (1 - mu) ** 2), color=INK, ls="--", lw=0.8, label="predicted end")
    else:
        right_axes.axhline(end, color=INK, ls="--", lw=0.8)
    if name == "alternating":
        show((path[0][:, 0], path[1]), left, name, PINK)
right_axes.axhline(0.5, color="#C09000", lw=1.2, label="the answer")
left.set_title("Outer loss and trajectories")
left.legend(loc="lower right", fontsize=7)
middle.set(xlabel="update", ylabel=r"$|\theta - 1/2|$", ylim=(1e-9, 5), title="Promised, and kept")
middle.legend(fontsize=6.5, loc="lower left")
right_axes.set(xlabel="update", ylabel=r"$\theta$", ylim=(0.4, 2.05), title="Not promised: predicted ends")
right_axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 2. Merely convex: the outer loss must choose
#
# Problem $P_0$: $f = u_1^2/2 - \theta u_1$ leaves $u_2$ free, $F = (\theta - u_2)^2/2 + (u_1 - 1)^2/2$, and the answer
# is $\theta = u_1 = u_2 = 1$. An implicit gradient never moves $u_2$ from its start 0.01 and ends at $(1 + 0.01)/2$.
# BAMM averages the two losses, HODL averages their steps: both move $u_2$, and arrive as the weight dies out.

# %%
problem = odl.problems.p_c(0.0)
f, F = problem.objective, problem.outer
operator = odl.operators.gradient(f, step_size=0.5)
chosen = {
    "SOBA": (h.soba(f, F, step_size=0.5), 0.05, 3000, ORANGE),
    "HODL, 1000 steps": (h.hodl(operator, F, num_steps=1000), 0.3, 200, BLUE),
    "BAMM, weight 0.9 (k+1)^(-1/4)": (
        h.bamm(f, F, step_size=0.5, weight=lambda k: 0.9 * number(k) ** -0.25),
        lambda k: 0.05 * number(k) ** -0.25,
        6000,
        GREEN,
    ),
}
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(9.5, 3.4))
for name, (hyper, rate, num_updates, colour) in chosen.items():
    thetas, us = walk(hyper, problem, rate, num_updates)
    left.semilogx(np.arange(1, num_updates + 2), thetas, color=colour, lw=1.6, label=name)
    right_axes.plot(us[:, 0], us[:, 1], color=colour, lw=1.6, label=name)
    right_axes.plot(us[-1, 0], us[-1, 1], "o", ms=6, color=colour, mec="white", zorder=5)
    print(f"{name:30s} theta = {thetas[-1]:.4f}, u = ({us[-1, 0]:.4f}, {us[-1, 1]:.4f})")
left.axhline(1.0, color="#C09000", lw=1.2, label="the answer")
left.axhline(0.505, color=INK, lw=0.8, ls="--", label="predicted: $(1 + u_2^0)/2$")
left.set(xlabel="update", ylabel=r"$\theta$", title="The hyper-variable")
left.legend(loc=(0.5, 0.14), fontsize=7)
star(right_axes, 1, 1)
right_axes.set(xlabel="$u_1$", ylabel="$u_2$, free inside", title="The inner variable")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 3. Non-convex, but every stationary point is a minimum
#
# PBGD's problem: $f = (x + \theta)^2 + \theta \sin^2(x + \theta)$ is not convex, but its one minimum is $x = -\theta$.
# Along this valley the outer loss has three local minima, and a local method finds the one of its start. Alternating
# descent finds none: it stops where the *partial* derivative of $F$ vanishes, from wherever it came.

# %%
problem = odl.problems.lineage_pbgd()
starts = jnp.linspace(0.1, 2.9, 15)


def ends(hyper, rate, num_updates):
    """Where descent ends from each start, x in the valley."""

    def run(theta):
        def body(carry, k):
            theta, state = carry
            gradient, state, _ = hyper.update(theta, state)
            return (problem.project(theta - rate * gradient), state), None

        return jax.lax.scan(body, (theta, hyper.init(theta, -theta)), jnp.arange(num_updates))[0][0]

    return np.asarray(jax.jit(jax.vmap(run))(starts))


norm = h.pbgd(problem.inner, problem.outer, step_size=0.004, penalty=50.0, form="gradient_norm")
gap = h.pbgd(problem.inner, problem.outer, step_size=0.05, inner_step_size=0.1, penalty=50.0)
players = h.alternating(problem.inner, problem.outer, step_size=0.1)
found = {
    "implicit": (ends(implicit(problem, 0.1), 0.05, 200), BLUE, "o"),
    "PBGD, value gap": (ends(gap, 1e-3, 5000), GREEN, "s"),
    "PBGD, gradient norm": (ends(norm, 2e-4, 15000), SKY, "^"),
    "alternating": (ends(players, 0.02, 1500), ORANGE, "X"),
}
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10.5, 3.7))
grid = np.linspace(0, 3, 400)
landscape(left, problem, np.linspace(0, 3, 120), np.linspace(-3.6, 0.6, 120))
left.plot(grid, -grid, color=INK, lw=0.8, ls=":", label="inner solution $x = -\\theta$")
for theta, name in ((0.8, None), (1.0, None), (2.5, "PBGD, value gap")):
    show(walk(gap, problem, 1e-3, 5000, theta, 0.4), left, name, GREEN)
for theta, name in ((1.6, None), (2.7, "alternating")):
    show(walk(players, problem, 0.02, 1500, theta, 0.4), left, name, ORANGE)
left.legend(loc="lower left")
left.set_title("Outer loss, and walks from $x_0 = 0.4$")
value = jax.vmap(problem.value)
right_axes.plot(grid, value(jnp.asarray(grid)), color=INK, lw=1.2)
for offset, (name, (places, colour, marker)) in enumerate(found.items()):
    heights = value(jnp.asarray(places)) + 0.06 * offset
    right_axes.plot(places, heights, marker, ms=7, color=colour, mec="white", mew=0.6, label=name)
    print(f"{name:20s} ends at {', '.join(f'{place:.3f}' for place in np.unique(places.round(3)))}")
right_axes.set(xlabel=r"$\theta$", ylabel=r"$F(-\theta, \theta)$", title="Where 15 starts end (symbols set off)")
right_axes.legend(loc="upper left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Infinitely many inner minima
#
# The sine of BVFSM and MEHA: $f = \sin(\theta + x - 2)$, $F = (\theta - 2)^2 + (x - 4)^2$. The inner solutions are a
# family of parallel lines, and the answer $(3\pi/4, 3\pi/4 + 2)$ lies on the best of them. An implicit gradient knows
# only the line on which it stands, and slides along it to $\theta = (2k - 1/2)\,\pi/2$. Methods that know the inner
# problem by its *value* may cross: BVFSM as long as its slack is more than the height 2 of a hill, MEHA and PBGD as
# long as their penalty is small.

# %%
problem = odl.problems.lineage_sine()
f, F = problem.inner, problem.outer


def closing(k):
    return 4 * jnp.exp(-k.astype(float) / 150)


options = {"step_size": 0.5, "num_steps": 20, "num_barrier_steps": 10}
crossing = {
    "BVFSM": (h.bvfsm(f, F, slack=closing, barrier=lambda k: closing(k) ** 0.5, **options), 0.05, 1500, PINK, "-"),
    "MEHA": (h.meha(f, F, step_size=0.1, penalty=lambda k: 0.2 * number(k) ** 0.49), 0.1, 15000, BLUE, "-"),
    "PBGD": (
        h.pbgd(f, F, step_size=0.2, inner_step_size=0.5, penalty=lambda k: 0.01 * number(k)),
        lambda k: 0.05 / (1 + 0.01 * number(k)),
        6000,
        GREEN,
        "-",
    ),
    "implicit": (implicit(problem), 0.05, 400, ORANGE, "--"),
    "BVFSM, slack 1/(r+1)": (h.bvfsm(f, F, step_size=0.5), 0.05, 600, YELLOW, "--"),
}
figure, panels = plt.subplots(1, 2, figsize=(11, 4.4))
for axes, start, low in zip(panels, (0.0, -6.0), (-3.5, -10.0), strict=True):
    landscape(axes, problem, np.linspace(low, 4.5, 120), np.linspace(low, 8, 120))
    for k in range(-4, 4):
        line = np.array([low, 4.5])
        label = "inner solutions" if k == 0 else None
        axes.plot(line, 2 - line - np.pi / 2 + 2 * np.pi * k, color=INK, lw=0.8, ls=":", label=label)
    print(f"from {start:g}:")
    for name, (hyper, rate, num_updates, colour, style) in crossing.items():
        path = walk(hyper, problem, rate, num_updates, start, [start])
        show(path, axes, name, colour, ls=style)
        print(f"  {name:22s} theta = {path[0][-1]:8.4f}, F = {float(F(path[1][-1], path[0][-1])):8.3f}")
    star(axes, 0.75 * np.pi, 0.75 * np.pi + 2)
    axes.set_title(f"Start $({start:g}, {start:g})$")
panels[0].legend(loc="lower left", fontsize=7, framealpha=0.9, frameon=True, edgecolor="none")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 5. Non-smooth inside: a penalty for every coordinate
#
# MEHA's problem in 1000 dimensions: $\varphi = \|x - a\|^2/2 + \sum_i \theta_i |x_i|$ with $a_i = \pm 1/n$, and
# $F = \sum_i x_i$. Whoever is positive should be penalised away ($\theta_i \ge 1/n$), whoever is negative be left alone
# ($\theta_i = 0$), for $F = -1/2$. The smooth part does not depend on $\theta$ at all: everything is in the derivative
# of the *non-smooth* part in $\theta$. A variant of MEHA that forgets it does not move, nor does alternating descent.

# %%
problem = odl.problems.lineage_l1(1000)
steps = odl.proximal_gradient(problem.inner, problem.prox, step_size=0.5)
solver = odl.implicit(odl.until_converged(steps, tol=1e-9, max_steps=100))
options = {"step_size": 0.3, "penalty": lambda k: 2000 * number(k) ** 0.4, "prox": problem.prox}
walks = {
    "MEHA": (h.meha(problem.inner, problem.outer, nonsmooth=problem.nonsmooth, **options), 0.2, BLUE),
    "implicit, proximal gradient": (h.through(solver, problem.outer), 2e-5, GREEN),
    "MEHA without $\\nabla_\\theta$ of the penalty": (
        h.meha(problem.inner, problem.outer, nonsmooth=lambda x, theta: 0.0 * jnp.sum(x), **options),
        0.2,
        ORANGE,
    ),
    "alternating": (h.alternating(problem.inner, problem.outer, step_size=0.5), 0.2, PINK),
}
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10, 3.4))
for name, (hyper, rate, colour) in walks.items():
    thetas, xs = walk(hyper, problem, rate, 100)
    value = np.asarray(jax.vmap(problem.value)(jnp.asarray(thetas)))
    style = "--" if name == "alternating" else "-"
    left.plot(value, color=colour, lw=1.6, ls=style, label=name)
    print(f"{name:45s} F at the inner solution = {value[-1]:.4f}")
    if name == "MEHA":
        right_axes.plot(1000 * thetas[:, 0], color=BLUE, lw=1.6, label=r"$n\,\theta_i$, $a_i > 0$")
        right_axes.plot(1000 * thetas[:, -1], color=SKY, lw=1.6, label=r"$n\,\theta_i$, $a_i < 0$")
left.axhline(-0.5, color="#C09000", lw=1.2, label="the answer")
left.set(xlabel="update", ylabel=r"$F(x(\theta))$", title="Outer loss at the inner solution")
left.legend(loc="center right", fontsize=7)
right_axes.axhspan(1.0, 2.2, color="#F0C000", alpha=0.25, lw=0, label="optimal for $a_i > 0$")
right_axes.axhline(0.0, color="#C09000", lw=1.2, label="optimal for $a_i < 0$")
right_axes.set(xlabel="update", ylim=(-0.05, 2.2), title="MEHA: the two kinds of coordinates")
right_axes.legend(loc="upper right", fontsize=7)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 6. A bad start inside: the worst iterate, and a start that is learned
#
# IAPTT's problem: $f = -\sin(\theta x)$ and $F = \theta + \theta x$ on $[1, 10] \times [-2, 2]$, from $(1, 2)$. The
# inner solutions are the curves $\theta x = \pi/2 + 2\pi k$; each time $\theta$ grows past $(-1/2 - 2k)\pi/2$, a lower
# one enters the box, and the best corner is $(11\pi/4, -2)$. Forty inner steps of $5 \cdot 10^{-4}$ from a fixed start
# never leave the first curve. Once the start is learned (a part of $\theta$, with outer step 0.1), differentiating the
# *last* iterate leads to a point where the iterate has run out of the box; differentiating the *worst* one stays at the
# corner, within one outer step. With the two step sizes exchanged, as another reading of the paper has it, nothing
# moves.

# %%
problem = odl.problems.lineage_iaptt()


def f(x, w):
    return problem.inner(x, w["theta"])


def F(x, w):
    return problem.outer(x, w["theta"])


def learn(build, num_updates=600, inner_step=5e-4, outer_step=0.1):
    hyper = build(odl.for_steps(odl.gradient_descent(f, step_size=inner_step), 40))

    def body(carry, _):
        w, state = carry
        gradient, state, info = hyper.update(w, state)
        w = jax.tree.map(lambda leaf, g: leaf - outer_step * g, w, gradient)
        w = {"theta": jnp.clip(w["theta"], 1.0, 10.0), "x": jnp.clip(w["x"], -2.0, 2.0)}
        return (w, state), (w["theta"], info.x)

    @jax.jit
    def run():
        w = {"theta": problem.theta, "x": problem.x0}
        return jax.lax.scan(body, (w, hyper.init(w, problem.x0)), length=num_updates)[1]

    return tuple(np.asarray(part) for part in run())


def learned(w):
    return w["x"]


paths = {
    "IAPTT: worst iterate, learned start": (learn(lambda s: h.pessimistic(s, F, start=learned)), BLUE),
    "last iterate, learned start": (learn(lambda s: h.through(odl.unrolled(s), F, start=learned)), ORANGE),
    "last iterate, fixed start": (learn(lambda s: h.through(odl.unrolled(s), F)), PINK),
    "worst iterate, fixed start": (learn(lambda s: h.pessimistic(s, F)), GREEN),
}
swapped = learn(lambda s: h.pessimistic(s, F, start=learned), inner_step=0.1, outer_step=5e-4)
print(f"steps exchanged: theta = {swapped[0][-1]:.4f}")
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(11, 4.0), width_ratios=(1.25, 1))
thetas, xs = np.linspace(0.8, 10, 160), np.linspace(-2.35, 2.2, 160)
landscape(left, problem, thetas, xs)
for k in range(-3, 1):
    label = r"inner solutions $\theta x = \pi/2 + 2\pi k$" if k == 0 else None
    left.plot(thetas, (np.pi / 2 + 2 * np.pi * k) / thetas, color=INK, lw=0.8, ls=":", label=label)
left.plot([1, 10, 10, 1, 1], [-2, -2, 2, 2, -2], color=GREY, lw=1.0)
for name, (path, colour) in paths.items():
    show(path, left, name, colour)
    style = "--" if name.startswith("worst") else "-"
    right_axes.plot(path[0], color=colour, lw=1.4, ls=style, label=name)
    print(f"{name:36s} theta = {path[0][-100:].mean():.4f} +- {np.ptp(path[0][-100:]) / 2:.4f}, x = {path[1][-1]:.4f}")
star(left, 11 * np.pi / 4, -2)
left.set_title("Outer loss, the box, and the iterates that were differentiated")
left.legend(loc="upper right", fontsize=7, frameon=True, framealpha=0.9, edgecolor="none")
right_axes.axhline(11 * np.pi / 4, color="#C09000", lw=1.2, label=r"the answer, $11\pi/4$")
right_axes.set(xlabel="update", ylabel=r"$\theta$", ylim=(0.5, 10.2), title="The hyper-variable")
right_axes.legend(loc=(0.42, 0.12), fontsize=7)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What to take away
#
# | inner problem | promised the answer | ends elsewhere |
# |---|---|---|
# | strongly convex | implicit, SOBA, penalties, barriers, envelopes | alternating, DARTS; BAMM at a large weight |
# | merely convex | HODL, BAMM | anything implicit: the free part of $x$ stays at its start |
# | one minimum, not convex | implicit, PBGD: a *local* minimum | alternating, DARTS |
# | many minima | BVFSM with enough slack, MEHA and PBGD with a slow penalty | implicit: the branch of the start |
# | non-smooth | MEHA with the derivative of the prox's function; implicit | alternating |
# | many minima, short walks | IAPTT with a learned start | the last iterate; any fixed start |
#
# No method is in the middle column of every row. The biases of the first-order ones are those of their penalty: of the
# order of $1/\gamma$, $1/c_k$, or the square root of the slack.
