"""Processes: the only place that touches process groups, accelerate and DeepSpeed.

`group` joins and leaves them, `collectives` are what all processes call together, `replicas` those that take local
steps together, `engine` trains under a strategy.

A collective must be called by all processes; a process by itself is all of them.  None stands inside a main-process
branch.
"""
