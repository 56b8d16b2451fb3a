"""Checks shapes and types of everything in jaxquant while the tests run, and forbids silent promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Before the first import of jaxquant, which stays instrumented when the hook is closed.
_hook = install_import_hook("jaxquant", "beartype.beartype")
import jaxquant  # noqa: E402, F401

_hook.uninstall()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most tests compile a small program and run it once. The flag is read when the backend starts; processes that tests
# start do without it, and what is to be fast asks for it itself (`models.well_jitted`).
_flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_flags or ''} --xla_backend_optimization_level=0"
jax.devices()
if _flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = _flags
