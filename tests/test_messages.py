"""Bad input: each refusal says who needs what, what came and what to do; each bad run ends in a status."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import config

import odljax as odl
from odljax import Status, diagnostics, linear, operators, problems, prox

LINE = odl.fixed_point(lambda x, theta: 0.5 * x + theta)
SOLVER = odl.until_converged(LINE, tol=1e-8, max_steps=100)
DESCENT = odl.gradient_descent(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2), step_size=0.5)
TREE = {"w": np.ones((2, 3)), "b": [np.ones(3)]}


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    """Without the type checker, which the tests bring and which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def identity_prox(v, theta, step_size):
    return v


def square(x, theta):
    return jnp.sum(x**2)


def steps(iteration, num_steps=2):
    return odl.for_steps(iteration, num_steps)


def refused(error, words, call):
    with pytest.raises(error, match=words):
        call()


def rows(*table):
    return pytest.mark.parametrize(("error", "words", "call"), [pytest.param(*row[1:], id=row[0]) for row in table])


# ---- structure, shape and dtype of what a user's function returns ----------------------------------------------------


@rows(
    (
        "operator structure",
        TypeError,
        r"<lambda>: the operator T\(x, theta\) must keep the structure of x; it came back as PyTreeDef\(\{'w': "
        r"\*\}\), x is "
        r"PyTreeDef\(\{'b': \[\*\], 'w': \*\}\)\. Return the same containers with the same keys",
        lambda: steps(odl.fixed_point(lambda x, theta: {"w": x["w"]}))(TREE, 1.0),
    ),
    (
        "operator shape",
        TypeError,
        r"the operator T\(x, theta\) must keep the shapes and dtypes of x; leaf \['b'\]\[0\] came back as "
        r"float64\[3,1\], x has "
        r"float64\[3\]\. Reshape or cast it",
        lambda: steps(odl.fixed_point(lambda x, theta: {"w": x["w"], "b": [x["b"][0][:, None]]}))(TREE, 1.0),
    ),
    (
        "operator dtype",
        TypeError,
        r"leaf \(itself\) came back as float32\[2\], x has float64\[2\]\. Reshape or cast it \(astype\) inside "
        r"the function",
        lambda: steps(odl.fixed_point(lambda x, theta: x.astype(jnp.float32)))(np.ones(2), 1.0),
    ),
    (
        "operator integer",
        TypeError,
        r"leaf \(itself\) came back as int64\[\], x has float64\[\]",
        lambda: operators.as_operator(lambda x, theta: 3)(1.0, None),
    ),
    (
        "operator shape while converging",
        TypeError,
        r"narrow: the operator T\(x, theta\) must keep .* leaf \(itself\) came back as float64\[1\], x has "
        r"float64\[2\]",
        lambda: odl.until_converged(odl.fixed_point(operators.Operator(lambda x, theta: x[:1], name="narrow")))(
            np.ones(2), 1
        ),
    ),
    (
        "displacement",
        TypeError,
        r"odd: the operator's displacement must keep the shapes and dtypes of x; leaf \(itself\) came back as "
        r"float64\[\]",
        lambda: steps(
            odl.fixed_point(
                operators.Operator(lambda x, theta: x, displacement=lambda x, theta: 0.0 * x[0], name="odd")
            )
        )(np.ones(2), 1.0),
    ),
    *(
        (
            f"chambolle_pock {name}",
            TypeError,
            rf"chambolle_pock: {name} must keep the shapes and dtypes of {like}; leaf \(itself\) came back as {came}",
            lambda name=name: operators.chambolle_pock(
                **(dict.fromkeys(("prox_g", "prox_h"), identity_prox) | {"linear": lambda x, theta: x[:2]})
                | {name: (lambda x, theta: x[:1]) if name == "linear" else (lambda v, theta, step_size: v[:1])},
                step_size=1.0,
                dual_step_size=1.0,
            )(operators.PrimalDual(jnp.ones(3), jnp.ones(2)), 1.0),
        )
        for name, like, came in (
            ("prox_g", "x", r"float64\[1\], x has float64\[3\]"),
            ("prox_h", "y", r"float64\[1\], y has float64\[2\]"),
            ("linear", "y", r"float64\[1\], y has float64\[2\]"),
        )
    ),
    (
        "prox shape",
        TypeError,
        r"forward_backward: the prox must keep the shapes and dtypes of x; leaf \(itself\) came back as "
        r"float64\[1\], x has float64\[2\]",
        lambda: steps(odl.proximal_gradient(square, lambda v, theta, s: v[:1], 0.1))(np.ones(2), 1.0),
    ),
    (
        "prox structure",
        TypeError,
        r"the prox must keep the structure of x; it came back as PyTreeDef\(\(\*, \*\)\), x is PyTreeDef\(\*\)",
        lambda: steps(odl.proximal_gradient(square, lambda v, theta, s: (v, v), 0.1))(np.ones(2), 1.0),
    ),
    (
        "prox dtype in the operator",
        TypeError,
        r"forward_backward: the prox must keep .* came back as float32\[2\]",
        lambda: operators.forward_backward(square, lambda v, theta, s: v.astype(jnp.float32), 0.1)(np.ones(2), 1.0),
    ),
    *(
        (
            f"admm {name}",
            TypeError,
            rf"linearized_admm: {name} must keep the shapes and dtypes of {part}; leaf \(itself\) came back as "
            rf"float64\[2\], {part} has float64\[3\]\. Reshape or cast it",
            lambda parts=parts: operators.linearized_admm(*parts, jnp.ones(3), proximal_weight=2.0)(
                operators.ADMMVariables(jnp.ones(3), jnp.ones(3), jnp.ones(3)), None
            ),
        )
        for name, part, parts in (
            ("linear", "e", (lambda z, theta: z[:2], identity_prox, identity_prox)),
            ("prox_z", "z", (lambda z, theta: z, lambda v, theta, s: v[:2], identity_prox)),
            ("prox_e", "e", (lambda z, theta: z, identity_prox, lambda v, theta, s: v[:2])),
        )
    ),
    (
        "projection",
        TypeError,
        r"project: the projection must keep the shapes and dtypes of x; leaf \(itself\) came back as float64\[\]",
        lambda: steps(odl.project(DESCENT, lambda x, theta: x[0]))(np.ones(2), 1.0),
    ),
    (
        "step",
        TypeError,
        r"walk: the step must keep the structure of x",
        lambda: steps(odl.Iteration(lambda x, theta: (), lambda x, s, theta, k: ((x,), s), None, "walk"))(
            np.ones(2), 1.0
        ),
    ),
    (
        "state",
        TypeError,
        r"walk: the step's state must keep the shapes and dtypes of the state before; leaf \['n'\] came back as "
        r"float64\[2\], the state before has int64\[\]",
        lambda: steps(
            odl.Iteration(lambda x, theta: {"n": 0}, lambda x, s, theta, k: (x, {"n": x}), None, "walk"),
        )(np.ones(2), 1.0),
    ),
    (
        "state structure",
        TypeError,
        r"walk: the step's state must keep the structure of the state before; it came back as PyTreeDef\(\(\)\)",
        lambda: odl.until_converged(
            odl.Iteration(lambda x, theta: (x,), lambda x, s, theta, k: (x, ()), operators.as_operator(square), "walk")
        )(1.0, 1.0),
    ),
    (
        "metric inverse",
        TypeError,
        r"aggregate: metric_inverse must keep the shapes and dtypes of x; leaf \(itself\) came back as float64\[1\]",
        lambda: steps(odl.aggregate(LINE, square, step_size=0.1, metric_inverse=lambda v, theta: v[:1]))(
            np.ones(2), 1.0
        ),
    ),
)
def test_what_must_keep_structure_shape_and_dtype(error, words, call):
    refused(error, words, call)


