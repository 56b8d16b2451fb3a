"""The same bytes in every process, whatever the number of threads that XLA gives its work to."""

from processes import found, started

PROGRAM = r"""
import hashlib, json
import jax, jax.numpy as jnp, numpy as np
import jaxquant as jq

# Large enough for XLA to split its loops among threads.
rng = np.random.default_rng(0)
params = {"w": rng.standard_normal((256, 1024)).astype(np.float32)}
x = rng.standard_normal((512, 256)).astype(np.float32)

def fn(params, x):
    return x @ params["w"]

def digest(tree):
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()

stats = jq.calibrate(fn, params, [x])
quantizers = {
    "int8": jq.int8,
    "int4": jq.int4(group=64, symmetric=False),
    "nf4": jq.nf4,
    "fp8": jq.fp8,
    "stochastic": jq.stochastic(jq.int8, jax.random.key(0)),
    "hqq": jq.hqq(jq.int4(group=64)),
    "gptq": jq.gptq(jq.int4(group=64)),
}
found = {"statistics": digest(stats), "paths": sorted(stats)}
for name, quantizer in quantizers.items():
    q = jq.quantize_params(params, quantizer, stats=stats)
    found[name] = [digest(q), digest(jax.jit(jq.quantized(fn))(q, x))]
print(json.dumps(found))
"""


def test_processes_and_threads_do_not_matter():
    """Law: statistics, codes, scales and outputs of one thread are those of seven, byte for byte.

    XLA reads NPROC; the hashes of strings differ too.
    """
    one, seven = found(*(started(PROGRAM, NPROC=n, PYTHONHASHSEED=n) for n in ("1", "7")))
    assert one == seven
