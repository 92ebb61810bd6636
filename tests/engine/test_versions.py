"""Other versions of vLLM serve their own models, and refuse sketched ones in one line."""

import subprocess
import sys

import pytest

#: Registers the plugin under a version, and asks vLLM for the class that reads sketched configs.
PROGRAM = """
import sys
from spallm_convert.serving import register, versions
versions.vllm_version = lambda: sys.argv[1]
register()
from vllm.model_executor.layers.quantization import get_quantization_config
try:
    print(get_quantization_config("spallm").from_config({}))
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0"])
def test_another_version_is_refused_with_the_versions_that_serve(version):
    command = [sys.executable, "-c", PROGRAM, version]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == (
        f"refused: spallm-convert serves sketched models with vLLM 0.32 to below 0.33, found "
        f"{version}: pip install 'spallm-convert[vllm]'"
    )
