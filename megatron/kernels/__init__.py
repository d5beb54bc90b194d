"""One interface per op: signature, shape checks and gradients once, implementations beside it."""