@rows(
    (
        "gradient",
        TypeError,
        r"gradient: the objective must return a real scalar; float64\[2\] came back\. Reduce it, for instance "
        r"with jnp\.sum",
        lambda: operators.gradient(lambda x, theta: x**2, 0.1)(np.ones(2), 1.0),
    ),
    (
        "gradient_descent",
        TypeError,
        r"gradient_descent: the objective must return a real scalar; float64\[1\] came back",
        lambda: steps(odl.gradient_descent(lambda x, theta: x**2, 0.1))(np.ones(1), 1.0),
    ),
    (
        "proximal_gradient",
        TypeError,
        r"forward_backward: the objective must return a real scalar; int64\[\] came back",
        lambda: steps(odl.proximal_gradient(lambda x, theta: jnp.argmax(x), prox.l1, 0.1))(np.ones(2), 1.0),
    ),
    (
        "from_optax",
        TypeError,
        r"from_optax: the objective must return a scalar; a tuple came back\. Return one number",
        lambda: steps(odl.from_optax(lambda x, theta: (square(x, theta), 0), optax.sgd(0.1)))(np.ones(2), 1.0),
    ),
    (
        "aggregate",
        TypeError,
        r"aggregate: the objective must return a real scalar; float64\[2\] came back",
        lambda: steps(odl.aggregate(LINE, lambda x, theta: x, step_size=0.1))(np.ones(2), 1.0),
    ),
    (
        "through",
        TypeError,
        r"through: the outer loss must return a real scalar; float64\[2\] came back",
        lambda: (h := odl.hypergradients.through(odl.implicit(SOLVER), lambda x, theta: x)).update(
            1.0, h.init(1.0, np.ones(2))
        ),
    ),
    (
        "hodl",
        TypeError,
        r"hodl: the outer loss must return a real scalar; complex128\[\] came back",
        lambda: (h := odl.hypergradients.hodl(LINE, lambda x, theta: jnp.sum(x).astype(complex), num_steps=2)).update(
            1.0, h.init(1.0, np.ones(2))
        ),
    ),
)
def test_non_scalar_objectives(error, words, call):
    refused(error, words, call)


# ---- theta and x0 ----------------------------------------------------------------------------------------------------


def test_integer_theta_under_plain_grad_is_refused_by_jax_itself():
    for solver in (odl.implicit(SOLVER), odl.unrolled(SOLVER), odl.one_step(SOLVER)):
        with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs .* but got int64"):
            jax.grad(lambda theta: solver(0.0, theta).x)(3)


