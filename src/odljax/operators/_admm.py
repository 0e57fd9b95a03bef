"""The alternating direction method of multipliers: exact, relaxed, by consensus, linearised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._checks import coefficient_of_theta, is_a, is_callable, same_as
from .._types import Coefficient, Data
from ..linear import LinearSolver, cg
from ._gradient import Objective, Prox, value_and_gradient
from ._operator import Operator, Residual
from ._weights import Weight, expect, given, solve_definite, unweigh, weigh, weight_of_theta, with_adjoint

LinearMap = Callable[[Any, Any], Any]


class SplitVariables(NamedTuple):
    """The variables of an exact ADMM operator: the second block ``z`` and the multiplier ``y`` of the constraint."""

    z: Any
    y: Any


class ADMMVariables(NamedTuple):
    """The variables of an ADMM operator: code ``z``, slack ``e`` and multiplier ``y``."""

    z: Any
    e: Any
    y: Any


class _Linearized(NamedTuple):
    """z+, e+, the forward point of z, the step to it, the step of y, and ``A z + e - b`` with two of its terms."""

    z: Any
    e: Any
    forward: Any
    shift: Any
    move: Any
    violation: Any
    terms: tuple[Any, Any]


def linearized_admm(
    linear: Callable[[Any, Any], Any],
    prox_z: Callable[[Any, Any, Any], Any],
    prox_e: Callable[[Any, Any, Any], Any],
    observation: Any,
    *,
    penalty: Coefficient = 1.0,
    proximal_weight: Weight,
) -> Operator:
    r"""Returns the linearised ADMM operator on ``ADMMVariables(z, e, y)``.

    It solves :math:`\min_{z, e} g(z) + h(e)` subject to :math:`A z + e = b` by

    .. math::
        z^+ &= \operatorname{prox}_{g/r}(z - \tfrac{\beta}{r} A^\top (A z + e - b + y/\beta)) \\
        e^+ &= \operatorname{prox}_{h/\beta}(b - A z^+ - y/\beta) \\
        y^+ &= y + \beta (A z^+ + e^+ - b)

    When: g and h are convex with cheap proximal operators and :math:`A^\top A` has no cheap inverse. With
    :math:`r > \beta \|A\|^2` the operator is non-expansive in the metric
    :math:`G = \operatorname{diag}(r I - \beta A^\top A, \beta I, I/\beta)`, which it carries, and not in the
    identity. It is not firmly so for every pair, but from its own outcomes towards a fixed point it is: it converges
    without relaxation. ``answer`` reads z.

    Shapes: z as g wants it; e, y and the observation b as A z. A, g and h may depend on theta, and so may r and beta.

    Args:
        linear: A, ``(z, theta) -> A z``, linear in z; its transpose is derived.
        prox_z: ``(v, theta, step_size) -> v``, of ``step_size * g``; called with step size 1/r.
        prox_e: the same for h; called with step size 1/beta.
        observation: b, or a function of theta.
        penalty: beta > 0, a number or a function of theta.
        proximal_weight: r, positive: a scalar, an array broadcastable to z (a diagonal metric), or a function of theta.

    Raises:
        ValueError: a penalty that is not positive.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: A once forward on z, once on the new z, and its transpose once.

    Source: Lin, Liu and Su (2011), algorithm 1; metric: He and Yuan (2012).

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> l1 = lambda v, theta, step_size: odl.prox.l1(v, theta, step_size)
        >>> T = odl.operators.linearized_admm(lambda z, theta: 2.0 * z, l1, l1, jnp.ones(3), proximal_weight=5.0)
        >>> u = odl.operators.ADMMVariables(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
        >>> [round(float(part[0]), 3) for part in T(u, 0.1)]
        [0.38, 0.14, -0.1]
    """
    who = "linearized_admm"
    is_callable(who, "linear", linear, "z, theta")
    is_callable(who, "prox_z", prox_z, "v, theta, step_size")
    is_callable(who, "prox_e", prox_e, "v, theta, step_size")
    r_of = weight_of_theta(who, "proximal_weight", proximal_weight)
    beta_of = coefficient_of_theta(who, "penalty", penalty)

    def image(z: Any, e: Any, theta: Any) -> Any:
        return same_as(who, "linear", linear(z, theta), e, "e")

    def pieces(u: ADMMVariables, theta: Any) -> _Linearized:
        z, e, y = expect(who, u, ADMMVariables)
        beta, r, b = beta_of(theta), r_of(theta), given(observation, theta)
        fitted, adjoint = with_adjoint(lambda z: image(z, e, theta), z)
        violation = _tree.subtract(_tree.add(fitted, e), b)
        shift = unweigh(r, adjoint(_tree.add_scaled(y, beta, violation)))
        forward = _tree.subtract(z, shift)
        z = same_as(who, "prox_z", prox_z(forward, theta, 1 / r), z, "z")
        rest = _tree.subtract(b, image(z, e, theta))
        e = same_as(who, "prox_e", prox_e(_tree.add_scaled(rest, -1 / beta, y), theta, 1 / beta), e, "e")
        move = _tree.scale(beta, _tree.subtract(e, rest))
        return _Linearized(z, e, forward, shift, move, violation, (fitted, b))

    def apply(u: ADMMVariables, theta: Any) -> ADMMVariables:
        to = pieces(u, theta)
        return type(u)(to.z, to.e, _tree.add(u.y, to.move))

    def displacement(u: ADMMVariables, theta: Any) -> ADMMVariables:
        to = pieces(u, theta)
        gap = _tree.add(_tree.subtract(to.forward, to.z), to.shift)
        return type(u)(gap, _tree.subtract(u.e, to.e), _tree.negative(to.move))

    def residual(u: ADMMVariables, theta: Any) -> tuple[Residual, ...]:
        to, beta, r = pieces(u, theta), beta_of(theta), r_of(theta)
        kept = _tree.subtract(to.forward, to.z)
        gap, slack = _tree.add(kept, to.shift), _tree.subtract(u.e, to.e)
        return (
            Residual((to.violation, slack), (*to.terms, u.e)),
            Residual(weigh(r, gap), (weigh(r, to.shift), weigh(r, kept))),
            Residual((to.move, _tree.scale(beta, slack)), (u.y, _tree.add(u.y, to.move))),
            Residual(gap, (u.z, to.z)),
        )

    def metric(v: ADMMVariables, theta: Any) -> ADMMVariables:
        beta = beta_of(theta)
        fitted, adjoint = with_adjoint(lambda z: linear(z, theta), v.z)
        z = _tree.subtract(weigh(r_of(theta), v.z), adjoint(_tree.scale(beta, fitted)))
        return type(v)(z, _tree.scale(beta, v.e), _tree.scale(1 / beta, v.y))

    return Operator(apply, displacement, metric, readout=lambda u, theta: u.z, natural_residual=residual, name=who)


def admm(
    prox_x: Prox,
    prox_z: Prox,
    *,
    linear_x: LinearMap | None = None,
    linear_z: LinearMap | None = None,
    observation: Any = None,
    penalty: Coefficient = 1.0,
    relaxation: Coefficient = 1.0,
) -> Operator:
    r"""Returns the ADMM operator on ``SplitVariables(z, y)``, over- or under-relaxed.

    It solves :math:`\min_{x, z} f(x) + g(z)` subject to :math:`A x + B z = b` by

    .. math::
        x &= \arg\min_x f(x) + \tfrac\rho2 |A x + B z - b + y/\rho|^2 \\
        s &= \alpha A x - (1 - \alpha) (B z - b) + y/\rho \\
        z^+ &= \arg\min_z g(z) + \tfrac\rho2 |s + B z - b|^2, \qquad y^+ = \rho (s + B z^+ - b)

    and ``answer`` reads x. By default A = I, B = -I and b = 0: the scaled ADMM of :math:`\min_x f(x) + g(x)` with
    :math:`y/\rho` the scaled multiplier, where both minimisations are proximal operators. With ``linear_x`` alone it is
    :math:`\min_x f(x) + g(A x)`.

    When: f and g are convex and both minimisations are cheap and exact: a proximal operator, a linear system
    (``quadratic_argmin``). For every :math:`\rho > 0` and :math:`0 < \alpha < 2` non-expansive in the metric
    :math:`G = \begin{pmatrix} \rho B^\top B & -(1 - \alpha) B^\top \\ -(1 - \alpha) B & I/\rho \end{pmatrix}`, which it
    carries (definite where B is injective), and not in the identity unless :math:`\rho = \alpha = 1` and B = -I. It is
    Douglas-Rachford in other variables, whose governing sequence is :math:`z + y/\rho`.

    Where A or B has dependent rows y may not be unique and x be so all the same: GMRES, the default of ``implicit``,
    then differentiates x.

    Shapes: x and z as f and g want them; y and the observation as A x. With the defaults all three are alike.

    Args:
        prox_x: ``(v, theta, step_size) -> the minimiser over x of step_size * f(x) + |A x - v|^2 / 2``; where A is the
            identity the proximal operator of f. Called with step size :math:`1/\rho`, and differentiated as it stands.
        prox_z: the same for g and B; where B is minus the identity it is the proximal operator of g (its argument has
            its sign turned for it).
        linear_x: A, ``(x, theta) -> A x``, linear in x. None: the identity.
        linear_z: B, ``(z, theta) -> B z``, linear in z; its adjoint is derived. None: minus the identity.
        observation: b, or a function of theta. None: zero.
        penalty: :math:`\rho > 0`, a number or a function of theta.
        relaxation: :math:`\alpha` in (0, 2), a number or a function of theta; 1.5 to 1.8 often saves steps.

    Raises:
        ValueError: a penalty that is not positive, a relaxation outside (0, 2).
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: both minimisations, one product with A, two with B; one more minimisation over x to read the answer.

    Source: Glowinski and Marroco (1975), Gabay and Mercier (1976); Boyd et al. (2011), section 3; relaxed: Eckstein and
    Bertsekas (1992), theorem 8.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.admm(  # |x - (3, 0.5)|^2 / 2 + theta |x|_1
        ...     lambda v, theta, step_size: (v + step_size * jnp.array([3.0, 0.5])) / (1 + step_size), odl.prox.l1,
        ...     relaxation=1.5)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=200)
        >>> solution = solver(odl.operators.SplitVariables(jnp.zeros(2), jnp.zeros(2)), 1.0)
        >>> [round(abs(float(entry)), 4) for entry in T.answer(solution.x, 1.0)]
        [2.0, 0.0]
    """
    return _admm("admm", prox_x, prox_z, linear_x, linear_z, observation, penalty, relaxation)


def _admm(
    who: str,
    prox_x: Prox,
    prox_z: Prox,
    linear_x: LinearMap | None,
    linear_z: LinearMap | None,
    observation: Any,
    penalty: Coefficient,
    relaxation: Coefficient,
    readout: Callable[[Any, Any], Any] | None = None,
    image_name: str = "b - B z",
) -> Operator:
    is_callable(who, "prox_x", prox_x, "v, theta, step_size")
    is_callable(who, "prox_z", prox_z, "v, theta, step_size")
    if linear_x is not None:
        is_callable(who, "linear_x", linear_x, "x, theta")
    if linear_z is not None:
        is_callable(who, "linear_z", linear_z, "z, theta")
    rho_of = coefficient_of_theta(who, "penalty", penalty)
    alpha_of = coefficient_of_theta(who, "relaxation", relaxation, high=2.0)

    def rest(z: Any, y: Any, theta: Any) -> Any:
        """``b - B z``."""
        image = z if linear_z is None else _tree.negative(linear_z(z, theta))
        if observation is not None:
            image = jax.tree.map(jnp.add, given(observation, theta), image)
        return same_as(who, image_name, image, y, "y")

    def first(u: SplitVariables, theta: Any) -> tuple[Any, Any]:
        """x and ``b - B z``."""
        z, y = expect(who, u, SplitVariables)
        rho, remaining = rho_of(theta), rest(z, y, theta)
        x = prox_x(_tree.add_scaled(remaining, -1 / rho, y), theta, 1 / rho)
        return (same_as(who, "prox_x", x, y, "y") if linear_x is None else x), remaining

    def pieces(u: SplitVariables, theta: Any) -> tuple[Any, Any, tuple[Any, Any, Any]]:
        """z+, the step of y, and A x, ``b - B z``, ``b - B z+``."""
        rho = rho_of(theta)
        x, remaining = first(u, theta)
        z, y = u
        image = x if linear_x is None else same_as(who, "linear_x", linear_x(x, theta), y, "y")
        relaxed = _tree.interpolate(remaining, image, alpha_of(theta))
        point = _tree.add_scaled(relaxed, 1 / rho, y)
        if observation is not None:
            point = _tree.subtract(point, given(observation, theta))
        point = point if linear_z is None else _tree.negative(point)
        new = same_as(who, "prox_z", prox_z(point, theta, 1 / rho), z, "z")
        left = rest(new, y, theta)
        return new, _tree.scale(rho, _tree.subtract(relaxed, left)), (image, remaining, left)

    def apply(u: SplitVariables, theta: Any) -> SplitVariables:
        new, move, _ = pieces(u, theta)
        return type(u)(new, _tree.add(u.y, move))

    def displacement(u: SplitVariables, theta: Any) -> SplitVariables:
        new, move, _ = pieces(u, theta)
        return type(u)(_tree.subtract(u.z, new), _tree.negative(move))

    def residual(u: SplitVariables, theta: Any) -> tuple[Residual, ...]:
        # A x + B z - b and B (z+ - z), as they are and, times rho, as what they leave of 0 in df + A'y and dg + B'y.
        _, _, (image, remaining, left) = pieces(u, theta)
        gaps = _tree.subtract(image, remaining), _tree.subtract(remaining, left)
        forces = _tree.scale(rho_of(theta), gaps)
        given_b = () if observation is None else (given(observation, theta),)
        return (
            Residual(gaps, (image, remaining, *given_b)),
            Residual(forces, (u.y, _tree.add(u.y, forces[0]))),
        )

    def metric(v: SplitVariables, theta: Any) -> SplitVariables:
        rho, cross = rho_of(theta), 1 - alpha_of(theta)
        if linear_z is None:
            z = _tree.add_scaled(_tree.scale(rho, v.z), cross, v.y)
            return type(v)(z, _tree.add_scaled(_tree.scale(1 / rho, v.y), cross, v.z))
        image, adjoint = with_adjoint(lambda z, B=linear_z: B(z, theta), v.z)
        z = adjoint(_tree.add_scaled(_tree.scale(rho, image), -cross, v.y))
        return type(v)(z, _tree.add_scaled(_tree.scale(1 / rho, v.y), -cross, image))

    def metric_inverse(v: SplitVariables, theta: Any) -> SplitVariables:
        rho, cross = rho_of(theta), 1 - alpha_of(theta)
        z = _tree.add_scaled(_tree.scale(1 / rho, v.z), -cross, v.y)
        y = _tree.add_scaled(_tree.scale(rho, v.y), -cross, v.z)
        return type(v)(*_tree.scale(1 / (1 - cross**2), (z, y)))

    return Operator(
        apply,
        displacement,
        metric,
        metric_inverse if linear_z is None else None,
        readout=readout or (lambda u, theta: first(u, theta)[0]),
        natural_residual=residual,
        name=who,
    )


def consensus_admm(
    prox: Callable[[Any, Any, Any, Any], Any],
    data: Data | Callable[[Any], Data],
    prox_z: Prox | None = None,
    *,
    penalty: Coefficient = 1.0,
    relaxation: Coefficient = 1.0,
) -> Operator:
    r"""Returns the operator of consensus ADMM on ``SplitVariables(z, y)``: many workers, one answer.

    It solves :math:`\min_z g(z) + \sum_{i=1}^n f_i(z)` by copies :math:`x_i` that must agree with z,

    .. math::
        x_i &= \operatorname{prox}_{f_i/\rho}(z - y_i/\rho) \\
        z^+ &= \operatorname{prox}_{g/(n\rho)}\Bigl(\tfrac1n \sum_i \hat x_i + y_i/\rho\Bigr), \qquad
        \hat x_i = \alpha x_i + (1 - \alpha) z \\
        y_i^+ &= y_i + \rho (\hat x_i - z^+)

    and ``answer`` reads z.

    When: the :math:`f_i` are convex, each with a cheap proximal operator of its own data, which stays where it is: the
    workers exchange z and averages only. It is ``admm`` with :math:`A = I` and B = minus the stacked copies of z, and
    carries that metric, :math:`G = \begin{pmatrix} n \rho I & (1 - \alpha) \mathbf 1^\top \\ (1 - \alpha) \mathbf 1 &
    I/\rho \end{pmatrix}`, in which it is non-expansive; in the identity it is not.

    Shapes: z as the :math:`f_i` want it; y like z with a leading axis of length n, the length of the leading axis of
    every leaf of the data.

    Args:
        prox: ``(v, theta, step_size, data_i) -> v``, the proximal operator of ``step_size * f_i``; it is vmapped over
            the workers.
        data: a pytree whose leaves have the leading axis of the workers, or a function of theta that returns one.
        prox_z: ``(v, theta, step_size) -> v``, of ``step_size * g``. None: g = 0.
        penalty: :math:`\rho > 0`, a number or a function of theta.
        relaxation: :math:`\alpha` in (0, 2), a number or a function of theta.

    Raises:
        ValueError: a penalty that is not positive, a relaxation outside (0, 2); at trace time, data without a common
            leading axis.
        TypeError: an argument that must be a function and is none; at trace time, parts that change shape or dtype.

    Cost: every worker's proximal operator once, one sum over the workers, the proximal operator of g.

    Source: Boyd et al. (2011), section 7.1.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> T = odl.operators.consensus_admm(  # the sum of (x - d_i)^2 / 2, and theta |x|: a shrunken mean
        ...     lambda v, theta, step_size, d: (v + step_size * d) / (1 + step_size), jnp.array([1.0, 2.0, 6.0]),
        ...     odl.prox.l1)
        >>> solver = odl.until_converged(odl.fixed_point(T), tol=1e-6, max_steps=200)
        >>> solution = solver(odl.operators.SplitVariables(jnp.zeros(()), jnp.zeros(3)), 1.5)
        >>> round(float(T.answer(solution.x, 1.5)), 4)
        2.5
    """
    who = "consensus_admm"
    is_callable(who, "prox", prox, "v, theta, step_size, data_i")
    if prox_z is not None:
        is_callable(who, "prox_z", prox_z, "v, theta, step_size")

    def workers(v: Any, theta: Any, step_size: Any) -> Any:
        own = given(data, theta)
        return jax.vmap(lambda v, d: prox(v, theta, step_size, d))(v, own)

    def together(v: Any, theta: Any, step_size: Any) -> Any:
        """The minimiser over z of ``step_size * g(z)`` and of half the distances of its copies from -v."""
        number = jax.tree.leaves(v)[0].shape[0]
        mean = jax.tree.map(lambda leaf: -jnp.mean(leaf, axis=0), v)
        return mean if prox_z is None else prox_z(mean, theta, step_size / number)

    def copies(z: Any, theta: Any) -> Any:
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(given(data, theta))}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                f"{who}: every leaf of the data needs the leading axis of the workers; the leading axes that came are "
                f"{sorted(lengths)}. Stack the data of the workers."
            )
        ((number,),) = lengths
        return jax.tree.map(lambda leaf: -jnp.broadcast_to(leaf, (number, *leaf.shape)), z)

    return _admm(
        who,
        workers,
        together,
        None,
        copies,
        None,
        penalty,
        relaxation,
        readout=lambda u, theta: u.z,
        image_name="the copies of z, one for each slice of the data,",
    )


def quadratic_argmin(
    objective: Objective,
    linear: LinearMap | None = None,
    like: Any = None,
    *,
    linear_solver: LinearSolver | None = None,
) -> Prox:
    r"""Returns the exact minimisation that ADMM wants of a quadratic objective, as a function of its point and step.

    .. math:: (v, \theta, \gamma) \mapsto \arg\min_x \gamma f(x, \theta) + \tfrac12 |A x - v|^2
        = (\gamma \nabla^2 f + A^\top A)^{-1} (A^\top v - \gamma \nabla f(0, \theta))

    Without A it is the proximal operator of f, for any splitting that wants one.

    When: f is quadratic in x (least squares, a linear term, a ridge) and :math:`\gamma \nabla^2 f + A^\top A` is
    positive definite. Of another f it returns the minimiser of the quadratic model at zero, without a warning.

    Shapes: v as A x, the result like ``like``.

    Args:
        objective: f, ``(x, theta) -> scalar``, quadratic in x.
        linear: A, ``(x, theta) -> A x``, linear in x; its adjoint is derived. None: the identity.
        like: a pytree of arrays, or of ``jax.ShapeDtypeStruct``, of the structure, shapes and dtypes of x; needed with
            ``linear``. None: v is like x.
        linear_solver: default ``odl.linear.cg()``, to 1e-12 in float64 and 1e-6 in float32; ``odl.linear.dense()`` for
            a few unknowns. A failed solve gives NaN.

    Returns:
        A function ``(v, theta, step_size) -> x``, differentiable in all three in both modes.

    Raises:
        TypeError: an argument that must be a function and is none, ``linear`` without ``like``; at trace time, an
            objective that is not a real scalar.

    Cost: one linear solve, each step one Hessian-vector product and one product with A and its adjoint.

    Source: Boyd et al. (2011), section 4.2.

    Example:
        >>> import jax.numpy as jnp, odljax as odl
        >>> prox = odl.operators.quadratic_argmin(lambda x, theta: 0.5 * theta * jnp.sum((x - 1.0) ** 2))
        >>> [round(float(entry), 4) for entry in prox(jnp.array([4.0, 1.0]), 2.0, 0.25)]
        [3.0, 1.0]
    """
    who = "quadratic_argmin"
    is_callable(who, "objective", objective, "x, theta")
    if linear is not None:
        is_callable(who, "linear", linear, "x, theta")
        if like is None:
            raise TypeError(f"{who}: linear hides the structure of x; like=None came. Pass an array (tree) like x.")
    solver = cg() if linear_solver is None else linear_solver
    is_a(who, "linear_solver", solver, LinearSolver, "Make one with odl.linear, for instance cg().")

    def argmin(v: Any, theta: Any, step_size: Any) -> Any:
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), v if like is None else like)
        slope, curvature = jax.linearize(lambda x: value_and_gradient(who, objective, x, theta)[1], zero)

        def product(x: Any) -> Any:
            if linear is None:
                return _tree.add(x, weigh(step_size, curvature(x)))
            image, adjoint = with_adjoint(lambda x, A=linear: A(x, theta), x)
            return _tree.add(weigh(step_size, curvature(x)), adjoint(image))

        pull = v if linear is None else with_adjoint(lambda x, A=linear: A(x, theta), zero)[1](v)
        return solve_definite(product, _tree.subtract(pull, weigh(step_size, slope)), solver)

    return argmin
