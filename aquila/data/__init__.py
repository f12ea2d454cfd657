"""Corpora as samples in a provable order, and the making of indexed datasets."""
