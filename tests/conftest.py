"""Checks shapes and types of everything in jaxquant while the tests run, and forbids silent dtype promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

_hook = install_import_hook("jaxquant", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
