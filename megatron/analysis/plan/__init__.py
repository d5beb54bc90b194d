"""The plan of a training run on a cluster, without the cluster: what each process holds, computes and sends, and how long a step should take.

The numbers come from the code that trains. Each process's part of the model is built without memory, on PyTorch's meta device, and takes one step.
"""
