"""Run one notebook in this process: `python -m workbench.reporting.execution JOB.json`.

Each notebook has such a process, because papermill launches kernels from threads unsafely
(papermill issue 239) and because a crash then costs one notebook only. The runner of a longer run
copies them from one that has imported everything.
"""

import datetime
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from workbench import files, machine
from workbench.reporting import kernels

# a grammar of addresses: papermill's imports build it, in 1.5 s, and nobody asks
sys.modules.setdefault("rfc3987_syntax", None)
CELLS, INNER = "cells.progress", "inner.progress"  # what the runner's progress line reads
ERRORS = "errors.txt"
DEAD = "its kernel died"  # of which reason() tells
FULL = files.REPORTS / "full"  # the committed reports of the full profile


@dataclass(frozen=True, eq=False)
class Job:
    """One notebook to execute. source: the notebook's text; folder: where notebooks run, so that
    paths resolve.

    Example: `Job("01_one", "{}", {}, "quick", "0", ".").given == ()`
    """

    name: str
    source: str
    parameters: dict
    profile: str
    fingerprint: str
    folder: str
    given: tuple[str, ...] = ()  # parameters that the user set


def start(job: Job, out: Path, scratch: Path, *, cores: Sequence[int],
          lock: Path | None = None) -> kernels.Copy:
    """A process that executes `job` on `cores` alone and leaves its report in `out`; it dies with
    this one.

    lock: of a run of several notebooks at a time, the file by which one of them has the machine
    alone (machine.alone).

    Example: `start(job, Path("out"), Path("scratch"), cores=[0]).wait()`
    """
    path, environment = _written(job, out, scratch, cores)
    run = {"lock": str(lock.resolve()), "processors": machine.processors()} if lock else None
    return kernels.copied(_child, path, job.folder, environment, cores, run)


