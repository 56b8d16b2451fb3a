"""Checks shapes and types of everything in jaxquant while the tests run, and forbids silent promotion."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook
from processes import QUICK

# Before the first import of jaxquant, which stays instrumented when the hook is closed.
_hook = install_import_hook("jaxquant", "beartype.beartype")
import jaxquant  # noqa: E402, F401

_hook.uninstall()

# Flags are read once, at the first compilation; processes that tests start do not inherit them. `XLA_FLAGS= pytest`
# compiles as users do, `models.jitted_as_shipped` one function.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = QUICK
    jax.jit(lambda: 0)()
    del os.environ["XLA_FLAGS"]

# Tracing makes many objects and few cycles; looking for them every 700 takes a tenth of the time.
gc.set_threshold(50_000, 10, 10)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """Most tests compile small programs and run each once; those of real models are compiled with all optimizations."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("model") is None)
