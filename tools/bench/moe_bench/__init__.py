"""What `kernels.py` and `moe_step.py` share: the machine and its rates, what a call must cost, interleaved rounds, reports."""
