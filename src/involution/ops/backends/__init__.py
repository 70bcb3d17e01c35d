"""The backends and the choice between them: C++ kernels, Triton kernels, and plain PyTorch."""
