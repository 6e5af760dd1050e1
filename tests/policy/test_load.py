"""Kernels that a policy runs on."""

import pytest
import torch

from kpo_cli.policy.load import choose_kernels


@pytest.fixture(autouse=True)
def flags():
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize(("device", "left"), [("cuda", False), ("cuda:1", False), ("cpu", True)])
def test_on_a_gpu_cudnn_s_attention_and_tf32_are_off(device, left):
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")  # as an engine beside us might
    choose_kernels(torch.device(device))
    assert torch.backends.cuda.cudnn_sdp_enabled() is left
    assert torch.backends.cuda.matmul.allow_tf32 is left
    assert torch.get_float32_matmul_precision() == ("high" if left else "highest")
    others = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    assert others == (True, True)
