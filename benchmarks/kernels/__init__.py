"""What the Triton kernels cost: launches and bytes counted without a GPU, times measured on one."""
