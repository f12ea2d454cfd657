"""What every room uses and none owns: errors, paths, JSON lines, the run folder. Imports nothing of ours."""
