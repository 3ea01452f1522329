"""Rows of attention edited by Triton kernels: `attend.py` on the device, `layer.py` on the host."""
