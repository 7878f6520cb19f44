"""CUDA backend: weights in GPU memory that other processes can map."""
