"""What the tests of the model share: small tensors on one thread, and transformers in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, with its casts to float32 turned into casts to float64: without them the two agree to 1e-7 only."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    return transformers
