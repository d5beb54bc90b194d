import sys
sys.path.insert(0, "/tmp/w6")
import torch
import w6k as CPU
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
def addresses(*tensors):
    return [0 if t is None else t.data_ptr() for t in tensors]
def threads_for(work):
    return torch.get_num_threads() if work > 1 << 18 else 1
