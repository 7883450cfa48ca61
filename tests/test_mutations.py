"""Mutated folders of models and vectors end in success or in one sentence, with every command."""

import os

import mutations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_server import HubServer

if os.name == "nt":
    pytest.skip("The limits of processes need fork.", allow_module_level=True)
pytestmark = pytest.mark.slow
# These take seconds, since they start other processes or train; the benchmark runs them.
SLOW = ("hub-verify", "hub-push", "train-embed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    mutations.build(folder)
    return folder


@pytest.fixture(scope="module")
def server():
    with HubServer() as started:
        yield started


@pytest.mark.parametrize("command", [name for name in mutations.COMMANDS if name not in SLOW])
def test_good_folders_pass(work, command, monkeypatch, server):
    """Show that a refusal is a refusal of the mutation."""
    monkeypatch.setattr(mutations, "mutate", lambda *_: ["nothing"])
    found = mutations.run_case(command, 0, work, None, server)
    assert found["outcome"] == "ok", found


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    command=st.sampled_from([name for name in mutations.COMMANDS if name not in SLOW]),
    number=st.integers(0, 1),
    rng=st.randoms(use_true_random=False),
)
def test_mutated_folders_are_opened_or_refused(work, server, command, number, rng):
    found = mutations.run_case(command, number, work, rng, server)
    assert found["outcome"] in ("ok", "refused"), found
