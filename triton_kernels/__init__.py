"""PrunePath's Triton kernels, installed as `prunepath.triton_kernels`.

Importing this package needs neither Triton nor a GPU; importing one of its modules (`route`) needs Triton and
raises ImportError without it. Every kernel has the signature and, where the operator is exact, the very bits of
the operator of the same name in `torch.ops.prunepath`. With TRITON_INTERPRET=1 set before Triton is imported they
run on CPU tensors.
"""
