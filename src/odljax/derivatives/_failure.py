"""What a derivative says of a solve that failed, where there is no status to look at: under plain ``jax.grad``."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _tree
from .._checks import enters
from .._moving import moving
from .._types import STATUS_MESSAGES, Status
from ..iterations import Iteration
from ..iterations._iteration import first_step
from ..solvers import Solution, Solver

POLICIES = ("warn", "ignore", "raise")


def check_policy(who: str, on_failure: str) -> str:
    """Refuses what is no policy."""
    if on_failure not in POLICIES:
        raise ValueError(f"{who}: on_failure must be 'warn', 'ignore' or 'raise'; {on_failure!r} came.")
    return on_failure


def solve_failed(status: int, residual: float) -> str:
    """What is wrong with a forward solve that ended so."""
    return (
        f"the solve failed ({Status(status).name}, relative residual {residual:.1e}): "
        f"{STATUS_MESSAGES[Status(status)]}. The derivative is that of another point."
    )


def adjoint_failed(status: int, residual: float, hint: str = "") -> str:
    """What is wrong with an adjoint solve that ended so."""
    return (
        f"the adjoint solve failed ({Status(status).name}, relative residual {residual:.1e}): "
        f"{STATUS_MESSAGES[Status(status)]}{hint}. The derivative is not to be trusted."
    )


def facts_of(solution: Solution) -> tuple[Array, Array]:
    """Status and relative residual of a forward solve; one that stalled at rounding is as exact as can be."""
    residual = solution.relative_residual
    if residual is None:
        return solution.status, jnp.zeros(())
    eps = _tree.rounding(solution.x)
    exact = (solution.status == int(Status.STALLED)) & (residual <= 10 * eps)
    return jnp.where(exact, jnp.zeros_like(solution.status), solution.status), residual


def with_alarm(solver: Solver, on_failure: str, worst: Status = Status.CONVERGED) -> Solver:
    """The solver, a derivative of whose solution tells the host of a status worse than one; it keeps the quiet one."""
    quiet = dataclasses.replace(solver, quiet=None)
    if on_failure == "ignore":
        return quiet
    tell = teller(solver.derivative, on_failure)

    def solve(x0: Any, theta: Any) -> Solution:
        solution = quiet.solve(x0, watched(solver.derivative, on_failure, solver.iteration, x0, theta))
        status, residual = facts_of(solution)
        status = jnp.where(status > int(worst), status, jnp.zeros_like(status))
        return solution._replace(x=reported(solution.x, (status, residual), tell, in_derivative=True))

    return dataclasses.replace(solver, solve=solve, quiet=quiet)


def watched(who: str, on_failure: str, iteration: Iteration, x0: Any, theta: Any) -> Any:
    """``theta``, whose derivative tells, while it is traced, of a theta that the steps do not look at."""

    if on_failure == "ignore" or enters(functools.partial(first_step, iteration, x0), theta):
        return theta
    message = (
        f"{who}: theta does not enter {iteration.name}, so the derivative of x in it is zero. A map T(x, theta) must "
        f"use its second argument (that of a Flax module may be a flag). If it is meant, pass on_failure='ignore'."
    )

    def tell(leaves: Any, operands: Any, tangents: Any) -> Any:
        if on_failure == "raise":
            raise ValueError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return tangents

    leaves, structure = jax.tree.flatten(theta)
    inexact = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    moved = [jnp.asarray(leaves[i]) for i in inexact]
    for i, leaf in zip(inexact, moving(moved, moved, tell), strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)


def teller(who: str, on_failure: str, describe: Callable[..., str] = solve_failed) -> Callable[..., None]:
    """What the host does with the facts ``(status, *others)`` of each element: it warns or raises about the first bad.

    ``describe(status, *others)`` says what is wrong; a batch has one message, with the number of elements.
    """

    def tell(*facts: Any) -> None:
        columns = [np.ravel(column) for column in np.broadcast_arrays(*facts)]
        bad = np.flatnonzero(columns[0] >= Status.STEP_BUDGET_SPENT)
        if not bad.size:
            return
        where = f" in {bad.size} of {columns[0].size} elements, first" if columns[0].size > 1 else ""
        worst = [column[bad[0]].item() for column in columns]
        text = f"{who}:{where} {describe(*worst)}"
        if on_failure == "raise":
            raise RuntimeError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    return tell


def reported(values: Any, facts: tuple[Array, ...], tell: Callable[..., None], *, in_derivative: bool = False) -> Any:
    """``values`` unchanged; the host is told the facts, the first of them a status, if that is bad.

    It is told where the values are used and nowhere else: what nobody looks at is dead code, alarm and all. With
    ``in_derivative`` only a derivative of the values tells. A batch is one call, and only if an element failed. The
    alarm stays out of programs that it would change: those that are exported, and all of them where JAX's persistent
    compilation cache is on, which keeps no program that calls the host.
    """
    leaves, structure = jax.tree.flatten(values)
    facts = jax.lax.stop_gradient(facts)
    out = _report().bind(*leaves, *facts, tell=tell, count=len(leaves), quiet=in_derivative)
    return structure.unflatten(out)


@functools.cache
def _report() -> Any:
    from jax.extend.core import Primitive  # costs 30 ms, so not on import
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("odljax_report")
    primitive.multiple_results = True

    def told(*arguments: Any, tell: Any, count: int, quiet: bool) -> list[Any]:
        values, facts = arguments[:count], arguments[count:]
        if not quiet:
            failed = jnp.any(facts[0] >= int(Status.STEP_BUDGET_SPENT))
            jax.lax.cond(failed, lambda: jax.debug.callback(tell, *facts), lambda: None)
        return list(values)

    def lower(ctx: Any, *arguments: Any, tell: Any, count: int, quiet: bool) -> Any:
        exported = ctx.module_context.lowering_parameters.for_export
        quiet = quiet or exported or bool(getattr(jax.config, "jax_compilation_cache_dir", None))
        rule = mlir.lower_fun(functools.partial(told, tell=tell, count=count, quiet=quiet), multiple_results=True)
        return rule(ctx, *arguments)

    def eager(*arguments: Any, tell: Any, count: int, quiet: bool) -> list[Any]:
        if not quiet:
            tell(*arguments[count:])
        return list(arguments[:count])

    def jvp(primals: Any, tangents: Any, *, tell: Any, count: int, quiet: bool) -> Any:
        params = {"tell": tell, "quiet": quiet}
        out = primitive.bind(*primals, count=count, **params)
        moved = [i for i in range(count) if type(tangents[i]) is not ad.Zero]
        tangents_out = [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in out]
        if moved:
            given = [tangents[i] for i in moved]
            if quiet:  # from here on it is a derivative
                given = primitive.bind(*given, *primals[count:], tell=tell, count=len(given), quiet=False)
            for i, tangent in zip(moved, given, strict=True):
                tangents_out[i] = tangent
        return out, tangents_out

    def transpose(cotangents: Any, *arguments: Any, tell: Any, count: int, quiet: bool) -> Any:
        facts = arguments[count:]
        moved = [i for i in range(count) if type(cotangents[i]) is not ad.Zero]
        back = list(cotangents)
        if moved:
            given = primitive.bind(*(cotangents[i] for i in moved), *facts, tell=tell, count=len(moved), quiet=quiet)
            for i, cotangent in zip(moved, given, strict=True):
                back[i] = cotangent
        return [*back, *(None for _ in facts)]

    def batch(arguments: Any, axes: Any, *, tell: Any, count: int, quiet: bool) -> Any:
        facts, spots = list(arguments[count:]), axes[count:]
        sizes = {fact.shape[axis] for fact, axis in zip(facts, spots, strict=True) if axis is not None}
        if sizes:  # each fact gets the axis, so that those of one element keep their place
            (size,) = sizes
            for i, axis in enumerate(spots):
                whole = facts[i] if axis is not None else jnp.broadcast_to(facts[i], (size, *facts[i].shape))
                facts[i] = jnp.moveaxis(whole, axis or 0, 0)
        out = primitive.bind(*arguments[:count], *facts, tell=tell, count=count, quiet=quiet)
        return out, axes[:count]

    primitive.def_impl(eager)
    primitive.def_abstract_eval(lambda *arguments, count, **params: list(arguments[:count]))
    mlir.register_lowering(primitive, lower)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return primitive