@pytest.mark.parametrize(
    ("who", "hyper"),
    [
        ("through", odl.hypergradients.through(odl.implicit(SOLVER), square)),
        ("warm_started", odl.hypergradients.warm_started(odl.implicit(SOLVER), square)),
        ("hodl", odl.hypergradients.hodl(LINE, square, num_steps=2)),
    ],
)
def test_integer_theta_in_a_hypergradient(who, hyper):
    words = (
        rf"{who}: theta is differentiated and must be real floating point; leaf \['n'\] is int64\[2\]\. Cast "
        rf"it, or close"
    )
    theta = {"a": 1.0, "n": jnp.arange(2)}
    with pytest.raises(TypeError, match=words):
        hyper.init(theta, 1.0)
    with pytest.raises(TypeError, match=words):
        hyper.update(theta, hyper.init({"a": 1.0, "n": 0.0}, 1.0, allow_unused=True))
    with pytest.raises(TypeError, match=rf"{who}: theta is differentiated .* leaf \(itself\) is int64\[\]"):
        hyper.update(3, hyper.init(3.0, 1.0))
    with pytest.raises(
        TypeError, match=rf"{who}: x0 must be real or complex floating point; leaf \(itself\) is int64\[\]"
    ):
        hyper.init(3.0, 1)


@pytest.mark.parametrize(
    ("x0", "words"),
    [
        (
            3,
            r"x0 must be real or complex floating point; leaf \(itself\) is int64\[\]\. Cast it, for instance with "
            r"\.astype\(float\)",
        ),
        ({"a": 1.0, "b": np.arange(3)}, r"x0 must be real or complex floating point; leaf \['b'\] is int64\[3\]"),
        (np.ones(2, bool), r"x0 must be real or complex floating point; leaf \(itself\) is bool\[2\]"),
        ({}, r"x0 needs at least one floating-point leaf; an empty tree came"),
        (None, r"x0 needs at least one floating-point leaf; an empty tree came"),
        ({"a": "text"}, r"x0 must hold arrays; leaf \['a'\] is a str\. Pass a pytree of floating-point arrays"),
    ],
    ids=["int", "int leaf", "bool", "empty", "None", "text"],
)
def test_bad_x0(x0, words):
    for solver, name in (
        (SOLVER, r"until_converged\(fixed_point\(<lambda>\)\)"),
        (odl.implicit(SOLVER), r"implicit\(until_converged\(fixed_point\(<lambda>\)\)\)"),
        (steps(DESCENT), r"for_steps\(gradient_descent\)"),
    ):
        with pytest.raises(TypeError, match=f"{name}: {words}"):
            solver(x0, 1.0)
    with pytest.raises(TypeError, match=words.replace("x0", "x")):
        operators.as_operator(lambda x, theta: x)(x0, 1.0)


def test_bad_points_of_the_probes():
    with pytest.raises(
        TypeError, match=r"expansion: x must be real or complex floating point; leaf \(itself\) is int64\[3\]"
    ):
        diagnostics.expansion(lambda x, theta: x, jnp.arange(3), None)
    with pytest.raises(ValueError, match=r"expansion: num_steps must be a whole number of at least 1; 0 came"):
        diagnostics.expansion(lambda x, theta: x, jnp.ones(3), None, num_steps=0)
    with pytest.raises(
        TypeError, match=r"taylor_test: theta must be real floating point; leaf \(itself\) is int64\[\]"
    ):
        diagnostics.taylor_test(lambda theta: theta, 3)


# ---- records ---------------------------------------------------------------------------------------------------------

RECORDS = {
    "Operator(gradient)": operators.gradient(square, 0.1),
    "Iteration(gradient_descent)": DESCENT,
    "Solver(until_converged(fixed_point(<lambda>)))": SOLVER,
    "Hypergradient(through(implicit(until_converged(fixed_point(<lambda>)))))": odl.hypergradients.through(
        odl.implicit(SOLVER), square
    ),
    "LinearSolver(cg)": linear.cg(),
    "Problem(line)": problems.line(),
}


@pytest.mark.parametrize("name", list(RECORDS))
def test_a_record_says_what_it_is(name):
    assert repr(RECORDS[name]) == name


def test_a_record_cannot_be_changed():
    with pytest.raises(AttributeError, match="name"):
        DESCENT.name = "other"


# ---- derivatives that have no meaning --------------------------------------------------------------------------------


