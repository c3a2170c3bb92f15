"""The command line: `workbench report` regenerates the reports, `workbench compress` runs a recipe,
`workbench search` finds one within limits, `workbench compare` judges two models, `workbench
listen` tells what is said."""

import sys
from pathlib import Path

import click

from workbench import machine
from workbench.errors import UnsupportedModelError

PROBLEMS = (ValueError, OSError, ImportError, UnsupportedModelError)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="workbench")
@click.option("--traceback", is_flag=True, expose_value=False,
              help="where an error arose, not only what it is")
def cli() -> None:
    """Compress neural networks and regenerate every table about it.

    Example: workbench report 01_baseline
    """


@cli.command()
@click.argument("notebooks", nargs=-1)
@click.option("--profile", default="quick", show_default=True,
              help="quick, full or smoke: see notebooks/profiles.yaml")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="a notebook's parameter; may be repeated")
@click.option("--jobs", default=min(machine.cores(), 4), show_default="cores, at most 4",
              help="notebooks at a time; while one takes times, the others stand still")
@click.option("--scheduler", metavar="ADDRESS",
              help="run on this dask.distributed scheduler's workers")
@click.option("--out", type=Path, help="where reports go  [default: reports, or reports/PROFILE]")
@click.option("--notebooks", "folder", type=Path, default=Path("notebooks"), show_default=True,
              help="where notebooks lie")
@click.option("--force", is_flag=True, help="run what has not changed, too")
def report(notebooks, profile, settings, jobs, scheduler, out, folder, force) -> None:
    """Execute NOTEBOOKS (all by default) and write the report site.

    Exit code 0: every check holds; 1: one does not; 2: bad input, or a notebook raised an error.

    Example: workbench report 22_quantization --profile smoke
    """
    from workbench.reporting import notebooks as runner
    from workbench.reporting import parameters

    planned = parameters.plan(notebooks, folder=folder, profile=profile, settings=settings)
    out = out or Path("reports") / ("" if profile == "quick" else profile)
    summary = runner.run(planned, out=out, workers=jobs, scheduler=scheduler, force=force)
    failed = f", {len(summary['failures'])} notebooks failed" if summary["failures"] else ""
    click.echo(f"{summary['checks_passed']} of {summary['checks']} checks hold{failed}; open "
               f"{out / 'index.html'}")
    raise SystemExit(2 if summary["failures"] else 0 if summary["passed"] else 1)


@cli.command()
@click.argument("reference")
@click.argument("candidate")
@click.option("--data", "source", help="an embedded set, hub:ID or folder:PATH  [default: a "
              "checkpoint's own, or fashion_mnist]")
@click.option("--examples", type=click.IntRange(min=1),
              help="how many test examples, drawn by --seed  [default: all]")
@click.option("--seed", default=0, show_default=True)
@click.option("--cosine", default=0.995, show_default=True,
              help="least cosine of any example's outputs")
@click.option("--l2", default=1e-4, show_default=True,
              help="largest relative L2 distance of any example's outputs")
@click.option("--agreement", default=1.0, show_default=True,
              help="least share of equal top-1 answers")
def compare(reference, candidate, source, examples, seed, cosine, l2, agreement) -> None:
    """Do REFERENCE and CANDIDATE compute the same? Each a model's name, a checkpoint or an .onnx
    file.

    Exit code 0: equivalent; 1: not; 2: bad input.

    Example: workbench compare resnet20 model.onnx --examples 1000
    """
    from workbench.measures import equivalence
    from workbench.subjects import data, models

    given = [m for m in (reference, candidate) if not m.endswith(".onnx")]
    known = next((models.preprocessing(m) for m in given), None)
    source = source or next((own for m in given if (own := models.trained_on(m))), "fashion_mnist")
    task = data.load(source, preprocessing=known)
    test = task.test.subset(examples, seed=seed) if examples else task.test
    both = [m if m.endswith(".onnx") else models.load(m, task) for m in (reference, candidate)]
    verdict = equivalence.compare(both[0], both[1], test,
                                  limits=equivalence.Limits(cosine, l2, agreement))
    for check in verdict.checks():
        click.echo(f"{'✓' if check['passed'] else '✗'} {check['name']}: {check['value']:.6g} "
                   f"({check['limit']})")
    click.echo(f"{'equivalent' if verdict.passed else 'not equivalent'} on {verdict.n:,} "
               f"{task.objective.unit}s of {task.name}")
    if not verdict.passed:
        click.echo(_first_parting(both, test.subset(200)))
    raise SystemExit(0 if verdict.passed else 1)


