"""What a run of a translation model does in each phase.

jax is imported by the phases, not by this module.
"""

import dataclasses
import functools
import hashlib
import sys

import numpy as np
from tqdm import tqdm

from experiments import run
from gen_jax.data import tokenizers, translation
from gen_jax.data.translation import Pairs
from gen_jax.models.masked.schedules import SCHEDULES
from gen_jax.nn.config import TransformerConfig

TOKENIZER = "tokenizer.json"
DISTILLED = "distilled.txt"
COMPLETED = "completed.txt"
_SHOWN = 4


class Run(run.Run):
    """One run of an experiment with translations."""

    unit = "pairs"
    results = (TOKENIZER, "translations.txt", "samples.npz", DISTILLED, COMPLETED)
    free = (*run.FREE, "data.targets", "complete.")

    def check(self) -> None:
        """Refuses pairs and vocabularies that do not fit."""
        _ = self.tokenizer
        if "train" in self.splits:
            self.pairs("train").batch(0, 0, 1)
        if "test" in self.splits:
            _ = self.pairs("validation")
        if {"sample", "evaluate"} & set(self.phases):
            _ = self.pairs(self.config.sample.split)
        if "complete" in self.phases:
            if self.config.strategy != "masked":
                raise ValueError("complete is for masked models: --strategy masked")
            if not self.config.complete.source.strip():
                raise ValueError("give the sentence to translate as --complete.source")
            _ = self._completion

    @functools.cached_property
    def _completion(self):
        """The source as a pair, and what is given of the target."""
        choice, most = self.config.complete, self.columns
        source = choice.source.strip()
        pair = Pairs.encode(self.tokenizer, [source], [source], most, long="leave out")
        given, is_open = translation.parse_template(self.tokenizer, choice.target)
        if len(given) > most:
            raise ValueError(f"complete.target has {len(given)} tokens, the model at most {most}: "
                             "give fewer")  # fmt: skip
        return pair, given, is_open

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """That of the work directory, where there is one."""
        path = self.workdir.path / TOKENIZER
        if path.exists():
            return tokenizers.load(path)
        return translation.make_tokenizer(self.config.data)

    @functools.cache  # noqa: B019
    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """Sources and targets of a split."""
        return translation.load_pairs(self.config.data, split)

    @functools.cache  # noqa: B019
    def pairs(self, split: str) -> Pairs:
        """The tokens of a split: of training pairs those that are short enough, else all."""
        long = "leave out" if split == "train" else "truncate"
        return Pairs.encode(
            self.tokenizer, *self.texts(split), self.config.data.max_length, long=long
        )

    @property
    def columns(self) -> int:
        """Positions of a target, END included."""
        return self.config.data.max_length

    @functools.cached_property
    def model(self) -> TransformerConfig:
        """The decoder, as the strategy needs it."""
        config = self.config
        blank = config.strategy == "ctc"
        return dataclasses.replace(
            config.model,
            vocabulary=self.tokenizer.vocabulary + blank,
            context=self.columns * (config.ctc_factor if blank else 1),
            causal=config.strategy == "ar",
            extra_inputs=1,
            memory=True,
        )

    @functools.cached_property
    def network(self):
        """Encoder and decoder, as pure functions."""
        from gen_jax.nn.encoder_decoder import EncoderDecoder

        config = self.config
        copies = config.copies and config.strategy != "ar"
        return EncoderDecoder(self.model, config.encoder_layers, copies)

    @functools.cached_property
    def decoder(self):
        """The parallel decoder: the network, with its lengths and its latent."""
        from gen_jax.models.parallel.losses import ParallelDecoder

        return ParallelDecoder(self.network, self.columns, latent=self.config.latent)

    @property
    def _parallel(self):
        return self.config.strategy in ("one_shot", "masked")

    def init_params(self, key):
        """Initial parameters."""
        return (self.decoder if self._parallel else self.network).init(key)

    def template(self, record):
        """Shapes and dtypes of the parameters; the tokenizer must be that of the record."""
        import jax

        from gen_jax import keys

        if record["tokenizer"] != self.tokenizer.describe():
            raise ValueError(f"{self.workdir.path / TOKENIZER} is not the tokenizer that the "
                             "checkpoint was trained with; restore that file")  # fmt: skip
        return jax.eval_shape(lambda: self.init_params(keys.root(0, "init")))

    def record(self) -> dict:
        """Which tokenizer and which targets."""
        content = "\n".join(self.texts("train")[1]).encode()
        targets = hashlib.sha256(content).hexdigest()
        return {"tokenizer": self.tokenizer.describe(), "targets": targets}

    def train(self) -> dict:
        """Keeps the tokenizer beside the checkpoints, and trains."""
        from gen_jax import checkpoint

        folder = self.workdir.checkpoints
        if checkpoint.steps(folder):
            stored, now = checkpoint.restore(folder, {}).record, self.record()
            for name in ("tokenizer", "targets"):
                if stored[name] != now[name]:
                    raise ValueError(f"the {name} of the data are not what the run in "
                                     f"{self.workdir.path} was trained with; choose another "
                                     "--workdir")  # fmt: skip
        elif run.is_main(self.config):
            self.tokenizer.save(self.workdir.path / TOKENIZER)
        left = self.pairs("train").left_out
        if left and run.is_main(self.config):
            print(f"{left} training pairs are longer than {self.columns} tokens and left out")
        return super().train() | {"left_out": left}

    def train_batch(self, step, shard):
        """Pairs of about one length."""
        train = self.config.train
        return _named(self.pairs("train").batch(train.seed, step, train.batch, shard=shard))

    def loss(self, params, batch, keys):
        """As `training.Loss`."""
        return self._loss(self.model.dropout, self.config.smoothing)(params, batch, keys)

    def _loss(self, dropout, smoothing):
        from gen_jax.models.autoregressive import losses as autoregressive
        from gen_jax.models.parallel import ctc
        from gen_jax.models.parallel import losses as nonautoregressive

        config = self.config
        network = dataclasses.replace(
            self.network, config=dataclasses.replace(self.model, dropout=dropout)
        )
        decoder = dataclasses.replace(self.decoder, network=network)
        if config.strategy == "ar":
            return functools.partial(autoregressive.loss, network, smoothing=smoothing)
        if config.strategy == "ctc":
            return functools.partial(ctc.ctc_loss, network, factor=config.ctc_factor)
        if config.strategy == "masked":
            return functools.partial(
                nonautoregressive.masked_loss, decoder, config=config.mask, smoothing=smoothing
            )
        return functools.partial(nonautoregressive.one_shot_loss, decoder, smoothing=smoothing)

    def validate(self, params) -> dict:
        """The loss of the validation pairs, without dropout and smoothing, in nats per token."""
        import jax

        loss = jax.jit(self._loss(0.0, 0.0))
        totals, tokens = {}, 0
        for part, keys in self._validation():
            value, metrics = jax.device_get(loss(params, part, keys))
            counted = int(part["length"].sum())
            for name, one in ({"nats_per_token": value} | metrics).items():
                totals[name] = totals.get(name, 0.0) + float(one) * counted
            tokens += counted
        return {name: total / tokens for name, total in totals.items()}

    def _validation(self):
        """The validation pairs, a batch at a time, each with its keys."""
        from gen_jax import keys

        arrays = _named(self.pairs("validation").all(self.columns))
        number, size = len(arrays["tokens"]), self.config.evaluate.batch
        ours, hidden = keys.stream(0, "evaluate", 0, number), not sys.stderr.isatty()
        for first in tqdm(range(0, number, size), "evaluating", unit="batch", disable=hidden):
            rows = slice(first, first + size)
            yield {name: leaf[rows] for name, leaf in arrays.items()}, ours[rows]

    def nats_per_pair(self, params, nats_per_token: float) -> float:
        """Minus the log-probability of a validation target, length included, or a bound on it.

        Of a masked model it is the bound of drawing its tokens one by one in a random order.

        Args:
          params: of the model.
          nats_per_token: of `validate`.
        """
        import jax

        from gen_jax.models.masked import losses as masked
        from gen_jax.models.parallel import losses as nonautoregressive

        pairs = len(self.pairs("validation"))
        if self.config.strategy != "masked":
            tokens = int(self.pairs("validation").length.sum())
            return nats_per_token * tokens / pairs
        names = ("source", "source_length", "length")

        @jax.jit
        def nats(params, part, keys):
            cond = {name: part[name] for name in names}
            denoiser = self.decoder.denoiser
            terms = masked.bound_terms(denoiser, params["network"], part["tokens"], keys, cond)
            lengths = nonautoregressive.length_nats(self.decoder, params, part)
            return (terms.sum(-1) + lengths).sum()

        total = sum(float(nats(params, part, keys)) for part, keys in self._validation())
        return total / pairs

    def sampler(self, columns: int):
        """The strategy as a `Sampler` of targets of at most `columns` tokens.

        CTC has columns by the source instead.
        """
        from gen_jax.models.autoregressive.beam_search import BeamSearchSampler
        from gen_jax.models.autoregressive.config import TokenChoice
        from gen_jax.models.autoregressive.losses import AutoregressiveSampler
        from gen_jax.models.masked import samplers as masked_samplers
        from gen_jax.models.parallel import losses as nonautoregressive
        from gen_jax.models.parallel.ctc import CTCSampler

        config, choice, end = self.config, self.config.sample, self.tokenizer.eos
        if config.strategy == "ctc":
            return CTCSampler(self.network, config.ctc_factor, end)
        if config.strategy == "ar":
            if choice.beams > 1:
                return BeamSearchSampler(
                    self.network, 1, columns, choice.beams, choice.length_penalty, end
                )
            return AutoregressiveSampler(
                self.network, 1, columns, TokenChoice(choice.temperature), end
            )
        decoder = dataclasses.replace(self.decoder, columns=columns)
        denoiser, sizes = decoder.denoiser, (columns, min(choice.rounds, columns))
        schedule = SCHEDULES[choice.schedule]
        if config.strategy == "one_shot":
            rounds = nonautoregressive.one_shot(decoder, choice.temperature)
        elif choice.decoder == "mask_predict":
            rounds = masked_samplers.MaskPredict(denoiser, *sizes, schedule)
        elif choice.decoder == "maskgit":
            rounds = masked_samplers.MaskGIT(
                denoiser, *sizes, schedule, choice.temperature, choice.choice_temperature
            )
        elif choice.decoder == "random_order":
            rounds = masked_samplers.InOrder(denoiser, *sizes, schedule, choice.temperature)
        else:
            rounds = masked_samplers.AbsorbingDiffusion(
                denoiser, *sizes, schedule, choice.temperature
            )
        return nonautoregressive.ParallelSampler(
            decoder, rounds, min(choice.lengths, columns), end, choice.latent_temperature
        )

    def condition(self, sources: dict, number: int) -> dict:
        """What the sampler conditions on: the first sources, and a start where it needs one."""
        names = ("source", "source_length")
        cond = {name: sources[name][:number] for name in names}
        if self.config.strategy == "ar":
            start = np.full((len(cond["source"]), 1), self.model.vocabulary, np.int32)
            cond["tokens"] = start
        return cond

    def sample(self, params) -> dict:
        """Translates the sources, and writes what came out; rates and latency."""
        choice = self.config.sample
        sampler, pairs = self.sampler(self.columns), self.pairs(choice.split)
        sources, number = pairs.all(self.columns), min(choice.number, len(pairs))
        cond = functools.partial(self.condition, sources)
        tokens, report = self.draw(sampler, params, cond, number=number)
        self.keep_samples(tokens=tokens, split=choice.split, nfe=sampler.nfe)
        hypotheses = self.texts_of(tokens)
        lines = [
            f"source      {source}\nreference   {target}\ntranslation {hypothesis}\n"
            for source, target, hypothesis in zip(
                *(side[:number] for side in self.texts(choice.split)), hypotheses, strict=True
            )
        ]
        self.keep_text("translations.txt", "\n".join(lines))
        print("\n".join(lines[:_SHOWN]))
        return report

    def evaluate(self, params) -> dict:
        """How good the translations drawn last are, and the loss of the validation pairs."""
        from gen_jax.metrics import translation as metrics

        kept = self.kept_samples()
        tokens, split = kept["tokens"], str(kept["split"])
        hypotheses, end = self.texts_of(tokens), self.tokenizer.eos
        sources, targets = (side[: len(tokens)] for side in self.texts(split))
        lengths = np.where((tokens == end).any(1), (tokens == end).argmax(1) + 1, tokens.shape[1])
        report = self.validate(params)
        report["nats_per_pair"] = self.nats_per_pair(params, report["nats_per_token"])
        if self.config.data.name == "synonyms":
            report |= self._exactly(report["nats_per_pair"], sources, hypotheses)
        else:
            report["bleu"] = metrics.bleu(hypotheses, targets)
            report["bleu_signature"] = metrics.bleu_signature()
        true = self.pairs(split).length[: len(tokens)]
        report["repeated_token_rate"] = metrics.repeated_token_rate(
            [row[: length - 1] for row, length in zip(tokens, lengths, strict=True)]
        )
        found = metrics.length_accuracy(lengths, true)
        return report | {f"length_{name}": value for name, value in found.items()}

    def _exactly(self, nats, sources, hypotheses):
        """What is known of the procedural task, beside what the model does."""
        from gen_jax.data.synonyms import Synonyms
        from gen_jax.metrics import translation as metrics

        task, (ours, targets) = Synonyms.of(self.config.data), self.texts("validation")
        entropy = -np.mean([task.log_prob(*pair) for pair in zip(ours, targets, strict=True)])
        correlation = np.mean([task.conditional_total_correlation(source) for source in ours])
        mass = np.mean([task.one_shot_valid_mass(source) for source in sources])
        left = metrics.conditional_total_correlation_left(nats, entropy)
        return {
            "exact_accuracy": task.accuracy(sources, hypotheses),
            "one_shot_valid_mass": float(mass),
            "conditional_entropy": float(entropy),
            "conditional_total_correlation": float(correlation),
            "conditional_total_correlation_left": float(left),
        }

    def distill(self, params) -> dict:
        """Translates all training sources, one line each: targets for another run."""
        from gen_jax import sampling

        sources, _ = self.texts("train")
        pairs = Pairs.encode(
            self.tokenizer, sources, sources, self.config.data.max_length, long="truncate"
        )
        order = np.argsort(pairs.source_length, kind="stable")  # so that a batch ends together
        whole = pairs.all(self.columns)
        cond = self.condition({name: leaf[order] for name, leaf in whole.items()}, len(order))
        chunks = sampling.generate_many(
            self.sampler(self.columns), params, self.config.sample.seed, len(order),
            cond=cond, micro_batch=self.config.sample.micro_batch,
        )  # fmt: skip
        tokens = np.concatenate([chunk.samples for chunk in chunks])
        texts = self.texts_of(tokens)
        lines = [""] * len(texts)
        for place, text in zip(order, texts, strict=True):
            lines[place] = text
        self.keep_text(DISTILLED, "\n".join(lines) + "\n")
        return {"distilled": len(lines)}

    def complete(self, params) -> dict:
        """Fills the holes of a target, or goes on from its beginning, in rounds."""
        from gen_jax import sampling
        from gen_jax.models.masked.losses import blanks

        pair, given, is_open = self._completion
        sampler, seed = self.sampler(self.columns), self.config.sample.seed
        lengths = None if is_open else [len(given)]
        cond = self.condition(pair.all(self.columns), 1)
        cond |= blanks(self.decoder.denoiser, self.columns, [given], lengths)
        tokens = sampling.generate(sampler, params, sampling.sample_keys(seed, 0, 1), cond)
        choice, (text,) = self.config.complete, self.texts_of(np.asarray(tokens))
        shown = f"source      {choice.source}\ngiven       {choice.target}\ntranslation {text}\n"
        self.keep_text(COMPLETED, shown)
        print(shown)
        return {"nfe": sampler.nfe}

    def texts_of(self, tokens: np.ndarray) -> list[str]:
        """Translations int32 [B, L] as texts, up to END."""
        whole = np.full(len(tokens), tokens.shape[1])
        return translation.texts_of(self.tokenizer, tokens, whole)


def _named(batch: dict) -> dict:
    """A batch of pairs under the names that the losses read."""
    names = {"target": "tokens"}
    return {names.get(name, name): leaf for name, leaf in batch.items()}