@rows(
    (
        "implicit aggregate",
        TypeError,
        r"implicit: the derivative at a fixed point needs an operator, and aggregate\(fixed_point\(<lambda>\)\) "
        r"has none\. Use "
        r"unrolled, which differentiates the steps themselves",
        lambda: odl.implicit(steps(odl.aggregate(LINE, square, step_size=0.1))),
    ),
    (
        "implicit aggregate with weight 0",
        TypeError,
        r"needs an operator, and aggregate\(fixed_point\(<lambda>\)\) has none",
        lambda: odl.implicit(steps(odl.aggregate(LINE, square, weight=0.0, step_size=0.1))),
    ),
    (
        "implicit layered",
        TypeError,
        r"implicit: .* needs an operator, and layered\(<lambda>\) has none\. Use unrolled",
        lambda: odl.implicit(steps(odl.layered(lambda x, theta: x))),
    ),
    (
        "one_step layered",
        TypeError,
        r"needs an operator, and layered\(<lambda>\) has none",
        lambda: odl.one_step(steps(odl.layered(lambda x, theta: x))),
    ),
    (
        "until_converged layered",
        TypeError,
        r"until_converged: the residual of an operator is tested, and layered\(<lambda>\) has no operator\. Use "
        r"for_steps",
        lambda: odl.until_converged(odl.layered(lambda x, theta: x)),
    ),
    (
        "cg on a plain map",
        TypeError,
        r"implicit: cg needs a symmetric positive-definite Jacobian, and that of <lambda> is not declared "
        r"symmetric\. Use "
        r"gmres, bicgstab or neumann, or declare Operator\(T, symmetric=True\) if it is",
        lambda: odl.implicit(SOLVER, linear.cg()),
    ),
    (
        "cg on a proximal map",
        TypeError,
        r"implicit: cg needs .* that of forward_backward is not declared symmetric",
        lambda: odl.implicit(steps(odl.proximal_gradient(square, prox.l1, 0.1)), linear.cg()),
    ),
    (
        "cg after a projection",
        TypeError,
        r"that of compose\(project, gradient\) is not declared symmetric",
        lambda: odl.implicit(steps(odl.project(DESCENT, lambda x, theta: x)), linear.cg()),
    ),
    (
        "on_failure",
        ValueError,
        r"implicit: on_failure must be 'warn', 'ignore' or 'raise'; 'loudly' came",
        lambda: odl.implicit(SOLVER, on_failure="loudly"),
    ),
    (
        "reverse mode of until_converged",
        TypeError,
        r"until_converged\(fixed_point\(<lambda>\)\): a loop that stops by itself has no reverse mode\. Wrap the "
        r"solver: implicit\(solver\), unrolled\(solver\), forward\(solver\), "
        r"truncated\(solver, num_steps=\.\.\.\) or one_step\(solver\)",
        lambda: jax.grad(lambda theta: SOLVER(0.0, theta).x)(1.0),
    ),
    (
        "reverse mode of until_converged in a compiled batch",
        TypeError,
        r"a loop that stops by itself has no reverse mode\. Wrap the solver: implicit\(solver\)",
        lambda: jax.jit(jax.vmap(jax.grad(lambda theta: SOLVER(0.0, theta).x)))(jnp.ones(2)),
    ),
    (
        "through a bare until_converged",
        TypeError,
        r"a loop that stops by itself has no reverse mode",
        lambda: (h := odl.hypergradients.through(SOLVER, square)).update(1.0, h.init(1.0, 0.0)),
    ),
)
def test_refused_derivatives(error, words, call):
    refused(error, words, call)


def test_forward_mode_of_until_converged_is_not_refused():
    tangent = jax.jvp(lambda theta: SOLVER(0.0, theta).x, (1.0,), (1.0,))[1]
    np.testing.assert_allclose(tangent, 2.0, rtol=1e-7)


def test_cg_is_accepted_where_the_jacobian_is_declared_symmetric():
    declared = operators.Operator(lambda x, theta: 0.5 * x + theta, symmetric=True)
    solver = odl.implicit(odl.until_converged(odl.fixed_point(declared), tol=1e-10), linear.cg())
    np.testing.assert_allclose(jax.grad(lambda theta: solver(0.0, theta).x)(1.0), 2.0, rtol=1e-12)


# ---- counts and tolerances -------------------------------------------------------------------------------------------


@rows(
    *[
        (
            f"{name} {value!r}",
            ValueError,
            rf"{name}: {what} must be a whole number of at least {least}; {value!r} came",
            lambda make=make, value=value: make(value),
        )
        for name, what, least, make in (
            ("for_steps", "num_steps", 1, lambda n: odl.for_steps(LINE, n)),
            ("until_converged", "max_steps", 1, lambda n: odl.until_converged(LINE, max_steps=n)),
            ("unrolled", "checkpoint_every", 1, lambda n: odl.unrolled(SOLVER, checkpoint_every=n)),
            ("truncated", "num_steps", 1, lambda n: odl.truncated(SOLVER, num_steps=n)),
            ("anderson", "memory", 1, lambda n: odl.anderson(LINE, memory=n)),
            ("neumann", "terms", 0, linear.neumann),
            ("cg", "max_steps", 1, lambda n: linear.cg(max_steps=n)),
            ("bicgstab", "max_steps", 1, lambda n: linear.bicgstab(max_steps=n)),
            ("gmres", "max_steps", 1, lambda n: linear.gmres(max_steps=n)),
            ("gmres", "restart", 1, lambda n: linear.gmres(restart=n)),
            ("hodl", "num_steps", 1, lambda n: odl.hypergradients.hodl(LINE, square, num_steps=n)),
            ("ridge", "num_samples", 1, lambda n: problems.ridge(n)),
            ("p_c", "copies", 1, lambda n: problems.p_c(copies=n)),
        )
        for value in ((-1, 2.5, True) if least == 0 else (0, -1, 2.5, True))
    ]
)
def test_step_counts(error, words, call):
    refused(error, words, call)


