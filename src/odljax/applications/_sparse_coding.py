"""Learned sparse coding with trusted pixels: the operator, the models that are trained on it, and their projection."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import odljax as odl

from ..networks import DLADMMLayer, DLADMMVariables, PixelWeights, neighbourhoods
from ..operators import ADMMVariables
from ..operators._operator import residual

_NETWORK = PixelWeights(hidden=8)
_MARGIN = 0.02
_EXTREME = 1e-3

Theta = dict[str, Any]
"""What is learned: the dictionary and, with a network, the rest of the operator or the layers."""


class Patches(NamedTuple):
    """What is observed of noisy patches, and what of it the network reads: data, which no gradient enters.

    Attributes:
        x: (n, p), the patches less their mean.
        mean: (n, 1), of the pixels that are neither black nor white.
        extreme: (n, h, w), 1 where a pixel is black or white.
        columns: (n, h, w, d), what the network reads at each pixel.
    """

    x: Array
    mean: Array
    extreme: Array
    columns: Array


def observe(noisy: Array) -> Patches:
    """The observation (n, h * h) as an operator and the network want it."""
    n, p = noisy.shape
    side = round(p**0.5)
    image = noisy.reshape(n, side, side)
    extreme = ((image <= _EXTREME) | (image >= 1 - _EXTREME)).astype(image.dtype)
    kept = (1 - extreme).sum((1, 2), keepdims=True)
    mean = ((1 - extreme) * image).sum((1, 2), keepdims=True) / jnp.maximum(kept, 1)
    mean = jnp.where(kept > 0, mean, jnp.full_like(mean, 0.5))
    centred = image - mean
    columns = neighbourhoods(jnp.stack([extreme, (1 - extreme) * centred, extreme * centred], axis=-1))
    return Patches(centred.reshape(n, p), mean.reshape(n, 1), extreme, columns)


class Coding(NamedTuple):
    """The parameters of the operator for given patches: what its network says included.

    Attributes:
        dictionary: A (p, m), of norm at most 1.
        kappa: (m,), the weight of each |z_j|.
        penalty: beta.
        weights: (n, p), the weight c of each |e_i|.
    """

    dictionary: Array
    kappa: Array
    penalty: Array
    weights: Array


def pixel_weights(theta: Theta, patches: Patches) -> Array:
    """c (n, p), what the network of theta says of each pixel."""
    weights: Any = _NETWORK.apply(theta["network"], patches.columns, patches.extreme)
    return weights.reshape(patches.x.shape)


def coding(theta: Theta, patches: Patches) -> Coding:
    """The operator's parameters; evaluated once for a solve, because they do not depend on the inner variable."""
    weights = pixel_weights(theta, patches) if "network" in theta else jnp.ones_like(patches.x)
    penalty = jnp.exp(jnp.clip(theta["log_penalty"], -3.0, 3.0))
    return Coding(theta["dictionary"], jnp.exp(theta["log_kappa"]), penalty, weights)


def operator(patches: Patches) -> odl.Operator:
    r"""D(u, theta), which minimises :math:`\kappa^\top |z| + c^\top |e|` subject to :math:`A z + e = x`.

    Its metric is positive definite, and D non-expansive in it, for every theta with :math:`\|A\| \le 1`, because
    :math:`r = 1.02 \beta`.
    """

    def linear(z: Array, theta: Any) -> Array:
        return z @ theta.dictionary.T

    def prox_z(v: Array, theta: Any, step_size: Any) -> Array:
        return odl.prox.l1(v, theta.kappa, step_size)

    def prox_e(v: Array, theta: Any, step_size: Any) -> Array:
        return odl.prox.l1(v, theta.weights, step_size)

    def penalty(theta: Any) -> Array:
        return theta.penalty

    def proximal_weight(theta: Any) -> Array:
        return (1 + _MARGIN) * theta.penalty

    return odl.operators.linearized_admm(
        linear, prox_z, prox_e, patches.x, penalty=penalty, proximal_weight=proximal_weight
    )


def smallest_metric_eigenvalue(theta: Theta) -> float:
    """The least eigenvalue of diag(r I - beta A'A, beta I, I / beta)."""
    largest = float(jnp.linalg.norm(theta["dictionary"], 2))
    beta = float(jnp.exp(jnp.clip(theta["log_penalty"], -3.0, 3.0)))
    return min(beta * (1 + _MARGIN - largest**2), beta, 1 / beta)


