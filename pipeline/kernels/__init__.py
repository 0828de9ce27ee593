"""Fast evaluations of the implicit heads: `cpu` (this machine's caches and cores) and `liif_triton` (one fused kernel,
with its gradient in `liif_triton_gradient`).

Each computes what the plain PyTorch path of its head computes; where a kernel does not cover a case, that path runs.
"""
