"""Parallel decoders: all positions of a sequence at once (Gu et al. 2018, 1711.02281).

    p(x | c) = p(L | c) prod_i p(x_i | L, c)                                                    (1)

One evaluation reads L masks and predicts every position. What such a model can learn at best has
the marginals of the data: its cross-entropy per sequence tends to the sum of the marginal
entropies, which is above the entropy of the data by the total correlation of the positions (Huang
et al. 2022, 2206.05975). This is the multi-modality problem, in nats.

Either a head predicts the length of a sequence (equation 1); or all sequences have as many
positions, and what follows the first EOS is dropped. With the loss of all positions they learn
marginals; with the loss up to EOS alone, each learns its distribution given that no EOS came
before.

A latent z that all positions share is the first repair (Kaiser et al. 2018; Shu et al. 2020,
1908.07181; Ma et al. 2019, 1909.02480):

    p(x | c) = E_{z ~ p(z | c)} prod_i p(x_i | z, c),
    -log p(x | c) <= E_{z ~ q(z | x, c)} [-log p(x | z, c)] + KL(q(z | x, c) || p(z | c)).      (2)

A Gaussian is drawn by reparametrisation; over few codes the expectation is a sum, and is exact. The
second repair is a masked model of which the length is predicted, decoded in rounds
(`gen_jax.models.masked`).

The third is connectionist temporal classification (CTC: Graves et al. 2006; for translation
Libovicky & Helcl 2018, 1811.04719). A parallel decoder predicts more columns than the target has
tokens, each a token or the blank, and the sum over alignments leaves order and length to the
network:

    p(x | c) = sum_{a : collapse(a) = x} prod_u p(a_u | c)                                      (3)

where `collapse` makes one token of a run of equal ones and takes the blanks out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["CTCOptions", "LatentConfig", "OneShotOptions", "ParallelOptions"],
        "ctc": ["CTCModel", "CTCSampler", "collapse"],
        "losses": ["ParallelModel"],
        "samplers": ["ParallelSampler", "one_shot"],
    },
)
