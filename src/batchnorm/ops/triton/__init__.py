"""The operators in Triton, for CUDA tensors. `register.py` imports the other modules when they are needed."""
