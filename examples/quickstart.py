"""A Linen and an NNX model, unmodified, on int8 weights: twenty lines, nothing to download."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxquant as jq


def relative_error(y, exact):
    return jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)


x = jax.random.normal(jax.random.key(0), (8, 256))

# Linen: parameters are a dictionary and the model is a function of them.
linen = nn.Sequential([nn.Dense(1024), nn.relu, nn.Dense(10)])
params = linen.init(jax.random.key(1), x)
qparams = jq.quantize_params(params)
forward = jax.jit(jq.quantized(linen.apply))
print(jq.explain(linen.apply, qparams, x))
print("relative error", relative_error(forward(qparams, x), linen.apply(params, x)))

# NNX: split the module, and merge it inside the function.
graph, state = nnx.split(nnx.Sequential(nnx.Linear(256, 1024, rngs=nnx.Rngs(0)), nnx.relu))
qstate = jq.quantize_params(state, jq.int4(group=64))
print(qstate["layers"][0]["kernel"][...])
forward = jax.jit(jq.quantized(lambda state, x: nnx.merge(graph, state)(x)))
print("relative error", relative_error(forward(qstate, x), nnx.merge(graph, state)(x)))
