"""Fixtures: tiny models built once per run, a fresh copy for each test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # which share the cores, as do the processes they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import copy
import multiprocessing
import socket

import pytest

from hub_server import HubServer

# torch and minibert are imported in the fixtures: the controller of pytest-xdist reads this file before it starts its workers.


@pytest.fixture(scope="session", params=["search-8x768", "bert-base", "modern-6x384"])
def config(request):
    """One tiny configuration for every combination of switches that a preset uses."""
    from helpers import TINY
    from minibert import MiniBertConfig

    return MiniBertConfig.preset(request.param, **TINY)


@pytest.fixture(scope="session")
def _model(config):
    import torch

    from minibert import MiniBertModel

    torch.manual_seed(0)
    return MiniBertModel(config).eval()


@pytest.fixture
def model(_model):
    return copy.deepcopy(_model)


@pytest.fixture
def batch():
    """Five rows of different lengths: padded on the right, on the left, with a hole, and one that is only padding."""
    import torch

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


@pytest.fixture
def start():
    """Fork processes that call a function, set up as torchrun does, without its seconds of start-up.

    ``start(2, function)`` returns them; ``start.finish(them)`` waits and returns their exit statuses.
    """

    def start(count, function):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def target(rank):
            import torch

            from minibert.train.loop import AcceleratorState

            torch.set_num_threads(1)
            if count > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ.update({key: str(value) for key, value in names.items()})
                os.environ.update(
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"
                )
            AcceleratorState._reset_state(reset_partial_state=True)
            function()

        context = multiprocessing.get_context("fork")
        started = [context.Process(target=target, args=(rank,)) for rank in range(count)]
        for process in started:
            process.start()
        return started

    def finish(started):
        for process in started:
            process.join(60)
        return [process.exitcode for process in started]

    start.finish = finish
    return start


@pytest.fixture
def hub_server():
    """A Hub of models and data sets on the loopback interface, empty; ``environment`` and ``patch`` make processes use it."""
    with HubServer() as server:
        yield server
