"""A format is a value: refused when it cannot exist, equal when its fields are, derived by a call.

Law of the numbers: qmax is the largest code, and a symmetric format spans [-qmax, qmax] where an affine one adds one.
"""

import copy
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tables import FORMATS, GRANULARITIES, as_shipped, limits, table

import jaxquant as jq
from jaxquant.errors import FormatError

UNEVEN = (-1.0, 0.0, 0.25, 1.0)

# What is asked for, and the words of the message that say what would be valid.
INVALID = {
    "bits 9": ({"bits": 9}, ["bits=9", "8, 4, 3 or 2"]),
    "bits 0": ({"bits": 0}, ["bits=0", "8, 4, 3 or 2"]),
    "bits 1": ({"bits": 1}, ["bits=1", "8, 4, 3 or 2"]),
    "bits negative": ({"bits": -8}, ["bits=-8", "8, 4, 3 or 2"]),
    "bits 3.5": ({"bits": 3.5}, ["bits=3.5", "8, 4, 3 or 2"]),
    "bits 8.0": ({"bits": 8.0}, ["bits=8.0", "8, 4, 3 or 2"]),
    "bits True": ({"bits": True}, ["bits=True", "8, 4, 3 or 2"]),
    "bits text": ({"bits": "8"}, ["bits='8'", "8, 4, 3 or 2"]),
    "bits None": ({"bits": None}, ["bits=None", "8, 4, 3 or 2"]),
    "group 0": ({"group": 0}, ["group=0", "positive whole"]),
    "group negative": ({"group": -64}, ["group=-64", "positive whole"]),
    "group float": ({"group": 64.0}, ["group=64.0", "positive whole"]),
    "group True": ({"group": True}, ["group=True", "positive whole"]),
    "group text": ({"group": "64"}, ["group='64'", "positive whole"]),
    "group per tensor": ({"group": 64, "per_channel": False}, ["group=64", "per_channel=False"]),
    "symmetric text": ({"symmetric": "no"}, ["symmetric='no'", "True", "False"]),
    "per_channel number": ({"per_channel": 2}, ["per_channel=2", "True", "False"]),
    "float of 4 bits": ({"bits": 4, "dtype": jnp.float8_e4m3fn}, ["bits=4", "float8_e4m3fn", "float8_e5m2"]),
    "float of 32 bits": ({"dtype": jnp.float32}, ["float8_e4m3fn", "float8_e5m2"]),
    "integer dtype": ({"dtype": jnp.int8}, ["float8_e4m3fn", "float8_e5m2"]),
    "affine float": ({"dtype": jnp.float8_e5m2, "symmetric": False}, ["symmetric=False", "integer"]),
    "affine codebook": ({"bits": 2, "levels": UNEVEN, "symmetric": False}, ["symmetric=False", "integer"]),
    "short codebook": ({"bits": 4, "levels": UNEVEN}, ["16"]),
    "codebook list": ({"bits": 2, "levels": list(UNEVEN)}, ["tuple", "4"]),
    "codebook falls": ({"bits": 2, "levels": UNEVEN[::-1]}, ["increases"]),
    "codebook repeats": ({"bits": 2, "levels": (-1.0, 0.0, 0.0, 1.0)}, ["increases"]),
    "codebook beyond 1": ({"bits": 2, "levels": (-1.0, 0.0, 1.0, 2.0)}, ["[-1, 1]"]),
    "codebook short of 1": ({"bits": 2, "levels": (-0.5, 0.0, 0.25, 0.5)}, ["reaches"]),
    "codebook NaN": ({"bits": 2, "levels": (-1.0, float("nan"), 0.5, 1.0)}, ["increases"]),
    "float codebook": ({"dtype": jnp.float8_e5m2, "levels": tuple(np.linspace(-1, 1, 256).tolist())}, ["not both"]),
}

READY = {"int8": jq.int8, "int4": jq.int4, "int3": jq.int3, "int2": jq.int2, "fp8": jq.fp8, "nf4": jq.nf4}


