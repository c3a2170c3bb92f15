"""The runner: which notebooks, with which parameters, which of them have changed; executed, kept,
summed up.

A report stands in OUT/NAME whole or not at all: it is made in OUT/.partial.NAME and renamed. So a
run that is killed keeps what had finished, and the next one goes on.
"""

import contextlib
import errno
import fcntl
import io
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from workbench import machine
from workbench.reporting import kernels, pages
from workbench.reporting.execution import CELLS, DEAD, ERRORS, INNER, Job, packed, reason, start


def run(jobs: Sequence[Job], *, out: Path, workers: int = 1, scheduler: str | None = None,
        force: bool = False) -> dict:
    """Execute the jobs that have changed, `workers` at a time or on a dask cluster; return (and
    write) the summary.

    Raises ValueError where `workers` is below 1 or another run is writing to `out`; OSError where
    `out` cannot be written or its disk is full, and then leaves what was finished.

    Example: `run(parameters.plan(["22_quantization"], folder=Path("notebooks")),
    out=Path("reports"))`
    """
    if workers < 1:
        raise ValueError(f"jobs is {workers}, expected at least 1")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out), _room(out):
        _recover(out)
        ran, failures = [], {}
        for wave, address in ([job for job in jobs if not _sums_up(job)],
                              scheduler), ([*filter(_sums_up, jobs)], None):
            before = {job.name: record(out / job.name) for job in wave}
            changed = [job for job in wave if force or not _current(before[job.name], job, out)]
            for job in wave:
                if job not in changed:
                    print(f"{job.name}: unchanged, not run again ({before[job.name]['status']})")
            for job, error in _on_cluster(changed, out,
                                          address) if address and changed else _here(changed, out,
                                                                                     workers):
                error = error or _keep(job, out, before[job.name])
                if error:
                    failures[job.name] = error
                    shutil.rmtree(_partial(out, job), ignore_errors=True)
                print(f"{job.name}: {_outcome(out, job, error)}", flush=True,
                      file=sys.stderr if error else sys.stdout)
            ran += [job.name for job in changed]
        return pages.write(out, ran=ran, failures=failures)


def record(folder: Path) -> dict | None:
    """run.json of a finished report; None where there is none that can be read.

    Example: `notebooks.record(Path("reports/01_baseline")) is None`
    """
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _sums_up(job: Job) -> bool:
    """Whether it reads what the others leave: notebooks 9x, which run behind them, here."""
    return job.name.startswith("9")


def _current(known: dict | None, job: Job, out: Path) -> bool:
    if (known is None or known.get("fingerprint") != job.fingerprint
        or known.get("status") == "error"):
        return False
    own = (out / job.name / "run.json").stat().st_mtime
    return (not _sums_up(job)
            or all(path.stat().st_mtime <= own for path in out.glob("[0-8]*/run.json")))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {out}; wait for it, or give another "
                             "--out") from error
        yield


@contextlib.contextmanager
def _room(out: Path) -> Iterator[None]:
    """Say of a full disk which one it is, and leave nothing half-written on it."""
    try:
        yield
    except OSError as error:
        _recover(out)
        if error.errno == errno.ENOSPC:
            raise OSError(f"no space left for the reports in {out}; free some, or give another "
                          "--out") from error
        raise


def _recover(out: Path) -> None:
    """Tidy up after a run that was killed: put back a report caught between two renames, drop what
    is partial."""
    for old in out.glob(".old.*"):
        if (out / old.name.removeprefix(".old.")).exists():
            shutil.rmtree(old)
        else:
            old.rename(out / old.name.removeprefix(".old."))
    for partial in out.glob(".partial.*"):
        shutil.rmtree(partial)


def _here(jobs: Sequence[Job], out: Path, workers: int) -> Iterator[tuple[Job, str | None]]:
    """Run the jobs as processes, at most `workers` at a time, each on cores of its own as far as
    they go, the whole machine while it takes times; yield each with the reason, if it left no
    report."""
    # side by side: long ones first
    waiting = sorted(jobs, key=lambda job: -len(job.source) if workers > 1 else 0)
    cores, running = machine.processors(), {}
    again: set[Job] = set()
    kernels.prepare(warm=len(jobs) > 2)
    free = [cores[k::workers] or [cores[k % len(cores)]] for k in range(workers)]
    lock = out / ".alone" if workers > 1 else None
    if lock:
        lock.write_text("")
    try:
        while waiting or running:
            while waiting and free:
                job, share = waiting.pop(0), free.pop(0)
                print(f"{job.name}: running", flush=True)
                running[job] = start(job, _partial(out, job), _scratch(out, job), cores=share,
                                     lock=lock), share
            for job, (process,
                      share) in [(j, found) for j, found in running.items()
                                 if found[0].poll() is not None]:
                del running[job]
                free.append(share)
                _clear_line()
                why = reason(_partial(out, job)) if process.poll() else None
                if why and DEAD in why and job not in again:  # copies sometimes do; states stay
                    again.add(job)
                    trace = out / ".failed" / f"{job.name}.txt"
                    trace.parent.mkdir(exist_ok=True)
                    (_partial(out, job) / ERRORS).replace(trace)
                    print(f"{job.name}: {why}; once more, what it left stands in {trace}",
                          flush=True)
                    shutil.rmtree(_partial(out, job), ignore_errors=True)
                    waiting.insert(0, job)
                    continue
                yield job, why
            if lock:
                _wake(lock, [process for process, _ in running.values()])
            _show([(job, _partial(out, job)) for job in running])
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.kill()


