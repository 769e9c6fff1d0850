"""imageway: one OpenAI-compatible front, many image upstreams behind it."""
