"""What samples of a data set are worth, and how they and the way to them are drawn.

A judge knows the truth of one data set. `comparison.Comparison` names its class.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax import data as image_data
from gen_jax import evaluation, keys, pictures
from gen_jax.comparison import laws
from gen_jax.comparison.gates import GateError
from gen_jax.config import RunConfig
from gen_jax.data import ShapesSet
from gen_jax.data.exact import Enumerated
from gen_jax.data.shapes import PALETTE
from gen_jax.loading import Loaded
from gen_jax.metrics import shapes as shape_metrics
from gen_jax.models.autoregressive import AutoregressiveSampler, SpeculativeSampler
from gen_jax.models.diffusion import DiffusionSampler
from gen_jax.models.masked import AbsorbingDiffusion, MaskGIT, OrderedGroups
from gen_jax.models.masked.iterative import IterativeSampler
from gen_jax.models.next_scale import NextScaleSampler
from gen_jax.models.parallel import ParallelSampler
from gen_jax.models.sequences import cross_entropy
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.sampling import Sampler
from gen_jax.tasks import image_files, text_files
from gen_jax.tasks.pixels import task as pixels
from gen_jax.tasks.pixels.config import PixelRunConfig
from gen_jax.tasks.two_stage.codes import distribution, encoded
from gen_jax.workdir import Workdir
from kernels.threefry import uniform_each

__all__ = ["CifarJudge", "Judge", "ShapesJudge", "TextJudge", "drawn_so_far"]

_HIDDEN = 96  # the grey of what is not drawn yet


@runtime_checkable
class Judge(Protocol):
    """What is known of a data set.

    Attributes:
      headline: the name of the figure by which strategies are compared, in [0, 1], larger is
        better.
      number: samples to score by default.
      entropy: of the data, in nats; None where it is not known.
    """

    headline: str
    number: int
    entropy: float | None

    def check(self, loaded: Loaded, samples: np.ndarray) -> None:
        """Raises a `GateError` where samples are not of the data's shape, or not finite."""

    def score(self, loaded: Loaded, samples: np.ndarray) -> dict[str, float]:
        """Figures of samples, with the headline; what exact draws give ends in `_expected`."""

    def draw(self, loaded: Loaded, samples: np.ndarray) -> np.ndarray:
        """Samples as pictures uint8 [B, height, width, 3]."""

    def frame(
        self, loaded: Loaded, sampler: Sampler, params: Any, state: Any, i: int
    ) -> np.ndarray:
        """The first sample of a state after step i, as a picture uint8 [height, width, 3]."""

    def known(self, loaded: Loaded, sampler: Sampler, params: Any) -> Enumerated | None:
        """The distribution of the tokens or codes that a sampler draws; None where not known."""

    def support(self) -> np.ndarray | None:
        """All images, uint8 [N, height, width, 3]; None where there is no such thing."""

    def law(self, loaded: Loaded, sampler: Sampler, params: Any) -> dict[str, float]:
        """What is known of the likelihood: "kl", "kl_perfect" and "entropy" as of `laws.measure`,
        or "bits" per unit with "bits_error" where it is an estimate of a bound; or nothing."""


