"""gen_jax: generation by every strategy between one unit at a time and all at once, in JAX."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

setuptools.setup(
    name="gen_jax",
    version="0.1.0",
    description="Autoregressive to non-autoregressive generation of text, images and audio in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(
        include=["gen_jax", "gen_jax.*", "experiments", "kernels", "kernels.*"]
    ),
    package_data={
        "gen_jax.comparison.page": ["*.css", "*.js"],
        "kernels": ["estimates.json"],
    },
    install_requires=[
        "jax>=0.10",
        "numpy",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11,<1",  # 1.0 moves the API; only checkpoint.py and hosts.py call it
        "einops",
        "jaxtyping>=0.3",  # shapes in annotations; checked while tests run
        "lazy_loader>=0.4",  # packages that name what is public and import it when it is used
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # needed by tensorflow-datasets, which does not declare it
        "requests",  # one request that tells whether there is a network; tensorflow-datasets has it
        "matplotlib",  # curves and figures of experiments
        "pillow",  # PNG and GIF, and image decoding in tensorflow-datasets
        "safetensors",  # the weight format that diffusers and transformers exchange
        "tqdm",
        "tyro>=1.0",  # command line from frozen dataclasses
    ],
    extras_require={
        "text": ["tokenizers>=0.20"],  # pretrained vocabularies; bytes and characters need nothing
        "translation": ["tokenizers>=0.20", "sacrebleu>=2.4"],  # byte-pair vocabularies and BLEU
        "tensorboard": ["tensorboardX>=2.6"],  # event files without TensorFlow
        # Charts of pages, and the same as PNG and SVG without a browser.
        "report": ["altair>=5.5", "vl-convert-python>=1.7"],
        # The compiler of TPUs, for machines that have none; figures are stored of this version.
        "tpu": ["libtpu==0.0.50.1"],
        # The compilers of CUDA (4.4 GB), and what prints machine code; no GPU is needed.
        "cuda": ["jax[cuda13]>=0.12", "nvidia-cuda-nvdisasm"],
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "beartype>=0.20",  # checks the annotations of jaxtyping
            "hypothesis",
            "scipy",
            "ruff",
            "tokenizers>=0.20",
            "sacrebleu>=2.4",
            "tensorboardX>=2.6",
            "altair>=5.5",
            "vl-convert-python>=1.7",
            "selenium>=4.20",  # pages in a headless Chromium, where one is installed
        ],
        # Faster peers of benchmarks on CPUs; onnx writes what ONNX Runtime reads.
        "peers": ["openvino>=2026.4", "onnxruntime>=1.32", "onnx>=1.23", "ctranslate2>=4.8"],
        # The peers that parity tests and benchmarks compare with.
        "oracles": ["torch==2.13.0", "diffusers>=0.35", "transformers>=4.55"],
    },
)
