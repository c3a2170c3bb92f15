"""Processes that are copied instead of started: a notebook's, and its kernel's, have what they
import from the first moment.

Source: multiprocessing's forkserver, which runs nothing else; a kernel is a copy that the
notebook's process makes of itself before it has threads.
"""

import faulthandler
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from workbench import machine

# what running a notebook imports, whatever is in it
RUNS = ["workbench.reporting.execution", "ipykernel.ipkernel", "ipykernel.kernelapp", "nbconvert",
        "papermill", "workbench.reporting.pages"]
# what notebooks import; nothing of either may compute or start threads, which copies would not have
WARM = ["matplotlib.pyplot", "onnxruntime", "onnxscript.rewriter", "pandas", "torch._dynamo",
        "torchvision", "transformers.models.bert.modeling_bert",
        "workbench.plans.compress", "workbench.plans.search", "workbench.reporting.plots",
        "workbench.subjects.data", "workbench.subjects.models", "workbench.deployment.warm"]


class Copy:
    """A copied process, with what subprocess.Popen has of one.

    Example: `Copy("fork", print, "from a copy").wait() == 0`
    """

    stdin = stdout = stderr = None

    def __init__(self, kind: str, target: Callable, *arguments):
        of_kind = multiprocessing.get_context(kind).Process  # type: ignore[attr-defined]
        self._process = of_kind(target=target, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """How it ended, None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """How it ended, once it has."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()


def copied(target: Callable, *arguments) -> Copy:
    """A copy of the process that waits for this, running target(*arguments).

    Example: `copied(print, "from a copy").wait()`
    """
    return Copy("forkserver", target, *arguments)


def prepare(*, warm: bool) -> None:
    """Say what that process imports before its first copy. warm: what notebooks import too, in 12
    s, which two do not earn back.

    Example: `prepare(warm=False)`
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["workbench.reporting.nursery", *RUNS, *(WARM if warm else [])])


def settle(folder: str, environment: Mapping[str, str], threads: int | None = None) -> None:
    """In a copy: the folder, environment and number of threads of a process that would have been
    started there. What came with the copy is looked through for garbage no more, a third of a
    second each time.

    Example: `settle("notebooks", os.environ)`
    """
    gc.freeze()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # which has read its number from the environment when it was imported
    if threads and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


class Reserve:
    """A copy of this process that waits to become a notebook's kernel; to be made before this
    process has threads.

    Example: `Reserve().manager()`
    """

    def __init__(self) -> None:
        self._pipe, there = multiprocessing.Pipe()
        self.copy = Copy("fork", _become, there)
        # short: the path of a socket has a hundred letters at most
        self._folder = tempfile.mkdtemp(prefix="kernel-")

    def manager(self) -> type:
        """The class of kernel managers whose kernel it is.

        They speak over sockets in a folder of their own: ports are chosen before they are bound,
        and two kernels that start at the same moment then sometimes choose the same.
        """
        from jupyter_client.manager import AsyncKernelManager

        reserve = self

        class Copied(AsyncKernelManager):
            def __init__(self, **given):
                super().__init__(transport="ipc", connection_file=f"{reserve._folder}/kernel.json",
                                 **given)

            async def _async_launch_kernel(self, kernel_cmd: list[str], **kw) -> None:
                given = kernel_cmd[kernel_cmd.index("ipykernel_launcher") + 1:]
                reserve._pipe.send((given, dict(kw.get("env") or os.environ),
                                    str(kw.get("cwd") or Path.cwd())))
                own = self.provisioner
                own.process, own.pid = reserve.copy, reserve.copy.pid  # type: ignore[attr-defined]
                own.pgid = None  # type: ignore[attr-defined]
                self._reconcile_connection_info(own.connection_info)  # type: ignore[union-attr]

        return Copied

    def end(self) -> None:
        """End the kernel where it has not ended itself."""
        self.copy.kill()
        self.copy.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _become(pipe) -> None:
    """In the copy: wait for what a kernel is started with, then be it."""
    machine.end_with_parent()
    # a fault leaves where it was; a kernel takes the number 2 for itself
    faulthandler.enable(os.fdopen(os.dup(2), "w"))
    arguments, environment, folder = pipe.recv()
    settle(folder, environment)
    from ipykernel import kernelapp

    sys.argv = ["ipykernel_launcher", *arguments]
    kernelapp.launch_new_instance(arguments)
