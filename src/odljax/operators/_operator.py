"""The operator record and the two ways to make a new operator of old ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple

import jax.numpy as jnp
from jax import Array

from .. import _tree, linear
from .._checks import as_inner, coefficient_of_theta, is_callable, is_record, record, same_as
from .._types import Coefficient, Theta, X
from ._weights import solve_definite


class Residual(NamedTuple):
    """One part of what vanishes at a solution, and what its size is compared with.

    Attributes:
        value: a pytree that is zero at the solution and depends on no step size, relaxation or penalty: a gradient, a
            prox-gradient map, a violated constraint.
        scale: a tuple of pytrees in the unit of ``value``, the terms that cancel in it; the largest of their norms is
            what a relative tolerance is relative to. None: nothing at hand has that unit (that of a gradient);
            solvers then measure at the start and along the walk how much the value changes with x, times ``||x||``.
    """

    value: Any
    scale: tuple[Any, ...] | None = None


@record
class Operator(Generic[X, Theta]):
    r"""A map ``T(x, theta) -> x`` with what a solver, a derivative or a probe may want to know about it.

    Calling it applies it. ``Operator(T)`` is all that a map needs; the rest makes it faster, more exact or checkable.

    Args:
        apply: the map :math:`T_\theta`; keeps the structure, shapes and dtypes of x.
        displacement: :math:`x - T_\theta(x)` in a form without cancellation; residuals and adjoint systems use it.
            None: the plain difference. (For a gradient step it is the step times the gradient, which keeps the adjoint
            of an ill-conditioned problem exact in float32.)
        metric: :math:`v \mapsto G_\theta v`, ``(v, theta) -> v``, the positive-definite metric in which T is
            non-expansive. None: the identity.
        metric_inverse: :math:`v \mapsto G_\theta^{-1} v`. None: solved for by conjugate gradients where it is needed.
        symmetric: whether the Jacobian of T in x is symmetric and :math:`I - T'` positive definite at the solution, so
            that conjugate gradients may solve the adjoint system. True for gradient steps, False for proximal,
            ADMM and network maps.
        readout: ``(x, theta) -> answer``, where x is not itself what the user wants: the governing sequence of
            Douglas-Rachford, primal and dual variables together. None: the answer is x. Call it through ``answer``.
        step_size: ``theta -> number``, by which the displacement is divided to be free of the step: the step size of a
            gradient step. None: 1.
        natural_residual: ``(x, theta) -> parts``, a tuple of ``Residual``: what a tolerance is set on, part by part,
            each in its own unit. None: the displacement over the step size; compared with x where there is none.
        certificate: ``(x, displacement, theta) -> code``, a whole number: a code of ``odl.Status`` if the displacement
            ``x - T(x, theta)`` proves that there is no fixed point, else -1. (The displacements of a non-expansive map
            without a fixed point converge to one vector.) ``until_converged`` asks it. None: nothing is asked.
        name: what messages call it.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.Operator(lambda x, theta: 0.5 * x + theta)
        >>> float(T(1.0, 2.0))
        2.5
    """

    apply: Callable[[X, Theta], X]
    displacement: Callable[[X, Theta], X] | None = None
    metric: Callable[[X, Theta], X] | None = None
    metric_inverse: Callable[[X, Theta], X] | None = None
    symmetric: bool = False
    readout: Callable[[X, Theta], Any] | None = None
    certificate: Callable[[X, X, Theta], Array] | None = None
    step_size: Callable[[Theta], Any] | None = None
    natural_residual: Callable[[X, Theta], tuple[Residual, ...]] | None = None
    name: str = "operator"

    def __post_init__(self) -> None:
        is_callable(self.name, "apply", self.apply, "x, theta")

    def __call__(self, x: X, theta: Theta) -> X:
        x = as_inner(self.name, "x", x, or_complex=True)
        return same_as(self.name, "the operator T(x, theta)", self.apply(x, theta), x)

    def answer(self, x: X, theta: Theta) -> Any:
        """What x, at a fixed point, says about the problem: ``readout(x, theta)``, or x itself where there is none."""
        return x if self.readout is None else self.readout(x, theta)


def displacement(operator: Operator[X, Theta], x: X, theta: Theta) -> X:
    """``x - T(x, theta)``: what vanishes at a fixed point."""
    if operator.displacement is None:
        return _tree.subtract(x, operator(x, theta))
    return same_as(operator.name, "the operator's displacement", operator.displacement(x, theta), x)


def natural_residual(operator: Operator[X, Theta], x: X, theta: Theta) -> tuple[Residual, ...]:
    """What vanishes at a solution, part by part, free of step sizes, relaxations and penalties."""
    if operator.natural_residual is not None:
        return operator.natural_residual(x, theta)
    away = displacement(operator, x, theta)
    if operator.step_size is None:
        return (Residual(away, (x,)),)
    return (Residual(_tree.divide(away, operator.step_size(theta))),)


def as_operator(T: Operator[X, Theta] | Callable[[X, Theta], X]) -> Operator[X, Theta]:
    """Returns T itself if it is an operator, else the operator of the function ``T(x, theta)``.

    Args:
        T: an operator or a function ``(x, theta) -> x``.

    Raises:
        TypeError: T is neither.

    Example:
        >>> import odljax as odl
        >>> odl.operators.as_operator(lambda x, theta: x)
        Operator(<lambda>)
    """
    return operator_of("as_operator", "T", T)


def operator_of(who: str, name: str, T: Any, also: str = "") -> Operator:
    """``as_operator``, in the words of the function that was called; ``also``: what else it takes."""
    if isinstance(T, Operator):
        return T
    if is_record(T) or not callable(T):
        raise TypeError(
            f"{who}: {name} must be {also}an operator or a function of (x, theta); {T!r} came. Of a solver take the "
            f"iteration, of an iteration the operator."
        )
    is_callable(who, name, T, "x, theta")
    return Operator(T, name=getattr(T, "__name__", type(T).__name__))


def averaged(
    operator: Operator[X, Theta] | Callable[[X, Theta], X], relaxation: Coefficient = 0.5
) -> Operator[X, Theta]:
    r"""Returns the averaged operator, which has the same fixed points.

    .. math:: T_\alpha(x, \theta) = x + \alpha (T(x, \theta) - x)

    When: T is only non-expansive; its average is then firmly so, and its iteration converges.

    Args:
        operator: T, an operator or a function ``(x, theta) -> x``.
        relaxation: :math:`\alpha` in (0, 2), a number or a function of theta; above 1 only if T is itself averaged.

    Raises:
        ValueError: a relaxation outside (0, 2).

    Cost: one application of T.

    Source: Krasnoselskii (1955), Mann (1953); Bauschke and Combettes (2017), definition 4.33.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.averaged(lambda x, theta: -x, relaxation=0.5)
        >>> float(T(3.0, None))
        0.0
    """
    operator = operator_of("averaged", "operator", operator)
    relax = coefficient_of_theta("averaged", "relaxation", relaxation, high=2.0)

    def step_back(x: X, theta: Theta) -> X:
        return _tree.scale(relax(theta), displacement(operator, x, theta))

    return Operator(
        apply=lambda x, theta: _tree.interpolate(x, operator(x, theta), relax(theta)),
        displacement=step_back,
        metric=operator.metric,
        metric_inverse=operator.metric_inverse,
        symmetric=operator.symmetric,
        readout=operator.readout,
        certificate=operator.certificate,  # a direction: the relaxation scales it
        natural_residual=partial(natural_residual, operator),
        name=f"averaged({operator.name})",
    )


def compose(
    *operators: Operator[X, Theta] | Callable[[X, Theta], X],
    metric: Callable[[X, Theta], X] | None = None,
    metric_inverse: Callable[[X, Theta], X] | None = None,
    readout: Callable[[X, Theta], Any] | None = None,
) -> Operator[X, Theta]:
    r"""Returns the composition, the last operator applied first.

    .. math:: T = T_1 \circ T_2 \circ \dots \circ T_n

    When: a learned network follows or precedes a numerical step. The composition is non-expansive if all factors are so
    in one and the same metric: state that metric here.

    Args:
        operators: at least one operator or function ``(x, theta) -> x``.
        metric: the common metric, ``(v, theta) -> v``. None: the identity.
        metric_inverse: its inverse, ``(v, theta) -> v``.
        readout: what a fixed point of the composition says about the problem, ``(x, theta) -> answer``. None: x itself.

    Raises:
        TypeError: no operator came.

    Cost: one application of each.

    Example:
        >>> import odljax as odl
        >>> T = odl.operators.compose(lambda x, theta: x + theta, lambda x, theta: 2.0 * x)
        >>> float(T(1.0, 10.0))
        12.0
    """
    if not operators:
        raise TypeError("compose: needs at least one operator; none came.")
    factors = [operator_of("compose", "each of operators", operator) for operator in operators]
    if len(factors) == 1 and metric is metric_inverse is readout is None:
        return factors[0]

    def apply(x: X, theta: Theta) -> X:
        for factor in reversed(factors):
            x = factor(x, theta)
        return x

    name = f"compose({', '.join(factor.name for factor in factors)})"
    return Operator(apply, metric=metric, metric_inverse=metric_inverse, readout=readout, name=name)


def residual(operator: Operator[X, Theta], x: X, theta: Theta) -> Array:
    """The size of the natural residual, that of its largest part."""
    return largest_part(natural_residual(operator, x, theta))


def largest_part(parts: tuple[Residual, ...]) -> Array:
    """The largest norm of the parts."""
    return functools.reduce(jnp.maximum, [_tree.norm(part.value) for part in parts])


def inverse_metric(operator: Operator[X, Theta]) -> Callable[[X, Theta], X] | None:
    """``(v, theta) -> G^-1 v``: that of the operator, else by conjugate gradients; None for the identity.

    A metric that is not positive definite gives NaN, which every status shows.
    """
    metric = operator.metric
    if operator.metric_inverse is not None or metric is None:
        return operator.metric_inverse

    return lambda v, theta: solve_definite(lambda v: metric(v, theta), v, linear.cg())