@rows(
    *[
        (
            f"{name} {value!r}",
            ValueError,
            rf"{name}: {what} must lie in .*; {value!r} came",
            lambda make=make, value=value: make(value),
        )
        for name, what, values, make in (
            ("until_converged", "tol", (-1e-3, np.nan), lambda t: odl.until_converged(LINE, tol=t)),
            ("until_converged", "relative_tol", (-1e-3, np.nan), lambda t: odl.until_converged(LINE, relative_tol=t)),
            ("cg", "tol", (0.0, -1e-3, np.nan), lambda t: linear.cg(tol=t)),
            ("bicgstab", "tol", (0.0, -1e-3), lambda t: linear.bicgstab(tol=t)),
            ("gmres", "tol", (0.0, -1e-3), lambda t: linear.gmres(tol=t)),
            ("anderson", "regularization", (-1e-3,), lambda t: odl.anderson(LINE, regularization=t)),
            ("quadratic", "condition", (0.5,), problems.quadratic),
            ("p_c", "c", (-0.5,), problems.p_c),
        )
        for value in values
    ]
)
def test_tolerances(error, words, call):
    refused(error, words, call)


def test_a_tolerance_that_no_residual_meets():
    with pytest.raises(
        ValueError, match=r"until_converged: tol and relative_tol are both 0, which no residual meets\. Set one"
    ):
        odl.until_converged(LINE, tol=0.0)
    odl.until_converged(LINE, tol=0, relative_tol=1e-3)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (
            "for_steps: num_steps fixes the program and must be a Python int; a traced value came",
            lambda n: steps(LINE, n),
        ),
        ("until_converged: max_steps fixes the program", lambda n: odl.until_converged(LINE, max_steps=n)),
        ("unrolled: checkpoint_every fixes the program", lambda n: odl.unrolled(SOLVER, checkpoint_every=n)),
        ("truncated: num_steps fixes the program", lambda n: odl.truncated(SOLVER, num_steps=n)),
        ("neumann: terms fixes the program", linear.neumann),
        ("anderson: memory fixes the program", lambda n: odl.anderson(LINE, memory=n)),
    ],
)
def test_traced_counts(words, make):
    with pytest.raises(TypeError, match=words):
        jax.jit(lambda n: make(n) and 0.0)(3)
    assert make(np.int64(3)) is not None


def test_a_traced_tolerance_is_welcome():
    solve = jax.jit(lambda tol: odl.until_converged(LINE, tol=tol, max_steps=100)(0.0, 1.0).num_steps)
    assert int(solve(1e-2)) < int(solve(1e-8)) < 100


# ---- coefficients ----------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    (
        "krasnoselskii_mann",
        "relaxation",
        lambda v: odl.krasnoselskii_mann(LINE, relaxation=v),
        (0.0, -0.5, 2.0, 2.5, np.nan),
    ),
    ("averaged", "relaxation", lambda v: operators.averaged(lambda x, theta: x, relaxation=v), (0.0, 2.0)),
    ("gradient_descent", "step_size", lambda v: odl.gradient_descent(square, v), (0.0, -0.1, np.nan)),
    ("gradient", "step_size", lambda v: operators.gradient(square, v), (0.0, -0.1)),
    ("proximal_gradient", "step_size", lambda v: odl.proximal_gradient(square, prox.l1, v), (0.0, -0.1)),
    ("forward_backward", "step_size", lambda v: operators.forward_backward(square, prox.l1, v), (0.0, -0.1)),
    ("nesterov", "momentum", lambda v: odl.nesterov(LINE, momentum=v), (1.0, -0.1)),
    ("heavy_ball", "momentum", lambda v: odl.heavy_ball(LINE, momentum=v), (1.0, -0.1)),
    ("anderson", "mixing", lambda v: odl.anderson(LINE, mixing=v), (0.0, 2.0)),
    ("aggregate", "weight", lambda v: odl.aggregate(LINE, square, weight=v, step_size=0.1), (1.0, -0.1)),
    ("aggregate", "step_size", lambda v: odl.aggregate(LINE, square, step_size=v), (-0.1,)),
    ("hodl", "weight", lambda v: odl.hypergradients.hodl(LINE, square, num_steps=2, weight=v), (1.0, -0.1)),
    (
        "linearized_admm",
        "penalty",
        lambda v: operators.linearized_admm(square, identity_prox, identity_prox, 1.0, penalty=v, proximal_weight=1.0),
        (0.0, -1.0),
    ),
]


