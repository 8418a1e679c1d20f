"""PrunePath's Triton kernels, installed as `prunepath.triton_kernels`.

Importing this package needs neither Triton nor a GPU; importing one of its modules (`route`) needs Triton and
raises ImportError without it. Every function has the signature of the operator of the same name in
`prunepath.ops`, and routing selects the very same experts. With TRITON_INTERPRET=1 set before Triton is imported
they run on CPU tensors.
"""
