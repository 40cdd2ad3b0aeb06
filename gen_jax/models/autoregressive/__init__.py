"""Autoregressive models: GPT-2 (Radford et al. 2019), Image GPT (Chen et al. 2020).

    log p(x) = sum_i log p(x_i | x_<i)

Training maximises this sum, and so the likelihood is exact. Sampling draws one token after the
other from the same conditionals. It needs as many evaluations of the network as there are tokens,
each of one new token, since the keys and values of the earlier tokens are kept.

A network with extra inputs begins every sequence with a start token, the input V + label (label 0
where there is no label), and so gives the probability of the first token too. A network without
extra inputs conditions on the first token of the sequence.

Beam search ranks a hypothesis of n new tokens by its log-probability / n ** length_penalty, as
transformers does. Speculative decoding (Leviathan et al. 2023, 2211.17192; Chen et al. 2023,
2302.01318) draws from the distribution p of a large model with fewer passes of it: a token x that
a small model proposes from q is kept with probability min(1, p(x) / q(x)), and the first one that
is not kept is replaced by a draw from max(p - q, 0), normalised.

    AutoregressiveModel                     parameters, loss, exact likelihood
    AutoregressiveSampler, SamplingOptions  one token at a time
    BeamSearchSampler, BeamSearchOptions    the most probable continuation
    SpeculativeSampler, SpeculativeOptions  the same distribution, with a small model that drafts
    UncachedSampler                         the same samples, reading everything again each time
    make_prompts                            prompts of different lengths as a `Condition`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "beam_search": ["BeamSearchSampler", "BeamSearchState"],
        "config": [
            "BeamSearchOptions",
            "DecodingOptions",
            "SamplingOptions",
            "SpeculativeOptions",
        ],
        "losses": ["AutoregressiveModel"],
        "prompts": ["make_prompts", "prefill"],
        "samplers": ["AutoregressiveSampler", "DecodingState"],
        "speculative": ["SpeculativeSampler", "SpeculativeState"],
        "uncached": ["UncachedSampler"],
    },
)
