"""The loop people otherwise rewrite: progress, metrics, checkpoint and resume around one pure update function."""

import functools
import importlib.util
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import _checks
from ._types import Data, State

__all__ = ["Trained", "fit", "latest_step", "load", "save"]

# Steps that may be under way at once: enough to hide the dispatch of a fast step, few enough for a prompt Ctrl-C.
_IN_FLIGHT = 8

_SECONDS_BETWEEN_REFRESHES = 0.05
_SECONDS_BETWEEN_INTERRUPTS = 1.0

# What Orbax writes beside the arrays, and the metrics of many steps.
_AROUND = 1 << 20

# Orbax's name for what is saved alone, so that it reads a saved model without being told one.
_TREE, _HISTORY = "default", "history"


class Trained(NamedTuple):
    """What `fit` returns.

    Attributes:
        state: The state after `num_steps` updates.
        metrics: One NumPy array for each metric, one entry for each step from the very first, resumed runs included.
        num_steps: Updates that are in `state`, counted from the very first run.
        status: "finished"; "interrupted" by Ctrl-C; "non_finite": the loss or the new state of step `num_steps` was NaN
            or infinite; or "failed", on an exception that ended the run.
        checkpoint: The newest checkpoint on disk, which `load` takes; None where there is none.
    """

    state: Any
    metrics: dict[str, np.ndarray]
    num_steps: int
    status: str
    checkpoint: Path | None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self.status == "interrupted"