def start(theta: Coding, patches: Patches) -> ADMMVariables:
    """u_0 = 0."""
    zero = jnp.zeros_like(patches.x)
    return ADMMVariables(jnp.zeros((len(zero), theta.dictionary.shape[1]), zero.dtype), zero, zero)


def readout(u: ADMMVariables | DLADMMVariables, patches: Patches) -> Array:
    """The restored patches: what is observed, less the slack."""
    return patches.x - u.e + patches.mean


def distance(u: ADMMVariables | DLADMMVariables, patches: Patches, clean: Array) -> Array:
    """The outer loss: half the squared error, summed over the patches, so that its Lipschitz constant in u is 1."""
    return 0.5 * jnp.sum((readout(u, patches) - clean) ** 2)


def dct_dictionary(side: int, atoms: int) -> np.ndarray:
    """An overcomplete DCT with orthonormal rows, (side * side, atoms): every singular value is 1."""
    count = int(np.ceil(atoms**0.5))
    at = np.arange(side) + 0.5
    waves = np.stack([np.cos(np.pi * k * at / count) for k in range(count)], axis=1)
    waves[:, 1:] -= waves[:, 1:].mean(0)
    waves /= np.linalg.norm(waves, axis=0)
    frequency = np.add.outer(np.arange(count), np.arange(count)).ravel()
    A = np.kron(waves, waves)[:, np.argsort(frequency, kind="stable")[:atoms]]
    left, _, right = np.linalg.svd(A, full_matrices=False)
    return (left @ right).astype(np.float32)


def clip_singular_values(A: Array) -> Array:
    """The nearest matrix of norm at most 1, from the eigenvalues of the small Gram matrix."""
    squares, vectors = jnp.linalg.eigh(A @ A.T)
    excess = 1 - jnp.minimum(1.0, jax.lax.rsqrt(jnp.maximum(squares, 1e-6)))
    return A - (vectors * excess[None]) @ (vectors.T @ A)


class Estimate(NamedTuple):
    """One batch: the gradient for theta, the outer loss, how far the inner solve came, and its curve against k."""

    gradient: Theta
    value: Array
    measure: dict[str, Array]
    curve: Array


@dataclasses.dataclass(frozen=True)
class Tied:
    """Every step is the same operator: HODL; ``weight=0`` is the simple variant."""

    weight: float = 0.0
    constrained: bool = True
    num_steps: int = 15
    relaxation: float = 0.95
    first_step: float = 0.5

    def init(self, key: Array, side: int, atoms: int) -> Theta:
        patches = observe(jnp.zeros((1, side * side), jnp.float32))
        return {
            "dictionary": jnp.asarray(dct_dictionary(side, atoms)),
            "log_kappa": jnp.full(atoms, np.log(0.02), jnp.float32),
            "log_penalty": jnp.zeros((), jnp.float32),
            "network": _NETWORK.init(key, patches.columns, patches.extreme),
        }

    def estimate(self, theta: Theta, noisy: Array, clean: Array) -> Estimate:
        patches = observe(noisy)
        parameters, pull = jax.vjp(lambda theta: coding(theta, patches), theta)
        # The outer gradient lives in the e-block, where G = beta I: there s_k < lambda_min(G) / L by construction.
        hyper = odl.hypergradients.hodl(
            operator(patches),
            lambda u, theta: distance(u, patches, clean),
            num_steps=self.num_steps,
            relaxation=self.relaxation,
            weight=self.weight,
            step_size=lambda theta, k: self.first_step * theta.penalty / (k + 1).astype(theta.penalty.dtype),
            metric_inverse=lambda v, theta: v._replace(e=v.e / theta.penalty),
        )
        slope, _, info = hyper.update(parameters, hyper.init(parameters, start(parameters, patches)))
        curve = info.history.residual / len(noisy) ** 0.5
        return Estimate(pull(slope)[0], info.value, {"residual": curve[-1]}, curve)

    def project(self, theta: Theta) -> Theta:
        if not self.constrained:
            return theta
        return theta | {"dictionary": clip_singular_values(theta["dictionary"])}

    def restore(
        self, theta: Theta, noisy: Array, num_steps: int | None = None, clean: Array | None = None
    ) -> tuple[Array, tuple[Array, Array]]:
        """The restored patches after ``num_steps`` steps of the operator alone; errors and residuals on the way."""
        patches = observe(noisy)
        parameters = coding(theta, patches)
        walk = odl.krasnoselskii_mann(operator(patches), self.relaxation)
        return _restore(walk, num_steps or self.num_steps, start(parameters, patches), parameters, patches, clean)


