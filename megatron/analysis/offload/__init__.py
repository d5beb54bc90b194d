"""What experts in slow memory cost.

measure.py   speed, memory and hits, each setting in a process of its own;   measure_report.py   as CoSMoEs' tables
report.py    the simulator's hit rates, and the locality of a trace, as tables
"""
