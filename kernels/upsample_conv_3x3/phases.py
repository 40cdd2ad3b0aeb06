"""upsample_conv_3x3 as four 2 x 2 convolutions of the small map: 16 products instead of 36.

Two of three neighbours along a side are the same pixel of the small map, so their taps are added
first: an even row reads the pixel above with the first tap and its own pixel with the other two,
an odd row its own pixel with the first two and the pixel below with the last. Rows and columns
together have four such phases, each with its own 2 x 2 kernel, and no map of four times the size
is made.
"""

import jax
import jax.numpy as jnp

from kernels.dispatch import register

__all__ = ["upsample_conv_3x3"]


@register("upsample_conv_3x3", "phases", default_on=("cpu",))
def upsample_conv_3x3(x, kernel):
    """See `kernels.upsample_conv_3x3`."""
    batch, height, width, _ = x.shape
    rows = []
    for i, of_row in enumerate(_phases(kernel, axis=0)):
        columns = []
        for j, taps in enumerate(_phases(of_row, axis=1)):
            padding = ((1 - i, i), (1 - j, j))
            numbers = ("NHWC", "HWIO", "NHWC")
            columns.append(
                jax.lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=numbers)
            )
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _phases(kernel, axis):
    """The two taps along `axis` that an even and an odd position read, from three."""
    before, here, after = jnp.split(kernel, 3, axis)
    return (
        jnp.concatenate([before, here + after], axis),
        jnp.concatenate([before + here, after], axis),
    )
