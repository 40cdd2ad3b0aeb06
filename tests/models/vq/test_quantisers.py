"""Quantisers: the equations of their papers in NumPy, gradients, and what devices agree on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gen_jax import keys, parallel
from gen_jax.models.vq import (
    FSQ,
    Codebook,
    CodebookOptions,
    FSQOptions,
    Gaussian,
    GaussianOptions,
    kl_divergence,
    usage,
)

KEY = jax.random.key(0)


def codebook(**options):
    return Codebook(CodebookOptions(**{"codes": 8, "width": 3} | options))


def latents(seed=0, batch=8, side=2, width=3):
    shape = batch, side, side, width
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sample_keys(step=0, batch=8):
    return keys.stream(step, "train", 0, batch)


def update(quantiser, params, statistics, z, step=0, devices=1):
    """One update on a mesh of devices, with the codes that the parameters give."""
    code = quantiser.quantise(params, z).code
    arguments = params, params, statistics, z, code, sample_keys(step, len(z))
    return mapped_update(quantiser, devices)(*arguments)


@functools.cache
def mapped_update(quantiser, devices):
    mesh, data = Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,)), P(parallel.AXIS)
    places = (P(), P(), P(), data, data, data), (P(), P(), P())
    return parallel.map_devices(mesh, quantiser.update, *places)


def test_the_nearest_entry_stands_for_a_vector():
    quantiser, z = codebook(), latents()
    params = {"codebook": jax.random.normal(KEY, (1, 8, 3))}
    quantised = quantiser.quantise(params, z)
    table = np.asarray(params["codebook"][0])
    distances = ((np.asarray(z)[..., None, :] - table) ** 2).sum(-1)
    np.testing.assert_array_equal(quantised.code, distances.argmin(-1))
    np.testing.assert_array_equal(quantised.value, table[distances.argmin(-1)])
    np.testing.assert_array_equal(quantiser.lookup(params, quantised.code), quantised.value)
    commitment = 0.25 * ((np.asarray(z) - np.asarray(quantised.value)) ** 2).mean()
    np.testing.assert_allclose(quantised.loss, commitment, rtol=1e-6)


@pytest.mark.parametrize(
    "quantiser",
    [
        codebook(commitment=0),
        codebook(depth=3, commitment=0),
        codebook(scales=(1, 1, 2), commitment=0),
        FSQ(FSQOptions((5, 4, 3))),
    ],
    ids=["codebook", "residual", "scales", "fsq"],
)
def test_the_gradient_of_the_decoder_goes_straight_through(quantiser):
    params, z = quantiser.init(KEY), latents()

    def decode(value):
        return jnp.sin(3 * value).sum()

    value = quantiser.quantise(params, z).value
    at_value = jax.grad(decode)(value)
    gradient = jax.grad(lambda z: decode(quantiser.quantise(params, z).value))(z)
    if isinstance(quantiser, FSQ):  # through the bound, and around the rounding
        half = quantiser._half[None, None, None]
        bound = jax.vjp(lambda z: quantiser._bound(z) / half, z)[1]
        at_value = bound(at_value)[0]
    np.testing.assert_allclose(gradient, at_value, rtol=1e-6)


def test_gradients_of_the_loss_of_a_codebook():
    z, params = latents(), {"codebook": jax.random.normal(KEY, (1, 8, 3))}
    for kind, beta in itertools.product(("gradient", "moving_average"), (0.0, 0.5)):
        quantiser = codebook(update=kind, commitment=beta)
        run = functools.partial(lambda q, p, z: q.quantise(p, z).loss, quantiser)
        by_params, by_z = jax.grad(run, (0, 1))(params, z)
        quantised = quantiser.quantise(params, z)
        toward = 2 * np.asarray(z - quantised.value) / z.size
        np.testing.assert_allclose(by_z, beta * toward, atol=1e-7)
        expected = np.zeros((8, 3))
        if kind == "gradient":
            np.add.at(expected, np.asarray(quantised.code).ravel(), -toward.reshape(-1, 3))
        np.testing.assert_allclose(by_params["codebook"][0], expected, atol=1e-7)


def closed_form(codebook, z, decay, epsilon, steps):
    """Appendix A.1 in float64, one table; the same vectors every step."""
    counts, sums, table = np.ones(len(codebook)), codebook.copy(), codebook
    for _ in range(steps):
        code = ((z[:, None] - table[None]) ** 2).sum(-1).argmin(1)
        chosen = np.eye(len(codebook))[code]
        counts = decay * counts + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ z
        total = counts.sum()
        smooth = (counts + epsilon) / (total + len(codebook) * epsilon) * total
        table = sums / smooth[:, None]
    return table, counts


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_moving_average_is_its_closed_form_on_any_number_of_devices(devices):
    quantiser = codebook(decay=0.9, epsilon=0.1, restart_every=0)
    params = {"codebook": jax.random.normal(KEY, (1, 8, 3))}
    start, z = np.asarray(params["codebook"][0], np.float64), latents()
    statistics = quantiser.init_statistics(params)
    for step in range(3):
        params, statistics, _ = update(quantiser, params, statistics, z, step, devices)
    table, counts = closed_form(start, np.asarray(z, np.float64).reshape(-1, 3), 0.9, 0.1, 3)
    np.testing.assert_allclose(params["codebook"][0], table, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["counts"][0], counts, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"depth": 1}, {"depth": 3, "update": "gradient"}, {"scales": (1, 2)}],
    ids=["one", "residual", "scales"],
)
def test_restarts_are_the_same_on_any_number_of_devices(options):
    quantiser = codebook(restart_every=2, **options)
    results = []
    for devices in (1, 2, 8):
        params = quantiser.init(KEY)
        statistics = quantiser.init_statistics(params)
        for step in range(5):
            z = latents(step)
            params, statistics, metrics = update(quantiser, params, statistics, z, step, devices)
        results.append((params, statistics, metrics))
    for other in results[1:]:
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(same, results[0], other)
    assert results[0][1]["age"] == 5


def test_the_first_step_puts_entries_on_the_data_and_different_ones():
    quantiser = codebook(restart_every=10)
    params, z = quantiser.init(KEY), latents()
    after, _, _ = update(quantiser, params, quantiser.init_statistics(params), z)
    vectors = {tuple(row) for row in np.asarray(z).reshape(-1, 3)}
    entries = {tuple(row) for row in np.asarray(after["codebook"][0])}
    assert entries <= vectors
    assert len(entries) == 8


@pytest.mark.parametrize("kind", ["moving_average", "gradient"])
def test_a_dead_entry_revives_within_a_period_and_live_ones_stay(kind):
    period = 3
    quantiser = codebook(codes=4, update=kind, decay=0.5, restart_every=period)
    # Entries on their vectors stay there, so that what moves was restarted.
    corners = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], jnp.float32)
    z = jnp.tile(corners[:, None, None], (8, 2, 2, 1))
    far = jnp.full((1, 3), 100.0)
    params = {"codebook": jnp.concatenate([corners, far])[None]}
    statistics = quantiser.init_statistics(params) | {"age": jnp.int32(1)}
    for step in range(1, period + 1):
        assert params["codebook"][0, 3, 0] > 50, "the planted entry is dead until the restart"
        params, statistics, _ = update(quantiser, params, statistics, z, step, 8)
    np.testing.assert_allclose(params["codebook"][0, :3], corners, rtol=1e-3)
    assert tuple(np.asarray(params["codebook"][0, 3])) in {tuple(row) for row in corners.tolist()}
    assert (statistics["used"] == 0).all()


def partial(quantiser, code, tables):
    """The code whose tables after the first few say zero."""
    kept = [each if i < tables else 0 * each for i, each in enumerate(quantiser.maps(code))]
    return quantiser._joined(kept)


@pytest.mark.parametrize("options", [{"depth": 4}, {"scales": (1, 2, 4)}], ids=["depth", "scales"])
def test_further_tables_never_make_the_error_larger(options):
    quantiser = codebook(**options)
    tables, z = quantiser.options.tables, jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    for scale in (0.1, 1.0, 30.0):
        codebooks = scale * jax.random.normal(KEY, (tables, 8, 3))
        params, errors = {"codebook": codebooks.at[1:, 0].set(0)}, []
        code = quantiser.quantise(params, z).code
        assert code.shape == (8, *quantiser.code_shape(4, 4))
        for number in range(1, tables + 1):
            value = quantiser.lookup(params, partial(quantiser, code, number))
            errors.append(jnp.square(z - value).sum((1, 2, 3)))
        for more, less in itertools.pairwise(errors):
            assert (less <= more * (1 + 1e-6)).all()
    assert float(errors[-1].mean()) < float(errors[0].mean())


def test_each_scale_quantises_the_means_of_blocks_of_what_is_left():
    quantiser = codebook(scales=(1, 2, 4))
    codebooks = jax.random.normal(KEY, (3, 8, 3)).at[1:, 0].set(0)
    params, z = {"codebook": codebooks}, jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
    quantised = quantiser.quantise(params, z)
    left, tables = np.array(z, np.float64), np.asarray(codebooks, np.float64)
    for table, code in zip(tables, quantiser.maps(quantised.code), strict=True):
        side = code.shape[1]
        step = 4 // side
        for row, column in itertools.product(range(side), repeat=2):
            rows, columns = (slice(place * step, (place + 1) * step) for place in (row, column))
            mean = left[:, rows, columns].mean((1, 2))
            nearest = ((mean[:, None] - table[None]) ** 2).sum(-1).argmin(-1)
            np.testing.assert_array_equal(code[:, row, column], nearest)
            left[:, rows, columns] -= table[nearest][:, None, None]
    np.testing.assert_allclose(quantised.value, z - left, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(quantiser.lookup(params, quantised.code), quantised.value, atol=1e-5)


def test_zero_stays_the_first_entry_of_the_residual_tables():
    quantiser = codebook(scales=(1, 2), restart_every=1)
    params = quantiser.init(KEY)
    statistics = quantiser.init_statistics(params)
    for step in range(3):
        params, statistics, _ = update(quantiser, params, statistics, latents(step), step)
        assert (params["codebook"][1, 0] == 0).all()
        assert (params["codebook"][0, 0] != 0).any()


def test_usage_of_a_batch():
    counts = jnp.array([[4.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    measured = usage(counts)
    np.testing.assert_allclose(measured["perplexity"], (2 + 4) / 2, rtol=1e-6)
    np.testing.assert_allclose(measured["used"], 6 / 8)


@pytest.mark.parametrize("levels", [(2,), (3,), (8, 5, 5), (4, 7, 2, 3)])
def test_fsq_codes_are_all_whole_numbers_and_back(levels):
    quantiser = FSQ(FSQOptions(levels))
    assert quantiser.codes == np.prod(levels)
    code = jnp.arange(quantiser.codes).reshape(-1, 1, 1)
    value = quantiser.lookup({}, code)
    assert value.shape == (quantiser.codes, 1, 1, len(levels))
    for i, level in enumerate(levels):
        assert len(np.unique(value[..., i])) == level
    assert float(jnp.abs(value).max()) <= 1
    assert len(np.unique(np.asarray(value).reshape(quantiser.codes, -1), axis=0)) == len(value)
    # Latents far inside of a cell are rounded to it: the bound is undone by its inverse.
    bounded = np.asarray(value) * quantiser._half
    half = (np.array(levels) - 1) * (1 + 1e-3) / 2
    offset = np.where(np.array(levels) % 2 == 0, 0.5, 0.0)
    z = np.arctanh((bounded + offset) / half) - np.arctanh(offset / half)
    quantised = quantiser.quantise({}, jnp.asarray(z, jnp.float32))
    np.testing.assert_array_equal(quantised.code, code)
    np.testing.assert_array_equal(quantised.value, value)


def test_fsq_of_any_latent_is_a_code_and_zero_is_zero():
    quantiser = FSQ(FSQOptions((8, 5, 2)))
    z = 100 * latents()
    quantised = quantiser.quantise({}, z)
    assert int(quantised.code.min()) >= 0
    assert int(quantised.code.max()) < 80
    np.testing.assert_array_equal(quantiser.lookup({}, quantised.code), quantised.value)
    np.testing.assert_array_equal(quantiser.quantise({}, 0 * z).value, 0 * z)


def test_the_divergence_of_normals():
    mean, log_variance = latents(0), latents(1)
    terms = np.exp(log_variance) + np.square(mean) - 1 - log_variance
    expected = 0.5 * np.asarray(terms, np.float64).sum((1, 2, 3))
    np.testing.assert_allclose(kl_divergence(mean, log_variance), expected, rtol=1e-5)
    assert float(jnp.abs(kl_divergence(0 * mean, 0 * mean)).max()) == 0


def test_a_gaussian_latent_is_drawn_with_keys_and_its_mean_without():
    quantiser = Gaussian(GaussianOptions(width=3, weight=0.5))
    mean, log_variance = latents(0), latents(1)
    both = jnp.concatenate([mean, log_variance], -1)
    quantised = quantiser.quantise({}, both)
    np.testing.assert_array_equal(quantised.value, mean)
    np.testing.assert_allclose(
        quantised.loss, 0.5 * kl_divergence(mean, log_variance).mean(), rtol=1e-6
    )
    drawn = quantiser.quantise({}, jnp.tile(both[:1], (4000, 1, 1, 1)), sample_keys(0, 4000)).value
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=0.1)
    np.testing.assert_allclose(drawn.std(0), jnp.exp(0.5 * log_variance[0]), rtol=0.1)
    with pytest.raises(ValueError, match="a continuous latent has no codes"):
        quantiser.code_shape(2, 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CodebookOptions, {"codes": 1}, "codes must be at least 2"),
        (CodebookOptions, {"depth": 0}, "depth must be at least 1, got 0"),
        (CodebookOptions, {"decay": 1.0}, "decay must be in"),
        (CodebookOptions, {"epsilon": 0.0}, "epsilon must be positive"),
        (CodebookOptions, {"commitment": -1.0}, "commitment must not be negative"),
        (CodebookOptions, {"update": "adam"}, "update must be one of 'moving_average', 'gradient'"),
        (CodebookOptions, {"scales": (1, 2), "depth": 2}, "one table a scale: leave depth at 1"),
        (CodebookOptions, {"scales": (2, 1)}, "scales go from coarse to fine"),
        (CodebookOptions, {"scales": (2, 3)}, "each divides the next"),
        (CodebookOptions, {"scales": (0, 2)}, "scales go from coarse to fine"),
        (FSQOptions, {"levels": ()}, "levels must be at least 2 each, and not none"),
        (FSQOptions, {"levels": (8, 1)}, "levels must be at least 2 each"),
        (FSQOptions, {"levels": (1000,) * 4}, "do not fit in 32 bits"),
        (GaussianOptions, {"width": 0}, "width must be at least 1"),
    ],
)
def test_what_options_refuse(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_latents_must_have_the_size_of_the_last_scale():
    quantiser = codebook(scales=(1, 2))
    assert quantiser.code_shape(2, 2) == (5,)
    for size in ((4, 4), (2, 4)):
        with pytest.raises(ValueError, match="end at 2 x 2, and the latents are"):
            quantiser.code_shape(*size)
