"""How good is a model, in HF format, at problems whose answers are known? Imports no trainer and no sampler."""
