"""What this computer is: the processor, its cores and number formats, memory, the versions of what
runs on it; and how to have it alone while a time is taken.

Notebooks that run side by side have a core each. Where one of them times something, the others
stand still (SIGSTOP) and it has all cores, so that its figures are those of a quiet machine.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

# what a notebook knows of the run that it is part of: the runner's process, its lock, its
# processors
RUN = "WORKBENCH_RUN"

_FORMATS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, and the number formats that decide int8
    and bf16 speed.

    Example: `hardware()["processor"]`
    """
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {key.strip(): value.strip()
              for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "formats": [name for name in _FORMATS if name in flags],
        "system": f"{platform.system()} {platform.release()}",
    }


@functools.cache
def _formats() -> frozenset[str]:
    return frozenset(hardware()["formats"])


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; where it does not, bfloat16 is slower
    than float32.

    Example: `precision = "bf16" if multiplies_bf16() else "fp32"`
    """
    return (bool({"avx512_bf16", "amx_bf16"} & _formats())
            or platform.machine() in ("arm64", "aarch64"))


def sums_integers() -> bool:
    """Whether the processor adds products of 8-bit integers without saturating at 16 bits (VNNI,
    AMX, Arm).

    Example: `bits = 8 if sums_integers() else 7`
    """
    return (bool({"avx512_vnni", "avx_vnni", "amx_int8"} & _formats())
            or platform.machine() in ("arm64", "aarch64"))


def processors() -> list[int]:
    """The processors that this process may run on, by number; of a notebook that runs beside
    others, those of the whole run.

    Example: `len(processors()) == cores()`
    """
    if RUN in os.environ:
        return json.loads(os.environ[RUN])["processors"]
    return (sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
            else list(range(psutil.cpu_count() or 1)))


def cores() -> int:
    """How many processors this process may run on, at least while it is `alone`.

    Example: `torch.set_num_threads(cores())`
    """
    return len(processors())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this is open, the notebooks that run beside this one stand still, and it may use all
    processors of the run.

    For what is timed. One at a time: who comes second waits. Outside such a run, or inside another
    `alone`, it does nothing.

    Example: `with machine.alone(): started = time.perf_counter(); ...`
    """
    global _is_alone
    if RUN not in os.environ or _is_alone:
        yield
        return
    run, own = json.loads(os.environ[RUN]), os.sched_getaffinity(0)
    with open(run["lock"], "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end_of_alone(lock)
        me = psutil.Process()
        mine = {me.pid, *(parent.pid for parent in me.parents())}
        others = [other.pid for other in psutil.Process(run["runner"]).children()
                  if other.pid not in mine]
        _is_alone = True
        lock.write(f"{me.pid} {time.perf_counter()}")
        lock.flush()
        try:
            for other in others:
                stand_still(other)
            _settle(run["processors"])
            yield
        finally:
            _settle(own)
            end_of_alone(lock)
            for other in others:
                go_on(other)
            _is_alone = False


def end_of_alone(lock: TextIO) -> None:
    """Write into the lock of the run, which the caller holds, that who was alone is so no longer,
    be it by being killed.

    Example: `with open("lock", "w") as lock: end_of_alone(lock)`
    """
    written = Path(lock.name).read_text()
    if written and not written.endswith("\n"):
        lock.write(f" {time.perf_counter()}\n")
        lock.flush()


def clock() -> float:
    """Seconds on a clock that stands still while this process does, for another that is `alone`;
    for what takes long.

    Example: `started = clock(); seconds = clock() - started`
    """
    if RUN not in os.environ:
        return time.perf_counter()
    path, said = Path(json.loads(os.environ[RUN])["lock"]), None
    while said != (said := path.read_text()):  # until nobody was alone in between
        now = time.perf_counter()
    times = [line.split() for line in said.splitlines()]
    return now - sum(float(ended) - float(began) for process, began, *ends in times
                     for ended in ends
                     if process != str(os.getpid()))


def stand_still(process: int) -> None:
    """Stop a process and all that it started, parents first, so that none starts more.

    Example: `stand_still(process)`
    """
    with contextlib.suppress(psutil.Error):
        here = psutil.Process(process)
        here.suspend()
        for child in here.children():
            stand_still(child.pid)


def go_on(process: int) -> None:
    """Let a process that stands still go on, with all that it started.

    Example: `go_on(process)`
    """
    with contextlib.suppress(psutil.Error):
        here = psutil.Process(process)
        for part in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                part.resume()


def end_with_parent() -> None:
    """On Linux: have this process killed when the one that started it ends, also while it stands
    still.

    Example: `end_with_parent()`
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _settle(on: list[int] | set[int]) -> None:
    """Keep all threads of this process to these processors."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), on)


_is_alone = False


def resident() -> float:
    """Memory of this process that lies in RAM now, in MB.

    Example: `before = resident()`
    """
    return psutil.Process().memory_info().rss / 1e6


def peak() -> float:
    """The most memory of this process that lay in RAM so far, in MB; of the process itself, not of
    what it was forked from.

    Raises RuntimeError on systems without /proc.

    Example: `peak()`
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("peak memory is read from /proc, which this system does not have")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024 / 1e6


def versions() -> dict[str, str]:
    """Versions of Python and of what the package requires, its extras included; those not installed
    are left out.

    Example: `"torch" in versions()`
    """
    found = {"python": platform.python_version()}
    for requirement in importlib.metadata.requires("workbench") or []:
        name = re.match(r"[\w.-]+", requirement).group()
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def others() -> Callable[[], float]:
    """A function that says what share of all processors other processes have taken since this was
    called, between 0 and 1; 0 within the first half of a second, as the counts tick in hundredths.

    Example: `taken = others(); taken() == 0`
    """
    def counted() -> tuple[float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # a guest's time is in the user's as well
        idle = [getattr(every, kind, 0.0) for kind in ("idle", "iowait", "guest", "guest_nice")]
        return time.perf_counter(), sum(every) - sum(idle) - own.user - own.system

    began, before = counted()

    def share() -> float:
        now, after = counted()
        if now - began < 0.5:
            return 0.0
        return min(max(after - before, 0.0) / ((now - began) * (psutil.cpu_count() or 1)), 1.0)

    return share


def describe() -> str:
    """One line for a figure's caption or a table's foot: processor, cores, formats, main versions.

    Example: `plots.latency(frame).set_title(machine.describe())`
    """
    has, runs = hardware(), versions()
    formats = ", ".join(has["formats"]) or "no vector formats known"
    libraries = ", ".join(f"{name} {runs[name]}" for name in ("torch", "onnxruntime")
                          if name in runs)
    count = f"{has['cores']} core{'s' if has['cores'] > 1 else ''}"
    return f"{has['processor']}, {count} ({formats}); {libraries}"
