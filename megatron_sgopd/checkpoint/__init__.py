"""Checkpoints between Hugging Face folders and Megatron's `torch_dist` format: converted, proven, inspected."""
