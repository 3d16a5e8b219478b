"""HF Qwen2 weights and Megatron's: one table of names, the layouts between them, and HF folders on disk. No ranks."""
