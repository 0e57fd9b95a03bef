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
# # Quickstart: a problem inside a problem
#
# Three steps: solve an inner problem and differentiate its solution; tune a hyperparameter with optax through that
# solution; and meet a problem where the inner solution is *not* unique, which is what HODL is for.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import odljax as odl

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.figsize": (7, 3.2), "figure.dpi": 110})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

# %% [markdown]
# ## 1. An inner problem and its derivative
#
# Ridge regression with penalty $e^\theta$ on the training half of scikit-learn's diabetes data. An **iteration**
# says how to walk, a **solver** when to stop, a **derivative** how to differentiate the solution.

# %%
from sklearn.datasets import load_diabetes

features, target = load_diabetes(return_X_y=True)
features = features * np.sqrt(len(features))  # unit variance
target = (target - target.mean()) / target.std()
A, b = jnp.asarray(features[:200]), jnp.asarray(target[:200])
A_val, b_val = jnp.asarray(features[200:]), jnp.asarray(target[200:])


def train_loss(w, theta):
    return 0.5 * jnp.mean((A @ w - b) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


def validation_loss(w, theta):
    return 0.5 * jnp.mean((A_val @ w - b_val) ** 2)


w0 = jnp.zeros(A.shape[1])
inner = odl.gradient_descent(train_loss, step_size=0.2)
solver = odl.implicit(odl.until_converged(inner, tol=1e-10, max_steps=5000))

solution = odl.check(solver(w0, -3.0))
status = odl.Status(int(solution.status)).name
print(f"{int(solution.num_steps)} steps, residual {float(solution.residual):.1e}, {status}")

# %% [markdown]
# A solver is a differentiable function, anywhere: `jax.grad` of a loss of its solution is the hypergradient. Here
# it is, beside the closed form and a finite difference.

# %%
value = jax.jit(lambda theta: validation_loss(solver(w0, theta).x, theta))
gradient = jax.jit(jax.grad(lambda theta: validation_loss(solver(w0, theta).x, theta)))


def closed_form(theta):
    n, d = A.shape
    w = jnp.linalg.solve(A.T @ A / n + jnp.exp(theta) * jnp.eye(d), A.T @ b / n)
    return validation_loss(w, theta)


h = 1e-4
print("implicit          ", float(gradient(-3.0)))
print("closed form       ", float(jax.grad(closed_form)(-3.0)))
print("finite difference ", float((value(-3.0 + h) - value(-3.0 - h)) / (2 * h)))

# %% [markdown]
# The walk can be exchanged without touching anything else: here three ways to the same solution.

# %%
slow = odl.gradient_descent(train_loss, step_size=0.2)
walks = {
    "gradient descent": (slow, GREY),
    "Nesterov": (odl.nesterov(slow), BLUE),
    "Anderson, memory 5": (odl.anderson(slow, memory=5), ORANGE),
}
figure, axes = plt.subplots()
for name, (walk, colour) in walks.items():
    run = odl.for_steps(walk, 150, history=True)(w0, -3.0)
    axes.semilogy(run.history.residual, color=colour, label=name)
axes.set(xlabel="inner step k", ylabel=r"residual $\|w_k - T(w_k)\|$", title="One operator, three iterations")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 2. An optax loop
#
# A **hypergradient** is an `init` / `update` pair. `warm_started` begins inner and adjoint solve where the last ones
# ended (`through` begins anew each time), and `info` tells the truth about both. The inner walk is Anderson's now.

# %%
solver = odl.implicit(odl.until_converged(odl.anderson(inner, memory=5), tol=1e-8, max_steps=500))


def tune(hyper, theta, num_updates=60):
    tx = optax.adam(optax.cosine_decay_schedule(0.4, num_updates), b1=0.5)

    @jax.jit
    def update(theta, state, opt_state):
        gradient, state, info = hyper.update(theta, state)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(theta, updates), state, opt_state, info

    state, opt_state, path = hyper.init(theta, w0), tx.init(theta), []
    for _ in range(num_updates):
        new_theta, state, opt_state, info = update(theta, state, opt_state)
        odl.check(info)
        path.append((float(theta), float(info.value), int(info.num_steps), float(info.adjoint_residual)))
        theta = new_theta
    return np.array(path)


start = jnp.asarray(1.5)
path = tune(odl.hypergradients.warm_started(solver, validation_loss), start)
cold = tune(odl.hypergradients.through(solver, validation_loss), start)
print(f"penalty exp({path[-1, 0]:.3f}), validation loss {path[-1, 1]:.5f}")
print(f"worst adjoint residual {path[:, 3].max():.1e}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
grid = np.linspace(-4, 1.6, 80)
left.plot(grid, jax.vmap(closed_form)(jnp.asarray(grid)), color=GREY, label="closed form")
left.plot(path[:, 0], path[:, 1], "o-", ms=3, color=ORANGE, label="optax path")
left.set(xlabel=r"$\theta$ (log penalty)", ylabel="validation loss", title="Descent on the outer problem")
left.legend(frameon=False)
right.plot(cold[:, 2], color=GREY, label="through: from the same start")
right.plot(path[:, 2], color=BLUE, label="warm_started: from the last solution")
right.set(xlabel="update t", ylabel="inner steps", title="The warm start at work", ylim=(0, None))
right.legend(frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 3. HODL: when the inner solution is not unique
#
# Problem $P_1$: the inner objective $f(u, w) = u_1^2/2 - w u_1$ leaves $u_2$ free, so *the outer loss must choose
# it*: $\ell(u, w) = (w - u_2)^2/2 + (u_1 - 1)^2/2 + w^2/2$. The truth is $w = u_1 = u_2 = 1/2$.
#
# Differentiating the plain iteration (the *simple* variant, `weight=0`) leaves $u_2$ at its start and ends at $(1 +
# u_2^0)/3$, however many steps it takes. HODL averages each inner step with a descent step of the outer loss whose
# step size $s_k = 1/(k+1)$ dies out slowly: inner and outer converge together.

# %%
problem = odl.problems.p_c(1.0)
operator = odl.operators.gradient(problem.objective, step_size=0.5)


def train(num_steps, weight, num_updates=80):
    hyper = odl.hypergradients.hodl(operator, problem.outer, num_steps=num_steps, weight=weight)
    tx = optax.sgd(0.3, momentum=0.5)

    @jax.jit
    def update(w, state, opt_state):
        gradient, state, info = hyper.update(w, state)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(w, updates), state, opt_state, info

    w = problem.theta
    state, opt_state, walk, changes = hyper.init(w, problem.x0), tx.init(w), [float(w)], []
    for _ in range(num_updates):
        w, state, opt_state, info = update(w, state, opt_state)
        walk.append(float(w))
        changes.append(float(info.outer_change))
    return np.array(walk), np.array(changes), np.asarray(info.history.residual)


steps = [1, 3, 10, 30, 100, 300, 1000]
found = {weight: [train(K, weight)[0][-1] for K in steps] for weight in (0.0, 0.5)}
exact = {weight: [odl.problems.p_c_minimiser(1.0, K, weight=weight) for K in steps] for weight in (0.0, 0.5)}
largest = max(abs(np.array(found[weight]) - np.array(exact[weight])).max() for weight in found)
print(f"largest distance to the exact minimiser of phi_K: {largest:.1e}")

# %%
walk, changes, residual = train(1000, 0.5)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
left.axhline(0.5, color=GREY, lw=1, ls="--", label="truth 1/2")
left.semilogx(steps, found[0.0], "s-", color=ORANGE, ms=4, label="simple (weight 0)")
left.semilogx(steps, found[0.5], "o-", color=BLUE, ms=4, label="HODL (weight 1/2)")
left.set(xlabel="inner steps K", ylabel="w found", title="Where each variant ends")
left.legend(frameon=False, fontsize=8)
middle.loglog(1 + np.arange(len(residual)), residual, color=BLUE)
middle.set(xlabel="inner step k", ylabel=r"$\|u_k - D(u_k)\|$", title="Inner convergence")
right.semilogy(np.arange(1, len(changes)), np.maximum(changes[1:], 1e-17), color=GREEN)
right.set(xlabel="update t", ylabel=r"$\|w_{t} - w_{t-1}\| / \|w_{t-1}\|$", title="Outer convergence")
figure.tight_layout()
plt.show()

# %% [markdown]
# The simple variant is as far from the truth after a thousand steps as after ten; HODL approaches it as $K$ grows,
# and the minimiser it finds is the exact one for each $K$. The two curves on the right are *joint convergence*:
# every HODL update returns both in `info`.
