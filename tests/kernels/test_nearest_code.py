"""nearest_code: memory, values that are not finite, and what it refuses. The rest are its cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import testing
from kernels.nearest_code import shortlisted
from kernels.nearest_code.cases import example


def search(implementation):
    return jax.jit(functools.partial(kernels.nearest_code, implementation=implementation))


def test_random_vectors_find_a_code_as_near_as_any():
    generator = np.random.default_rng(0)
    x, codebook = generator.normal(size=(600, 16)), generator.normal(size=(1500, 16))
    distances = ((x[:, None] - codebook[None]) ** 2).sum(-1)
    for name in ("reference", "blocks"):
        index, distance = search(name)(jnp.float32(x), jnp.float32(codebook))
        np.testing.assert_allclose(distance, distances.min(1), rtol=1e-5)
        np.testing.assert_allclose(distances[np.arange(600), index], distances.min(1), rtol=1e-5)


def test_blocks_keep_no_table_of_all_distances():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 8), (4096, 8))]
    whole, blocks = (
        search(name).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for name in ("reference", "blocks")
    )
    assert whole >= 4096 * 4096 * 4
    assert blocks < whole / 4


def test_a_problem_of_one_block_has_no_loop():
    for number, loops in ((512, False), (513, True)):
        text = jax.jit(kernels.nearest_code).lower(*example(number, 1024, 4)).as_text()
        assert ("stablehlo.while" in text) == loops


@pytest.mark.parametrize("implementation", ["reference", "blocks"])
def test_a_vector_that_is_not_finite_has_no_finite_distance(implementation):
    x, codebook = example(6, 4, 3)
    x = x.at[2].set(jnp.nan).at[4, 0].set(jnp.inf)
    index, distance = search(implementation)(x, codebook)
    np.testing.assert_array_equal(jnp.isfinite(distance), [1, 1, 0, 1, 0, 1])
    assert ((index >= 0) & (index < 4)).all()


def random_codes(number, codes, width):
    generator = np.random.default_rng(width)
    x, codebook = generator.normal(size=(number, width)), generator.normal(size=(codes, width))
    return jnp.asarray(x, jnp.float32), jnp.asarray(codebook, jnp.float32)


@pytest.mark.parametrize("width", [32, 256])
def test_a_shortlist_finds_the_nearest_code_whenever_it_has_it(width):
    """Products of bfloat16 alone name other codes; a shortlist of their names nearly none."""
    x, codebook = random_codes(1000, 4096, width)
    exact, distance = search("reference")(x, codebook)
    missed = []
    for number in (1, 2, 8):

        @jax.jit
        def run(x, codebook, number=number):
            found = kernels.nearest_code(x, codebook, shortlist=number)
            return *found, shortlisted._candidates(x, codebook, number)

        found, its, candidates = run(x, codebook)
        has = np.asarray((candidates == exact[None]).any(axis=0))
        np.testing.assert_array_equal(found == exact, has)
        np.testing.assert_allclose(its[has], distance[has], rtol=1e-4)
        assert (its[~has] > distance[~has]).all()
        missed.append(int((~has).sum()))
    assert missed[0] > missed[1] >= missed[2]


def test_the_kernel_for_tpus_has_the_candidates_of_the_reference():
    x, codebook = random_codes(150, 300, 20)
    entry = testing.suites()["shortlisted_code"].implementations()["tpu"]
    for number in (1, 3):
        found = jax.jit(functools.partial(kernels.nearest_code, shortlist=number))(x, codebook)
        with testing.interpreted_elsewhere(entry):
            ours = jax.jit(
                functools.partial(kernels.nearest_code, shortlist=number, implementation="tpu")
            )(x, codebook)
        np.testing.assert_array_equal(ours[0], found[0])


def test_what_it_refuses():
    x, codebook = example(2, 4, 3)
    with pytest.raises(ValueError, match="a shortlist has up to 8 entries, not 9; 0 is for none"):
        kernels.nearest_code(x, codebook, shortlist=9)
    with pytest.raises(NotImplementedError, match="no implementation 'blocks'; known: ref"):
        kernels.nearest_code(x, codebook, shortlist=2, implementation="blocks")
    with pytest.raises(ValueError, match="the codebook has no entries"):
        kernels.nearest_code(x, codebook[:0])
    with pytest.raises(NotImplementedError, match="known: reference, blocks, gpu, tpu"):
        kernels.nearest_code(x, codebook, implementation="mosaic")


def test_no_vectors_have_no_codes():
    x, codebook = example(2, 4, 3)
    for platforms in (("cpu",), ("cuda",), ("tpu",)):
        text = jax.jit(kernels.nearest_code).trace(x[:0], codebook)
        assert "custom_call" not in text.lower(lowering_platforms=platforms).as_text()
    index, distance = kernels.nearest_code(x[:0], codebook)
    assert index.shape == distance.shape == (0,)
