"""Train what data/trained holds: the trainings of the notebooks of methods, which the quick profile
then only measures.

    python data/build_trained.py 21_distillation [...] [--work FOLDER]

Runs the notebooks with `trained` off and their own parameters; stopped, it goes on where it was.
Every training is kept with its identity (start, data, recipe, loss, seed), history and machine:
`states.finish`. What a notebook's parameters no longer ask for is to be deleted by hand.
"""

import argparse
import os
from pathlib import Path

import papermill

from workbench import files
from workbench.subjects import states

HERE = Path(__file__).parent
TRAINED = HERE / "trained"


def main() -> None:
    """Run the notebooks that the command line names."""
    told = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("notebooks", nargs="+")
    told.add_argument("--work", type=Path, default=HERE.parent / "reports" / ".trained",
                      help="unfinished trainings, reports")
    asked = told.parse_args()
    for name in asked.notebooks:
        work = (asked.work / name).resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.environ |= {"WORKBENCH_REPORT": str(work), "WORKBENCH_SCRATCH": str(work / "scratch")}
        notebook = HERE.parent / "notebooks" / f"{name}.ipynb"
        papermill.execute_notebook(notebook, work / notebook.name, {"trained": False},
                                   cwd=notebook.parent)
        for state in sorted((work / "scratch").glob("*.state")):
            states.finish(state, TRAINED / f"{name[:2]}-{state.stem.replace(' ', '-')}.safetensors")
        sums = [f"{files.sha256(path)}  {path.name}\n"
                for path in sorted(TRAINED.glob("*.safetensors"))]
        (TRAINED / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