def fit(
    update: Callable[..., tuple[State, Mapping[str, Any]]],
    state: State,
    *data: Data,
    num_steps: int,
    batches: Callable[[int], Data] | None = None,
    checkpoint_directory: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: str | None = "training",
    log_every: int | None = None,
) -> Trained:
    r"""Returns the state after `num_steps` updates, with the metrics of every step.

    $(s_{k+1}, m_k) = \mathrm{update}(s_k, k, \mathrm{data})$ for $k = 0, \dots, \mathrm{num\_steps} - 1$.

    Use it for any loop whose step is a pure function: an optax step on a hypergradient, or a plain one. The loop owns
    `k`, so a minibatch drawn with `jax.random.fold_in(key, k)` is the same in a run that was interrupted and resumed as
    in an unbroken one, and so is every bit of the result.

    **Ctrl-C** lets the steps under way finish, writes a checkpoint where a directory was given, and returns with
    `interrupted` set; one more, a second later or after, raises `KeyboardInterrupt` at once, except while a checkpoint
    is being written. This needs the main thread; elsewhere, and where SIGINT is ignored, signals are left as they are.

    **A step that is not finite** ends the run with status "non_finite": the metric named `loss` (a metric of any other
    name may be anything), or a leaf of the new state that was finite throughout in the initial one, is NaN or infinite.
    The update of that step is discarded: `state` is the one before it, the last entry of each metric is that of the bad
    step, and no checkpoint is written. So no checkpoint ever holds a NaN that `state` did not start with.

    **An exception** out of `update`, `batches` or the writing of a checkpoint passes through, and takes the last state
    with it: `error.trained` is a `Trained` with status "failed", and a checkpoint is written where there is a
    directory. Only where the device has lost the state with the failed step is there none but the checkpoint before.

    Args:
        update: `(state, step, *data) -> (state, metrics)`, pure. `fit` traces and compiles it once. `step` is an int32
            scalar; `metrics` a flat dict of scalars; the new state has the structure, shapes and dtypes of the old.
        state: Any pytree of arrays, numbers and PRNG keys. It is copied, so the caller's arrays stay valid while the
            loop donates its own.
        *data: Passed on to `update` as arguments, so large arrays do not become constants of the compiled program.
        num_steps: Updates in total, counted from the very first run; at least 1.
        batches: `step -> batch` on the host, for data that does not fit on the device; the batch is passed to `update`
            after `data`. It must depend on `step` alone.
        checkpoint_directory: Where the last checkpoint is kept: local, made if needed. Whether it can be written, has
            room for the state, and Orbax is there is found out before the first step. None: no checkpoints.
        checkpoint_every: Steps between checkpoints. None: only when the run ends or is interrupted.
        resume: Continue from the checkpoint. One that already has `num_steps` or more is returned as it is.
        progress: The name shown beside the progress on standard error: a live bar on a terminal, plain lines elsewhere.
            None: silent.
        log_every: Steps between plain lines. None: ten lines a run.

    Returns:
        A `Trained`.

    Raises:
        ValueError: A count is below 1; an option needs `checkpoint_directory`; the checkpoint does not match `state`.
        TypeError: A leaf of `state` is not an array, a number or a key; `update` changes the structure, a shape or a
            dtype of the state, or its metrics are not a flat dict of scalars.
        FileNotFoundError: `resume` and there is no checkpoint.
        FileExistsError: Not `resume` and the directory holds a checkpoint, which this run would overwrite.
        OSError: `checkpoint_directory` cannot be made or written, or has no room for the state.
        ModuleNotFoundError: `checkpoint_directory` and no Orbax.

    Cost: less than 0.1 ms a step beside `update`; one copy of `state`; of each step the bytes of its metrics. They are
    fetched while later steps run.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from odljax.training import fit
        >>> def update(theta, step, target):
        ...     loss, gradient = jax.value_and_grad(lambda theta: jnp.sum((theta - target) ** 2))(theta)
        ...     return theta - 0.25 * gradient, {"loss": loss}
        >>> trained = fit(update, jnp.zeros(2), jnp.array([1.0, 2.0]), num_steps=30, progress=None)
        >>> trained.state.round(3).tolist(), trained.status
        ([1.0, 2.0], 'finished')
        >>> trained.metrics["loss"].shape, trained.metrics["loss"][0].item()
        ((30,), 5.0)
    """
    who = "odljax.training.fit"
    _checks.is_callable(who, "update", update)
    if batches is not None:
        _checks.is_callable(who, "batches", batches, "step")
    _checks.is_a(who, "resume", resume, bool, "True continues the run in checkpoint_directory.")
    if progress is not None:
        _checks.is_a(who, "progress", progress, str, "It is the name that is shown; None is silent.")
    num_steps = _checks.count(who, "num_steps", num_steps)
    for name, count in {"checkpoint_every": checkpoint_every, "log_every": log_every}.items():
        if count is not None:
            _checks.count(who, name, count)
    if checkpoint_directory is None and (resume or checkpoint_every is not None):
        raise ValueError(f"{who}: resume and checkpoint_every need checkpoint_directory; None came. Say where it is.")
    directory = None if checkpoint_directory is None else _absolute(checkpoint_directory)
    first = _first_step(who, directory, resume)

    collected, guarded = 0, []
    pending: deque[tuple[dict[str, jax.Array], Any]] = deque()
    culprit, written = -1, first if resume else None

    def collect(in_flight: int) -> None:
        nonlocal collected, culprit
        # A step is read as soon as it is done; waiting happens only when too many are under way.
        while culprit < 0 and pending and (len(pending) > in_flight or pending[0][1].is_ready()):
            metrics, bad = jax.device_get(pending.popleft())
            _append(series, metrics)
            collected, culprit = collected + 1, int(bad)
            show(first + collected, metrics)

    def checkpoint() -> None:
        nonlocal written
        collect(0)
        step = first + collected
        if directory is not None and culprit < 0 and step != written:
            with interrupt.held():
                _save(who, directory, carry[0], step, _series(series))
            written = step

    def ended(status: str) -> Trained:
        kept = None if directory is None or written is None else directory / str(written)
        return Trained(carry[0], _series(series), first + collected - (culprit >= 0), status, kept)

    with _interrupts() as interrupt, _display(progress, first, num_steps, log_every) as show:
        given, data, past = _arrays(who, state), jax.tree.map(jnp.asarray, data), {}
        if directory is not None and first < num_steps:
            _look_ahead(who, directory, given)
        state = given
        if resume and directory is not None:
            state, past = _restore_run(who, directory, given)
        series = {name: (values.dtype, bytearray(values.tobytes())) for name, values in past.items()}
        carry, finite = jax.jit(_start, static_argnums=2)(state, given, first)
        guarded = [path for path, flag in zip(_paths(given), jax.device_get(finite), strict=True) if flag]
        advance = jax.jit(_step(who, update, past, guarded), donate_argnums=0)
        del state, given  # they would stay in memory beside the copy
        try:
            for step in range(first, num_steps):
                if interrupt.requested or culprit >= 0:
                    break
                batch = () if batches is None else (batches(step),)
                carry, report = advance(carry, *data, *batch)
                pending.append(report)
                collect(_IN_FLIGHT)
                if checkpoint_every is not None and (step + 1) % checkpoint_every == 0:
                    checkpoint()
            checkpoint()
        except Exception as error:
            if pending or collected:
                _rescue(error, checkpoint, ended, lambda: jax.block_until_ready(carry))
            raise

    trained = ended("non_finite" if culprit >= 0 else "interrupted" if interrupt.requested else "finished")
    if progress is not None and (trained.status != "finished" or not collected):
        what = {"finished": "nothing left to do", "interrupted": "interrupted"}.get(trained.status)
        what = what or f"stopped, because {['the loss', *guarded][culprit]} is NaN or infinite,"
        where = trained.checkpoint or "none"
        _say(f"{progress}: {what} at step {trained.num_steps}/{num_steps}; checkpoint: {where}")
    return trained


