"""The iteration record and its constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _tree
from .._checks import coefficient, describe, is_a, is_callable, leaf_name, record, same_as
from .._types import Coefficient, State, Step, Theta, X
from ..operators import Operator, Residual, forward_backward, gradient
from ..operators._gradient import Objective, Prox, forward_backward_step, value_and_gradient
from ..operators._operator import operator_of


@record
class Iteration(Generic[X, Theta]):
    """One way to walk: an initial state and a step, both pure functions.

    The loop owns the step number k and passes it, so schedules need no state.

    Args:
        init: ``(x, theta) -> state``.
        step: ``(x, state, theta, k) -> (x, state)``; keeps structure, shapes and dtypes of both.
        operator: whose fixed point the iterates approach; None: there is none, and ``implicit`` is refused.
        name: what messages call it; transforms compose it.
        num_layers: for untied layers, the number of steps that a theta holds; None: any number of steps.
        restart: ``(x, state, theta) -> state``, the state after x has jumped elsewhere: earlier iterates are forgotten
            (momentum), what was tuned is kept (a step length). None: the state remembers no iterates.

    Example:
        >>> import odljax as odl
        >>> odl.anderson(odl.krasnoselskii_mann(odl.gradient_descent(lambda x, theta: x**2, step_size=0.1)))
        Iteration(anderson(krasnoselskii_mann(gradient_descent)))
    """

    init: Callable[[X, Theta], State]
    step: Callable[[X, State, Theta, Step], tuple[X, State]]
    operator: Operator[X, Theta] | None
    name: str
    num_layers: Callable[[Theta], int] | None = None
    restart: Callable[[X, State, Theta], State] | None = None

    def forget(self, x: X, state: State, theta: Theta) -> State:
        """The state at an x that these steps did not lead to."""
        return state if self.restart is None else self.restart(x, state, theta)


def restart_by(init: Callable[[X, Theta], State]) -> Callable[[X, State, Theta], State]:
    """A restart that keeps nothing."""
    return lambda x, state, theta: init(x, theta)


class MeasuredStep:
    """A step that also says the natural residual at the iterate it starts from, so that it is not computed twice.

    Args:
        measured: ``(x, state, theta, k) -> (x, state, parts)``.
    """

    def __init__(self, measured: Callable[[Any, State, Any, Step], tuple[Any, State, tuple[Residual, ...]]]):
        self.measured = measured

    def __call__(self, x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        return self.measured(x, state, theta, k)[:2]


def stateless(x: Any, theta: Any) -> State:
    """The empty state."""
    return ()


def first_step(iteration: Iteration[X, Theta], x: X, theta: Theta) -> tuple[X, State]:
    """The step from x with nothing before it."""
    return iteration.step(x, iteration.init(x, theta), theta, jnp.zeros((), int))


def as_iteration(source: Iteration[X, Theta] | Operator[X, Theta] | Callable[[X, Theta], X]) -> Iteration[X, Theta]:
    """Returns the iteration itself, or the Picard iteration of an operator or function ``T(x, theta)``.

    Args:
        source: an iteration, an operator or a function ``(x, theta) -> x``.

    Raises:
        TypeError: source is none of the three.

    Example:
        >>> import odljax as odl
        >>> odl.iterations.as_iteration(lambda x, theta: 0.5 * x)
        Iteration(fixed_point(<lambda>))
    """
    return iteration_of("as_iteration", "source", source)


def iteration_of(who: str, name: str, source: Any) -> Iteration:
    """``as_iteration``, in the words of the function that was called."""
    return source if isinstance(source, Iteration) else fixed_point(operator_of(who, name, source, "an iteration, "))


def fixed_point(T: Operator[X, Theta] | Callable[[X, Theta], X]) -> Iteration[X, Theta]:
    r"""Returns the Picard iteration of T.

    .. math:: x_{k+1} = T(x_k, \theta)

    When: T is a contraction, or averaged. For a map that is only non-expansive, relax it: ``krasnoselskii_mann``.

    Args:
        T: an operator, or a function ``(x, theta) -> x`` that keeps structure, shapes and dtypes.

    Raises:
        TypeError: T is no function; at trace time, T changes structure, shape or dtype.

    Cost: one application of T a step; no state.

    Source: Picard (1890), Banach (1922).

    Example:
        >>> import odljax as odl
        >>> heron = odl.fixed_point(lambda x, theta: 0.5 * (x + theta / x))
        >>> solver = odl.until_converged(heron, tol=1e-6, max_steps=20)
        >>> round(float(solver(1.0, 2.0).x), 4)
        1.4142
    """
    operator = operator_of("fixed_point", "T", T)

    def measured(x: Any, state: State, theta: Any, k: Step) -> Any:
        new = operator(x, theta)
        return new, state, (Residual(_tree.subtract(x, new), (x,)),)

    def plain(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        return operator(x, theta), state

    own = operator.displacement or operator.natural_residual or operator.step_size
    return Iteration(stateless, plain if own else MeasuredStep(measured), operator, f"fixed_point({operator.name})")


def gradient_descent(objective: Objective, step_size: Coefficient) -> Iteration:
    r"""Returns gradient descent on f.

    .. math:: x_{k+1} = x_k - \gamma_k \nabla_x f(x_k, \theta)

    When: f is smooth; :math:`\gamma < 2/L` for an L-Lipschitz gradient. Linear rate where f is strongly convex.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        step_size: :math:`\gamma_k > 0`, a number, a schedule of k or a function of theta. The operator, and so the
            residual, uses the step of k = 0.

    Raises:
        ValueError: a step size that is not positive (a schedule: at k = 0; warm-up from zero works in ``from_optax``).
        TypeError: at trace time, an objective that is not a real scalar.

    Cost: one gradient a step; no state.

    Source: Cauchy (1847).

    Example:
        >>> import jax, odljax as odl
        >>> descent = odl.gradient_descent(lambda x, theta: 0.5 * (x - theta) ** 2, step_size=0.5)
        >>> solver = odl.for_steps(descent, 20)
        >>> round(float(jax.grad(lambda theta: solver(0.0, theta).x)(3.0)), 4)
        1.0
    """
    is_callable("gradient_descent", "objective", objective, "x, theta")
    step_at = coefficient("gradient_descent", "step_size", step_size)
    operator = gradient(objective, first(step_at))

    def step(x: Any, state: State, theta: Any, k: Step) -> Any:
        _, slope = value_and_gradient("gradient_descent", objective, x, theta)
        return _tree.subtract(x, _tree.scale(step_at(theta, k), slope)), state, (Residual(slope),)

    return Iteration(stateless, MeasuredStep(step), operator, "gradient_descent")


def first(coefficient: Callable[[Any, Step], Any]) -> Callable[[Any], Any]:
    """The coefficient of the operator, which has no steps: that of k = 0."""
    return lambda theta: coefficient(theta, jnp.zeros((), int))


def proximal_gradient(objective: Objective, prox: Prox, step_size: Coefficient) -> Iteration:
    r"""Returns proximal gradient descent on :math:`f + h`.

    .. math:: x_{k+1} = \operatorname{prox}_{\gamma_k h}(x_k - \gamma_k \nabla_x f(x_k, \theta))

    When: f is smooth, h is not but has a cheap proximal operator; :math:`\gamma < 2/L`.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        prox: ``(v, theta, step_size) -> v``, as in ``odljax.prox`` with its parameter in the place of theta.
        step_size: :math:`\gamma_k > 0`, a number, a schedule of k or a function of theta. The operator uses that of k
            = 0.

    Raises:
        ValueError: a step size that is not positive.
        TypeError: at trace time, an objective that is not a scalar, a prox that changes structure, shape or dtype.

    Cost: one gradient and one prox a step; no state.

    Source: Combettes and Wajs (2005); ISTA in Beck and Teboulle (2009), equation 3.1.

    Example:
        >>> import odljax as odl
        >>> lasso = odl.proximal_gradient(lambda x, lam: 0.5 * (x - 3.0) ** 2, odl.prox.l1, step_size=1.0)
        >>> float(odl.for_steps(lasso, 3)(0.0, 1.0).x)
        2.0
    """
    is_callable("proximal_gradient", "objective", objective, "x, theta")
    is_callable("proximal_gradient", "prox", prox, "v, theta, step_size")
    step_at = coefficient("proximal_gradient", "step_size", step_size)
    operator = forward_backward(objective, prox, first(step_at))

    def measured(x: Any, state: State, theta: Any, k: Step) -> Any:
        size = step_at(theta, k)
        forward, backward, shift = forward_backward_step(objective, prox, x, theta, size)
        away = _tree.add(_tree.subtract(forward, backward), shift)
        return backward, state, (Residual(_tree.divide(away, size)),)

    def scheduled(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        return measured(x, state, theta, k)[:2]

    step = scheduled if callable(step_size) else MeasuredStep(measured)  # the operator's step is that of k = 0
    return Iteration(stateless, step, operator, "proximal_gradient")


def from_optax(objective: Objective, tx: optax.GradientTransformation) -> Iteration:
    r"""Returns the iteration of any optax optimiser on f.

    When: Adam, L-BFGS, a schedule, clipping or a line search in the inner problem. The operator is the unit gradient
    step :math:`x - \nabla_x f`, so residual, status and implicit derivative are those of the stationary points of f,
    whatever ``tx``. A ``tx`` that moves x where the gradient is zero (``adamw``, ``lion`` and others that decay weights
    by default, constraints, noise) ends elsewhere: where its first update shows that, there is no operator, and
    ``implicit`` and ``until_converged`` are refused. Put the penalty into f, the constraint into ``project``.

    Through the steps: Adam and its kin take the root of a running square, whose slope at a gradient of exactly zero (a
    weight that nothing depends on) is infinite, and the derivative NaN: give them ``eps_root``, as in
    ``optax.adam(1e-2, eps_root=1e-16)``. Line searches, and so L-BFGS with its default, loop inside optax until
    rounding decides, and what JAX makes of that is wrong: refused, ``implicit`` is the derivative there.

    Args:
        objective: f, ``(x, theta) -> scalar``.
        tx: an optax gradient transformation; those that need ``value``, ``grad`` or ``value_fn`` get them.

    Raises:
        TypeError: ``tx`` is no gradient transformation; at trace time, an objective that is not a real scalar; a
            derivative through the steps of a line search.

    Cost: one gradient a step and the state of ``tx``.

    Source: optax, the DeepMind JAX ecosystem (2020).

    Example:
        >>> import optax, odljax as odl
        >>> adam = odl.from_optax(lambda x, theta: 0.5 * (x - theta) ** 2, optax.adam(0.1))
        >>> round(float(odl.for_steps(adam, 200)(0.0, 1.0).x), 2)
        1.0
    """
    is_callable("from_optax", "objective", objective, "x, theta")
    hint = "Build one with optax, for instance optax.adam(1e-2); of MultiSteps take .gradient_transformation()."
    is_a("from_optax", "tx", tx, optax.GradientTransformation, hint)
    extended = optax.with_extra_args_support(tx)

    def step(x: Any, state: State, theta: Any, k: Step) -> Any:
        value, slope = value_and_gradient("from_optax", objective, x, theta)
        updates, state = extended.update(
            slope, state, x, value=value, grad=slope, value_fn=lambda x: objective(x, theta)
        )
        if _holds(state, _SEARCHES):
            updates, state = _without_derivative((updates, state))
        return optax.apply_updates(x, updates), state, (Residual(slope),)

    def init(x: Any, theta: Any) -> State:
        return extended.init(x)

    def restart(x: Any, state: State, theta: Any) -> State:
        """Moments and differences anew; what counts steps, such as a schedule, goes on."""
        if _holds(state, _LENGTHS):
            raise TypeError(
                "from_optax: an acceleration (anderson, broyden, squarem) needs steps that are a map of x; those of "
                "Adam and its kin get their lengths from what they remember. Accelerate gradient_descent, or do not."
            )
        inexact = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)  # noqa: E731
        return jax.tree.map(lambda old, new: new if inexact(old) else old, state, init(x, theta))

    if _moves_at_rest(extended):
        why = "from_optax (whose tx moves x where the gradient is zero: decayed weights, a constraint)"
        return Iteration(init, lambda *inputs: step(*inputs)[:2], None, why, restart=restart)
    return Iteration(init, MeasuredStep(step), gradient(objective, 1.0), "from_optax", restart=restart)


_SEARCHES = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
_LENGTHS = (optax.ScaleByAdamState, optax.ScaleByAdaDeltaState, optax.ScaleByBeliefState, optax.ScaleByLionState)
_LENGTHS += (optax.ScaleByRmsState, optax.ScaleByRStdDevState, optax.ScaleByRssState)


def _holds(state: State, kinds: tuple[type, ...]) -> bool:
    """Whether the state of an optax transformation holds one of these."""
    found = lambda node: isinstance(node, kinds)  # noqa: E731
    return any(map(found, jax.tree.leaves(state, is_leaf=found)))


@jax.custom_jvp
def _without_derivative(updates: Any) -> Any:
    """What a line search of optax found: its loop ends by rounding, and what JAX makes of its derivative is wrong."""
    return updates


@_without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "from_optax: the line search in tx has no derivative through its steps (it loops until rounding decides). "
        "Differentiate the solution, implicit(solver), or take a tx without one, such as optax.lbfgs(0.5, "
        "linesearch=None), or odl.line_search around this iteration."
    )


def _moves_at_rest(tx: optax.GradientTransformationExtraArgs) -> bool:
    """Whether the first update of two parameters, one of each sign, is not zero where their gradient is."""
    from jax.interpreters import partial_eval  # its import costs more than ours

    zeros, at, zero = np.zeros(2, np.float32), np.array([-1, 1], np.float32), np.zeros((), np.float32)

    def first_update(x: Any) -> Any:
        state = tx.init(x)
        if _holds(state, _SEARCHES):
            return jnp.zeros_like(x)
        return tx.update(jnp.asarray(zeros), state, x, value=zero, grad=jnp.asarray(zeros), value_fn=lambda x: zero)[0]

    try:
        with jax.numpy_dtype_promotion("standard"):  # optax knows no strict one
            if not any(partial_eval.dce_jaxpr(jax.make_jaxpr(first_update)(at).jaxpr, [True])[1]):  # x does not enter
                return False
            with jax.ensure_compile_time_eval():
                return bool(np.any(np.asarray(jax.jit(first_update)(at))))
    except Exception:  # masks and labels of another tree, traced settings: not known
        return False


def layered(T: Operator | Callable[[Any, Any], Any]) -> Iteration:
    r"""Returns untied layers: step k uses slice k of every leaf of theta.

    .. math:: x_{k+1} = T(x_k, \theta_k)

    When: an unrolled network such as LISTA. There is no operator, hence no fixed point beyond the last layer, and only
    ``unrolled`` and ``truncated`` apply; asking for more steps than theta has layers is refused.

    Shapes: every leaf of theta has a leading axis of the same length, the number of layers.

    Args:
        T: an operator or function ``(x, theta_k) -> x``.

    Raises:
        TypeError: T is no function.
        ValueError: at trace time, leaves of theta without a common leading axis, or more steps than layers.

    Cost: one application of T a step; no state.

    Source: Gregor and LeCun (2010).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> network = odl.for_steps(odl.layered(lambda x, weight: weight * x), 3)
        >>> float(network(1.0, jnp.array([2.0, 3.0, 4.0])).x)
        24.0
    """
    operator = operator_of("layered", "T", T)
    name = f"layered({operator.name})"

    def num_layers(theta: Any) -> int:
        leaves, _ = jax.tree_util.tree_flatten_with_path(theta)
        lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else -1 for _, leaf in leaves}
        if len(lengths) != 1 or -1 in lengths:
            shapes = ", ".join(f"{leaf_name(path)} {describe(leaf)}" for path, leaf in leaves)
            raise ValueError(
                f"{name}: every leaf of theta needs one common leading axis, the layers; came {shapes}. "
                f"Stack the layers."
            )
        return lengths.pop()

    def step(x: Any, state: State, theta: Any, k: Step) -> tuple[Any, State]:
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, k, keepdims=False), theta)
        return same_as(name, "the layer", operator(x, layer), x), state

    return Iteration(stateless, step, None, name, num_layers)
