"""Which samples a rank takes next: a pure function, so that resuming the data order is one integer."""


def micro_batch_indices(consumed_samples: int, rank: int, world_size: int, micro_batch_size: int) -> range:
    """Samples of one micro step of one rank, after `consumed_samples` of all ranks together.

    The ranks take consecutive stretches. A micro step of all ranks consumes the next
    `world_size * micro_batch_size` samples, so a global batch is the same samples however it is cut.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if micro_batch_size < 1 or consumed_samples < 0:
        raise ValueError(f"micro batch {micro_batch_size} or consumed samples {consumed_samples} is negative")
    start = consumed_samples + rank * micro_batch_size
    return range(start, start + micro_batch_size)
