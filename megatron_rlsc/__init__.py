"""RLSC (arXiv 2506.06395) on megatron-core: a policy trained on its own confidence, beside a vLLM sidecar."""

__version__ = "0.1.0"