def save(directory: str | Path, tree: PyTree, step: int | None = None) -> Path:
    """Returns the path of the checkpoint of `tree` that was written: the only one in `directory` from then on.

    The checkpoint is written beside the one before and takes its place when it is complete, so a crash at any moment
    leaves one or the other. It is a plain Orbax checkpoint: Orbax alone can read it too.

    Args:
        directory: A local directory, made if needed.
        tree: Any pytree of arrays, numbers and PRNG keys: a trained model, a state.
        step: Its number, above that of the checkpoint before. None: the next one.

    Raises:
        ValueError: `step` is not above that of the checkpoint before.
        ModuleNotFoundError: There is no Orbax.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from odljax.training import load, save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save(directory, {"theta": jnp.arange(3.0)})
        ...     load(directory, {"theta": jnp.zeros(3)})["theta"].tolist()
        [0.0, 1.0, 2.0]
    """
    return _save("odljax.training.save", _absolute(directory), tree, step, {})


def load(directory: str | Path, like: PyTree | None = None, part: str = "") -> PyTree:
    """Returns the tree that `save`, or the state that `fit`, wrote last to `directory`, with the structure of `like`.

    Args:
        directory: The directory that was given to `save` or `fit`; or a checkpoint in it, such as `trained.checkpoint`.
        like: A tree of the same structure, shapes and dtypes: arrays, or `jax.ShapeDtypeStruct` from `jax.eval_shape`.
            Leaves come back where their model lives; as NumPy arrays where the model is no JAX array. None: as it is
            stored, in NumPy arrays: tuples as lists, named tuples as dicts, keys as their data, empty arrays as None.
        part: The part that is wanted, and that `like` describes, by its names in the tree: "theta", "theta/w",
            "layers/0". Empty: all.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint has another structure, shape or dtype than `like`; or no such part.
        ModuleNotFoundError: There is no Orbax.

    Cost: the whole checkpoint is read, also for a part.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> from odljax.training import load, save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save(directory, {"key": jax.random.key(0), "w": jnp.ones(2)})
        ...     model = load(directory, {"key": jax.random.key(1), "w": jnp.zeros(2)})
        ...     w = load(path, part="w")
        >>> model["w"].tolist(), bool(model["key"] == jax.random.key(0)), w.tolist()
        ([1.0, 1.0], True, [1.0, 1.0])
    """
    who = "odljax.training.load"
    path = _absolute(directory)
    if not (path / "_CHECKPOINT_METADATA").is_file():  # which Orbax writes into every checkpoint
        path = path / str(_found(who, path))
    return _restore(who, path, like, part.split("/") if part else [])