def packed(job: Job) -> bytes:
    """The report of `job`, executed on this machine, as a tar archive: what a cluster's worker
    sends back.

    Example: `tarfile.open(fileobj=io.BytesIO(packed(job)))`
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / job.name
        # the worker's own clone
        here = job if Path(job.folder).is_dir() else replace(job, folder=str(Path.cwd()))
        cores = machine.processors()
        path, environment = _written(here, out, Path(folder) / "scratch", cores)
        with open(out / ERRORS, "wb") as errors:
            done = subprocess.run([sys.executable, "-m", "workbench.reporting.execution", path],
                                  cwd=here.folder, env=environment,
                                  preexec_fn=partial(_settle, cores), stdout=subprocess.DEVNULL,
                                  stderr=errors, check=False)
        if done.returncode:
            raise RuntimeError(reason(out))
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(out, arcname=".")
        return archive.getvalue()


def _written(job: Job, out: Path, scratch: Path,
             cores: Sequence[int]) -> tuple[str, dict[str, str]]:
    """The job file, and the environment in which it is executed."""
    out.mkdir(parents=True)
    (out / "job.json").write_text(json.dumps(asdict(job)))
    return str((out / "job.json").resolve()), os.environ | {
        "WORKBENCH_REPORT": str(out.resolve()), "WORKBENCH_SCRATCH": str(scratch.resolve()),
        "WORKBENCH_PROGRESS": str((out / INNER).resolve()), "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(len(cores))}


def _child(path: str, folder: str, environment: dict[str, str], cores: Sequence[int],
           run: dict | None) -> None:
    """In a copy: execute the job file. run: what machine.alone needs, where there are several at a
    time."""
    _settle(cores)
    with open(os.devnull, "wb") as nowhere, open(Path(path).parent / ERRORS, "wb") as errors:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    if run:
        environment = environment | {machine.RUN: json.dumps(run | {"runner": os.getppid()})}
    kernels.settle(folder, environment, threads=len(cores))
    main(path)


def execute(job: Job, out: Path) -> None:
    """Execute the notebook, write NAME.ipynb, index.html and run.json into `out`; errors of cells
    go to run.json.

    Example: `execute(job, Path("out"))`
    """
    kernel = kernels.Reserve()
    import papermill
    from papermill.exceptions import PapermillExecutionError

    started, clock, error = datetime.datetime.now(datetime.UTC), time.monotonic(), None
    source, executed = out / "source.ipynb", out / f"{job.name}.ipynb"
    source.write_text(job.source)
    try:
        with open(out / CELLS, "w") as cells:
            papermill.execute_notebook(source, executed, job.parameters, cwd=job.folder,
                                       kernel_name="python3", progress_bar={"file": cells},
                                       kernel_manager_class=kernel.manager())
    except PapermillExecutionError as failure:
        error = (f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}".strip()
                 .splitlines()[0])
    except RuntimeError as failure:
        if kernel.copy.poll() is None:
            raise
        raise RuntimeError(f"{DEAD} (exit code {kernel.copy.poll()}): {failure}") from failure
    finally:
        kernel.end()
    result = {"checks": [], "headlines": []}
    if (out / "result.json").exists():
        result = json.loads((out / "result.json").read_text())
    if job.profile == "quick" and not job.given:
        result["checks"] += agreement(result["headlines"], FULL / job.name / "run.json")
    status = ("error" if error else "passed" if all(check["passed"] for check in result["checks"])
              else "failed")
    title = _finish(out, executed, status)
    record = {
        "name": job.name, "title": title, "status": status, "error": error, "profile": job.profile,
        "parameters": job.parameters,
        "seeds": {k: v for k, v in job.parameters.items() if "seed" in k},
        **result, "tables": _names(out / "tables"), "figures": _names(out / "figures"),
        "started": started.isoformat(timespec="seconds"),
        "duration_s": round(time.monotonic() - clock, 1),
        "commit": _commit(job.folder), "versions": machine.versions(),
        "hardware": machine.hardware(),
        "fingerprint": job.fingerprint,
    }
    for spare in (source, out / CELLS, out / INNER, out / ERRORS, out / "job.json",
                  out / "result.json"):
        spare.unlink(missing_ok=True)
    with files.atomic(out / "run.json") as new:
        new.write_text(json.dumps(record, indent=1))


def agreement(headlines: Sequence[dict], full: Path) -> list[dict]:
    """A check for each headline that has an interval, here and in the full run's record: how far
    the two intervals lie apart, at most 0. None where there is no such record.

    Example: `agreement([], Path("reports/full/20_channel_pruning/run.json")) == []`
    """
    stored = json.loads(full.read_text())["headlines"] if full.exists() else []
    known = {line["name"]: line for line in stored if "low" in line}
    return [{"name": f"{own['name']}: apart from the full run's [{other['low']:.4g}, "
                     f"{other['high']:.4g}]",
             "value": apart, "limit": "<= 0", "passed": apart <= 0}
            for own in headlines if "low" in own and (other := known.get(own["name"]))
            for apart in [max(own["low"] - other["high"], other["low"] - own["high"], 0.0)]]


def reason(out: Path) -> str:
    """Why the process that was to fill `out` failed: the last line of its error output, which in
    Python names it.

    Example: `reason(Path("."))`
    """
    if shutil.disk_usage(out).free < 2**20:  # then not even the error could be written
        return f"no space left for the reports in {out.parent}; free some, or give another --out"
    lines = ((out / ERRORS).read_text(errors="replace").strip().splitlines()
             if (out / ERRORS).exists() else [])
    return lines[-1] if lines else "its process ended without a word, for want of memory or disk"


def _finish(out: Path, executed: Path, status: str) -> str:
    """Write index.html of the executed notebook; return its title, the first heading."""
    import nbformat

    from workbench.reporting import pages

    notebook = nbformat.read(executed, as_version=4)
    # above the heading of one that failed papermill puts a word of its own
    first = next((cell.source for cell in notebook.cells
                  if cell.cell_type == "markdown" and cell.source.startswith("#")), "")
    title = first.splitlines()[0].lstrip("# ").strip() if first else executed.stem
    (out / "index.html").write_text(pages.notebook_page(notebook, title, status), encoding="utf-8")
    return title


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.*"))


def _commit(folder: str) -> str | None:
    shown = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=folder,
                           capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def _settle(cores: Sequence[int]) -> None:
    """In the child: keep to its cores, and be killed when the runner is, so that no orphan goes on
    computing."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    machine.end_with_parent()


def main(path: str) -> None:
    """Execute this job file.

    Example: `main("out/job.json")`
    """
    execute(Job(**json.loads(Path(path).read_text())), Path(path).parent)


if __name__ == "__main__":
    main(sys.argv[1])
