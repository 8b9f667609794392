"""Frozen weights kept in a file: the same numbers, and memory only while they are used."""

import sys

import pytest
import torch

from dualign.models.mmap import move_to_file
from dualign.models.packing import Tokens, pack
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig


def resident_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["tiny", "tiny_gpt2"])
def test_a_policy_kept_in_a_file_gives_the_same_log_probs_to_the_bit(model, precision, request, tmp_path):
    hf, _ = load_model(ModelConfig(name=str(request.getfixturevalue(model))))
    frozen = Policy(hf, precision, True).frozen_copy()
    tokens = Tokens(((5, 6, 7), (8, 9)), ((10, 11, 12), (13, 14)), (0, 1))
    micro = pack(tokens, [0, 1], tokens.width, 0, frozen.share)
    with torch.inference_mode():
        before = frozen(micro)
        frozen.move_to_file(tmp_path)
        for _ in range(2):  # before and after letting go
            with frozen.whole():
                assert torch.equal(frozen(micro), before)
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_that_rests_on_the_host_gives_the_same_log_probs_to_the_bit(precision, tiny):
    frozen = Policy(load_model(ModelConfig(name=str(tiny)))[0], precision, True).frozen_copy()
    tokens = Tokens(((5, 6, 7), (8, 9)), ((10, 11, 12), (13, 14)), (0, 1))
    micro = pack(tokens, [0, 1], tokens.width, 0, frozen.share)
    with torch.inference_mode():
        before = frozen(micro)
        frozen.move_to_host()
        for _ in range(2):
            assert sum(p.numel() for p in frozen.parameters()) == 0
            with frozen.whole():
                assert torch.equal(frozen(micro), before)


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_memory_is_taken_by_use_and_let_go(tmp_path):
    weights = [torch.randn(4 << 20) for _ in range(8)]  # 128 MB
    sums = [float(w.sum()) for w in weights]
    whole = move_to_file(weights, tmp_path)
    with whole():
        pass
    before = resident_mb()
    with whole():
        assert [float(w.sum()) for w in weights] == sums
        used = resident_mb()
    assert used - before > 100 and used - resident_mb() > 100
    assert [float(w.sum()) for w in weights] == sums


def test_where_no_file_can_be_made_weights_stay(tmp_path):
    (tmp_path / "taken").write_text("")
    weight = torch.randn(8)
    pointer, kept = weight.data_ptr(), weight.clone()
    with move_to_file([weight], tmp_path / "taken")():
        pass
    assert weight.data_ptr() == pointer and torch.equal(weight, kept)
