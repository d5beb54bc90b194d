"""Routers: which experts each token goes to, one algorithm a file. No communication, no losses."""
