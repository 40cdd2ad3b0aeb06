import numpy as np
import pytest

from annotations import unchecked_annotations
from gen_jax.data import DataConfig, ShapesSet, load
from gen_jax.data.shapes import COLOURS, PALETTE, SHAPES

SETS = {size: ShapesSet(size) for size in (16, 32)}


@pytest.fixture(params=[16, 32])
def world(request):
    return SETS[request.param]


def to_float(images):
    return images.astype(np.float32) / 127.5 - 1


def squared_distances(world):
    """Mean squared errors [N, N] between the images, with infinity on the diagonal."""
    flat = to_float(world.images()).reshape(len(world), -1).astype(np.float64)
    norms = (flat**2).sum(axis=1)
    distances = (norms[:, None] + norms - 2 * flat @ flat.T) / flat.shape[1]
    np.fill_diagonal(distances, np.inf)
    return distances


def test_every_combination_is_there_once(world):
    assert len(world) == 6 * 6 * 2 * 3 * 3 == 648
    assert len(np.unique(world.attributes, axis=0)) == len(world)
    assert len(np.unique(world.images().reshape(len(world), -1), axis=0)) == len(world)
    assert len(set(world.captions)) == len(world)
    for column, values in zip(world.attributes.T, world.attribute_values, strict=True):
        assert set(column.tolist()) == set(range(len(values)))


def test_rgb_and_palette_are_the_same_pictures(world):
    assert np.array_equal(PALETTE[world.images(palette=True)], world.images())


def test_objects_have_one_colour_and_the_stated_size(world):
    sides = {(16, 0): 8, (16, 1): 12, (32, 0): 16, (32, 1): 24}
    for image, attributes in zip(world.images(palette=True), world.attributes, strict=True):
        assert set(np.unique(image)) == {0, attributes[1] + 1}
        rows, columns = np.nonzero(image)
        side = sides[world.size, attributes[2]]
        assert np.ptp(rows) == np.ptp(columns) == side - 1
        gap = (world.size - side) // 2
        assert rows.min() == attributes[3] * gap
        assert columns.min() == attributes[4] * gap


def test_captions_state_the_attributes(world):
    index = world.attributes.tolist().index([1, 0, 0, 0, 1])
    assert world.captions[index] == "a small red circle in row 1, column 2"
    for caption, row in zip(world.captions, world.attributes, strict=True):
        assert all(
            values[value] in caption
            for values, value in zip(world.attribute_values, row, strict=True)
        )


def test_distances_leave_room_for_the_threshold_of_validity(world):
    distances = squared_distances(world)
    assert distances.min() > 0.06
    blank = np.full((1, world.size, world.size, 3), -1.0, np.float32)
    mean = to_float(world.images()).mean(axis=0, keepdims=True)
    assert world.nearest(blank)[1] > 0.14
    assert world.nearest(mean)[1] > 0.15


def test_the_nearest_image_is_found(world):
    index, mse = world.nearest(to_float(world.images()))
    assert np.array_equal(index, np.arange(len(world)))
    assert (mse == 0).all()
    index, mse = world.nearest(world.images(palette=True)[::-1])
    assert np.array_equal(index, np.arange(len(world))[::-1])
    assert (mse == 0).all()


def test_nearest_agrees_with_brute_force(world):
    generator = np.random.default_rng(0)
    support = to_float(world.images()).astype(np.float64)
    samples = generator.uniform(-1, 1, (20, world.size, world.size, 3)).astype(np.float32)
    samples[10:] = support[generator.integers(0, len(world), 10)] + 0.2 * samples[10:]
    index, mse = world.nearest(samples)
    for sample, found, error in zip(samples, index, mse, strict=True):
        errors = ((support - sample) ** 2).mean(axis=(1, 2, 3))
        assert found == errors.argmin()
        np.testing.assert_allclose(error, errors.min(), rtol=1e-9)


def test_total_correlation_is_what_independent_pixels_lose(world):
    images = world.images(palette=True).reshape(len(world), -1)
    frequencies = np.stack([(images == colour).mean(axis=0) for colour in range(len(PALETTE))])
    log_likelihoods = np.log(np.take_along_axis(frequencies, images.astype(np.int64), axis=0)).sum(
        axis=1
    )
    kl = -world.entropy - log_likelihoods.mean()
    np.testing.assert_allclose(world.total_correlation(palette=True), kl, rtol=1e-12)
    assert world.total_correlation(palette=True) == world.total_correlation()
    np.testing.assert_allclose(world.entropy, np.log(648))


def test_as_images_labels_are_shape_and_colour(world):
    data = world.as_images(palette=True)
    assert data.images.shape == (648, world.size, world.size)
    assert len(data.label_names) == 36
    for label, attributes in zip(data.labels, world.attributes, strict=True):
        expected = f"{COLOURS[attributes[1]]} {SHAPES[attributes[0]]}"
        assert data.label_names[label] == expected
    assert data.captions == world.captions


def test_both_splits_are_the_whole_distribution():
    config = DataConfig(palette=True)
    assert np.array_equal(load(config, "train").images, load(config, "test").images)


def test_the_cached_arrays_cannot_be_written():
    for array in (SETS[16].images(), SETS[16].images(palette=True), SETS[16].attributes, PALETTE):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 16, 16), np.float32), "not float32"),
        (np.zeros((1, 16, 16, 3), np.uint8), "not uint8"),
        (np.zeros((1, 8, 8, 3), np.float32), r"\[1, 8, 8, 3\]"),
        (np.full((1, 16, 16), 8, np.uint8), r"span 8\.\.8"),
        (np.full((1, 16, 16), -1), r"span -1\.\.-1"),
        (np.full((1, 16, 16, 3), np.nan, np.float32), "not finite"),
    ],
)
@unchecked_annotations()
def test_images_that_cannot_be_compared_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        SETS[16].nearest(images)


@unchecked_annotations()
def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="size must be one of 16, 32"):
        ShapesSet(24)