@pytest.mark.parametrize(
    ("who", "name", "make", "values"), OUT_OF_RANGE, ids=[f"{row[0]} {row[1]}" for row in OUT_OF_RANGE]
)
def test_coefficients_out_of_range(who, name, make, values):
    # (HODL's coefficients are those of aggregate and krasnoselskii_mann, which tell.)
    operator = who in operators.__all__
    for value in values:
        with pytest.raises(ValueError, match=rf"{who}: {name} must lie in [\[(][\d.]+, [\w.]+[\])]; {value!r} came"):
            make(value)
        if operator:  # has no steps
            with pytest.raises(TypeError, match=rf"{who}: {name} came as a function of \['k'\], but .* has no steps"):
                make(lambda k: value + 0.0 * k.astype(float))
        else:
            with pytest.raises(ValueError, match=rf"{who}: {name} at k = 0 must lie in "):
                make(lambda k: value + 0.0 * k.astype(float))


def test_coefficients_of_a_wrong_kind():
    for value, error, words in (
        ("fast", TypeError, r"krasnoselskii_mann: relaxation must be a number; 'fast' came"),
        (None, TypeError, r"krasnoselskii_mann: relaxation must be a number; None came"),
        (np.array([0.5, 0.5]), TypeError, r"krasnoselskii_mann: relaxation must be a number"),
        (
            np.array([0.5]),
            (TypeError, ValueError),
            r"krasnoselskii_mann: relaxation must be a (scalar; float64\[1\] came|number)",
        ),
        (
            lambda alpha: 0.5,
            TypeError,
            r"krasnoselskii_mann: relaxation came as a function of \['alpha'\]; name its one argument theta \(the "
            r"hyper-variable\) or k \(the step, as in an optax schedule\), or let it take \(theta, k\)",
        ),
        (lambda a, b, c: 0.5, TypeError, r"relaxation came as a function of \['a', 'b', 'c'\]"),
        (lambda: 0.5, TypeError, r"relaxation came as a function of \[\]"),
    ):
        with pytest.raises(error, match=words):
            odl.krasnoselskii_mann(LINE, relaxation=value)


def test_a_coefficient_function_that_returns_an_array():
    walk = odl.krasnoselskii_mann(LINE, relaxation=lambda theta: theta * jnp.ones(3))
    with pytest.raises(TypeError, match=r"krasnoselskii_mann: relaxation must return a scalar; float64\[3\] came back"):
        steps(walk)(1.0, 0.5)


def test_more_steps_than_layers():
    network = odl.layered(lambda x, layer: layer * x)
    for solver in (steps(network, 4), odl.unrolled(steps(network, 4)), odl.truncated(steps(network, 4), num_steps=1)):
        with pytest.raises(
            ValueError,
            match=r"for_steps: num_steps is 4, but theta holds 3 layers for layered\(<lambda>\)\. An untied "
            r"network cannot go on "
            r"past its last layer; ask for at most 3 steps",
        ):
            solver(1.0, jnp.ones(3))
    with pytest.raises(
        ValueError,
        match=r"every leaf of theta needs one common leading axis, the layers; came \['a'\] float64\[3\], "
        r"\['b'\] float64\[2,2\]",
    ):
        steps(network)(1.0, {"a": jnp.ones(3), "b": jnp.ones((2, 2))})
    with pytest.raises(
        ValueError, match=r"common leading axis, the layers; came \(itself\) float64\[\]\. Stack the layers"
    ):
        steps(network)(1.0, jnp.ones(()))


def test_more_truncated_steps_than_steps():
    with pytest.raises(
        ValueError, match=r"truncated: num_steps is 6, but the solver takes 5 steps\. Ask for at most 5"
    ):
        odl.truncated(steps(LINE, 5), num_steps=6)
    odl.truncated(steps(LINE, 5), num_steps=5)


# ---- a wrong thing in the place of another ---------------------------------------------------------------------------


@rows(
    (
        "no function",
        TypeError,
        r"gradient: objective must be .*\(x, theta\); 3 came",
        lambda: operators.gradient(3, 0.1),
    ),
    (
        "no prox",
        TypeError,
        r"prox must be .*step_size\); None came",
        lambda: odl.proximal_gradient(square, None, 0.1),
    ),
    (
        "no operator",
        TypeError,
        r"as_operator: T must be .*\(x, theta\); 'T' came",
        lambda: operators.as_operator("T"),
    ),
    (
        "no T",
        TypeError,
        r"fixed_point: T must be an operator or a function of \(.*\); 1\.0 came",
        lambda: odl.fixed_point(1.0),
    ),
    ("apply", TypeError, r"operator: apply must be a function of \(.*\); 1 came", lambda: operators.Operator(1)),
    ("projection", TypeError, r"project: projection must be a function", lambda: odl.project(LINE, 1.0)),
    ("outer", TypeError, r"aggregate: outer must be a function", lambda: odl.aggregate(LINE, 1.0, step_size=0.1)),
    ("nothing composed", TypeError, r"compose: needs at least one operator; none came", operators.compose),
    (
        "solver of a function",
        TypeError,
        r"for_steps: iteration must be an Iteration; a function came\. Wrap a map T\(x, theta\) in "
        r"odl\.fixed_point\(T\)",
        lambda: odl.for_steps(lambda x, theta: x, 3),
    ),
    (
        "derivative of an iteration",
        TypeError,
        r"implicit: solver must be a Solver; an Iteration came\. Make one with for_steps or until_converged",
        lambda: odl.implicit(LINE),
    ),
    ("unrolled", TypeError, r"unrolled: solver must be a Solver; an Iteration came", lambda: odl.unrolled(LINE)),
    ("truncated", TypeError, r"truncated: solver must be a Solver", lambda: odl.truncated(LINE, num_steps=1)),
    ("through", TypeError, r"through: solver must be a Solver", lambda: odl.hypergradients.through(LINE, square)),
    (
        "linear solver",
        TypeError,
        r"implicit: linear_solver must be a LinearSolver; a function came\. Make one with odl\.linear, for "
        r"instance cg\(\)",
        lambda: odl.implicit(SOLVER, linear.gmres),
    ),
    (
        "optax",
        TypeError,
        r"from_optax: tx must be a GradientTransformation; a float came\. Build one with optax",
        lambda: odl.from_optax(square, 0.1),
    ),
)
def test_wrong_things(error, words, call):
    refused(error, words, call)


