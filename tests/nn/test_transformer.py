"""The transformer: what each logit may depend on, and the cache that must not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.nn.attention import dot_product_attention, rotate
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(vocabulary=12, context=10, layers=2, width=16, heads=4)
LLAMA = dataclasses.replace(GPT, kv_heads=2, mlp_dim=24, **LLAMA_FORM)
FORMS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
TOKENS = np.random.default_rng(0).permuted(np.tile(np.arange(12, dtype=np.int32), (3, 1)), axis=1)
TOKENS = TOKENS[:, :10]  # all different within a sequence

_apply = jax.jit(
    lambda network, params, tokens, rest: network(params, tokens, **rest), static_argnums=0
)
prepare = jax.jit(lambda network, params: network.prepare(params), static_argnums=0)
extend = jax.jit(
    lambda network, prepared, tokens, caches, column, first, **rest: network.extend(
        prepared, tokens, caches, column, first, **rest
    ),
    static_argnums=0,
)


def apply(network, params, tokens, **rest):
    return np.asarray(_apply(network, params, tokens, rest))


def logits_of(config, hidden):
    """Logits of hidden values [..., D], by the parameters as they are."""
    params = random_params(config)
    head = params["token"][: config.vocabulary].T if config.tied else params["head"]
    return np.asarray(hidden) @ head


@FORMS
def test_the_distributions_of_these_tests_are_neither_flat_nor_sharp(config):
    p = np.exp(apply(TokenNetwork(config), random_params(config), TOKENS))
    p /= p.sum(axis=-1, keepdims=True)
    assert 0.2 < np.mean(p.max(axis=-1)) < 0.8
    assert np.median(p) < 0.06


def test_the_small_gpt_2_has_its_124_4_million_parameters():
    network = TokenNetwork(TransformerConfig(vocabulary=50257))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


@FORMS
@pytest.mark.parametrize("memory", [False, True])
def test_the_number_of_parameters_is_the_formula(config, memory):
    config = dataclasses.replace(config, vocabulary=7, extra_inputs=3, memory=memory, layers=3)
    d, w, h, k = config.width, config.head_size, config.heads, config.key_heads
    hidden, gates = config.mlp_size, 2 if config.activation == "swiglu" else 1
    matrices = [(d, (h + 2 * k) * w), (h * w, d), (d, gates * hidden), (hidden, d)]
    matrices += [(d, h * w), (d, 2 * k * w), (h * w, d)] if memory else []
    block = sum(rows * columns + config.bias * columns for rows, columns in matrices)
    norm = d * (2 if config.norm == "layer" and config.bias else 1)
    total = 3 * (block + (3 if memory else 2) * norm) + norm + 10 * d
    total += config.context * d if config.position == "learned" else 0
    total += 0 if config.tied else 7 * d
    shapes = jax.eval_shape(TokenNetwork(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params):
    model = AutoregressiveModel(TokenNetwork(config))
    return jax.value_and_grad(model.loss, has_aux=True)(params, {"tokens": TOKENS}, None)


@FORMS
def test_every_parameter_has_a_gradient_and_fresh_ones_know_nothing(config):
    _, gradients = loss_and_gradients(config, random_params(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    fresh = TokenNetwork(config).init(jax.random.key(0))
    (value, metrics), _ = loss_and_gradients(config, fresh)
    assert value == pytest.approx(np.log(12), abs=0.05)
    assert metrics == {}
    block = jax.tree.map(np.asarray, fresh["block_1"])
    residual = 0.02 / np.sqrt(2 * config.layers)
    for layer, part, deviation in (
        ("attention", "qkv", 0.02),
        ("attention", "out", residual),
        ("feed_forward", "up", 0.02),
        ("feed_forward", "down", residual),
    ):
        kernel = block[layer][part]["kernel"]
        error = 5 * deviation / np.sqrt(2 * kernel.size)
        assert abs(kernel.std() - deviation) < error
        assert ("bias" in block[layer][part]) == config.bias


def influence(config):
    """[L, L]: the largest derivative of output i by the embedding of input j."""
    params = jax.tree.map(jnp.asarray, random_params(config))
    probe = np.random.default_rng(3).normal(size=config.width)

    @jax.jit
    @jax.jacobian
    def jacobian(table):
        return TokenNetwork(config).hidden(params | {"token": table}, TOKENS[:1])[0] @ probe

    return np.abs(jacobian(params["token"])).max(axis=-1)[:, TOKENS[0]]


@FORMS
def test_a_causal_network_sees_itself_and_what_came_before(config):
    got = influence(config)
    future = np.triu(np.ones_like(got, bool), k=1)
    assert (got[future] == 0).all()
    assert (got[~future] > 1e-6).all()


@FORMS
def test_another_network_sees_everything(config):
    assert (influence(dataclasses.replace(config, causal=False)) > 1e-6).all()


def test_without_positions_the_past_has_no_order():
    config = dataclasses.replace(GPT, position="none", layers=1)
    network, params = TokenNetwork(config), random_params(config)
    swapped = TOKENS[:, [3, 1, 0, 2, *range(4, 10)]]
    whole, other = apply(network, params, TOKENS), apply(network, params, swapped)
    np.testing.assert_allclose(whole[:, 4:], other[:, 4:], atol=1e-5)
    for config in (GPT, LLAMA):
        network, params = TokenNetwork(config), random_params(config)
        whole, other = apply(network, params, TOKENS), apply(network, params, swapped)
        assert np.abs(whole[:, 4:] - other[:, 4:]).max() > 1e-2


@FORMS
@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_in_padding_does_not_matter(config, causal):
    config = dataclasses.replace(config, causal=causal)
    network, params = TokenNetwork(config), random_params(config)
    mask = np.ones((3, 10), bool)
    mask[0, 7:], mask[1, :4], mask[2, [2, 5, 9]] = False, False, False
    one = apply(network, params, TOKENS, mask=mask)
    other = apply(network, params, np.where(mask, TOKENS, 11 - TOKENS), mask=mask)
    np.testing.assert_array_equal(one[mask], other[mask])
    assert np.isfinite(one).all()
    assert np.abs(one - apply(network, params, TOKENS)).max() > 1e-2
    # Right padding is a shorter sequence.
    short = apply(network, params, TOKENS[:1, :7])
    np.testing.assert_allclose(one[:1, :7], short, atol=2e-5)


@FORMS
def test_samples_do_not_see_each_other(config):
    network, params = TokenNetwork(config), random_params(config)
    changed = np.array(TOKENS)
    changed[1] = changed[1, ::-1].copy()
    one, other = apply(network, params, TOKENS), apply(network, params, changed)
    np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]])
    assert np.abs(one[1] - other[1]).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_that_of_jax(causal, kv_heads):
    keys = jax.random.split(jax.random.key(kv_heads), 3)
    q, k, v = (
        jax.random.normal(key, (3, 7, n, 8))
        for key, n in zip(keys, (4, kv_heads, kv_heads), strict=True)
    )
    for lengths in (None, np.array([7, 3, 1])):
        mask = None if lengths is None else np.arange(7) < lengths[:, None]
        expected = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, mask=None if mask is None else mask[:, None, None]
        )
        call = jax.jit(functools.partial(dot_product_attention, causal=causal))
        np.testing.assert_allclose(call(q, k, v, mask=mask), expected, atol=1e-5)
    # Other numbers of queries than of keys.
    if not causal:
        expected = jax.nn.dot_product_attention(q[:, :2], k, v)
        np.testing.assert_allclose(
            jax.jit(dot_product_attention)(q[:, :2], k, v), expected, atol=1e-5
        )


def test_a_row_that_sees_nothing_stays_finite():
    x = jax.random.normal(jax.random.key(0), (2, 4, 2, 8))
    mask = np.zeros((2, 4), bool)
    mask[1] = True

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(x, causal):
        return dot_product_attention(x, x, x, mask=mask, causal=causal).sum()

    for causal in (False, True):
        value, gradient = loss(x, causal)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_rotation_keeps_lengths_and_scores_depend_on_distances():
    keys = jax.random.split(jax.random.key(0), 2)
    q, k = (jax.random.normal(key, (2, 6, 3, 8)) for key in keys)
    q, k, positions = np.asarray(q), np.asarray(k), np.arange(6)
    turn = jax.jit(rotate, static_argnums=2)

    def scores(shift):
        a, b = (np.asarray(turn(x, positions + shift, 10_000.0)) for x in (q, k))
        return np.einsum("bshw,bmhw->bhsm", a, b)

    np.testing.assert_allclose(scores(0), scores(17), atol=1e-4)
    np.testing.assert_allclose(scores(0), scores(500), atol=2e-3)
    turned = np.asarray(turn(q, positions, 10_000.0))
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
    )
    np.testing.assert_allclose(turned[:, 0], q[:, 0], atol=1e-6)
    assert np.abs(turned[:, 1:] - q[:, 1:]).max() > 0.1
    # Each pair is a complex number that turns by position x its frequency.
    pairs = q[..., :4] + 1j * q[..., 4:]
    angles = np.arange(6)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-5)
    own = np.stack([positions, positions + 5])
    both = np.asarray(turn(q, own, 10_000.0))
    np.testing.assert_allclose(both[0], turned[0], atol=1e-6)
    np.testing.assert_allclose(both[1], np.asarray(turn(q, positions + 5, 10_000.0))[1], atol=1e-6)


def test_shared_heads_are_repeated_heads():
    params = random_params(LLAMA)
    full = dataclasses.replace(LLAMA, kv_heads=4)
    repeated = jax.tree.map(lambda leaf: leaf, params)  # other dicts, the same arrays
    for name in ("block_0", "block_1"):
        kernel = np.asarray(params[name]["attention"]["qkv"]["kernel"]).reshape(16, 8, 4)
        q, k, v = np.split(kernel, [4, 6], axis=1)
        kernel = np.concatenate([q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)], axis=1)
        repeated[name]["attention"]["qkv"]["kernel"] = kernel.reshape(16, -1)
    expected = apply(TokenNetwork(full), repeated, TOKENS)
    np.testing.assert_allclose(apply(TokenNetwork(LLAMA), params, TOKENS), expected, atol=1e-5)


@FORMS
def test_cached_in_chunks_at_python_columns(config):
    network, params = TokenNetwork(config), random_params(config)

    @jax.jit
    def chunked(params, tokens):
        prepared, caches, at, parts = network.prepare(params), network.make_caches(3, 12), 0, []
        for size in (4, 1, 3, 2):
            part, caches = network.extend(prepared, tokens[:, at : at + size], caches, at)
            parts, at = [*parts, part], at + size
        return jnp.concatenate(parts, axis=1)

    hidden = chunked(params, TOKENS)
    assert hidden.dtype == jnp.float32
    expected = apply(network, params, TOKENS)
    np.testing.assert_allclose(logits_of(config, hidden), expected, atol=1e-5)
    head = prepare(network, params).head
    assert head.shape == (16, 12)
    np.testing.assert_allclose(np.asarray(hidden) @ head, expected, atol=1e-5)


@FORMS
@pytest.mark.parametrize(("own_columns", "size"), [(False, 1), (True, 2)])
def test_cached_a_few_at_a_time_with_left_padding(config, own_columns, size):
    network, params = TokenNetwork(config), random_params(config)
    prepared, caches = prepare(network, params), network.make_caches(3, 10)
    first = np.array([0, 2, 5], np.int32)
    tokens, expected = np.full((3, 10), 11, np.int32), np.zeros((3, 10, 12))
    seen = np.arange(10) >= first[:, None]
    whole = np.asarray(apply(network, params, TOKENS))
    for b, start in enumerate(first):
        tokens[b, start:], expected[b, start:] = TOKENS[b, : 10 - start], whole[b, : 10 - start]
    hidden = np.zeros((3, 10, 16), np.float32)
    for column in range(0, 10, size):
        place = np.full(3, column, np.int32) if own_columns else np.int32(column)
        new = slice(column, column + size)
        part, caches = extend(network, prepared, tokens[:, new], caches, place, first)
        hidden[:, new] = part
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(logits_of(config, hidden)[seen], expected[seen], atol=1e-5)


@FORMS
def test_cached_with_samples_at_different_columns(config):
    network, params = TokenNetwork(config), random_params(config)
    prepared, caches = prepare(network, params), network.make_caches(3, 10)
    expected, delay = apply(network, params, TOKENS), np.array([0, 3, 1])
    for step in range(10):
        # One that waits reads its first again.
        column = np.maximum(step - delay, 0).astype(np.int32)
        new = np.take_along_axis(TOKENS, column[:, None], axis=1)
        hidden, caches = extend(network, prepared, new, caches, column, None)
        np.testing.assert_allclose(
            logits_of(config, hidden)[:, 0], expected[np.arange(3), column], atol=1e-5
        )


def test_cached_across_the_edge_of_a_bucket():
    config = dataclasses.replace(LLAMA, context=100)
    network, params = TokenNetwork(config), random_params(config)
    tokens = np.random.default_rng(5).integers(12, size=(3, 68)).astype(np.int32)
    expected = apply(network, params, tokens)
    prepared, caches = prepare(network, params), network.make_caches(3, 100)
    _, caches = jax.jit(functools.partial(network.extend, column=0))(
        prepared, tokens[:, :62], caches
    )
    for column in range(62, 68):
        new = tokens[:, column : column + 1]
        hidden, caches = extend(network, prepared, new, caches, np.int32(column), None)
        np.testing.assert_allclose(logits_of(config, hidden)[:, 0], expected[:, column], atol=2e-5)


@FORMS
def test_a_memory_is_read_through_its_mask_and_once(config):
    config = dataclasses.replace(config, memory=True)
    network, params = TokenNetwork(config), random_params(config)
    memory = np.random.default_rng(4).normal(size=(3, 6, 16)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 4, 1])[:, None]
    whole = apply(network, params, TOKENS, memory=memory, memory_mask=mask)
    noisy = np.where(mask[..., None], memory, 100 * memory + 7)
    other = apply(network, params, TOKENS, memory=noisy, memory_mask=mask)
    np.testing.assert_array_equal(whole, other)
    unmasked = apply(network, params, TOKENS, memory=memory)
    np.testing.assert_allclose(unmasked[0], whole[0], atol=1e-5)
    assert np.abs(unmasked[1:] - whole[1:]).max(axis=(1, 2)).min() > 1e-3
    changed = apply(network, params, TOKENS, memory=memory[::-1], memory_mask=mask)
    assert (np.abs(changed - whole).max(axis=-1)[[0, 2]] > 1e-4).all()  # at every position

    prepared, caches = prepare(network, params), network.make_caches(3, 10)
    options = {"memory_kv": jax.jit(network.project_memory)(params, memory), "memory_mask": mask}
    hidden = []
    for column in range(10):
        new = TOKENS[:, column : column + 1]
        part, caches = extend(network, prepared, new, caches, np.int32(column), None, **options)
        hidden.append(part)
    got = logits_of(config, np.concatenate(hidden, axis=1))
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_extra_inputs_are_read_and_never_predicted():
    for config in (GPT, LLAMA):
        config = dataclasses.replace(config, extra_inputs=2)
        network, params = TokenNetwork(config), random_params(config)
        assert params["token"].shape == (14, 16)
        tokens = np.array(TOKENS)
        tokens[:, 0] = [12, 13, 13]
        logits = apply(network, params, tokens)
        assert logits.shape == (3, 10, 12)
        other = apply(network, params, np.where(tokens >= 12, 25 - tokens, tokens))
        assert (np.abs(logits - other).max(axis=-1) > 1e-4).all()
        assert prepare(network, params).head.shape == (16, 12)


def test_dropout_depends_only_on_the_key_of_the_sample():
    config = dataclasses.replace(GPT, dropout=0.3, memory=True)
    network, params = TokenNetwork(config), random_params(config)
    memory = np.random.default_rng(4).normal(size=(3, 6, 16)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 3)
    whole = apply(network, params, TOKENS, memory=memory, keys=keys)
    alone = apply(network, params, TOKENS[1:2], memory=memory[1:2], keys=keys[1:2])
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)
    without = apply(network, params, TOKENS, memory=memory)
    assert np.abs(whole - without).max() > 1e-2
    other = apply(network, params, TOKENS, memory=memory, keys=keys[::-1])
    np.testing.assert_allclose(other[1], whole[1], atol=1e-5)
    assert np.abs(other[0] - whole[0]).max() > 1e-2
    plain = TokenNetwork(dataclasses.replace(config, dropout=0.0))
    np.testing.assert_array_equal(apply(plain, params, TOKENS, memory=memory, keys=keys), without)


@FORMS
def test_bfloat16_is_close_and_its_logits_float32(config):
    params = random_params(config)
    exact = apply(TokenNetwork(config), params, TOKENS)
    network = TokenNetwork(dataclasses.replace(config, dtype="bfloat16"))
    rough = apply(network, params, TOKENS)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


@FORMS
def test_bfloat16_with_a_cache_is_as_close(config):
    params = random_params(config)
    exact = apply(TokenNetwork(config), params, TOKENS)
    config = dataclasses.replace(config, dtype="bfloat16")
    network = TokenNetwork(config)
    prepared, caches = prepare(network, params), network.make_caches(3, 10)
    kinds = {
        path[-2].key if len(path) > 1 else path[-1].key: leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(prepared.params)
    }
    assert kinds["norm_attention"] == kinds["norm"] == jnp.float32
    assert kinds["token"] == kinds["qkv"] == prepared.head.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(caches)} == {jnp.dtype(jnp.bfloat16)}
    rows = []
    for column in range(10):
        new = TOKENS[:, column : column + 1]
        hidden, caches = extend(network, prepared, new, caches, np.int32(column), None)
        assert hidden.dtype == jnp.float32
        rows.append(logits_of(config, hidden))
    rough = np.concatenate(rows, axis=1)
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"context": 0}, "context must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"vocabulary": -1}, "vocabulary must not be negative"),
        ({"kv_heads": -1}, "kv_heads must not be negative"),
        ({"head_width": -8}, "head_width must not be negative"),
        ({"mlp_dim": -1}, "mlp_dim must not be negative"),
        ({"extra_inputs": -1}, "extra_inputs must not be negative"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be finite"),
        ({"rotary_base": float("inf")}, "rotary_base must be finite"),
        ({"rotary_base": -1.0}, "rotary_base must be positive"),
        ({"position": "rope"}, "position must be one of 'learned', 'rotary', 'both', 'none'"),
        ({"norm": "batch"}, "norm must be one of 'layer', 'rms'"),
        ({"activation": "relu"}, "activation must be one of 'gelu', 'swiglu'"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16'"),
        ({"width": 16.0}, "width must be a whole number"),
        ({"causal": 1}, "causal must be of type bool"),
        ({"width": 30}, r"heads \(4\) must divide width \(30\)"),
        ({"kv_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"position": "rotary", "head_width": 5}, "even head width, got 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_configurations_that_cannot_be(wrong, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(GPT, **wrong)


def test_what_it_refuses():
    network, params = TokenNetwork(GPT), random_params(GPT)
    memory = np.zeros((3, 2, 16), np.float32)
    with pytest.raises(ValueError, match="11 inputs is longer than the context of 10"):
        apply(network, params, np.zeros((3, 11), np.int32))
    with pytest.raises(ValueError, match="give both or neither"):
        apply(network, params, TOKENS, memory=memory)
    with pytest.raises(ValueError, match="give both or neither"):
        apply(TokenNetwork(dataclasses.replace(GPT, memory=True)), params, TOKENS)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        TokenNetwork(dataclasses.replace(GPT, vocabulary=0))
    with pytest.raises(ValueError, match="config must be of type TransformerConfig"):
        TokenNetwork(None)
    other = TokenNetwork(dataclasses.replace(GPT, causal=False))
    prepared, caches = other.prepare(params), other.make_caches(3, 10)
    with pytest.raises(ValueError, match="only a causal network can be extended"):
        other.extend(prepared, TOKENS, caches, 0)
