"""The account of a step's kernels: exposed communication is what no compute covers."""

import pytest

from picotron_mini.bench import bench
from picotron_mini.config import ConfigError, RunConfig
from picotron_mini.monitoring.exposed import exposed, merged

KERNELS = [
    ("gemm", 0.0, 2.0),
    ("ncclDevKernel_AllReduce", 1.0, 4.0),
    ("copy", 3.5, 5.0),
    ("gemm", 4.0, 4.5),
    ("ncclDevKernel_SendRecv", 7.0, 8.0),
]


def test_exposed_time_is_communication_without_compute() -> None:
    seen = exposed(KERNELS)
    assert (seen.step, seen.compute, seen.communication) == (8.0, 3.5, 4.0)
    assert seen.exposed == 1.5 + 1.0  # 2 to 3.5, and 7 to 8
    assert seen.idle == 2.0  # 5 to 7
    assert seen.kernels[0] == ("ncclDevKernel_AllReduce", 3.0)


def test_kernels_on_two_streams_count_once() -> None:
    assert merged([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]


def test_communication_that_is_covered_is_not_exposed() -> None:
    seen = exposed([("gemm", 0.0, 3.0), ("nccl", 1.0, 2.0)])
    assert (seen.communication, seen.exposed, seen.idle) == (1.0, 0.0, 0.0)


def test_what_copy_engines_send_is_communication() -> None:
    """A copy from another GPU and the meeting before it; a copy inside a GPU is compute."""
    kernels = [
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int)", 0.0, 1.0),
        ("Memcpy PtoP (Device -> Device)", 1.0, 3.0),
        ("Memcpy DtoD (Device -> Device)", 3.0, 4.0),
    ]
    seen = exposed(kernels)
    assert (seen.communication, seen.compute, seen.exposed) == (3.0, 1.0, 3.0)


def test_a_profile_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="only GPUs"):
        bench(RunConfig(layout="dp=1"), profile=True)
