"""Package metadata. `scripts/install.sh` takes the exact releases of requirements/, which are tested; here
they become ranges, so that the package installs beside others."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aquila" / "__init__.py").read_text()).group(1)
# torch and torch_npu: from the first release whose match with CANN is known.
RANGES = {
    "torch": ">=2.6",
    "torch_npu": ">=2.6",
    "deepspeed": ">=0.19.8,<0.20",
}


def requirements(name: str) -> list[str]:
    """The packages of requirements/NAME.txt, the one place that lists them; exact releases as ranges."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return [re.sub(r"^([\w-]+)==.*", lambda exact: exact[1] + RANGES[exact[1]], line) for line in wanted]


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
    package_data={
        "aquila": ["py.typed"],
        "aquila.backend": ["**/*.cpp", "**/*.h"],
        "aquila.launch": ["npu_pairs.txt"],
    },
    install_requires=requirements("torch") + requirements("core"),
    extras_require={name: requirements(name) for name in ("extras", "dev", "npu")},
)