@cli.command()
@click.argument("recipe")
@click.option("--model", "name", help="a model's name or checkpoint, as models.load takes it")
@click.option("--data", "source", help="an embedded set, hub:ID or folder:PATH")
@click.option("--out", type=Path, required=True, help="where model, file, table and stages go")
@click.option("--examples", type=click.IntRange(min=1),
              help="how many test examples judge, drawn by --seed  [default: all]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1),
              help="of the runtime that is timed")
@click.option("--blocks", default=20, show_default=True, type=click.IntRange(min=5),
              help="rounds of the interleaved timing")
@click.option("--seed", default=0, show_default=True)
def compress(recipe, name, source, out, examples, threads, blocks, seed) -> None:
    """Take a model through RECIPE, a YAML file or one that comes with the package, and leave the
    smaller one in --out.

    There are then model.onnx, model.safetensors, stages.csv (accuracy with interval, paired change,
    size and latency of each stage) and run.json. Killed, it goes on where it stopped. Exit code 0:
    the file answers as the module does; 1: not; 2: bad input.

    Example: workbench compress int8 --model resnet20 --data fashion_mnist --out smaller
    """
    from workbench.plans import recipe as recipes
    from workbench.plans.compress import compress as run
    from workbench.subjects import data, models
    from workbench.subjects.subject import Subject

    plan = recipes.load(recipe)
    for key, given, wanted in (("model", name, plan.model), ("data", source, plan.data)):
        if given and wanted and given != wanted:
            raise ValueError(f"recipe {recipe} is for {key} {wanted}, not {given}; leave --{key} "
                             "out, or change the recipe")
        if not given and not wanted:
            raise ValueError(f"compress needs --{key}; recipe {recipe} names none")
    name, source = name or plan.model, source or plan.data
    task = data.load(source, preprocessing=models.preprocessing(name))
    model = models.load(name, task)
    recipes.expect_layers(plan.steps, model, where=recipe)
    test = task.test.subset(examples, seed=seed) if examples else task.test
    made = run(Subject(model, task), plan.steps, out, test=test, threads=threads, blocks=blocks,
               seed=seed)
    click.echo(made.stages.round(4).to_string(index=False))
    click.echo(made.stages.attrs["machine"])
    for check in made.verdict.checks():
        click.echo(f"{'✓' if check['passed'] else '✗'} {check['name']}: {check['value']:.6g} "
                   f"({check['limit']})")
    verdict = "answers as the module does" if made.verdict.passed else "parts from the module"
    click.echo(f"{out / 'model.onnx'}: {verdict}")
    raise SystemExit(0 if made.verdict.passed else 1)


@cli.command()
@click.option("--model", "name", required=True,
              help="a model's name or checkpoint, as models.load takes it")
@click.option("--data", "source", required=True, help="an embedded set, hub:ID or folder:PATH")
@click.option("--out", type=Path, required=True, help="where the plan, its file and the journal go")
@click.option("--latency", type=float, help="limit: share of the model's own latency")
@click.option("--size", type=float, help="limit: share of its file's bytes")
@click.option("--lost", type=float, help="limit: accuracy lost, a fraction")
@click.option("--sampler", default="forecast", show_default=True, help="who proposes plans",
              type=click.Choice(["forecast", "greedy", "random", "nsga2", "tpe", "gp", "policy"]))
@click.option("--evaluations", default=64, show_default=True, type=click.IntRange(min=1),
              help="plans that are made, at most")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True),
              help="when no further plans are begun")
@click.option("--workers", default=machine.cores(), show_default="cores",
              type=click.IntRange(min=1), help="plans made at a time")
@click.option("--scheduler", metavar="ADDRESS",
              help="make plans on this dask.distributed scheduler's workers")
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=50),
              help="validation examples that judge")