# ---- bad numbers end in a status -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["for_steps", "until_converged", "implicit", "unrolled", "truncated"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_in_x0_and_theta(kind, bad):
    base = odl.until_converged(DESCENT, tol=1e-8, max_steps=60)
    solver = {
        "for_steps": lambda: steps(DESCENT, 5),
        "until_converged": lambda: base,
        "implicit": lambda: odl.implicit(base),
        "unrolled": lambda: odl.unrolled(base),
        "truncated": lambda: odl.truncated(base, num_steps=2),
    }[kind]()
    solve = jax.jit(jax.vmap(lambda x0, theta: solver(x0, theta)))
    good, start = np.ones(2), np.zeros(2)
    batch = solve(np.stack([start, [0.0, bad], start]), np.stack([good, good, [bad, 1.0]]))
    assert [Status(int(code)) for code in batch.status[1:]] == [Status.NON_FINITE] * 2
    assert Status(int(batch.status[0])) < Status.STEP_BUDGET_SPENT  # its neighbours are not touched
    assert np.isfinite(batch.x[0]).all()
    with pytest.raises(
        RuntimeError, match=r"solver: NON_FINITE in 2 of 3 elements, first at index \(1,\): a NaN or an infinity"
    ):
        odl.check(batch)


def test_a_gradient_through_a_nan_is_nan_and_not_zero():
    base = odl.until_converged(DESCENT, tol=1e-8, max_steps=60)
    for derive in (
        lambda solver: odl.implicit(solver, on_failure="ignore"),
        lambda solver: odl.implicit(solver, linear.gmres(), on_failure="ignore"),
        lambda solver: odl.unrolled(solver, on_failure="ignore"),
        lambda solver: odl.truncated(solver, num_steps=2, on_failure="ignore"),
    ):
        solver = derive(base)
        slope = jax.jit(jax.grad(lambda theta: jnp.sum(solver(jnp.zeros(2), theta).x ** 2)))(jnp.array([np.nan, 1.0]))
        assert np.isnan(slope[0])


def test_a_diverging_iteration():
    wild = odl.gradient_descent(square, step_size=2.0)
    solution = odl.until_converged(wild, tol=1e-8, max_steps=200)(1.0, 1.0)
    assert Status(int(solution.status)) is Status.DIVERGED
    with pytest.raises(RuntimeError, match=r"solver: DIVERGED: the residual grew without bound; take a smaller"):
        odl.check(solution)
    with pytest.raises(RuntimeError, match=r"training: DIVERGED"):
        odl.check(steps(wild, 40)(1.0, 1.0), name="training")
    assert set(odl.STATUS_MESSAGES) == set(Status)


# ---- the adjoint that failed -----------------------------------------------------------------------------------------

# At (1, 1), a fixed point where theta is 1 or 2, I - T' is singular, and theta moves what it does not reach.
FLAT = jnp.array([1.0, 0.5])
SINGULAR = odl.fixed_point(lambda x, theta: 1 + FLAT * (x - 1) + theta * (theta - 1) * (theta - 2))
WORDS = (
    r"implicit: (in 2 of 4 elements, first )?the adjoint solve failed \(STALLED, relative residual "
    r"\d\.\de[+-]\d\d\): .*The derivative is not to be trusted"
)


def singular_value(theta, **options):
    solver = odl.implicit(steps(SINGULAR, 30), **options)
    return jnp.sum(solver(jnp.ones(2), theta).x)


def finished(call):
    result = jax.block_until_ready(call())
    jax.effects_barrier()  # the warning comes from the host
    return result


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return finished(call)


def warned(call):
    with pytest.warns(RuntimeWarning, match=WORDS) as caught:
        result = finished(call)
    return result, len(caught)


def test_a_failed_adjoint_warns_under_plain_grad():
    result, count = warned(lambda: jax.grad(singular_value)(1.0))
    assert np.isfinite(result)  # the run goes on
    assert count == 1
    compiled = jax.jit(jax.grad(singular_value))
    assert warned(lambda: compiled(1.0))[1] == 1
    assert warned(lambda: compiled(2.0))[1] == 1  # at every run, not only at the first


