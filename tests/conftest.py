"""Settings of the whole suite: eight CPU devices, strict shapes, and one cache of programs.

Annotations of shapes are checked, ranks are not promoted silently, and warnings are errors.
Programs are compiled once for all workers and processes, and for the next run of the suite; with
few optimisations, in one piece, and with the older emitters of fusions where jaxlib has them, which
takes a transformer a third of the time. Accelerators, a whole run with its resume, and what asks
for `optimised` are tested with programs as users have them.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])  # the last counts
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody profiles these programs
gc.set_threshold(100_000, 20, 50)  # a heap of traced programs is large, and little of it garbage

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook(["gen_jax", "kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

from gen_jax import parallel  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """Options of the command line."""
    parser.addoption(
        "--few",
        action="store_true",
        help="of the cases of each test the first and the last alone",
    )


def pytest_configure(config):
    """Imports PyTorch and its kin where they are: as errors their warnings would break that."""
    if "not oracle" not in config.option.markexpr:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("torch", "torch._dynamo", "diffusers", "transformers"):
                if importlib.util.find_spec(name.partition(".")[0]):
                    importlib.import_module(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests of a file run in one worker, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 20_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Lets the programs of earlier modules go before the process has too many memory maps.

    A compiled program keeps about six, Linux allows 65,530 a process, and where there are no more
    the compiler dies of a segmentation fault.
    """
    if (nextitem is not None and nextitem.path == item.path) or not _MAPS.exists():
        return
    with open(_MAPS) as maps:
        number = sum(1 for _ in maps)
    if number > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """Cases are left out where few are asked for; warnings of PyTorch and its kin are not ours."""
    if config.option.few:
        cases = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = {one for of_test in cases.values() for one in (of_test[0], of_test[-1])}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for item in items:
        if item.get_closest_marker("oracle"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="module")
def optimised():
    """Programs with all optimisations."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def one_device():
    """Experiments on one device: eight take a minute to compile for."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "data_mesh", lambda: mesh)
        patch.setattr(parallel, "local_mesh", lambda: mesh)
        yield
