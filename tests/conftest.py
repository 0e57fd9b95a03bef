"""Float64, strict promotion, warnings as errors; annotations are checked at run time."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# The tests compile much and run little: XLA's older way to emit loops compiles a third faster. It aborts at a flag that
# it does not know.
if version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10.")):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

from jaxtyping import install_import_hook

install_import_hook("odljax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", None)  # with it the alarms of failed solves are silent
# What the tests say of bytes and operations is said of optimised code: see below.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised():
    """Compilation as users have it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def float32_only():
    """The lane without x64."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)
