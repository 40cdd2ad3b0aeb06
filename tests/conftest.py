"""Settings of the whole suite: eight CPU devices, so that mapping over devices is exercised."""

import jax
import pytest

from gen_jax import parallel

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compile():
    """For laws that do not hang on how well the compiler optimises: it takes half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_device():
    """Experiments on one device: eight take a minute to compile for."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "data_mesh", lambda: mesh)
        patch.setattr(parallel, "local_mesh", lambda: mesh)
        yield