@pytest.mark.parametrize("fields, words", **table(INVALID))
@pytest.mark.parametrize("derived", [False, True], ids=["constructed", "derived"])
def test_an_impossible_format_is_refused_with_what_is_valid(fields, words, derived):
    """Law: no impossible format exists, whichever way it is made, and the message names the value and the choices."""
    with as_shipped(), pytest.raises(FormatError) as error:
        jq.int8(**fields) if derived else jq.Format(**fields)
    assert [word for word in words if word not in str(error.value)] == []


def test_an_unknown_keyword_is_refused_with_the_known_ones():
    """Law: a misspelt field is never dropped, and the message lists the fields there are."""
    with pytest.raises(FormatError) as error:
        jq.int4(gruop=64)
    assert all(word in str(error.value) for word in ("gruop", "bits", "group", "symmetric", "per_channel"))
    with pytest.raises(TypeError, match="gruop"):
        jq.Format(gruop=64)


@pytest.mark.parametrize("format", **table(FORMATS))
def test_the_codes_are_those_of_the_table(format):
    """Law: qmin and qmax are the ends of the code's range, and the container holds both."""
    assert (format.qmin, format.qmax) == limits(format)
    if format.is_integer:
        held = jnp.iinfo(format.container)
        assert held.min <= format.qmin and format.qmax <= held.max
        assert format.qmax - format.qmin == 2**format.bits - (2 if format.symmetric else 1)


@pytest.mark.parametrize("format", **table(FORMATS | READY))
def test_a_format_is_a_value(format):
    """Law: equal fields are one format: one key of a dict, one static argument of a jit, the same after a copy."""
    for twin in (format(), copy.deepcopy(format), pickle.loads(pickle.dumps(format)), format(group=None)):
        equal = twin.group == format.group
        assert (twin == format, hash(twin) == hash(format)) == (equal, equal)
    assert len(set(FORMATS.values())) == len(FORMATS)
    with pytest.raises(AttributeError):
        format.bits = 4


def test_equal_formats_share_one_compilation():
    """Law: a format derived anew is the same static argument."""
    traced = []

    @jax.jit
    def once(w):
        traced.append(1)
        return w

    apply = jax.jit(lambda w, format: once(w) * jnp.float32(format.qmax), static_argnums=1)
    for format in (jq.int4(group=16), jq.int8(bits=4, group=16), jq.Format(4, 16)):
        apply(jnp.ones(3, jnp.float32), format)
    assert len(traced) == 1


@pytest.mark.parametrize("granularity", **table(GRANULARITIES))
def test_derivation_changes_what_is_named_and_nothing_else(granularity):
    """Law: `format(field=value)` is the format with that field, and the format it came from stays as it was."""
    for format in (jq.int8, jq.int4, jq.int3, jq.int2, jq.fp8, jq.nf4(group=None)):
        before = {name: getattr(format, name) for name in ("bits", "group", "symmetric", "per_channel", "levels")}
        derived = format(**granularity)
        assert {name: getattr(derived, name) for name in before} == before | granularity
        assert {name: getattr(format, name) for name in before} == before
    assert jq.int4(group=64, symmetric=False) == jq.Format(bits=4, group=64, symmetric=False)


def test_formats_are_told_apart_in_words():
    """Law: what prints differently is different, so a table of results can be read."""
    assert len({str(format) for format in FORMATS.values()}) == len(FORMATS)
    assert str(jq.int4(group=64, symmetric=False)) == "int4 g64 affine"
    assert [str(format).split()[0] for format in READY.values()] == [
        *("int8", "int4", "int3", "int2", "float8_e4m3fn", "nf4")
    ]


def test_the_codebook_of_nf4_is_the_published_one():
    """Law: NF4 has an exact zero, both ends, and more levels above zero than below (QLoRA, appendix E)."""
    levels = np.asarray(jq.nf4.levels)
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1) and np.all(np.diff(levels) > 0)
    assert np.array_equal(levels, levels.astype(np.float32))
    assert jq.Format(bits=2, levels=UNEVEN).levels == UNEVEN


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_the_two_floats_are_the_same_by_whatever_name(name):
    """Law: a dtype is a value: its NumPy dtype and its JAX scalar type make one format."""
    by_type, by_dtype = jq.fp8(dtype=getattr(jnp, name)), jq.fp8(dtype=np.dtype(getattr(ml_dtypes, name)))
    assert by_type == by_dtype and hash(by_type) == hash(by_dtype)
