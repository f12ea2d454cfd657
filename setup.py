"""Package metadata. Versions are pinned where a mismatch is known to break: see requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aquila" / "__init__.py").read_text()).group(1)


def requirements(name: str) -> list[str]:
    """The packages of requirements/NAME.txt, the one place that lists them."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


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
    package_data={"aquila.backend.cpu_kernels": ["*.cpp", "*.h", "amx/*.cpp", "amx/*.h"]},
    install_requires=requirements("torch") + requirements("core"),
    extras_require={name: requirements(name) for name in ("extras", "dev", "npu")},
)
