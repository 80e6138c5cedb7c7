"""Fixtures that several test files share."""

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin for others stall on CI's shared cores


@pytest.fixture
def poisoned():
    """torch.empty returns NaN during the test, so that an element left unwritten shows."""
    from glabench.oracle import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture
def one_thread():
    """Small tensors are faster on one thread, and CI's cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
