"""Processes: the only package that touches process groups, accelerate and DeepSpeed.

`group` joins and leaves process groups, `collectives` has the calls that all processes make together, `replicas` groups
the processes that take local steps together, `engine` trains under a strategy.

A collective must be called by all processes (a single process is all of them).  None is inside a main-process branch.
"""
