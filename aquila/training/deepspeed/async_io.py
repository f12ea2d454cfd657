"""Whether DeepSpeed can write to NVMe here."""


def has_async_io() -> bool:
    """Whether its asynchronous reads and writes compile and run on this machine (libaio is there)."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())
