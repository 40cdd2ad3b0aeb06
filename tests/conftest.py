"""Settings of the whole suite: eight CPU devices, so that mapping over devices is exercised."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
