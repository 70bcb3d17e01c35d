"""The backends, and the choice between them: the C++ kernels, the Triton kernels, and plain PyTorch."""