@click.option("--recovery", default=60, show_default=True, type=click.IntRange(min=0),
              help="steps of distilling behind a cut")
@click.option("--seed", default=0, show_default=True)
def search(name, source, out, latency, size, lost, sampler, evaluations, minutes, workers,
           scheduler, images, recovery, seed) -> None:
    """Find the plan that loses least within limits (--latency, --size, --lost) and leave its
    recipe, model and file in --out.

    Killed, it goes on where it stopped. The best plans are judged on the test split, which the
    search never saw, and timed in a process of their own. Exit code 0: the plan keeps the limits;
    1: none does, the nearest is left; 2: bad input.

    Example: workbench search --model resnet20 --data fashion_mnist --latency 0.7 --out found
    """
    from workbench.plans.search import Limits
    from workbench.plans.search import search as run
    from workbench.subjects import data, models
    from workbench.subjects.subject import Subject

    limits = Limits(latency, size, lost)
    task = data.load(source, preprocessing=models.preprocessing(name))
    found = run(Subject(models.load(name, task), task), limits, out, sampler=sampler,
                evaluations=evaluations, minutes=minutes, workers=workers, scheduler=scheduler,
                images=images, recovery=recovery, seed=seed)
    click.echo(found.confirmed.round(4).to_string(index=False))
    click.echo(f"{found.reason}; {len(found.plans)} plans made, racing spared {found.saved:.0%} of "
               "their scoring")
    click.echo(f"{out / 'recipe.yaml'}: workbench compress takes it, {out / 'model.onnx'} is its "
               "file")
    raise SystemExit(0 if found.reason == "within the limits" else 1)


@cli.command()
@click.argument("source", metavar="FILE", required=False)
@click.option("--model", "name", default="word_spotter", show_default=True,
              help="a checkpoint of a word spotter, or an .onnx file of streaming.export")
@click.option("--bits", type=click.Choice(["8", "32"]), default="8", show_default=True,
              help="of a checkpoint's weights")
@click.option("--gate/--no-gate", default=True, show_default=True,
              help="rest where silero-vad hears no speech")
@click.option("--threshold", default=0.8, show_default=True, type=click.FloatRange(0, 1),
              help="probability of a word")
@click.option("--pace", type=click.FloatRange(min=0, min_open=True),
              help="times real time  [default: as fast as it can]")
@click.option("--microphone", is_flag=True,
              help="listen to the microphone instead of FILE, until Ctrl-C")
@click.option("--state", type=Path,
              help="where each second is remembered: killed, the next run goes on there")
def listen(source, name, bits, gate, threshold, pace, microphone, state) -> None:
    """Print what is said in FILE (WAV, FLAC, OGG), one event a line: seconds, word, probability,
    what it means.

    Sound of another rate than 8 kHz is resampled, and said to be. Exit code 0; 2: bad input.

    Example: workbench listen said.wav --bits 8
    """
    from workbench.plans import chain as chains

    if bool(source) == microphone:
        raise ValueError("listen takes a FILE or --microphone, one of them")
    samples = None if microphone else chains.recording(source, told=click.echo)
    with chains.chain(name, bits=int(bits), gate=gate, threshold=threshold) as listener:
        chains.listen(listener, samples, pace=pace, state=state, told=click.echo)


def _first_parting(both: list, test) -> str:
    from workbench.measures import equivalence

    try:
        parted = equivalence.by_layer(both[0], both[1], test).query("first")
    except (ValueError, UnsupportedModelError) as error:  # of other widths, say, or without names
        return f"layer by layer they cannot be compared: {error}"
    return ("the first layer that parts: "
            f"{parted.layer.iloc[0] if len(parted) else 'none; only the outputs differ'}")


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2.

    Example: `sys.argv = ["workbench", "--help"]; main()`
    """
    try:
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as error:
        sys.exit(_refuse(error.format_message()))
    except Exception as error:
        if not isinstance(error, PROBLEMS) or "--traceback" in sys.argv:
            raise
        sys.exit(_refuse(str(error)))


def _refuse(message: str) -> int:
    click.echo(f"workbench: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    main()
