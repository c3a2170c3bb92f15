"""What the process that is copied does first, before it imports anything: it is to end with the runner, and its copies with it.

multiprocessing's own sign of that, the end of a pipe, does not come while copies run, which hold the pipe too.
"""

import os
import warnings

from workbench import machine

machine.end_with_parent()
warnings.simplefilter("ignore")  # tqdm's, for want of a notebook here
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # read once, when matplotlib is imported
