"""Data: text into a built corpus, and a built corpus into training samples.

`manifest` and `sampler` are pure Python; `build`, `corpus` and `dataset` import torch and Megatron when called.
"""
