"""What every iteration owes: structure and dtype kept, jit = no jit, vmap = loop, a solution that stays put."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import ITERATIONS, PROBLEMS

import odljax as odl


def pairs():
    """Each iteration on three of its problems, by turns; the derivative matrix takes it to all of them."""
    for number, (name, build) in enumerate(ITERATIONS.items()):
        fits = [p for p in PROBLEMS if build(PROBLEMS[p]()) is not None]
        turn = number % len(fits)
        yield from ((p, name) for p in (fits[turn:] + fits[:turn])[:3])


PAIRS = list(pairs())


def test_every_constructor_and_transform_of_the_face_is_registered():
    apart = {"aggregate", "layered", "as_iteration"}  # without an operator: tested by hand in test_hypergradients
    apart |= {"accelerated_hard_thresholding", "quadratic_program"}  # on problems of their own: in files of their own
    constructors = {name for name in odl.iterations.__all__ if name[0].islower()} - apart
    assert constructors == {name.split()[0] for name in ITERATIONS}


@pytest.mark.parametrize(("problem_name", "iteration_name"), PAIRS)
def test_protocol(problem_name, iteration_name):
    problem = PROBLEMS[problem_name]()
    iteration = ITERATIONS[iteration_name](problem)
    assert iteration_name.split()[0] in iteration.name
    x, theta = problem.solution(problem.theta), problem.theta
    state, k = iteration.init(x, theta), jnp.zeros((), int)
    new_x, new_state = jax.jit(iteration.step)(x, state, theta, k)
    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert signature(new_x) == signature(x)
    assert signature(new_state) == signature(state)

    def same(a, b, tolerance=1e-13):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), a, b)

    # The solution is a fixed point of the step and of the operator.
    same(new_x, x, 1e-10)
    same(iteration.operator(x, theta), x, 1e-10)
    # jit = no jit, and vmap = loop, over three steps.
    solver = odl.for_steps(iteration, 3)
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), problem.x0)
    batched = jax.jit(jax.vmap(lambda x0: solver(x0, theta)))(starts)
    for i in range(2):
        start = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        with jax.disable_jit():
            single = solver(start, theta)
        same(jax.tree.map(lambda leaf, i=i: leaf[i], batched.x), single.x)
        same(batched.residual[i], single.residual)


@pytest.mark.parametrize("iteration_name", ITERATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_low_precision_keeps_its_dtype(iteration_name, dtype):
    """Whatever the coefficients' dtype, with float64 on: schedules and numbers are cast to the leaf."""
    for name in ("ridge", "lasso"):
        problem = PROBLEMS[name](dtype) if dtype == jnp.float32 else None
        if problem is None:  # decompositions do not exist in bfloat16: a hand-made quadratic
            prox = (lambda v, t, s: odl.prox.l1(v, t, s)) if name == "lasso" else None
            problem = odl.problems.Problem(
                name=name,
                T=lambda x, t: 0.5 * x,
                outer=lambda x, t: jnp.sum(x),
                x0=jnp.ones(3, dtype),
                theta=jnp.asarray(0.1, dtype),
                solution=lambda t: jnp.zeros(3, dtype),
                objective=lambda x, t: 0.5 * jnp.sum(x * x),
                prox=prox,
                step_size=0.5,
            )
        iteration = ITERATIONS[iteration_name](problem)
        if iteration is None:
            continue
        solution = odl.until_converged(iteration, tol=1e-2, max_steps=40)(problem.x0, problem.theta)
        assert solution.x.dtype == dtype
        assert solution.residual.dtype == jnp.float32
        assert odl.Status(int(solution.status)) is odl.Status.CONVERGED
