import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data import Images


def numbered(count, shape=(2, 3, 1)):
    """Images whose first pixel and label tell which one they are."""
    images = np.zeros((count, *shape), np.uint8)
    images.reshape(count, -1)[:, 0] = np.arange(count)
    names = tuple(str(number) for number in range(count))
    return Images(images, np.arange(count, dtype=np.int32), names)


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 90),
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 8),
)
def test_every_epoch_is_a_permutation_across_batch_borders(count, size, seed, steps):
    data = numbered(count)
    stream = np.concatenate([data.batch(seed, step, size)["label"] for step in range(steps)])
    for begin in range(0, len(stream), count):
        epoch = stream[begin : begin + count]
        assert len(set(epoch.tolist())) == len(epoch)


@settings(max_examples=50, deadline=None)
@given(
    shards=st.integers(1, 8),
    each=st.integers(1, 9),
    step=st.integers(0, 1000),
    flip=st.booleans(),
)
def test_the_shards_concatenated_are_the_batch(shards, each, step, flip):
    generator = np.random.default_rng(step)
    images = generator.integers(0, 256, (23, 4, 5, 3), dtype=np.uint8)
    data = Images(images, np.arange(23, dtype=np.int32), tuple("abcdefghijklmnopqrstuvw"))
    whole = data.batch(7, step, shards * each, flip=flip)
    parts = [
        data.batch(7, step, shards * each, flip=flip, shard=(i, shards)) for i in range(shards)
    ]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts]))
        assert all(len(part[name]) == each for part in parts)


def test_a_batch_does_not_depend_on_the_calls_before_it():
    data, fresh = numbered(50), numbered(50)
    late = data.batch(3, 17, 20, flip=True)
    for seed, step in ((3, 0), (4, 17), (3, 90)):
        data.batch(seed, step, 20)
    again, alone = data.batch(3, 17, 20, flip=True), fresh.batch(3, 17, 20, flip=True)
    for name, array in late.items():
        assert np.array_equal(array, again[name])
        assert np.array_equal(array, alone[name])


def test_writing_into_a_batch_leaves_the_data_alone():
    data = numbered(5)
    data.batch(0, 0, 5)["image"][:] = 99
    assert np.array_equal(data.images, numbered(5).images)


def test_epochs_and_seeds_give_different_orders():
    data = numbered(100)
    orders = [tuple(data.indices(seed, epoch, 100)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_first_places_are_uniform_over_the_examples():
    data = numbered(4)
    counts = np.bincount([data.indices(seed, 0, 4)[0] for seed in range(1000)], minlength=4)
    assert ((counts - 250) ** 2 / 250).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 4)])
def test_flips_mirror_half_of_the_images_left_to_right(shape):
    ramp = np.arange(4, dtype=np.uint8).reshape(1, 4, *[1] * (len(shape) - 2))
    images = np.broadcast_to(ramp, shape)
    data = Images(np.stack([images] * 4), np.zeros(4, np.int32), ("one",))
    batch = data.batch(0, 0, 2000, flip=True)["image"]
    straight = (batch == images).all(axis=tuple(range(1, batch.ndim)))
    mirrored = (batch == images[:, ::-1]).all(axis=tuple(range(1, batch.ndim)))
    assert (straight ^ mirrored).all()
    assert 0.45 < mirrored.mean() < 0.55


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.batch(0, 0, 10, shard=(0, 3)), "choose 9"),
        (lambda data: data.batch(0, 0, 9, shard=(3, 3)), "0 <= index < count"),
        (lambda data: data.batch(-1, 0, 9), "seed is -1"),
        (lambda data: data.batch(0, -1, 9), "step is -1"),
        (lambda data: data.batch(0, 0, 0), "batch size is 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbered(5))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 2, 2, 3), np.float32), np.zeros(2, np.int32), "uint8"),
        (np.zeros((0, 2, 2, 3), np.uint8), np.zeros(0, np.int32), "at least one"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.int64), "int32"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros(3, np.int32), "int32"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1], np.int32), "label names"),
    ],
)
@unchecked_annotations()
def test_arrays_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Images(images, labels, ("one",))


def test_other_images_or_labels_have_another_digest():
    data = numbered(5)
    others = [
        Images(data.images[::-1], data.labels, data.label_names),
        Images(data.images, data.labels[::-1].copy(), data.label_names),
        numbered(5, (3, 2, 1)),
        numbered(4),
    ]
    assert numbered(5).digest == data.digest
    assert len({each.digest for each in [data, *others]}) == 5
