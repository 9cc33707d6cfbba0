"""torchao's generic tests for tensor subclasses, on this one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from affine_tensor import AffineQuantizedTensor

utils = pytest.importorskip(
    "torchao.testing.utils",
    reason="torchao, whose tests these are, is missing or does not fit this torch",
    exc_type=ImportError,
)

FORMAT = {"bits": 8, "group_size": 64}  # the nearest to the int8 of torchao's bounds


class TestBasic(utils.TorchAOBasicTestCase):
    TENSOR_SUBCLASS = AffineQuantizedTensor
    FACTORY_FN = staticmethod(AffineQuantizedTensor.from_dense)
    kwargs = FORMAT

    def test_device1_to_device2_device1_cpu_device2_cpu(self) -> None:
        # This case calls .cuda() whatever its devices are.
        if torch.cuda.is_available():
            super().test_device1_to_device2_device1_cpu_device2_cpu()
        else:
            with mock.patch.object(torch.Tensor, "cuda", torch.Tensor.cpu):
                super().test_device1_to_device2_device1_cpu_device2_cpu()


class TestCompile(utils.TorchAOCompileTestCase):
    TENSOR_SUBCLASS = AffineQuantizedTensor
    FACTORY_FN = staticmethod(AffineQuantizedTensor.from_dense)
    kwargs = FORMAT


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_chunks_are_joined_again_as_in_vllm(dim: int) -> None:
    weight = AffineQuantizedTensor.from_dense(torch.randn(4, 8, 256), **FORMAT)
    case = utils.TorchAOIntegrationTestCase()
    case._test_chunk_similar_to_vllm_llama4(weight, dim)
    case._test_chunk_similar_to_vllm_llama4(weight.transpose(1, 2), dim)
