"""Environment variables by which a launch and its ranks tell each other things."""

ERROR_FILE = "AQUILA_ERROR_FILE"
"""Names a file in which a command leaves the error that ended it (`errors.run_command`)."""
LAUNCHED_CONFIG = "AQUILA_LAUNCHED_CONFIG"
"""The configuration that the launcher checked, as JSON (`config.compare`)."""
