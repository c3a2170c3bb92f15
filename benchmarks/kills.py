"""A search on a cluster whose scheduler and workers are killed ten times at random: what is lost,
what the bookkeeping costs.

    python benchmarks/kills.py [TABLE.csv]

ResNet-20, 200 plans, two workers of dask.distributed. Killed is the scheduler, a worker or the
search itself, and started again. A kill may lose what was being made just then, whose folder stays
behind unfinished and is counted. Then the same search undisturbed, on the evaluations that are
kept: its table must be the same to the byte, and what it takes beyond one of four plans is the
price of asking, telling, looking up and writing, measured and not estimated.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from workbench import files, machine

EVALUATIONS, KILLS, ADDRESS = 200, 10, "tcp://127.0.0.1:18786"
COMMANDS = {
    "scheduler": ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "18786",
                  "--no-dashboard"],
    "worker 0": ["-m", "distributed.cli.dask_worker", ADDRESS, "--nthreads", "1", "--no-dashboard",
                 "--no-nanny"],
    "worker 1": ["-m", "distributed.cli.dask_worker", ADDRESS, "--nthreads", "1", "--no-dashboard",
                 "--no-nanny"],
}


def searching(out: Path, *, scheduler: str | None = None,
              evaluations: int = EVALUATIONS) -> list[str]:
    """The command of the search."""
    found = ["-m", "workbench", "search", "--model", "resnet20", "--data", "fashion_mnist", "--out",
             out, "--latency", "0.5",
             "--sampler", "random", "--evaluations", evaluations, "--images", 100, "--recovery", 2,
             "--workers", 1]
    return [str(part) for part in (*found, *(["--scheduler", scheduler] if scheduler else []))]


def started(command: list[str], folder: Path) -> subprocess.Popen:
    """A process of its own, whose words go to a file."""
    with open(folder / "words.txt", "a") as words:
        return subprocess.Popen([sys.executable, *command], cwd=folder, stdout=words, stderr=words,
                                env=os.environ | {"OMP_NUM_THREADS": "1"},
                                preexec_fn=machine.end_with_parent)


def made(out: Path) -> int:
    """Plans that are finished."""
    return len(list((out / "evaluations").glob("plan-*/plan.json")))


def disturbed(out: Path, folder: Path, draw: random.Random) -> tuple[list[dict], float]:
    """Run the search to its end, killing on the way; each kill with how many plans were finished,
    and how long all took."""
    running = {name: started(command, folder) for name, command in COMMANDS.items()}
    running["search"] = started(searching(out, scheduler=ADDRESS), folder)
    kills, began = [], time.monotonic()
    due = sorted(draw.sample(range(10, EVALUATIONS - 10), KILLS))
    bar = files.progress(total=EVALUATIONS, title="search that is killed", unit="plan")
    while not (out / "plans.csv").exists() or running["search"].poll() is None:
        time.sleep(0.2)
        done = made(out)
        bar.update(done - bar.n)
        if due and done >= due[0]:
            name = draw.choice(list(running))
            running[name].kill()
            kills.append({"kill": len(kills) + 1, "killed": name, "plans": done})
            bar.write(f"{name} killed behind plan {done}")
            due.pop(0)
        for name, process in running.items():
            if process.poll() is not None and not (out / "plans.csv").exists():
                running[name] = started(COMMANDS.get(name) or searching(out, scheduler=ADDRESS),
                                        folder)
    bar.close()
    for process in running.values():
        process.kill()
    return kills, time.monotonic() - began


def main(table: Path) -> None:
    """Run both searches and write the table."""
    folder = Path(tempfile.mkdtemp())
    one = folder / "one"
    kills, took = disturbed(one, folder, random.Random(0))
    lost = [path for path in (one / "evaluations").glob(".plan-*") if path.is_dir()]
    before, alone = made(one), {}
    for evaluations in (4, EVALUATIONS):
        other = folder / str(evaluations)
        shutil.copytree(one / "evaluations", other / "evaluations")
        began = time.monotonic()
        subprocess.run([sys.executable, *searching(other, evaluations=evaluations)], check=False,
                       stdout=subprocess.DEVNULL)
        alone[evaluations] = time.monotonic() - began
    alike = (one / "plans.csv").read_bytes() == (other / "plans.csv").read_bytes()
    price, asked = alone[EVALUATIONS] - alone[4], len(pd.read_csv(one / "plans.csv"))
    frame = pd.DataFrame(kills).assign(asked=asked, made=before, lost=len(lost), same_bytes=alike,
                                       made_again=made(other) - before, took_s=round(took, 1),
                                       bookkeeping_s=round(price, 2),
                                       bookkeeping=round(price / took, 4),
                                       machine=machine.describe())
    with files.atomic(table) as new:
        frame.to_csv(new, index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent / "reports"
         / "benchmarks" / "kills.csv")
