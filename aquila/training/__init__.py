"""From built objects to a finished run: engine, loop, schedule, checkpoints, metrics."""
