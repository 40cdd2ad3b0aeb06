"""One seed serves every purpose, and no two purposes share a key."""

import jax
import numpy as np
import pytest

from gen_jax import keys, sampling


def words(some):
    return {tuple(row) for row in np.asarray(jax.random.key_data(some)).reshape(-1, 2).tolist()}


def test_purposes_and_items_have_keys_of_their_own():
    split = jax.jit(jax.vmap(lambda key: jax.random.split(key, 4)))
    seen = set()
    for seed in (0, 1, 2**32 - 1):
        for purpose in ("init", "train", "sample", "evaluate"):
            root = keys.root(seed, purpose)
            items = keys.stream(seed, purpose, 0, 50)
            # A training step splits its key once more, by example.
            for some in (root, items, split(items)):
                assert not seen & words(some)
                seen |= words(some)


def test_a_stream_can_be_entered_anywhere():
    whole = jax.random.key_data(keys.stream(3, "sample", 0, 20))
    np.testing.assert_array_equal(whole[7:12], jax.random.key_data(keys.stream(3, "sample", 7, 5)))
    np.testing.assert_array_equal(whole, jax.random.key_data(sampling.sample_keys(3, 0, 20)))


@pytest.mark.parametrize("seed", [-1, 2**32, -(2**40)])
def test_seeds_that_would_be_taken_for_others_are_refused(seed):
    """Of -1 and 2**32 jax would keep the lowest 32 bits."""
    for make in (lambda: keys.root(seed, "init"), lambda: sampling.sample_keys(seed, 0, 2)):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*32\)"):
            make()


def test_items_run_to_the_last_of_32_bits_and_not_beyond():
    last = keys.stream(0, "sample", 2**32 - 2, 2)
    expected = jax.random.fold_in(keys.root(0, "sample"), np.uint32(2**32 - 1))
    np.testing.assert_array_equal(jax.random.key_data(last)[1], jax.random.key_data(expected))
    for start, count in ((-1, 2), (2**32 - 1, 2)):
        with pytest.raises(ValueError, match=r"items must be in \[0, 2\*\*32\)"):
            keys.stream(0, "sample", start, count)
