"""The Triton kernels themselves, one module per operator. Importing one of them imports triton."""
