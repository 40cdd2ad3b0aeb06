"""Times the implementations of conv_3x3 at the sizes of DDPM's CIFAR-10 network.

    python -m kernels.conv_3x3.bench

Each is compared with the reference first; medians, interleaved, weights prepared outside.
"""

import statistics
import time

import jax
import numpy as np

import kernels
from kernels.conv_3x3 import winograd

# (H = W, channels in, channels out)
SIZES = (
    (32, 128, 128),
    (32, 384, 128),
    (16, 256, 256),
    (16, 512, 256),
    (8, 512, 256),
    (4, 512, 256),
)


def bench(batch: int, side: int, channels: int, channels_out: int, repeats: int = 9) -> dict:
    """Median milliseconds of each implementation.

    Raises:
      AssertionError: an implementation differs from the reference by more than 1e-4.
    """
    keys = jax.random.split(jax.random.key(side * channels), 2)
    x = jax.random.normal(keys[0], (batch, side, side, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, channels_out)) / (9 * channels) ** 0.5
    prepared = winograd.transform_kernel(kernel)
    runs = {
        name: jax.jit(
            lambda x, kernel, prepared, name=name: kernels.conv_3x3(
                x, kernel, prepared, implementation=name
            )
        )
        for name in ("reference", "winograd")
    }
    expected = runs["reference"](x, kernel, prepared)
    for run in runs.values():
        np.testing.assert_allclose(run(x, kernel, prepared), expected, atol=1e-4)
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run(x, kernel, prepared).block_until_ready()
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints a table."""
    print("batch  side  channels    reference ms  winograd ms  ratio")
    for batch in (1, 16):
        for side, channels, channels_out in SIZES:
            times = bench(batch, side, channels, channels_out)
            print(
                f"{batch:>5}  {side:>4}  {channels:>3} -> {channels_out:>3}  "
                f"{times['reference']:>12.2f}  {times['winograd']:>11.2f}  "
                f"{times['reference'] / times['winograd']:>5.2f}"
            )


if __name__ == "__main__":
    main()
