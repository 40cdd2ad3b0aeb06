"""One seed serves every purpose, and no two purposes share a key."""

import jax
import numpy as np

from gen_jax import keys, sampling


def words(some):
    return {tuple(row) for row in np.asarray(jax.random.key_data(some)).reshape(-1, 2).tolist()}


def test_purposes_and_items_have_keys_of_their_own():
    seen = set()
    for seed in (0, 1):
        for purpose in ("init", "train", "sample", "evaluate"):
            root = keys.root(seed, purpose)
            items = keys.stream(seed, purpose, 0, 50)
            # A training step splits its key once more, by example.
            deeper = jax.vmap(lambda key: jax.random.split(key, 4))(items)
            for some in (root, items, deeper):
                assert not seen & words(some)
                seen |= words(some)


def test_a_stream_can_be_entered_anywhere():
    whole = jax.random.key_data(keys.stream(3, "sample", 0, 20))
    np.testing.assert_array_equal(whole[7:12], jax.random.key_data(keys.stream(3, "sample", 7, 5)))
    np.testing.assert_array_equal(whole, jax.random.key_data(sampling.sample_keys(3, 0, 20)))
