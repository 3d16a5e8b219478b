"""Responses from a live vLLM: the sidecar, its client, and the weights pushed into it. Never imports policy/."""