def latest_step(directory: str | Path) -> int | None:
    """Returns the number of the checkpoint in `directory`; None where there is none. Imports no Orbax.

    Args:
        directory: where ``save`` or ``fit`` put it.

    Example:
        >>> from odljax.training import latest_step
        >>> latest_step("a/directory/that/is/not/there") is None
        True
    """
    return max((int(path.name) for path in _numbered(_absolute(directory)) if (path / _TREE).is_dir()), default=None)


def _numbered(directory: Path) -> list[Path]:
    """What bears a bare number, which Orbax gives to complete checkpoints alone."""
    return [path for path in directory.iterdir() if path.name.isdigit()] if directory.is_dir() else []


def _first_step(who: str, directory: Path | None, resume: bool) -> int:
    if directory is None:
        return 0
    if resume:
        return _found(who, directory)
    last = latest_step(directory)
    if last is not None:
        raise FileExistsError(
            f"{who}: {directory} holds the checkpoint of step {last} of an earlier run, which a new one would replace. "
            "Pass resume=True to continue that run; empty the directory, or choose another, to start anew."
        )
    return 0


def _found(who: str, directory: Path) -> int:
    last = latest_step(directory)
    if last is None:
        what = "holds no checkpoint" if directory.is_dir() else "does not exist"
        raise FileNotFoundError(f"{who}: {directory} {what}. Check the path, or start anew without resuming.")
    return last


# The compiled step ----------------------------------------------------------------------------------------------------


def _step(
    who: str, update: Callable[..., Any], past: Mapping[str, np.ndarray], guarded: list[str]
) -> Callable[..., Any]:
    def advance(carry: tuple, *data: Data) -> tuple:
        state, step, running = carry
        new_state, metrics = _checked(who, update(state, step, *data), state, past)
        leaves = dict(zip(_paths(new_state), jax.tree.leaves(new_state), strict=True))
        finite = jnp.stack(
            [jnp.isfinite(metrics.get("loss", 0.0)), *(jnp.all(jnp.isfinite(leaves[path])) for path in guarded)]
        )
        # The flag stays down: steps dispatched before the host sees it must not move the state.
        running = running & jnp.all(finite)
        new_state = jax.tree.map(lambda new, old: jnp.where(running, new, old), new_state, state)
        return (new_state, step + 1, running), (metrics, jnp.where(running, -1, jnp.argmin(finite)))

    return advance


def _checked(who: str, result: Any, state: State, past: Mapping[str, np.ndarray]) -> tuple[State, dict[str, jax.Array]]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TypeError(
            f"{who}: update must return (state, metrics), metrics a flat dict of scalars; {_words(result)} came."
        )
    new_state, metrics = result
    for name, value in metrics.items():
        if not isinstance(name, str) or not _is_array(value) or jnp.shape(value) != ():
            raise TypeError(
                f"{who}: metrics must be a flat dict of scalars; metrics[{name!r}] is {_words(value)}. "
                "Reduce it, or leave it out."
            )
    metrics = {name: _strong(value) for name, value in metrics.items()}
    held, came = (sorted(f"{name} {value.dtype}" for name, value in kind.items()) for kind in (past, metrics))
    if past and held != came:
        raise ValueError(
            f"{who}: update must return the metrics that the checkpoint holds, {held}; {came} came. "
            "Resume with the update of the interrupted run, or start anew in another directory."
        )
    came, wanted = jax.tree.structure(new_state), jax.tree.structure(state)
    differences = _differences({"state": new_state}, "returned", {"state": state}, "given")
    if differences or came != wanted:
        raise TypeError(
            f"{who}: update must keep the structure, shapes and dtypes of the state; "
            f"{differences or f'{came} came for {wanted}'}. Cast or reshape it in update, or in the initial state."
        )
    return jax.tree.map(_strong, new_state), metrics


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _strong(leaf: Any) -> jax.Array:
    # A weakly typed state would be strong after one trip through a checkpoint, and compile and round differently.
    array = jnp.asarray(leaf)
    return jnp.asarray(array, dtype=array.dtype)


