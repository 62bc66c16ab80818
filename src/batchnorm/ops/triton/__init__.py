"""Twins of the operators in Triton, for CUDA tensors. Importing this imports nothing: see register.py."""
