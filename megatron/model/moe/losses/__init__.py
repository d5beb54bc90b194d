"""Auxiliary losses: pure functions of a routing, one a file. Their coefficients live in the config (`moe_losses`)."""