def test_a_failed_adjoint_warns_once_under_vmap_and_counts():
    walk = odl.fixed_point(lambda x, theta: theta * x + (1 - theta) * (2 - theta**2))  # singular where theta is 1
    solver = odl.implicit(odl.until_converged(walk, tol=1e-9, max_steps=100))
    slope = jax.jit(jax.vmap(jax.grad(lambda theta: solver(1.0, theta).x)))
    result, count = warned(lambda: slope(jnp.array([0.5, 1.0, 0.2, 1.0])))
    np.testing.assert_allclose(result[::2], [-1.0, -0.4], rtol=1e-7)  # x = 2 - theta^2
    assert count == 1
    silent(lambda: slope(jnp.array([0.5, 0.3, 0.2, 0.1])))


def test_a_failed_adjoint_is_silent_where_asked():
    silent(lambda: jax.grad(lambda theta: singular_value(theta, on_failure="ignore"))(1.0))
    silent(lambda: singular_value(1.0))  # and where no derivative is taken


def test_a_good_adjoint_is_silent():
    solver = odl.implicit(SOLVER)
    silent(lambda: jax.jit(jax.grad(lambda theta: solver(0.0, theta).x))(1.0))


def test_forward_mode_warns_too():
    warned(lambda: jax.jvp(singular_value, (1.0,), (1.0,)))


def test_info_carries_the_failed_adjoint():
    for make in (odl.hypergradients.through, odl.hypergradients.warm_started):
        hyper = make(odl.implicit(steps(SINGULAR, 30)), lambda x, theta: jnp.sum(x))
        _, _, info = silent(lambda: jax.jit(hyper.update)(1.0, hyper.init(1.0, jnp.ones(2))))
        assert Status(int(info.status)) is Status.STALLED
        np.testing.assert_allclose(info.adjoint_residual, np.sqrt(0.5), rtol=1e-9)  # the part that I - T' cannot reach
        with pytest.raises(RuntimeError, match="STALLED"):
            odl.check(info)


# ---- every argument of every constructor -----------------------------------------------------------------------------

PROGRAM = operators.QuadraticProgram(jnp.eye(2), jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jnp.ones(2))
SOUND = {
    **dict.fromkeys(("objective", "loss", "function", "residual", "outer", "inner"), square),
    **dict.fromkeys(
        ("linear", "linear_x", "linear_z", "monotone", "denoiser", "projection", "to_dual"), lambda x, theta: x
    ),
    **dict.fromkeys(("prox_g", "prox_h", "prox_x", "prox_z", "prox_e"), identity_prox),
    **dict.fromkeys(
        ("step_size", "dual_step_size", "proximal_weight", "preconditioner", "penalty", "observation"), 1.0
    ),
    **dict.fromkeys(("num_steps", "num_nonzeros", "capacity", "rank", "terms", "num_samples", "batch_size"), 2),
    **dict.fromkeys(("T", "operator", "source", "operator_or_iteration"), lambda x, theta: 0.5 * x),
    "prox": identity_prox,
    "to_primal": lambda v, theta: v,
    "iteration": LINE,
    "solver": odl.for_steps(LINE, 2),
    "design": jnp.eye(2),
    "start": lambda theta: theta,
    "build": lambda theta: None,
    "tx": optax.sgd(0.1),
    "program": PROGRAM,
}
MAPS = {"iteration", "T", "operator", "source", "operator_or_iteration"}
# Data and switches: any value is one, or it is looked at where it meets x.
ANY_VALUE = {"observation", "data", "design", "like", "key", "tags", "history", "rows", "symmetric", "restart"}
ANY_VALUE |= {"warm_start", "fixed_batches", "error_estimate"}
# They take data or records of other packages, are no constructors, or say themselves what they need.
APART = {"compose", "consensus_admm", "equality_quadratic_program", "box_quadratic_program", "from_optimistix"}
APART |= {"from_lineax", "check", "num_samples", "bamm_rate"}
ROOMS = {room.__name__: room for room in (odl.operators, odl.iterations, odl.solvers, odl.derivatives, odl.linear)}
ROOMS |= {room.__name__: room for room in (odl.hypergradients, odl.sampling)}


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_no_argument_is_refused_by_the_name_that_the_user_wrote(room):
    """Each argument in turn is an object of no kind; a solver, which is callable, is no map."""
    faults = []
    for name in set(ROOMS[room].__all__) - APART:
        constructor = getattr(ROOMS[room], name)
        if not inspect.isfunction(constructor):
            continue
        parameters = inspect.signature(constructor).parameters.values()
        sound = {p.name: SOUND[p.name] for p in parameters if p.default is p.empty}
        constructor(**sound)
        for parameter in {p.name for p in parameters} - ANY_VALUE:
            for wrong in [object(), *([SOUND["solver"]] if parameter in MAPS else [])]:
                try:
                    constructor(**(sound | {parameter: wrong}))
                except (TypeError, ValueError) as error:
                    if not re.match(rf"{name}: (.* )?{parameter}\b", str(error)):
                        faults.append(f"{name}({parameter}): {error}")
                else:
                    faults.append(f"{name}({parameter}) accepts {wrong!r}")
    assert not faults, "\n".join(faults)