@dataclasses.dataclass(frozen=True)
class Untied:
    """Every step has its own parameters: D-LADMM, unrolled."""

    weighted: bool = False
    kappa: float = 0.02
    penalty: float = 1.0
    num_steps: int = 15

    @property
    def _layer(self) -> DLADMMLayer:
        # So each layer starts as a step of linearised ADMM.
        threshold = self.kappa / ((1 + _MARGIN) * self.penalty)
        return DLADMMLayer(_near_zero, self.penalty, threshold, 1 / self.penalty)

    def init(self, key: Array, side: int, atoms: int) -> Theta:
        tied = Tied().init(key, side, atoms)
        patches = observe(jnp.zeros((1, side * side), jnp.float32))
        A = tied["dictionary"]
        u = self._start(A, patches)
        keys = jax.random.split(key, self.num_steps)
        layers = jax.vmap(lambda key: self._layer.init(key, u, A, patches.x))(keys)
        layers["params"]["W"] += A[None] / ((1 + _MARGIN) * self.penalty)
        theta = {"dictionary": A, "layers": layers}
        return theta | {"network": tied["network"]} if self.weighted else theta

    def _start(self, dictionary: Array, patches: Patches) -> DLADMMVariables:
        zero = jnp.zeros_like(patches.x)
        return DLADMMVariables(jnp.zeros((len(zero), dictionary.shape[1]), zero.dtype), zero, zero, -patches.x)

    def _parameters(self, theta: Theta, patches: Patches) -> Theta:
        shared = {"dictionary": theta["dictionary"], "layers": theta["layers"]}
        return shared | {"weights": pixel_weights(theta, patches)} if self.weighted else shared

    def _walk(self, patches: Patches) -> odl.Iteration:
        """Untied layers that share the dictionary and the weights."""

        def step(u: DLADMMVariables, state: Any, theta: Theta, k: Array) -> Any:
            layers = odl.layered(
                lambda u, layer: self._layer.apply(layer, u, theta["dictionary"], patches.x, theta.get("weights"))
            )
            return layers.step(u, state, theta["layers"], k)

        return odl.Iteration(lambda u, theta: (), step, None, "dladmm", lambda theta: self.num_steps)

    def estimate(self, theta: Theta, noisy: Array, clean: Array) -> Estimate:
        patches = observe(noisy)
        parameters, pull = jax.vjp(lambda theta: self._parameters(theta, patches), theta)
        solver = odl.unrolled(odl.for_steps(self._walk(patches), self.num_steps))
        hyper = odl.hypergradients.through(solver, lambda u, theta: distance(u, patches, clean))
        slope, _, info = hyper.update(parameters, hyper.init(parameters, self._start(theta["dictionary"], patches)))
        violation = jnp.sqrt(jnp.sum(info.x.violation**2) / len(noisy))
        return Estimate(pull(slope)[0], info.value, {"violation": violation}, jnp.zeros(self.num_steps, noisy.dtype))

    def project(self, theta: Theta) -> Theta:
        return theta

    def restore(
        self, theta: Theta, noisy: Array, num_steps: int | None = None, clean: Array | None = None
    ) -> tuple[Array, tuple[Array, Array]]:
        patches = observe(noisy)
        parameters = self._parameters(theta, patches)
        u = self._start(theta["dictionary"], patches)
        return _restore(self._walk(patches), num_steps or self.num_steps, u, parameters, patches, clean)


def _near_zero(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 1e-3 * jax.random.normal(key, shape, dtype)


def _restore(
    walk: odl.Iteration, num_steps: int, u: Any, theta: Any, patches: Patches, clean: Array | None
) -> tuple[Array, tuple[Array, Array]]:
    """The readout of the last iterate; mean squared errors and residuals (zero without operator) of all of them."""

    def measures(u: Any, theta: Any, k: Any) -> tuple[Array, Array]:
        zero = jnp.zeros((), patches.x.dtype)
        error = zero if clean is None else jnp.mean((readout(u, patches) - clean) ** 2)
        if clean is None or walk.operator is None:
            return error, zero
        return error, residual(walk.operator, u, theta) / len(patches.x) ** 0.5

    solution = odl.for_steps(walk, num_steps, record=measures)(u, theta)
    last = measures(solution.x, theta, num_steps)
    assert solution.history is not None
    rows = jax.tree.map(lambda rows, row: jnp.append(rows, row), solution.history.recorded, last)
    return readout(solution.x, patches), rows
