"""Fixtures: tiny models built once per run, a fresh copy for each test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy

import pytest
import torch

from minibert import MiniBertConfig, MiniBertModel

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="session")
def tiny():
    """The shape every test model has, to be combined with a preset's switches."""
    return TINY


@pytest.fixture(scope="session", params=["search-8x768", "bert-base", "modern-6x384"])
def config(request):
    """One tiny configuration for every combination of switches that a preset uses."""
    return MiniBertConfig.preset(request.param, **TINY)


@pytest.fixture(scope="session")
def _model(config):
    torch.manual_seed(0)
    return MiniBertModel(config).eval()


@pytest.fixture
def model(_model):
    return copy.deepcopy(_model)


@pytest.fixture
def batch():
    """Five rows of different lengths: padded on the right, on the left, with a hole, and one that is only padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(6, 12, dtype=torch.long)
    mask[0, :] = 1
    mask[1, :7] = 1
    mask[2, 5:] = 1
    mask[3, [0, 1, 4, 5, 6]] = 1
    mask[4, 0] = 1
    return {
        "input_ids": torch.randint(1, 101, (6, 12), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (6, 12), generator=generator),
    }