def _start(state: State, given: State, step: int) -> tuple[tuple[State, jax.Array, jax.Array], list[Any]]:
    # A copy, which the loop may give away; made by a compiled program, so that all parts live where its results live.
    carry = jax.tree.map(jnp.copy, state), jnp.asarray(step, jnp.int32), jnp.asarray(True)
    # Only what is finite at the start must stay so, in a resumed run as in an unbroken one.
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(given), strict=True)
    return carry, [jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b)) if _is_inexact(a) else False for a, b in pairs]


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _paths(state: State) -> list[str]:
    return [f"state{jax.tree_util.keystr(path)}" for path, _ in jax.tree.leaves_with_path(state)]


def _arrays(who: str, state: State) -> State:
    for path, leaf in jax.tree.leaves_with_path(state):
        if not _is_array(leaf):
            raise TypeError(
                f"{who}: state must hold arrays, numbers and PRNG keys; leaf {_checks.leaf_name(path)} "
                f"is a {_words(leaf)}. Close over functions and settings in update instead."
            )
    return jax.tree.map(_strong, state)


def _append(series: dict[str, tuple[np.dtype, bytearray]], metrics: Mapping[str, np.ndarray]) -> None:
    for name, value in metrics.items():
        series.setdefault(name, (value.dtype, bytearray()))[1].extend(value.tobytes())


def _series(series: Mapping[str, tuple[np.dtype, bytearray]]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(data, dtype).copy() for name, (dtype, data) in series.items()}


def _rescue(
    error: Exception, checkpoint: Callable[[], None], ended: Callable[[str], Trained], wait: Callable[[], Any]
) -> None:
    """Saves what the exception would lose, on disk where there is a directory, and on the exception itself."""
    try:
        wait()
    except Exception:
        error.add_note("odljax.training.fit: the state was lost with the failed step; the newest checkpoint remains.")
        return
    with suppress(Exception):  # the first error is the one to be seen
        checkpoint()
    trained = ended("failed")
    error.trained = trained  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(
        f"odljax.training.fit: the state after {trained.num_steps} steps is the attribute trained.state of this "
        f"exception; checkpoint: {trained.checkpoint or 'none'}."
    )


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _absolute(directory: str | Path) -> Path:
    return Path(directory).expanduser().absolute()


def _orbax(who: str) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who}: checkpoints need the package orbax-checkpoint; it is not installed. Install it (pip install "
            "orbax-checkpoint), or go without checkpoints.",
            name=error.name,
        ) from error
    return ocp


def _look_ahead(who: str, directory: Path, state: State) -> None:
    """Raises before the first step what would otherwise be raised after the last."""
    _orbax(who)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        raise type(error)(
            f"{who}: checkpoint_directory must be a directory that can be written to; {directory}: {error.strerror}. "
            "Choose another."
        ) from error
    _refuse_strangers(who, directory)
    needed = _AROUND + sum(leaf.nbytes for leaf in map(_stored, jax.tree.leaves(state)) if leaf is not None)
    if free < needed:
        raise OSError(
            f"{who}: checkpoint_directory must have room for the state, {needed:,} bytes; {directory} has "
            f"{free:,}. Make room, or choose another."
        )


def _refuse_strangers(who: str, directory: Path) -> None:
    for path in _numbered(directory):
        if not (path / _TREE).is_dir():
            raise FileExistsError(
                f"{who}: {path} has the name of a checkpoint and is none, and Orbax would count it as one. Move it, or "
                "choose another directory."
            )


