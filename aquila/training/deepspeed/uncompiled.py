"""torch's compiler stays out of a run that compiles nothing: it is most of what a rank would import.

torch marks an optimizer's methods as not to be traced, which loads the whole compiler at their first call;
DeepSpeed wraps functions of its Muon in `torch.compile`, and any backward of ZeRO-1 or 2 imports them.

Frozen: nothing. Free: everything; where a name is gone the compiler is loaded again, and the start is slower.
Guarded by: tests/integration/test_start_imports.py.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


def leave_out_compiler() -> None:
    """Loads what would load the compiler without it. Before the first optimizer is made.

    The optimizer's methods run outside of every compiled graph, so that nothing needs the mark.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        setattr(method, "__dynamo_disable", method)  # where torch._compile keeps the unmarked method


def import_muon_uncompiled() -> None:
    """DeepSpeed's Muon as plain functions, where the run's optimizer is another."""
    from deepspeed.runtime import compiler

    def as_it_is(*_: Any, **__: Any) -> Callable:
        return lambda function: function

    compile_function = compiler.compile
    compiler.compile = as_it_is
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_function
