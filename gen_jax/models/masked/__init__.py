"""Masked models and decoding in rounds.

Papers: Mask-Predict (Ghazvininejad et al. 2019, 1904.09324), MaskGIT (Chang et al. 2022,
2202.04200), absorbing diffusion (D3PM: Austin et al. 2021, 2107.03006), remasking (ReMDM: Wang et
al. 2025, 2503.00307), any-order autoregression (Uria et al. 2014, 1310.1757; Hoogeboom et al. 2021,
2110.02037), groups in Halton's order (Besnier et al. 2025, 2503.17076).

A network that sees all positions reads a sequence of L tokens, of which n are replaced by a mask,
and predicts those: p(x_i | x_known) for every masked i. Training hides n positions at random and
averages their cross-entropies. Where n is uniform over 1 .. L the mean of this loss is the
following bound per position:

    -log p(x) <= sum_{n = 1}^{L}  E_hidden [ 1/n sum_{i hidden} -log p(x_i | x_known) ]         (1)

where the expectation is over sets of n hidden positions. This is the ELBO of absorbing diffusion in
continuous time, for any masking schedule, and of autoregression in a random order (Hoogeboom et al.
2021, equation 5; Ou et al. 2024, 2406.03736). A denoiser that is exact attains the entropy.

A sampler in rounds starts from masks and evaluates the denoiser once a round, at all positions. The
samplers differ in which positions a round reveals, and whether it masks some again. A `Denoiser` is
all that they need: `MaskedModel` is a trained network, and `ExactDenoiser` has the conditionals of
a known distribution, so that a sampler can be compared with its law without any training error.
The mask is the first of the network's extra inputs, token V; the classes follow it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": [
            "AbsorbingDiffusionOptions",
            "HaltonOptions",
            "IterativeOptions",
            "MaskConfig",
            "MaskGITOptions",
            "MaskPredictOptions",
            "RandomOrderOptions",
            "RepairOptions",
        ],
        "conditions": ["infill"],
        "denoisers": ["Denoiser", "ExactDenoiser"],
        "iterative": ["IterativeSampler", "MaskedState"],
        "losses": [
            "MaskedModel",
            "bound_terms",
            "entropy_profile",
            "estimate_bound",
            "hide",
            "log_prob_in_order",
        ],
        "orders": ["halton_order"],
        "samplers": [
            "AbsorbingDiffusion",
            "MaskGIT",
            "MaskPredict",
            "OrderedGroups",
            "Repair",
        ],
        "schedules": [
            "SCHEDULES",
            "Cosine",
            "Curve",
            "Exponential",
            "Fixed",
            "Logarithmic",
            "Optimal",
            "Power",
            "Schedule",
            "masked_after",
        ],
    },
)
