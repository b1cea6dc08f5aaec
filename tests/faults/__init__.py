"""What users, disks, schedulers and enemies do to the scripts, and how they answer. `make faults` runs all of it.

A case is answered well where the result is right, or where each line of what is wrong names flag, value and remedy, the
status is 2, nothing is left half-written and there is no traceback. `make test` runs the few cases without the mark
`faults`.
"""
