"""Training in several processes: the gradients of queries and key gains are those of all samples, or it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("parallel_modes.py")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("parallel") / "found.json"
    done = subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(file.read_text()))


@pytest.fixture(params=["", ", compiled"], ids=["eager", "compiled"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("mode", ["tensor parallel", "DDP", "fully_shard"])
def test_gradients_are_those_of_all_samples(found: dict[str, Any], mode: str, form: str) -> None:
    outcome = found[mode + form]
    assert isinstance(outcome, dict) and set(outcome) == {"query", "key_gain"}, outcome
    assert max(outcome.values()) < 1e-5


def test_pieces_of_gradients_make_up_those_of_all_samples(found: dict[str, Any], form: str) -> None:
    assert found["FSDP" + form] < 1e-5


@pytest.mark.parametrize("mode, told", [
    ("sequence parallel", "ShardedStreamError: every process has only a share of stream 'stream'"),
    ("distributed stream", "ShardedStreamError: stream 'stream' is a distributed tensor"),
    ("DDP, ignored", "UnreducedGradientsError: the gradient of the query of stream 'stream'"),
    ("DDP, converted within", "DistributedDataParallel around the model does not know this parameter"),
    ("DDP, converted within and called before", "DistributedDataParallel around the model does not know this parameter"),
    ("fully_shard, ignored", "fully_shard around the model does not know this parameter"),
    ("fully_shard, a part", "fully_shard around the model does not know this parameter"),
    ("FSDP, ignored", "FullyShardedDataParallel around the model does not know this parameter"),
])
def test_what_would_be_a_share_is_refused(found: dict[str, Any], mode: str, told: str, form: str) -> None:
    assert told in found[mode + form]
    assert "What to do: " in found[mode + form]


@pytest.mark.parametrize("mode", ["sequence parallel, frozen", "DDP, ignored and frozen"])
def test_frozen_parameters_are_nobody_s_business(found: dict[str, Any], mode: str, form: str) -> None:
    assert found[mode + form] == {"query": None, "key_gain": None}


@pytest.mark.parametrize("mode", ["sequence parallel", "DDP, ignored", "fully_shard, ignored"])
def test_inference_is_right_in_any_case(found: dict[str, Any], mode: str) -> None:
    assert found[f"{mode}, inference"] < 1e-5