def _manager(ocp: Any, directory: Path) -> Any:
    return ocp.CheckpointManager(
        directory,
        item_handlers={name: ocp.StandardCheckpointHandler() for name in (_TREE, _HISTORY)},
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        ),
    )


def _boxed(tree: PyTree) -> PyTree:
    """The tree, in a dict where it is a single leaf or empty, because Orbax stores neither."""
    return {"value": tree} if jax.tree.structure(tree).num_nodes == 1 else tree


def _save(who: str, directory: Path, tree: PyTree, step: int | None, history: Mapping[str, np.ndarray]) -> Path:
    last = latest_step(directory)
    step = (-1 if last is None else last) + 1 if step is None else _checks.count(who, "step", step, 0)
    if last is not None and step <= last:
        raise ValueError(
            f"{who}: step must be above {last}, that of the checkpoint in {directory}; {step} came. "
            "Leave it out, or choose another directory."
        )
    _refuse_strangers(who, directory)
    ocp = _orbax(who)
    # The history is beside the tree, not around it, so that what fit saved is loaded like what save did.
    parts = {_TREE: _boxed(jax.tree.map(_stored, tree)), **({_HISTORY: dict(history)} if history else {})}
    items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
    with _manager(ocp, directory) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
    return directory / str(step)


def _restore(who: str, path: Path, like: PyTree, part: list[str], item: str = _TREE) -> PyTree:
    ocp = _orbax(who)
    with _manager(ocp, path.parent) as manager:
        items = manager.item_metadata(int(path.name))
        if item == _HISTORY and item not in items:  # a run without metrics, or before its first step
            return {}
        stored = items[item].tree
        try:
            chosen = functools.reduce(lambda tree, name: tree[_key(tree, name)], part, stored)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(
                f"{who}: part must be in {path}, which holds {', '.join(_leaves(stored))}; {'/'.join(part)!r} came."
            ) from None
        boxed = like is not None and not part
        model = chosen if like is None else _boxed(like) if boxed else like
        wanted = jax.tree.map(_wanted, model)
        if differences := _differences(chosen, "in the checkpoint", wanted, "asked for"):
            raise ValueError(
                f"{who}: {path} must have the structure, shapes and dtypes that are asked for; {differences}. Build "
                "the same model, optimiser and precision as the run that wrote it, or start anew in another directory."
            )
        asked = _replaced(jax.tree.map(_wanted, stored), part, wanted)
        restored = manager.restore(int(path.name), args=ocp.args.Composite(**{item: ocp.args.StandardRestore(asked)}))
    found = functools.reduce(lambda tree, name: tree[_key(tree, name)], part, restored[item])
    found = jax.tree.map(_unstored, model, found)
    return found["value"] if boxed and model is not like else found


def _key(tree: Any, name: str) -> Any:
    return int(name) if isinstance(tree, list | tuple) else name


def _replaced(tree: Any, part: list[str], value: Any) -> Any:
    """The tree of dicts and lists with the value in the place of its part."""
    if not part:
        return value
    tree, key = tree.copy(), _key(tree, part[0])
    tree[key] = _replaced(tree[key], part[1:], value)
    return tree


def _restore_run(who: str, directory: Path, state: State) -> tuple[State, dict[str, np.ndarray]]:
    path = directory / str(_found(who, directory))
    return _restore(who, path, state, []), _restore(who, path, None, [], _HISTORY)


