"""Remove salt-and-pepper noise from photographs by learned sparse coding: the library's nouns on a real problem.

A noisy 16 x 16 patch x is explained as A z + e, a sparse code and sparse outliers, by

    min over (z, e) of  sum_j kappa_j |z_j| + sum_i c_i(x) |e_i|  subject to  A z + e = x,

which linearised ADMM solves. The dictionary A, the kappas, the penalty and the network behind c are learned, by
descending the distance of x - e to the clean patch through fifteen steps. The projection that follows each update keeps
the norm of A at most 1, and the operator non-expansive in its metric: what is learned is a fixed point, not a number of
steps. A new photograph is restored by the operator alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .. import _tree, diagnostics, training
from ..iterations import krasnoselskii_mann
from ..solvers import for_steps
from ._photographs import TEST, photograph, random_patches, restored, salt_and_pepper, training_patches
from ._sparse_coding import Tied, Untied, coding, dct_dictionary, observe, operator, smallest_metric_eigenvalue, start

__all__ = ["METHODS", "SUMMARY", "main"]

SUMMARY = "remove salt-and-pepper noise from photographs by learned sparse coding (HODL against D-LADMM)"

METHODS = ("untrained", "dladmm", "dladmm-weighted", "hodl-simple", "hodl", "unconstrained")
"""What `--method` may name; the classical filters are always shown."""

_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Settings:
    """What fixes a run; the tests make it small.

    Attributes:
        steps: updates of each method.
        rate: peak step size of Adam for dictionaries and matrices, `untied_rate` where the layers are untied; `faster`
            times that for kappa, penalties and network.
        clip: the largest norm of a gradient of 100 times the mean squared error.
        photographs: those that are held out; `crop` keeps their upper left corner only.
        stride: between the overlapping patches of a restored photograph.
        experiment_steps: updates with and without the projection, at `experiment_rate` and without clipping.
        untrained: step counts of the untrained solver; `kappa` and `penalty` are its own, tuned on the training
            photographs: best there at 15 and at 100 steps.
    """

    steps: int = 300
    seed: int = 0
    side: int = 16
    atoms: int = 512
    patches: int = 40_000
    batch: int = 64
    rate: float = 2e-3
    untied_rate: float = 1e-3
    faster: float = 5.0
    clip: float = 1.0
    photographs: tuple[str, ...] = TEST
    crop: int | None = None
    stride: int = 4
    chunk: int = 128
    curve_patches: int = 1024
    experiment_steps: int = 50
    experiment_rate: float = 2e-2
    untrained: tuple[int, ...] = (15, 100)
    kappa: float = 0.7
    penalty: float = 0.35


SETTINGS = Settings()

_MODELS: dict[str, Tied | Untied] = {
    "dladmm": Untied(kappa=0.7),
    "dladmm-weighted": Untied(weighted=True),
    "hodl-simple": Tied(weight=0.0),
    "hodl": Tied(weight=0.5),
}
_TITLES = {
    "dladmm": "D-LADMM",
    "dladmm-weighted": "D-LADMM + weight network",
    "hodl-simple": "HODL, simple",
    "hodl": "HODL, aggregated",
}
_EXPERIMENT = {"free": Tied(constrained=False), "projected": Tied()}
_OURS = (*METHODS, "run.json", "denoise.json", "denoise.png")


def main(steps: int | None, methods: list[str] | None, seed: int, out: Path, resume: bool) -> int:
    """Returns 0 when all is trained, compared and drawn; 2 when there is no such run to resume; 130 after Ctrl-C.

    Writes to `out`: a directory of checkpoints for each trained method, `run.json` (what fixes the run), `denoise.json`
    (every number) and `denoise.png`. What an earlier run left there is moved to `out/earlier-N`, not overwritten.

    Args:
        steps: updates of each method. None: 300, or those of the run that is resumed.
        methods: a subset of `METHODS`. None: all of them.
        seed: of training patches, networks and batches; not of the noise on the test photographs, which is fixed.
        out: made if needed.
        resume: go on with the run in `out`; methods that are done are not trained again.

    Raises:
        ImportError: a package of the demo extra is missing.

    Cost: three minutes on two cores, 1.5 GiB.
    """
    from . import _report  # first: what is missing shall be missed before the training, not after it

    chosen = [method for method in METHODS if methods is None or method in methods]
    run = _Run.begin(out, steps, seed, resume)
    if run is None:
        return 2
    began = time.perf_counter()
    test = _Test(run.settings)
    results: dict[str, Any] = {"settings": dataclasses.asdict(run.settings), **_report.environment()}
    results |= {"rows": [], "curves": {}, "training": {}, "probe": {}, "experiment": {}}
    pictures = {"clean": test.clean[0], "noisy": test.noisy[0]}
    for key, title, filtered in _classical():
        pictures[key] = test.row(results, key, title, filtered)
    if "untrained" in chosen:
        _compare_untrained(test, results)
    patches = jnp.asarray(training_patches(run.settings.patches, run.settings.side, seed))
    for key in chosen:
        if key in _MODELS:
            trained = run.train(key, _MODELS[key], patches)
            if trained.interrupted:
                return _INTERRUPTED
            pictures["restored"] = _compare(key, _MODELS[key], trained, run, test, results)
        if key == "unconstrained":
            for name, model in _EXPERIMENT.items():
                trained = run.train(f"{key}/{name}", model, patches, experiment=True)
                if trained.interrupted:
                    return _INTERRUPTED
                results["experiment"][name] = _rounded(trained.metrics)
    results["seconds"] = round(time.perf_counter() - began, 1)
    parts = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in results.items())
    (out / "denoise.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    _report.figure(results, pictures, out / "denoise.png")
    _report.tell(results, out)
    return 0


# The run and its directory --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    out: Path
    settings: Settings
    resume: bool
    seconds: dict[str, float]

    @classmethod
    def begin(cls, out: Path, steps: int | None, seed: int, resume: bool) -> _Run | None:
        settings = dataclasses.replace(SETTINGS, steps=steps or SETTINGS.steps, seed=seed)
        if not resume:
            _set_aside(out)
            run = cls(out, settings, False, {})
            run.write()
            return run
        if not (out / "run.json").is_file():
            print(f"{out} holds no run of denoise. Leave out --resume to begin one.", file=sys.stderr)
            return None
        earlier = json.loads((out / "run.json").read_text())
        if steps is None:
            settings = dataclasses.replace(settings, steps=earlier["settings"]["steps"])
        ours, theirs = json.loads(json.dumps(dataclasses.asdict(settings))), earlier["settings"]
        if ours != theirs:
            differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            words = ", ".join(f"{name} {theirs.get(name)} and not {ours.get(name)}" for name in differing)
            print(f"The run in {out} has {words}. Resume it as it was, or choose another --out.", file=sys.stderr)
            return None
        return cls(out, settings, True, earlier["seconds"])

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        words = {"settings": dataclasses.asdict(self.settings), "seconds": self.seconds}
        (self.out / "run.json").write_text(json.dumps(words, indent=1) + "\n")

    def train(self, name: str, model: Tied | Untied, patches: Array, experiment: bool = False) -> training.Trained:
        from threadpoolctl import threadpool_limits  # scikit-learn brings it

        settings = self.settings
        if isinstance(model, Untied):
            settings = dataclasses.replace(settings, rate=settings.untied_rate)
        if experiment:
            settings = dataclasses.replace(
                settings, steps=settings.experiment_steps, rate=settings.experiment_rate, clip=np.inf
            )
        directory, began = self.out / name, time.perf_counter()
        networks, batches = jax.random.split(jax.random.key(settings.seed))
        theta = model.init(networks, settings.side, settings.atoms)
        optimiser = _optimiser(settings)
        curves = jnp.zeros((len(_marks(settings.steps)), model.num_steps), jnp.float32)
        # The eigenvalues of a small matrix: threads that wait for each other cost up to ten times what they share.
        with threadpool_limits(1, user_api="blas"):
            trained = training.fit(
                _update(model, optimiser, settings, experiment),
                {"theta": theta, "optimiser": optimiser.init(theta), "curves": curves},
                patches,
                batches,
                num_steps=settings.steps,
                checkpoint_directory=directory,
                resume=self.resume and training.latest_step(directory) is not None,
                progress=f"{name:{_WIDTH}}",
            )
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 1)
        self.write()
        return trained


_WIDTH = max(len(f"unconstrained/{name}") for name in _EXPERIMENT)


def _set_aside(out: Path) -> None:
    """Moves what an earlier run left in `out` to `out/earlier-N`."""
    left = [out / name for name in _OURS if (out / name).exists()]
    if not left:
        return
    number = 1
    while (aside := out / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    print(f"The earlier run in {out} is now in {aside}.", file=sys.stderr)


# Training -------------------------------------------------------------------------------------------------------------


def _marks(steps: int) -> list[int]:
    """The updates whose inner residuals are kept against k."""
    return sorted({0, steps // 30, steps // 10, steps // 3, steps - 1})


def _rate(settings: Settings) -> optax.Schedule:
    warm_up = max(1, min(20, settings.steps // 10))
    return optax.warmup_cosine_decay_schedule(
        0.1 * settings.rate, settings.rate, warm_up, max(settings.steps, warm_up + 1), 0.02 * settings.rate
    )


def _optimiser(settings: Settings) -> optax.GradientTransformation:
    fast = {"log_kappa", "log_penalty", "network", "beta_1", "beta_2"}

    def is_fast(theta: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: any(getattr(entry, "key", None) in fast for entry in path), theta
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip) if np.isfinite(settings.clip) else optax.identity(),
        optax.scale_by_adam(b2=0.99),
        optax.scale_by_learning_rate(_rate(settings)),
        optax.masked(optax.scale(settings.faster), is_fast),
    )


def _update(
    model: Tied | Untied, optimiser: optax.GradientTransformation, settings: Settings, experiment: bool
) -> Callable[..., Any]:
    marks, rate = np.array(_marks(settings.steps))[:, None], _rate(settings)

    def update(
        state: dict[str, Any], step: Array, patches: Array, key: Array
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        draw, noise = jax.random.split(jax.random.fold_in(key, step))
        clean = patches[jax.random.randint(draw, (settings.batch,), 0, len(patches), jnp.int32)]
        theta = state["theta"]
        estimate = model.estimate(theta, salt_and_pepper(noise, clean), clean)
        per_pixel = 2 / clean.size
        gradient = _tree.scale(100 * per_pixel, estimate.gradient)
        updates, optimiser_state = optimiser.update(gradient, state["optimiser"], theta)
        moved: Any = optax.apply_updates(theta, updates)
        new = model.project(moved)
        loss = per_pixel * estimate.value
        metrics = {"loss": loss, "psnr": -10 * jnp.log10(loss), **estimate.measure}
        metrics["change"] = _tree.norm(_tree.subtract(new, theta)) / _tree.norm(theta)
        metrics["rate"] = jnp.asarray(rate(step), loss.dtype)
        if experiment:
            metrics["norm_A"] = jnp.linalg.norm(new["dictionary"], 2)
        curves = jnp.where(marks == step, estimate.curve[None], state["curves"])
        return {"theta": new, "optimiser": optimiser_state, "curves": curves}, metrics

    return update


# Comparison -----------------------------------------------------------------------------------------------------------


class _Test:
    """The held-out photographs, noisy in the same way for every method, and random patches of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clean = [photograph(name)[: settings.crop, : settings.crop] for name in settings.photographs]
        keys = jax.random.split(jax.random.key(7), len(self.clean) + 1)
        self.noisy = [np.asarray(salt_and_pepper(k, jnp.asarray(x))) for k, x in zip(keys, self.clean, strict=False)]
        rng = np.random.default_rng(7)
        patches = random_patches(self.clean, settings.curve_patches, settings.side, rng)
        self.clean_patches = jnp.asarray(patches.reshape(len(patches), -1))
        self.noisy_patches = salt_and_pepper(keys[-1], self.clean_patches)

    def row(
        self, results: dict[str, Any], key: str, title: str, method: Callable[[np.ndarray], np.ndarray], **more: Any
    ) -> np.ndarray:
        """The first photograph, restored; a row of the table for all."""
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity

        began = time.perf_counter()
        restored = [method(x) for x in self.noisy]
        seconds = time.perf_counter() - began
        names = [name.split(".")[0] for name in self.settings.photographs]
        psnr: dict[str, Any] = dict(
            zip(names, map(partial(peak_signal_noise_ratio, data_range=1), self.clean, restored), strict=True)
        )
        ssim: dict[str, Any] = dict(
            zip(names, map(partial(structural_similarity, data_range=1), self.clean, restored), strict=True)
        )
        results["rows"].append(
            {
                "method": key,
                "title": title,
                "psnr": {name: round(float(value), 2) for name, value in psnr.items()},
                "ssim": {name: round(float(value), 4) for name, value in ssim.items()},
                "training_seconds": None,
                "restoring_seconds": round(seconds, 2),
                "parameters": None,
                **more,
            }
        )
        return restored[0]

    def row_of_patches(
        self,
        results: dict[str, Any],
        key: str,
        title: str,
        model: Tied | Untied,
        theta: Any,
        num_steps: int,
        **more: Any,
    ) -> np.ndarray:
        s = self.settings
        restore = jax.jit(lambda theta, x: model.restore(theta, x, num_steps)[0])
        jax.block_until_ready(restore(theta, np.zeros((s.chunk, s.side**2), np.float32)))  # compiles

        def whole(image: np.ndarray) -> np.ndarray:
            return restored(image, lambda x: restore(theta, x), s.side, s.stride, s.chunk)

        return self.row(results, key, title, whole, **more)

    def curve(self, results: dict[str, Any], key: str, model: Tied | Untied, theta: Any) -> None:
        """PSNR and residual after 0, 1, ... steps; a fixed point may go on to four times as many as were trained."""
        num_steps = model.num_steps if isinstance(model, Untied) else 4 * model.num_steps
        walk = jax.jit(lambda theta, noisy, clean: model.restore(theta, noisy, num_steps, clean)[1])
        errors, residuals = walk(theta, self.noisy_patches, self.clean_patches)
        results["curves"][key] = _rounded({"psnr": -10 * jnp.log10(errors), "residual": residuals})


