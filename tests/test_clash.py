"""Our `kernels` beside the Hugging Face package of that name, in processes of their own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

ROOT = pathlib.Path(importlib.util.find_spec("gen_jax").origin).parent.parent

CHECK = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("clash", sys.argv[1])
clash = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clash)
clash.check_kernels()
assert "jax" not in sys.modules
"""


def run(code, *path, arguments=(), **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def check(*path, before=""):
    return run(before + CHECK, *path, arguments=[str(ROOT / "gen_jax" / "clash.py")])


@pytest.fixture
def other(tmp_path):
    """A folder with a package that looks like the Hugging Face one, installed with its version."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(name):\n    return name\n")
    metadata = tmp_path / "kernels-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return tmp_path


def test_our_own_package_passes_wherever_the_other_one_comes_later(other):
    for path in ((ROOT,), (ROOT, other)):
        result = check(*path)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("before", ["", "import kernels\n"], ids=["found", "imported"])
def test_a_package_that_shadows_ours_is_named_in_one_line(other, before):
    result = check(other, ROOT, before=before)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: `import kernels` finds {other / 'kernels'}, the Hugging")
    assert f"put {ROOT} first on the path" in last


def test_a_folder_or_a_file_of_that_name_is_named_too(tmp_path):
    (tmp_path / "folder" / "kernels").mkdir(parents=True)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "kernels.py").write_text("")
    for place, found in (("folder", "kernels"), ("file", "kernels.py")):
        result = check(tmp_path / place)
        assert f"finds {tmp_path / place / found}" in result.stderr.strip().splitlines()[-1]


def test_what_asks_ours_for_the_other_one_is_told_so(other):
    result = run("from kernels import get_kernel", ROOT, other)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: `kernels.get_kernel` belongs to the Hugging Face package")
    result = run("import kernels\nassert not hasattr(kernels, 'nothing')", ROOT)
    assert result.returncode == 0, result.stderr


PEERS = """
import numpy as np, torch
from transformers import GPT2Config, GPT2LMHeadModel
from diffusers import DDPMScheduler, UNet2DModel
"""
OURS = """
import jax.numpy as jnp
import kernels
"""
USE = """
from transformers.utils import is_kernels_available
assert not is_kernels_available()
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)
with torch.no_grad():
    logits = model(torch.arange(6)[None]).logits.numpy()
    assert logits.shape == (1, 6, 11)
    assert model.generate(torch.arange(3)[None], max_new_tokens=2, do_sample=False).shape == (1, 5)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )
    image = torch.randn(1, 3, 8, 8)
    noise = unet(image, 3).sample
    assert DDPMScheduler().step(noise, 3, image).prev_sample.shape == image.shape
kept = kernels.filter_logits(jnp.asarray(logits[0]), top_k=2)
assert (np.isfinite(kept).sum(axis=1) == 2).all()
"""


@pytest.mark.oracle
@pytest.mark.parametrize("code", [PEERS + OURS, OURS + PEERS], ids=["peers first", "ours first"])
def test_transformers_and_diffusers_run_beside_us(code):
    for peer in ("torch", "transformers", "diffusers"):
        pytest.importorskip(peer)
    result = run(code + USE, ROOT, HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
