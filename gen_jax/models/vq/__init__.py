"""Autoencoders with a compressed space between encoder and decoder, discrete or continuous.

Papers: VQ-VAE (van den Oord et al. 2017, 1711.00937), VQ-VAE-2 (Razavi et al. 2019, 1906.00446),
residual quantisation (Zeghidour et al. 2021, 2107.03312), finite scalar quantisation (Mentzer et
al. 2023, 2309.15505), the KL-regularised autoencoder of latent diffusion (Rombach et al. 2022,
2112.10752), the critic and the perceptual term of VQGAN (Esser et al. 2021, 2012.09841).

    z      = encoder(x),   k = argmin_j |z - e_j|,   x^ = decoder(e_k)          1711.00937 eq. 1, 2
    L      = |x - x^|^2 + |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2                1711.00937 eq. 3
    N_k   <- g N_k + (1 - g) n_k,   m_k <- g m_k + (1 - g) sum z,   e_k = m_k / N_k       eq. 6 to 8
    x^     = decoder(round(f(z))),  f(z) = (L - 1) / 2 tanh(z)                  2309.15505 eq. 1
    L      = |x - x^| + weight KL(N(mean, variance) || N(0, 1))                 2112.10752 eq. 25
    L      = L_rec + L_quantiser - lambda weight mean D(x^)                     2012.09841 eq. 5, 6
    lambda = |grad L_rec| / (|grad mean D(x^)| + 1e-4),  by the decoder's last weights     eq. 7

where sg stops the gradient, which goes from the decoder's input to z unchanged. Squares are means
over all values here, sums in the papers.

`config` loads no jax; names are imported when they are used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adversarial": ["AdversarialTrainable", "adaptive_weight", "hinge_loss"],
        "autoencoder": ["Autoencoder", "CodingNetwork", "Losses", "make_autoencoder"],
        "codebook": ["Codebook"],
        "config": [
            "AutoencoderOptions",
            "CodebookOptions",
            "CriticOptions",
            "FSQOptions",
            "GaussianOptions",
            "QuantiserOptions",
        ],
        "contract": ["Quantised", "Quantiser", "straight_through", "usage"],
        "fsq": ["FSQ"],
        "gaussian": ["Gaussian", "kl_divergence"],
        "perceptual": ["LaplacianPyramid", "Perceptual", "perceptual_distance", "unit_channels"],
        "trainable": ["AutoencoderTrainable"],
    },
)
