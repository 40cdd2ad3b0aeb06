"""The compiled loop of a sampler: its caches stay in place. It is compiled as users compile it."""

import re

import numpy as np

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.autoregressive.samplers import AutoregressiveSampler
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import random_params


def test_the_caches_of_local_attention_are_written_in_place():
    config = TransformerConfig(
        vocabulary=11, context=300, window=6, layers=2, width=16, heads=2, position="both"
    )
    sampler = AutoregressiveSampler(AutoregressiveModel(TokenNetwork(config)), 1, 300)
    prepared = sampler.prepare(random_params(config))
    cond = Condition(prompt=np.zeros((3, 1), np.int32))
    program = sampling.compile_generate(sampler, prepared, sampling.sample_keys(0, 0, 3), cond)
    loop, entry = program.as_text().split("\nENTRY ")  # which may copy the zeros of the start
    assert re.search(r"= f32\[3,2,8,300\]\S* fusion\(", loop)
    assert not re.findall(r"= f32\[3,2,(?:8,300|300,8)\]\S* copy\(", loop)
    assert " while(" in entry
