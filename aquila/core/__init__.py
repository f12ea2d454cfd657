"""What every room uses and none owns: errors, paths, files, JSON lines, the run folder. Imports nothing of ours."""
