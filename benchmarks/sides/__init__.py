"""The sides of benchmarks/side_by_side.py: one training step of RLSC by several programs, each in a process of its own.

`work.py` is what all are given, `measure.py` what is measured of each, `worker.py` the process, `processes.py` its
other end. A side is a module with `build(Setup)`, whose result takes one step at a time.
"""
