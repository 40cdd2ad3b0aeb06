"""Generation in two stages: a prior draws in the compressed space, a decoder makes images of that.

Papers: VQ-VAE (van den Oord et al. 2017, 1711.00937, section 3.3) and VQGAN (Esser et al. 2021,
2012.09841) with an autoregressive prior over codes; MaskGIT (Chang et al. 2022, 2202.04200) in
rounds; latent diffusion (Rombach et al. 2022, 2112.10752).

    p(x) = sum_k p(k) p(x | k),    -log p(x) <= -log p(k(x)) - log p(x | k(x))                   (1)

where k(x) is the code of x: the bound is that of a posterior which is sure of its code. What is
sequential is drawn for the few codes of an image alone; the decoder makes all pixels at once, with
one evaluation more.

The prior is any sampler of the other families: of code sequences int32 [B, L], L the codes of an
image in raster order (and table by table at each position), or of maps of latents.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"samplers": ["TwoStageSampler"]}
)
