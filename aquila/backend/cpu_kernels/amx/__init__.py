"""Kernels on AMX matrix tiles (Intel Xeon since 2023). Without AMX nothing here is called."""