def _classical() -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    from scipy.ndimage import median_filter
    from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic

    def extreme(x: np.ndarray) -> np.ndarray:
        return (x == 0) | (x == 1)

    yield "noisy", "noisy", lambda x: x
    yield "median", "3 x 3 median", lambda x: median_filter(x, 3)
    yield "variation", "total variation", lambda x: denoise_tv_chambolle(x, weight=0.3)
    yield "switching", "median where black or white", lambda x: np.where(extreme(x), median_filter(x, 3), x)
    yield "biharmonic", "biharmonic where black or white", lambda x: inpaint_biharmonic(x, extreme(x))


def _compare_untrained(test: _Test, results: dict[str, Any]) -> None:
    s, model = test.settings, Tied(relaxation=1.0)
    A = dct_dictionary(s.side, s.atoms)
    sizes = np.linalg.norm(A, axis=0)
    theta = {
        "dictionary": jnp.asarray(A),
        "log_kappa": jnp.asarray(np.log(s.kappa * sizes / sizes.mean())),
        "log_penalty": jnp.float32(np.log(s.penalty)),
    }
    for num_steps in s.untrained:
        title = f"ADMM, untrained, {num_steps} steps"
        test.row_of_patches(results, f"untrained-{num_steps}", title, model, theta, num_steps)
    test.curve(results, "untrained", model, theta)