def _wake(path: Path, processes: Sequence[kernels.Copy]) -> None:
    """Let those go on that stand still for one which was killed while it had the machine alone."""
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        machine.end_of_alone(lock)
        for process in processes:
            # who was killed may have let a notebook go on, and not yet its kernel
            with contextlib.suppress(psutil.Error):
                here = psutil.Process(process.pid)
                if any(part.status() == psutil.STATUS_STOPPED
                       for part in (here, *here.children(recursive=True))):
                    machine.go_on(process.pid)


def _on_cluster(jobs: Sequence[Job], out: Path, address: str) -> Iterator[tuple[Job, str | None]]:
    """Run the jobs as tasks of a dask cluster, whose workers have this package; reports come back
    as archives."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ValueError("--scheduler needs dask.distributed; pip install "
                         "'workbench[cluster]'") from error
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:
        raise ValueError(f"no dask scheduler answers at {address} ({error})") from error
    with client:
        futures = {client.submit(packed, job, pure=False): job for job in jobs}
        for future in as_completed(futures):
            job, failed = futures[future], future.exception()
            if failed is None:
                with tarfile.open(fileobj=io.BytesIO(future.result())) as archive:
                    archive.extractall(_partial(out, job), filter="data")
            yield job, None if failed is None else str(failed).strip().splitlines()[-1]


def _keep(job: Job, out: Path, before: dict | None) -> str | None:
    """Put a finished report in its place. One whose notebook raised goes to .failed and leaves the
    last good one."""
    partial, final = _partial(out, job), out / job.name
    new = record(partial)
    if new is None:
        return "it left no report"
    target = out / ".failed" / job.name if new["status"] == "error" else final
    if before:
        new["previous"] = {"started": before["started"], "headlines": before["headlines"]}
        (partial / "run.json").write_text(json.dumps(new, indent=1))
    old = target.parent / f".old.{target.name}"
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    if new["status"] != "error":
        shutil.rmtree(_scratch(out, job), ignore_errors=True)
        shutil.rmtree(out / ".failed" / job.name, ignore_errors=True)
    return new["error"]


def _outcome(out: Path, job: Job, error: str | None) -> str:
    if error:
        kept = out / ".failed" / job.name / f"{job.name}.ipynb"
        return f"error: {error}" + (f" (see {kept})" if kept.exists() else "")
    done = record(out / job.name)
    held = sum(check["passed"] for check in done["checks"])
    missed = "; ".join(f"{c['name']}: {c['value']} ({c['limit']})" for c in done["checks"]
                       if not c["passed"])
    line = f"{done['status']}, {held} of {len(done['checks'])} checks, {done['duration_s']:.0f} s"
    return f"{line}; {missed}" if missed else line


def _partial(out: Path, job: Job) -> Path:
    return out / f".partial.{job.name}"


def _scratch(out: Path, job: Job) -> Path:
    return out / ".scratch" / f"{job.name}.{job.fingerprint[:12]}"


def _show(running: Sequence[tuple[Job, Path]]) -> None:
    """One live line on a terminal: the cell each notebook has reached, and the progress bar inside
    it."""
    if not sys.stderr.isatty():
        return
    parts = []
    for job, partial in running:
        cells, inner = (_last_bar(partial / name) for name in (CELLS, INNER))
        parts.append(f"{job.name} {cells.partition('|')[0].rpartition(':')[2].strip()} "
                     f"{inner}".strip())
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write("\r\033[K" + "  ·  ".join(parts)[:width])
    sys.stderr.flush()


def _last_bar(path: Path) -> str:
    try:
        return path.read_text(errors="replace").rstrip().rpartition("\r")[2].strip()
    except OSError:
        return ""


def _clear_line() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
