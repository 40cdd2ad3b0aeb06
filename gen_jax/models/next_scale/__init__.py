"""Next-scale prediction: maps of tokens from coarse to fine, each drawn at once.

VAR (Tian et al. 2024, 2404.02905, eq. 5): with r_k the map of scale k,

    p(r_1, ..., r_R) = prod_k p(r_k | r_1, ..., r_(k-1)),   p(r_k | ...) = prod_i p(r_k,i | ...)

so that a sample takes R evaluations, of as many positions as the scales have together. A position
sees all positions of its own scale and of the coarser ones (attention causal by blocks), and its
own input is the token that covers it at the scale before; at the first scale, a start token, or one
for each class. Where we differ: that input is an embedding of the token with a table for each
scale, and not the accumulated map of the quantiser, so that the model needs no codebook and takes
any pyramid of tokens.

    NextScaleModel, network_sizes    parameters, loss, exact likelihood
    NextScaleSampler                 a scale at a time
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": ["NextScaleModel", "network_sizes"],
        "samplers": ["NextScaleSampler", "NextScaleState"],
    },
)
