"""The critic of VQGAN: its loss, the adaptive weight, the late start, devices, and resuming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gen_jax import keys, parallel, training
from gen_jax.config import TrainConfig, frozen
from gen_jax.models.vq import (
    FSQ,
    AdversarialTrainable,
    Autoencoder,
    AutoencoderOptions,
    AutoencoderTrainable,
    Codebook,
    CodebookOptions,
    CriticOptions,
    FSQOptions,
    adaptive_weight,
    hinge_loss,
)
from gen_jax.nn.config import DiscriminatorConfig
from gen_jax.nn.discriminator import PatchDiscriminator
from gen_jax.workdir import Workdir
from linear_coder import LinearCoder

SIZES = DiscriminatorConfig(width=2, layers=1, groups=2)
CRITIC = CriticOptions(weight=0.7, start=1, learning_rate=1e-2, network=SIZES)
QUANTISER = FSQ(FSQOptions((5, 4, 3)))
TRAIN = TrainConfig(
    steps=4, batch=8, warmup=0, learning_rate=1e-2, log_every=1, checkpoint_every=2, ema=0.5
)


@frozen
class Channels:
    """The sum of the channels."""

    def features(self, x):
        return [x.sum(axis=-1, keepdims=True)]


def autoencoder(quantiser=QUANTISER, **critic):
    critic = dataclasses.replace(CRITIC, **critic)
    options = AutoencoderOptions(loss="l1", perceptual=0.5, critic=critic)
    network = LinearCoder(quantiser.inputs, quantiser.width)
    return Autoencoder(network, quantiser, options, (8, 12, 3), Channels())


def images(number=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 8, 12, 3), np.uint8)


@functools.cache
def mapped_update(trainable, devices):
    mesh, data = Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,)), P(parallel.AXIS)
    return parallel.map_devices(mesh, trainable.update, (P(), data, data), (P(), P()))


def play(trainable, steps, devices=1):
    """The states before the first step and after each, and the metrics of each."""
    state = jax.jit(trainable.init)(keys.root(0, "init"))
    # Logits of a fresh critic are so small that the constant in the ratio would rule it.
    state["critic"]["params"] = jax.tree.map(lambda leaf: 8 * leaf, state["critic"]["params"])
    states, metrics = [state], []
    for step in range(steps):
        batch = {"image": images(seed=step)}
        state, measured = mapped_update(trainable, devices)(
            state, batch, keys.stream(0, "train", 8 * step, 8)
        )
        states.append(state)
        metrics.append(measured)
    return jax.device_get((states, metrics))


@pytest.fixture(scope="module")
def played():
    """Three steps on one device; the critic starts at the second."""
    return play(AdversarialTrainable(autoencoder(), TRAIN), 3)


def test_the_hinge_is_its_closed_form():
    real = np.array([[[-0.5, 0.5, 2.0]]], np.float32)
    fake = np.array([[[-3.0, -0.5, 1.0]]], np.float32)
    expected = 0.5 * ((1.5 + 0.5 + 0) / 3 + (0 + 0.5 + 2) / 3)
    np.testing.assert_allclose(hinge_loss(jnp.asarray(real), jnp.asarray(fake)), expected)


def test_the_ratio_has_its_bounds():
    three, four, none = ({"kernel": jnp.array([x, y])} for x, y in ((3.0, 0), (0, 4.0), (0, 0)))
    np.testing.assert_allclose(adaptive_weight(three, four), 3 / 4.0001, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(jax.tree.map(lambda x: x / 10, three), none), 3e3)
    assert adaptive_weight(three, none) == 1e4
    assert adaptive_weight(none, four) == 0


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_by_hand(played):
    states, metrics = played
    model, state = autoencoder(), states[1]
    batch, key = {"image": images(seed=1)}, keys.stream(0, "train", 8, 8)

    def terms(params):
        parts = model.losses(params, batch, key)
        logits = PatchDiscriminator(SIZES)(state["critic"]["params"], parts.images)
        error = parts.reconstruction + 0.5 * parts.perceptual
        return {"error": error, "critic": -logits.mean(), "total": parts.total}

    @jax.jit
    def gradients(params):
        values, pull = jax.vjp(terms, params)
        one = {name: {other: jnp.float32(name == other) for other in values} for name in values}
        return values, {name: pull(each)[0] for name, each in one.items()}

    values, of = gradients(state["params"])
    last = {term: np.linalg.norm(tree["network"]["decoder"]) for term, tree in of.items()}
    expected = last["error"] / (last["critic"] + 1e-4)
    assert 0 < expected < 1e4
    np.testing.assert_allclose(metrics[1]["adaptive_weight"], expected, rtol=1e-4)
    np.testing.assert_allclose(
        metrics[1]["loss"], values["total"] + 0.7 * expected * values["critic"], rtol=1e-4
    )
    both = jax.tree.map(lambda a, b: a + 0.7 * expected * b, of["total"], of["critic"])
    np.testing.assert_allclose(metrics[1]["gradient_norm"], optax.tree.norm(both), rtol=1e-4)
    assert not np.isclose(optax.tree.norm(both), optax.tree.norm(of["total"]), rtol=1e-2)


def test_before_the_start_there_is_no_critic_and_after_it_both_move(played):
    states, metrics = played
    alone = AutoencoderTrainable(autoencoder(), TRAIN)
    own = {name: states[0][name] for name in ("params", "optimizer", "statistics")}
    batch, key = {"image": images(seed=0)}, keys.stream(0, "train", 0, 8)
    expected, measured = mapped_update(alone, 1)(own, batch, key)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, expected, {name: states[1][name] for name in own})
    jax.tree.map(np.testing.assert_array_equal, states[0]["critic"], states[1]["critic"])
    assert metrics[0]["adaptive_weight"] == 0
    np.testing.assert_allclose(metrics[0]["loss"], measured["loss"], rtol=1e-5)
    assert metrics[0].keys() == {
        "loss", "reconstruction", "perceptual", "adversarial", "adaptive_weight", "gradient_norm",
        "perplexity", "used", "critic_loss", "critic_real", "critic_fake", "critic_gradient_norm",
    }  # fmt: skip
    for leaf, moved in zip(
        *(jax.tree.leaves(state["critic"]["params"]) for state in states[1:3]), strict=True
    ):
        assert np.abs(leaf - moved).max() > 0
    assert metrics[1]["adaptive_weight"] > 0
    assert [int(state["step"]) for state in states] == [0, 1, 2, 3]


def test_a_step_is_the_same_on_several_devices_and_in_slices(played):
    config = dataclasses.replace(TRAIN, accumulate=2)
    states, metrics = play(AdversarialTrainable(autoencoder(), config), 2, devices=4)
    for ours, theirs in zip(metrics, played[1], strict=False):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), ours, theirs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, states[2], played[0][2])


def test_it_resumes_bit_for_bit(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:1]), (parallel.AXIS,))
    model = autoencoder(Codebook(CodebookOptions(codes=6, width=4, restart_every=2)))

    def fit(name, steps):
        config = dataclasses.replace(TRAIN, steps=steps)
        trainable = AdversarialTrainable(model, config)
        path, batch = Workdir(tmp_path / name), lambda step: {"image": images(seed=step)}
        return training.fit(config, trainable, batch, path, mesh=mesh, progress=False)

    whole = fit("whole", 4)
    fit("cut", 2)
    again = fit("cut", 4)
    jax.tree.map(np.testing.assert_array_equal, whole.state, again.state)
    assert again.state.ema.keys() == {"network", "quantiser", "deviation"}
    assert int(again.state.state["step"]) == 4


def test_a_run_can_begin_with_a_given_autoencoder(played):
    trainable = AdversarialTrainable(autoencoder(), TRAIN)
    given = played[0][3]["params"]
    state = trainable.replace_averaged(trainable.init(keys.root(1, "init")), given)
    assert state.keys() == played[0][0].keys()
    jax.tree.map(np.testing.assert_array_equal, trainable.averaged(state), given)
    assert state["step"] == 0


def test_a_critic_alone_separates_two_classes():
    network, optimizer = PatchDiscriminator(SIZES), optax.adam(2e-2)
    params = network.init(jax.random.key(0), 8, 8, 3)
    stripes = jnp.sign(jnp.sin(2.5 * jnp.arange(8)))[None, :, None, None]
    real, fake = (jnp.broadcast_to(x, (8, 8, 8, 3)) for x in (stripes, stripes.swapaxes(1, 2)))

    @jax.jit
    def step(params, state, key):
        noise = 0.3 * jax.random.normal(key, (2, *real.shape))

        def loss(params):
            return hinge_loss(network(params, real + noise[0]), network(params, fake + noise[1]))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 60):
        params, state, value = step(params, state, key)
    assert value < 0.3
    assert (network(params, real).mean((1, 2)) > 0).all()
    assert (network(params, fake).mean((1, 2)) < 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight must not be negative"),
        ({"start": -1}, "start must not be negative"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"weight": 0.0}, "critic.weight is 0: train with AutoencoderTrainable"),
        ({"start": 4}, "the critic starts at step 4, and training ends at 4: start it earlier"),
        ({"network": DiscriminatorConfig(layers=2)}, "images of 8 x 12 are too small"),
    ],
)
def test_what_it_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        AdversarialTrainable(autoencoder(**changes), TRAIN)


def test_a_network_without_a_last_layer_is_refused(monkeypatch):
    monkeypatch.delattr(LinearCoder, "last_layer")
    with pytest.raises(ValueError, match="give LinearCoder an attribute last_layer, the path"):
        AdversarialTrainable(autoencoder(), TRAIN)
