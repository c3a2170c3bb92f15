"""What the process that is copied does first: it is to end with the runner, and its copies with it.

multiprocessing's own sign of that, the end of a pipe, does not come while copies run, which hold the pipe too.
"""

from workbench import machine

machine.end_with_parent()
