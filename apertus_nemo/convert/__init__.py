"""Checkpoints, from Megatron's form to the published one of Hugging Face and back."""
