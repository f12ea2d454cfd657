"""The OpenAI-compatible HTTP endpoint: server, wire format, continuous batching."""
