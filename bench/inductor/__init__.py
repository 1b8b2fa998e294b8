"""torch.compile's code for a GPU that is not there: a CUDA device in name only, the step compiled for it, its kernels
counted.
"""
