"""The stand-in kernels by the name that tools outside of the project know."""

from tests.npu_simulator.kernels import *  # noqa: F403
