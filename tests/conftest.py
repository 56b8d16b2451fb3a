"""Checks shapes and types of everything in jaxquant while the tests run, and forbids silent promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

# Before the first import of jaxquant, which stays instrumented when the hook is closed.
_hook = install_import_hook("jaxquant", "beartype.beartype")
import jaxquant  # noqa: E402, F401

_hook.uninstall()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """Most tests compile small programs and run each once; those of real models are compiled with all optimizations."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("model") is None)
