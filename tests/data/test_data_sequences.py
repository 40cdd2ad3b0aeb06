import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data import Images, PixelSequences, ShapesSet
from gen_jax.data.shapes import PALETTE


def noise(shape, count=12):
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    return PixelSequences(Images(images, np.arange(count, dtype=np.int32), tuple("abcdefghijkl")))


SETS = {
    "rgb": noise((4, 5, 3)),
    "grey": noise((3, 2, 1)),
    "palette": PixelSequences(ShapesSet(16).as_images(palette=True)),
    "patches": PixelSequences(ShapesSet(16).as_images(palette=True), 4),
}


@pytest.fixture(params=SETS)
def data(request):
    return SETS[request.param]


def test_the_lengths_and_vocabularies():
    assert [SETS[name].length for name in SETS] == [60, 6, 256, 16]
    assert [SETS[name].vocabulary for name in SETS] == [256, 256, len(PALETTE), 595]
    assert noise((32, 32, 3), 2).length == 3072
    assert len(SETS["palette"]) == 648


def test_images_come_back(data):
    images = data.images.images
    tokens = data.tokens_of(images)
    assert tokens.shape == (len(data), data.length)
    assert tokens.dtype == np.int32
    assert np.array_equal(data.images_of(tokens), images)
    assert data.images_of(tokens).dtype == np.uint8
    assert data.tokens_of(images[:0]).shape == (0, data.length)
    assert data.images_of(tokens[:0]).shape == (0, *data.shape)


def test_the_order_is_rows_columns_channels():
    data = SETS["rgb"]
    tokens = data.tokens_of(data.images.images)
    assert tokens[7, (2 * 5 + 3) * 3 + 1] == data.images.images[7, 2, 3, 1]


def test_a_patch_is_a_square_of_the_dictionary():
    data = SETS["patches"]
    image = data.images.images[100]
    (tokens,) = data.tokens_of(image[None])
    for place, token in enumerate(tokens):
        top, left = 4 * (place // 4), 4 * (place % 4)
        square = image[top : top + 4, left : left + 4]
        np.testing.assert_array_equal(data.dictionary[token].reshape(4, 4), square)
    with pytest.raises(ValueError, match="squares of pixels that are not in the dictionary"):
        data.tokens_of(np.arange(256, dtype=np.int32).reshape(1, 16, 16) % 7)
    for images in (SETS["rgb"].images, data.images):
        with pytest.raises(ValueError, match="a patch of 3 does not fit images of"):
            PixelSequences(images, 3)


@settings(max_examples=30, deadline=None)
@given(
    shards=st.integers(1, 4), each=st.integers(1, 5), step=st.integers(0, 99), flip=st.booleans()
)
def test_batches_are_those_of_the_images_in_every_shard(shards, each, step, flip):
    for data in SETS.values():
        flip = flip and data.patch == 1
        size = shards * each
        images = data.images.batch(3, step, size, flip=flip)
        parts = [
            data.batch(3, step, size, flip=flip, shard=(index, shards)) for index in range(shards)
        ]
        tokens = np.concatenate([part["tokens"] for part in parts])
        assert np.array_equal(data.images_of(tokens), images["image"])
        labels = np.concatenate([part["label"] for part in parts])
        assert np.array_equal(labels, images["label"])
        assert labels.dtype == tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.images_of(np.zeros((2, 255), np.int32)), r"\[B, 256\], not int32"),
        (lambda data: data.images_of(np.zeros(256, np.int32)), r"not int32 \[256\]"),
        (lambda data: data.images_of(np.zeros((2, 256))), "not float64"),
        (lambda data: data.images_of(np.full((2, 256), 7)), r"must lie in 0\.\.6"),
        (lambda data: data.images_of(np.full((2, 256), -1)), r"tokens span -1\.\.-1"),
        (lambda data: data.tokens_of(np.zeros((2, 8, 8), np.uint8)), r"images .*\[B, 16, 16\]"),
        (lambda data: data.tokens_of(np.full((2, 16, 16), 9)), r"must lie in 0\.\.6"),
        (lambda data: data.batch(0, 0, 3, shard=(0, 2)), "not a multiple"),
    ],
)
@unchecked_annotations()
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(SETS["palette"])