def _stored(leaf: Any) -> Any:
    """What Orbax is given for a leaf: it takes no empty arrays, and keys travel as their data."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    if _is_key(leaf):
        return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)
    if math.prod(leaf.shape) == 0:
        return None
    return leaf


def _wanted(leaf: Any) -> Any:
    """What Orbax is asked for: an array where its model was placed on purpose, otherwise memory of the host."""
    leaf = _stored(leaf)
    if leaf is None:
        return None
    placed = getattr(leaf, "committed", isinstance(leaf, jax.ShapeDtypeStruct))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if placed else None)


def _unstored(model: Any, leaf: Any) -> Any:
    if leaf is None:
        return jnp.zeros(model.shape, model.dtype)
    if hasattr(model, "dtype") and _is_key(model):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(jnp.empty((), model.dtype)))
    return jnp.asarray(leaf) if isinstance(model, jax.Array) else leaf


def _differences(came: PyTree, came_where: str, wanted: PyTree, wanted_where: str) -> str:
    """The first leaves in which two trees differ, in words; empty where none does."""
    ours, theirs = _leaves(came), _leaves(wanted)
    differing = [path for path in sorted(ours.keys() | theirs.keys()) if ours.get(path) != theirs.get(path)]
    words = [
        f"{path} is {ours.get(path, 'missing')} {came_where}, {theirs.get(path, 'missing')} {wanted_where}"
        for path in differing[:4]
    ]
    return "; ".join(words + [f"{len(differing) - 4} more"] * (len(differing) > 4))


def _leaves(tree: PyTree) -> dict[str, str]:
    # Orbax stores a named tuple as a dict; paths in this plain form are the same for both.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _words(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _words(value: Any) -> str:
    if isinstance(value, bool | int | float | complex):
        value = np.asarray(value, jnp.result_type(value))
    return _checks.describe(value)


# Ctrl-C and progress --------------------------------------------------------------------------------------------------


class _Interrupt:
    """Takes SIGINT down as a request, so that no step, and no checkpoint, is ever cut in two."""

    def __init__(self) -> None:
        self._since = math.inf
        self._held = False

    @property
    def requested(self) -> bool:
        return self._since < math.inf

    def __call__(self, signum: int, frame: Any) -> None:
        # Launchers hand on the Ctrl-C that the terminal already gave to the whole group: twins come close together.
        if not self._held and time.monotonic() - self._since > _SECONDS_BETWEEN_INTERRUPTS:
            raise KeyboardInterrupt
        self._since = min(self._since, time.monotonic())

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False


@contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _display(
    name: str | None, first: int, num_steps: int, log_every: int | None
) -> Iterator[Callable[[int, Mapping[str, np.ndarray]], None]]:
    if name is None or first >= num_steps:
        yield lambda step, metrics: None
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar(name, first, num_steps) as show:
            yield show
    else:
        yield _lines(name, first, num_steps, log_every or -(-num_steps // 10))


def _lines(name: str, first: int, num_steps: int, every: int) -> Callable[[int, Mapping[str, np.ndarray]], None]:
    began = 0.0

    def show(step: int, metrics: Mapping[str, np.ndarray]) -> None:
        nonlocal began
        now = time.monotonic()
        if step == first + 1:  # this step compiled, and tells nothing about the others
            began = now
        if step in (first + 1, num_steps) or step % every == 0:
            pace = (now - began) / max(step - first - 1, 1)
            left = f"  {pace * (num_steps - step):.0f} s left" if first + 1 < step < num_steps else ""
            _say(f"{name}  step {step}/{num_steps}  {_values(metrics)}{left}")

    return show


@contextmanager
def _bar(name: str, first: int, num_steps: int) -> Iterator[Callable[[int, Mapping[str, np.ndarray]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    refreshed = 0.0
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(name, total=num_steps, completed=first, words="compiling")

        def show(step: int, metrics: Mapping[str, np.ndarray]) -> None:
            nonlocal refreshed
            if step == num_steps or time.monotonic() - refreshed > _SECONDS_BETWEEN_REFRESHES:
                bar.update(task, completed=step, words=_values(metrics))
                refreshed = time.monotonic()

        yield show


def _values(metrics: Mapping[str, np.ndarray]) -> str:
    return "  ".join(f"{name} {value.item():.4g}" for name, value in metrics.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
