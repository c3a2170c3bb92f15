"""What the process that is copied does first, before it imports anything: it is to end with the
runner, and its copies with it. And it is to start no threads, which copies would lack.

multiprocessing's own sign of that, the end of a pipe, does not come while copies run, which hold
the pipe too.
"""

import os
import warnings

from workbench import machine

machine.end_with_parent()
warnings.simplefilter("ignore")  # tqdm's, for want of a notebook here
# read once, when matplotlib is imported
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
# a thread that Arrow's memory starts when pandas imports it
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
