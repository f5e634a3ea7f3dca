"""Nothing is sent anywhere that the user did not name."""

import subprocess
import sys

import pytest

from megatron_sgopd.platform.cpu import CpuPlatform
from megatron_sgopd.platform.cuda import CudaPlatform

ASK = """
import os, sys
from vllm.usage import usage_lib
print(usage_lib.is_usage_stats_enabled())
os.environ["VLLM_NO_USAGE_STATS"] = sys.argv[1]
usage_lib._USAGE_STATS_ENABLED = None
print(usage_lib.is_usage_stats_enabled())
"""


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform])
def test_engines_do_not_report_themselves(platform: type[CpuPlatform] | type[CudaPlatform]) -> None:
    assert platform.environment["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_heeds_that_variable() -> None:
    words = [sys.executable, "-c", ASK, CpuPlatform.environment["VLLM_NO_USAGE_STATS"]]
    alone = {"HOME": "/nonexistent"}  # without the user's own wishes
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=alone)
    assert done.stdout.split()[-2:] == ["True", "False"]
