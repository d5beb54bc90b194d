"""Tools for the tests of this project and of code built on it: processes, tiny models, devices. Nothing in the library imports it.

distributed.py   run a function on several processes
tiny.py          configurations small enough for a test
devices.py       the devices that a test is run on
"""