def _compare(
    key: str, model: Tied | Untied, trained: training.Trained, run: _Run, test: _Test, results: dict[str, Any]
) -> np.ndarray:
    theta = trained.state["theta"]
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    more = {"training_seconds": run.seconds[key], "parameters": size, "status": trained.status}
    picture = test.row_of_patches(results, key, _TITLES[key], model, theta, model.num_steps, **more)
    test.curve(results, key, model, theta)
    results["training"][key] = _rounded(trained.metrics)
    if isinstance(model, Tied):
        marks = _marks(run.settings.steps)
        results["training"][key] |= {"marks": marks, "curves": _rounded({"": trained.state["curves"]})[""]}
        results["probe"][key] = _probe(model, theta, test)
    return picture


@partial(jax.jit, static_argnums=(0, 1))
def _stretches(relaxation: float, num_steps: int, theta: dict[str, Any], noisy: Array) -> Array:
    """The expansion of the learned operator for each patch, where its iteration starts and where it ends."""

    def stretch(x: Array) -> Array:
        patches = observe(x[None])
        parameters = coding(theta, patches)
        T, u = operator(patches), start(parameters, patches)
        end = for_steps(krasnoselskii_mann(T, relaxation), num_steps)(u, parameters).x
        return jnp.stack([diagnostics.expansion(T, at, parameters).factor for at in (u, end)])

    return jax.vmap(stretch)(noisy)


def _probe(model: Tied, theta: dict[str, Any], test: _Test, count: int = 16) -> dict[str, Any]:
    at = np.linspace(0, len(test.noisy_patches) - 1, count).astype(int)
    stretches = _stretches(model.relaxation, model.num_steps, theta, test.noisy_patches[at])
    return {
        "stretch": round(float(jnp.max(stretches)), 5),
        "points": 2 * count,
        "smallest_metric_eigenvalue": round(smallest_metric_eigenvalue(theta), 5),
        "norm_A": round(float(jnp.linalg.norm(theta["dictionary"], 2)), 6),
    }


def _rounded(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of six significant digits; None for what is not finite, which JSON cannot say."""

    def plain(values: Any) -> Any:
        if isinstance(values, list):
            return [plain(value) for value in values]
        return float(f"{values:.6g}") if np.isfinite(values) else None

    return {name: plain(np.asarray(values).tolist()) for name, values in arrays.items()}
