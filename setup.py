"""Package metadata. Versions are pinned where a mismatch is known to break: see scripts/install.sh."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aquila" / "__init__.py").read_text()).group(1)

setup(
    name="aquila-pretrain",
    version=VERSION,
    description="Pretraining recipe for Aquila on Ascend NPU, NVIDIA GPU and CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["aquila", "aquila.*", "data_tools"]),
    py_modules=["generate"],
    install_requires=[
        "torch>=2.11",
        "numpy",
        "pydantic>=2.7",
        "pyyaml>=6",
        "tokenizers>=0.21",
        "tiktoken>=0.9",
        "safetensors>=0.5",
        "deepspeed==0.19.*",
        "megatron-core==0.16.*",
        "ninja",
        "psutil",
        "rich>=13",
        "prompt_toolkit>=3",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.9", "pexpect>=4.9", "transformers>=5,<6"],
        "npu": ["torch==2.13.0", "torch_npu==2.13.0"],
    },
)
