"""Run the GPU tests, measure the kernels and compare them with others."""