def drawn_so_far(sampler: Sampler, state: Any, i: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens int [B, L] of a state after step i, and which are hidden, bool [B, L].

    None for a sampler that draws no tokens, or of an unknown kind.
    """
    if isinstance(sampler, TwoStageSampler):
        return drawn_so_far(sampler.prior, state, i)
    if isinstance(sampler, ParallelSampler):
        return drawn_so_far(sampler.inner, state, i)
    if isinstance(sampler, IterativeSampler):
        tokens = np.asarray(state.tokens)
        return tokens, tokens == sampler.model.mask
    if isinstance(sampler, NextScaleSampler):
        tokens = np.asarray(state.tokens)
        return tokens, tokens < 0
    if isinstance(sampler, SpeculativeSampler):
        tokens = np.asarray(sampler.new_tokens(state))
        first = sampler.prompt_length + sampler.model.has_start
        return tokens, np.arange(tokens.shape[1]) >= np.asarray(state.known)[:, None] - first
    if isinstance(sampler, AutoregressiveSampler):
        tokens = np.asarray(sampler.new_tokens(state))
        return tokens, np.broadcast_to(np.arange(tokens.shape[1]) > i, tokens.shape)
    return None


class _ImagesJudge:
    """What judges of images share: shapes, pictures, and frames."""

    size: int
    channels, entropy = 3, None

    def check(self, loaded: Loaded, samples: np.ndarray) -> None:
        """See `Judge`."""
        samples = np.asarray(samples)
        if np.issubdtype(samples.dtype, np.integer):
            wanted, most = (loaded.config.model.context,), loaded.config.vocabulary
            fits = samples.shape[1:] == wanted and samples.min() >= 0 and samples.max() < most
            what = f"tokens [B, {wanted[0]}] below {most}"
        else:
            wanted = (self.size, self.size, self.channels)
            fits = samples.shape[1:] == wanted and np.isfinite(samples).all()
            what = f"finite images {['B', *wanted]}"
        if not fits:
            raise GateError(
                f"samples are {samples.dtype}{list(samples.shape)}, and should be {what}"
            )

    def draw(self, loaded: Loaded, samples: np.ndarray) -> np.ndarray:
        """See `Judge`."""
        samples = np.asarray(samples)
        if not np.issubdtype(samples.dtype, np.integer):
            return pictures.to_uint8(samples)
        return pixels.to_rgb(self._images(loaded.config, samples))

    def _images(self, config: RunConfig, tokens: np.ndarray) -> np.ndarray:
        shape = (self.size, self.size) if config.data.palette else (self.size, self.size, 3)
        return pixels.images_of(config, shape, tokens)

    def frame(
        self, loaded: Loaded, sampler: Sampler, params: Any, state: Any, i: int
    ) -> np.ndarray:
        """See `Judge`; codes are a map of colours until the last step."""
        last = i == sampler.steps - 1
        drawn = None if last else drawn_so_far(sampler, state, i)
        if isinstance(sampler, TwoStageSampler) and drawn is not None:
            return _code_map(sampler, *(one[0] for one in drawn), self.size)
        if drawn is not None and isinstance(loaded.config, PixelRunConfig):
            tokens, hidden = (one[:1] for one in drawn)
            picture = self.draw(loaded, np.where(hidden, 0, tokens))[0]
            return np.where(self._spread(loaded.config, hidden[0]), np.uint8(_HIDDEN), picture)
        if isinstance(sampler, DiffusionSampler):
            return pictures.to_uint8(np.asarray(state.x[:1]))[0]
        return self.draw(loaded, np.asarray(_finish(sampler, params, state))[:1])[0]

    def _spread(self, config, hidden):
        """Which pixels are of hidden tokens, bool [height, width, 1 or 3]."""
        grid = hidden.reshape(self.size // config.patch, self.size // config.patch, -1)
        return grid.repeat(config.patch, 0).repeat(config.patch, 1)


@functools.partial(jax.jit, static_argnums=0)
def _finish(sampler, params, state):
    return sampler.finish(params, state)


def _code_map(sampler, codes, hidden, size):
    """A colour for each code of the finest map, grey where it is still to come, [size, size, 3]."""
    side = sampler.autoencoder.latent_shape[0]
    codes, hidden = (one[-side * side :].reshape(side, side) for one in (codes, hidden))
    hues = np.random.default_rng(0).integers(64, 256, (sampler.autoencoder.quantiser.codes, 3))
    colours = np.where(hidden[..., None], _HIDDEN, hues[np.where(hidden, 0, codes)])
    return colours.astype(np.uint8).repeat(size // side, 0).repeat(size // side, 1)


class ShapesJudge(_ImagesJudge):
    """The embedded shapes of 16 pixels, whose distribution is known: uniform over 648 images."""

    headline, number, size = "validity", 384, 16

    def __init__(self):
        self.set, self._known = ShapesSet(self.size), {}
        self.entropy = self.set.entropy

    def score(self, loaded: Loaded, samples: np.ndarray) -> dict[str, float]:
        """See `metrics.shapes.score`."""
        samples = np.asarray(samples)
        if np.issubdtype(samples.dtype, np.integer):
            samples = self._images(loaded.config, samples)
        return shape_metrics.score(samples, self.set)

    def support(self) -> np.ndarray:
        """See `Judge`."""
        return PALETTE[self.set.images(palette=True)]

    def known(self, loaded: Loaded, sampler: Sampler, params: Any) -> Enumerated | None:
        """See `Judge`."""
        if isinstance(sampler, TwoStageSampler):
            if sampler.latents:
                return None
            decoder = params["autoencoder"]
            kept, dist = self._known.get(sampler.autoencoder, (None, None))
            if kept is not decoder:  # the codes are of these parameters
                codes = encoded(sampler.autoencoder, decoder, self.support(), False)
                dist = distribution(codes, sampler.autoencoder.quantiser.codes)
                self._known[sampler.autoencoder] = decoder, dist
            return dist
        if not isinstance(loaded.config, PixelRunConfig):
            return None
        config, palette = loaded.config, loaded.config.data.palette
        if config.patch > 1:
            sequences = config.palette_sequences()
        else:
            sequences = pixels.PixelSequences(self.set.as_images(palette))
        tokens = sequences.tokens_of(self.set.images(palette)).astype(np.int32)
        return Enumerated(tokens, np.full(len(tokens), 1 / len(tokens)), config.vocabulary)

    def law(self, loaded: Loaded, sampler: Sampler, params: Any) -> dict[str, float]:
        """See `Judge`."""
        return laws.measure(self.known(loaded, sampler, params), sampler, params)


class CifarJudge(_ImagesJudge):
    """CIFAR-10. There is no network for a score here: what is compared are means of 4 x 4 pixels.

    The headline, "similarity", is 1 / (1 + d) with d their Frechet distance from the test set. It
    is no FID.
    """

    headline, number, size = "similarity", 256, 32

    def score(self, loaded: Loaded, samples: np.ndarray) -> dict[str, float]:
        """See `tasks.image_files.score`."""
        config, samples = loaded.config, np.asarray(samples)
        if np.issubdtype(samples.dtype, np.integer):
            samples = self._images(config, samples) / np.float32(127.5) - 1
        figures = image_files.score(samples, config.data, _test_set(config.data))
        return figures | {"similarity": 1 / (1 + figures["frechet_pooled_pixels"])}

    def support(self) -> None:
        """See `Judge`; the test set is no distribution."""

    def known(self, loaded: Loaded, sampler: Sampler, params: Any) -> None:
        """See `Judge`."""

    def law(self, loaded: Loaded, sampler: Sampler, params: Any) -> dict[str, float]:
        """See `Judge`."""
        return {}


@functools.cache
def _test_set(config):
    return image_data.load(config, "test")


_WINDOWS = 64  # at most so many windows of text, the same for any number of rounds


class TextJudge:
    """Characters of a text. The headline is the share of letters in words that the text has."""

    headline, number, entropy = "known_words", 64, None

    def __init__(self):
        self._read = {}

    def check(self, loaded: Loaded, samples: np.ndarray) -> None:
        """See `Judge`."""
        samples, most = np.asarray(samples), loaded.tokenizer.vocabulary
        fits = samples.ndim == 2 and np.issubdtype(samples.dtype, np.integer)
        if not fits or samples.min() < 0 or samples.max() >= most:
            raise GateError(
                f"samples are {samples.dtype}{list(samples.shape)}, and should be tokens [B, L] "
                f"below {most}"
            )

    def score(self, loaded: Loaded, samples: np.ndarray) -> dict[str, float]:
        """See `tasks.text_files.score`."""
        texts = [text_files.from_first_word(text) for text in self.draw(loaded, samples)]
        return text_files.score(texts, self._data(loaded).train_text)

    def draw(self, loaded: Loaded, samples: np.ndarray) -> np.ndarray:
        """The texts."""
        none = np.zeros(0, np.int32)
        decode = functools.partial(text_files.decode, loaded.tokenizer, None, none)
        return np.array([decode(row) for row in np.asarray(samples)])

    def frame(self, loaded: Loaded, sampler: Sampler, params: Any, state: Any, i: int) -> str:
        """The text so far; what is hidden is `text_files.HIDDEN`."""
        drawn = drawn_so_far(sampler, state, i)
        if drawn is None:
            return str(self.draw(loaded, np.asarray(_finish(sampler, params, state))[:1])[0])
        tokens, hidden = (one[0] for one in drawn)
        mask = loaded.tokenizer.vocabulary
        tokens = np.where(hidden, mask, tokens).astype(np.int32)
        return text_files.decode_with_masks(loaded.tokenizer, tokens, mask)

    def support(self) -> None:
        """See `Judge`."""

    def known(self, loaded: Loaded, sampler: Sampler, params: Any) -> None:
        """See `Judge`."""

    def law(self, loaded: Loaded, sampler: Sampler, params: Any) -> dict[str, float]:
        """Bits per character of the test split: exact one by one and at once, else a bound.

        The bound is the mean over random orders of minus the log-probability of drawing the groups
        of the rounds, each in parallel: that of the sampler given its order. MaskGIT chooses what
        it reveals by what it has drawn, and has none.
        """
        data = self._data(loaded)
        if isinstance(sampler, AutoregressiveSampler | SpeculativeSampler):
            length = loaded.config.model.context
            windows, counted = data.test_stream.windows(length)
            rows = {"tokens": windows, "length": counted}
            nats = -evaluation.log_prob(loaded.model, loaded.params, rows, _WINDOWS)
            return _bits(float(nats.sum(dtype=np.float64)), int(counted.sum()))
        at_once = isinstance(sampler, MaskGIT) and sampler.rounds == 1
        if not at_once and not isinstance(sampler, OrderedGroups | AbsorbingDiffusion):
            return {}
        number = min(_WINDOWS, len(data.test_windows))
        windows = data.test_windows[:: len(data.test_windows) // number][:number]
        rows = {"tokens": windows, "index": np.arange(number, dtype=np.int32)}
        f = functools.partial(_nats_in_rounds, sampler)
        nats = evaluation.map_rows(f, params, rows, _WINDOWS).astype(np.float64)
        bits = _bits(float(nats.sum()), windows.size)
        error = nats.std(ddof=1) / np.sqrt(number) / windows.shape[1] / np.log(2)
        return bits | {"bits_error": float(error)}

    def _data(self, loaded):
        config = loaded.config
        if config.workdir not in self._read:
            path = Workdir(config.workdir).path
            self._read[config.workdir] = config.load(path, ("train", "evaluate"))
        return self._read[config.workdir]


def _bits(nats, characters):
    return {"bits": nats / np.log(2) / characters}


@functools.partial(jax.jit, static_argnums=0)
def _nats_in_rounds(sampler, params, rows):
    """Minus the log-probability [B] of rows drawn in the rounds of a sampler, in a random order."""
    model, tokens = sampler.model, rows["tokens"]
    prepared = model.prepare(params)
    context, valid = model.encode(prepared, {}), jnp.ones(tokens.shape, bool)
    ours = keys.of_items(keys.root(0, "evaluate"), rows["index"])
    uniform = uniform_each(ours, tokens.shape[1:])
    left = np.asarray(sampler.schedule.sizes(sampler.length, sampler.rounds))
    ends = np.cumsum(left) / sampler.length
    share = uniform
    if not isinstance(sampler, AbsorbingDiffusion):  # exactly as many as the schedule says
        share = (jnp.argsort(jnp.argsort(uniform)) + 0.5) / sampler.length
    drawn_in = (share[..., None] > jnp.asarray(ends, jnp.float32)[None, None]).sum(-1)

    def one(round_, total):
        seen = jnp.where(drawn_in >= round_, model.mask, tokens)
        nats = cross_entropy(model(prepared, seen, valid, context), tokens)
        return total + jnp.where(drawn_in == round_, nats, 0).sum(-1)

    return jax.lax.fori_loop(0, sampler.rounds, one, jnp.zeros(len(tokens), jnp.float32))
