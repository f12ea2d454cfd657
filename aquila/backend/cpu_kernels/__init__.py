"""C++ kernels for CPUs, each with a plain torch fallback; what needs AMX is in `amx/`."""
