"""The runner on small notebooks: what is kept, skipped, refused; the real notebooks in the smoke
profile."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from workbench import machine
from workbench.reporting import execution, notebooks, parameters
from workbench.reporting.report import Report

ROOT = Path(__file__).parents[1]
BODY = """
import time
from workbench.reporting.report import Report
report = Report("x")
time.sleep(pause)
if fault: raise ValueError("layer3 is missing")
report.headline("images", images)
print(report.check("images", images, at_least=least))
"""


def write(folder: Path, name: str, body: str = BODY) -> None:
    parameters = ("images: int = 10  # many\nleast: float = 5.0  # limit\n"
                  "pause: float = 0.0  # s\nfault: bool = False  # raise")
    code = nbformat.v4.new_code_cell
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"),
             code(parameters, metadata={"tags": ["parameters"]}), code(body)]
    folder.mkdir(exist_ok=True)
    (folder / "profiles.yaml").touch()
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    for name in ("01_one", "02_two"):
        write(tmp_path / "notebooks", name)
    return tmp_path / "notebooks"


def run(folder, *names, settings=(), **options):
    return notebooks.run(parameters.plan(names, folder=folder, settings=settings),
                         out=folder.parent / "reports", **options)


def full(folder: Path, *headlines: dict) -> Path:
    (folder / "run.json").write_text(json.dumps({"headlines": list(headlines)}))
    return folder / "run.json"


def test_a_quick_figure_is_held_against_the_full_runs_interval(tmp_path):
    lost = {"name": "lost", "value": -0.01, "low": -0.015, "high": -0.005}
    assert execution.agreement([lost], tmp_path / "none.json") == []
    without = full(tmp_path, {"name": "lost", "value": -0.01})
    assert execution.agreement([lost], without) == []
    near = full(tmp_path, {"name": "lost", "value": -0.003, "low": -0.006, "high": 0.0})
    found = execution.agreement([lost, {"name": "time", "value": 1.0}], near)
    assert [check["passed"] for check in found] == [True]
    far = full(tmp_path, {"name": "lost", "value": 0.0, "low": -0.002, "high": 0.002})
    [check] = execution.agreement([lost], far)
    assert not check["passed"]
    assert check["value"] == pytest.approx(0.003)
    assert "[-0.002, 0.002]" in check["name"]
    nothing = float("nan")  # of one seed
    [check] = execution.agreement([lost | {"low": nothing, "high": nothing}], far)
    assert not check["passed"]


def test_a_notebook_that_disagrees_with_its_committed_full_run_is_red(folder):
    said = ("report.headline('8-bit weights and activations against float32', -0.4, "
            "interval=(-0.5, images / -100))")
    write(folder, "22_quantization", BODY + said)
    run(folder, "22_quantization")
    stored = folder.parent / "reports" / "22_quantization" / "run.json"
    told = json.loads(stored.read_text())
    assert told["status"] == "failed"
    known = json.loads((execution.FULL / "22_quantization" / "run.json").read_text())["headlines"]
    assert told["checks"][-1]["value"] == pytest.approx(0.1 + known[0]["low"])
    run(folder, "22_quantization", settings=["images=9"])  # the full run's parameters no more
    assert json.loads(stored.read_text())["status"] == "passed"


def command(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "workbench", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True,
                          check=False)


def test_a_notebook_that_sums_up_runs_behind_the_others_and_again_when_one_of_them_did(folder):
    found = ("from workbench.reporting.report import Report\nreport = Report('90_sum')\n"
             "found = report.others['here'].glob('[0-8]*/run.json')\n"
             "report.headline('there', sorted(path.parent.name for path in found))")
    write(folder, "90_sum", found)
    assert run(folder)["ran"] == ["01_one", "02_two", "90_sum"]
    told = json.loads((folder.parent / "reports" / "90_sum" / "run.json").read_text())
    assert told["headlines"][0]["value"] == ["01_one", "02_two"]
    assert run(folder)["ran"] == []
    assert run(folder, "02_two", settings=["images=11"])["ran"] == ["02_two"]
    assert run(folder, "90_sum")["ran"] == ["90_sum"]


def test_a_run_leaves_what_the_contract_names(folder):
    summary = run(folder)
    out = folder.parent / "reports"
    assert summary["passed"]
    assert {p.name for p in out.iterdir()
            if not p.name.startswith(".")} == {"01_one", "02_two", "committed", "index.html",
                                               "reference", "summary.json"}
    assert {p.name for p in (out / "01_one").iterdir()} == {"01_one.ipynb", "index.html",
                                                            "run.json"}
    record = json.loads((out / "01_one" / "run.json").read_text())
    assert record["status"] == "passed"
    assert record["checks"] == [{"name": "images", "value": 10, "limit": ">= 5.0", "passed": True}]
    assert record["title"] == "Title of 01_one"
    assert {"parameters", "seeds", "versions", "commit", "hardware", "duration_s"} <= record.keys()


def test_what_has_not_changed_is_not_run_again_and_what_has_is(folder, capsys):
    run(folder)
    assert run(folder)["ran"] == []
    write(folder, "02_two", BODY + "\nprint('new')")
    assert run(folder)["ran"] == ["02_two"]
    assert run(folder, "01_one", settings=["images=11"])["ran"] == ["01_one"]
    assert "02_two: unchanged, not run again (passed)" in capsys.readouterr().out


def test_the_index_says_what_changed(folder):
    run(folder)
    summary = run(folder, settings=["images=12"])
    assert summary["reports"][0]["changed"] == ["images: 10 → 12"]
    assert "images: 10 → 12" in (folder.parent / "reports" / "index.html").read_text()


def test_a_check_that_does_not_hold_makes_the_report_red_and_stays(folder):
    write(folder, "02_two", BODY.replace("at_least=least", "at_least=99"))
    for _ in range(2):  # run, then unchanged: still red
        summary = run(folder)
        assert not summary["passed"]
        assert not summary["failures"]
        assert [entry["status"] for entry in summary["reports"]] == ["passed", "failed"]


def test_a_notebook_that_raises_keeps_the_last_good_report_and_is_run_again(folder):
    run(folder)
    summary = run(folder, "01_one", settings=["fault=true"])
    assert summary["failures"] == {"01_one": "cell 3: ValueError: layer3 is missing"}
    out = folder.parent / "reports"
    assert json.loads((out / "01_one" / "run.json").read_text())["status"] == "passed"
    assert (out / ".failed" / "01_one" / "01_one.ipynb").exists()
    # stays until it is run well
    assert "01_one" in run(folder, "02_two", settings=["images=9"])["failures"]
    assert not run(folder, force=True)["failures"]


def test_several_notebooks_at_a_time_leave_the_same(folder):
    body = BODY + "import os\nreport.headline('own cores', len(os.sched_getaffinity(0)))"
    for name in ("01_one", "02_two"):
        write(folder, name, body)
    summary = run(folder, workers=2)
    assert [entry["status"] for entry in summary["reports"]] == ["passed", "passed"]
    half = machine.cores() / 2
    for name in ("01_one", "02_two"):
        ran = json.loads((folder.parent / "reports" / name / "run.json").read_text())
        assert ran["hardware"]["cores"] == machine.cores()
        assert ran["headlines"][-1]["value"] in (max(1, int(half)),
                                                 math.ceil(
                                                     half)), "each of two has cores of its own"


TICKING = """
import time
from pathlib import Path
from workbench.reporting.report import Report
from workbench import machine
report, ticks, began = Report("x"), [], (time.perf_counter(), machine.clock())
Path("ticking").touch()
while not Path("timed").exists() and len(ticks) < 3000:
    ticks.append(time.time())
    time.sleep(0.01)
ticks.append(time.time())
report.check("longest pause, s", max(b - a for a, b in zip(ticks, ticks[1:])), at_least=1.5)
stood = (time.perf_counter() - began[0]) - (machine.clock() - began[1])
report.check("what the clock leaves out, s", abs(stood - 2), at_most=0.3)
"""
TIMING = """
import os, time
from pathlib import Path
from workbench import machine
from workbench.reporting.report import Report
report = Report("x")
while not Path("ticking").exists(): time.sleep(0.05)
with machine.alone(), machine.alone():
    report.check("cores while alone", len(os.sched_getaffinity(0)), equals=machine.cores())
    time.sleep(2)
    {last}
Path("timed").touch()
"""


def test_while_one_notebook_takes_times_the_others_stand_still(folder):
    write(folder, "01_one", TICKING)
    write(folder, "02_two", TIMING.format(last=""))
    summary = run(folder, workers=2)
    assert summary["passed"]
    assert summary["checks"] == 3


@pytest.mark.parametrize("killed", ["os.getppid()", "os.getpid()"])
def test_who_is_killed_while_alone_holds_nobody_up(folder, killed):
    write(folder, "01_one", TICKING)
    write(folder, "02_two", TIMING.format(last=f"Path('timed').touch(); os.kill({killed}, 9)"))
    summary = run(folder, workers=2)
    assert list(summary["failures"]) == ["02_two"]
    assert [entry["name"] for entry in summary["reports"]
            if entry["status"] == "passed"] == ["01_one"]


def test_a_runner_that_is_killed_leaves_nobody_standing(folder):
    write(folder, "01_one", TICKING)
    write(folder, "02_two", TIMING.format(last="Path('alone').touch(); time.sleep(60)"))
    process = subprocess.Popen([sys.executable, "-m", "workbench", "report", "--notebooks", folder,
                                "--jobs", "2", "--out",
                                folder.parent / "reports"], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    while not (folder.parent / "alone").exists():
        assert process.poll() is None
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(started, timeout=20)
    assert len(gone) >= 4
    assert not alive


def test_a_dask_cluster_leaves_the_same(folder):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None,
                      processes=False) as cluster:
        summary = run(folder, "01_one", scheduler=cluster.scheduler_address)
    assert summary["passed"]
    assert (folder.parent / "reports" / "01_one" / "index.html").exists()


def test_killed_anywhere_nothing_is_half_written_and_the_next_run_completes(folder):
    """The runner is killed at four moments; what is finished is whole, and no process of it goes
    on."""
    out = folder.parent / "reports"
    arguments = [sys.executable, "-m", "workbench", "report", "--notebooks", folder, "--out", out,
                 "--set", "pause=0.5"]
    for wait in (0.8, 2.5, 4.0, 5.5):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for report in out.glob("[0-9]*"):
            assert json.loads((report / "run.json").read_text())["status"] == "passed"
            assert (report / "index.html").read_text().rstrip().endswith("</html>")
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
    assert len(list(out.glob("[0-9]*/run.json"))) == 2
    assert not [p for p in out.iterdir() if p.name.startswith((".partial", ".old"))]


def test_two_runs_do_not_write_to_the_same_folder(folder):
    out = folder.parent / "reports"
    out.mkdir()
    with notebooks._locked(out), pytest.raises(ValueError, match="another run is writing to"):
        run(folder)


def test_a_report_caught_between_two_renames_is_put_back(folder):
    run(folder)
    out = folder.parent / "reports"
    (out / "01_one").rename(out / ".old.01_one")
    assert run(folder)["ran"] == []
    assert (out / "01_one" / "run.json").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["99_none"], "unknown notebook '99_none'; there are 01_one, 02_two"),
    (["--set", "speed=1"], "unknown parameter 'speed'; 01_one, 02_two take fault, "
     "images, least, pause"),
    (["--set", "images=many"], "parameter 'images' expects int, found 'many'"),
    (["--set", "images=true"], "parameter 'images' expects int, found True"),
    (["--set", "images"], "--set 'images' is not name=value"),
    (["--set", "images=[1"], "the value is not valid YAML"),
    (["--profile", "slow"], "unknown profile 'slow'"),
    (["--jobs", "0"], "jobs is 0"),
    (["--jobs", "x"], "'x' is not a valid integer"),
    (["--scheduler", "tcp://127.0.0.1:1"], "no dask scheduler answers"),
    (["--notebooks", "nowhere"], "no folder of notebooks nowhere"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder, arguments, message):
    out = folder.parent / "reports"
    done = command("report", "--notebooks", folder, "--out", out, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("workbench:")]) == 1
    assert not list(out.glob("[0-9]*"))


def test_a_profile_that_names_what_is_not_there_is_refused(folder):
    for text, message in (("quick: {09_x: {}}", "the unknown notebook '09_x'"),
                          ("slow: {}", "unknown profile 'slow'"),
                          ("quick: {01_one: {speed: 1}}", "01_one has no parameter 'speed'"),
                          ("a: [", "not valid YAML")):
        (folder / "profiles.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            parameters.plan([], folder=folder)


def test_a_folder_of_notebooks_needs_no_profiles(folder):
    (folder / "profiles.yaml").unlink()
    assert parameters.plan([], folder=folder)[0].parameters


def test_a_notebook_of_any_name_runs_and_an_empty_folder_is_refused(folder, tmp_path):
    mine = folder.parent / "mine"
    write(mine, "first_use")
    told = json.loads((mine / "first_use.ipynb").read_text())
    del told["metadata"]["kernelspec"]  # as nbformat makes one
    (mine / "first_use.ipynb").write_text(json.dumps(told))
    made = command("report", "--notebooks", mine, "--out", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert "1 of 1 checks hold" in made.stdout
    assert "first_use" in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "none").mkdir()
    refused = command("report", "--notebooks", tmp_path / "none", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "holds no notebook" in refused.stderr


def test_compare_takes_a_checkpoints_own_data(folder, tmp_path, model, task):
    from workbench.deployment import onnx
    from workbench.subjects import models

    models.save(model, tmp_path / "mine.safetensors")
    onnx.export(model, task.example, tmp_path / "mine.onnx")
    made = command("compare", tmp_path / "mine.safetensors", tmp_path / "mine.onnx", "--examples",
                   100)
    assert made.returncode == 0, made.stderr
    assert "of fashion_mnist" in made.stdout


def test_settings_and_defaults_keep_their_types(folder):
    job, = parameters.plan(["01_one"], folder=folder, settings=["least=1e-4"])
    assert job.parameters == {"images": 10, "least": 1e-4, "pause": 0.0, "fault": False}


def test_a_damaged_notebook_is_named(folder):
    (folder / "02_two.ipynb").write_text('{"cells": [')
    with pytest.raises(ValueError, match=r"02_two.ipynb is no notebook that can be run"):
        parameters.plan([], folder=folder)


def test_a_reports_folder_that_cannot_be_written_is_refused(folder):
    (folder.parent / "reports").write_text("a file")
    done = command("report", "--notebooks", folder, "--out", folder.parent / "reports")
    assert done.returncode == 2
    assert done.stderr.startswith("workbench:")
    assert "reports" in done.stderr


def test_a_check_takes_one_limit_and_nan_does_not_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_REPORT", str(tmp_path))
    report = Report("x")
    assert report.check("a", float("nan"), at_most=1).startswith("✗")
    assert report.check("b", 1, equals=1).startswith("✓")
    with pytest.raises(ValueError, match="exactly one of"):
        report.check("c", 1)
    with pytest.raises(ValueError, match="exactly one of"):
        report.check("c", 1, at_least=0, at_most=2)


NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


# a part for each process of the tests: what a part's notebooks import, they import once
PARTS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))


@pytest.mark.parametrize("part", range(PARTS))
def test_the_notebooks_of_the_house_hold_their_checks_and_their_pages_need_no_network(
        part, tmp_path):
    out, names = tmp_path / "reports", NOTEBOOKS[part::PARTS]
    done = command("report", *names, "--profile", "smoke", "--jobs", 1, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in out.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", text), page
        assert not re.search(r"<script|@import|url\(http", text), page
    for name in names:
        assert json.loads((out / name / "run.json").read_text())["status"] == "passed"
        assert list((out / name / "figures").glob("*.png"))
        assert list((out / name / "tables").glob("*.csv"))


def test_compare_judges_two_files_and_names_the_layer(tmp_path, model, task):
    import torch

    from workbench.deployment import onnx
    from workbench.subjects import models

    path = onnx.export(model, task.example, tmp_path / "m.onnx")
    good = command("compare", "resnet20", path, "--examples", 100)
    assert good.returncode == 0, good.stderr
    assert "equivalent on 100 images" in good.stdout
    damaged = models.load("resnet20", task)
    damaged.layer2[1].conv2.weight.data += 0.1 * torch.randn(damaged.layer2[1].conv2.weight.shape)
    models.save(damaged, tmp_path / "damaged.safetensors")
    bad = command("compare", path, tmp_path / "damaged.safetensors", "--examples", 100)
    assert bad.returncode == 1
    assert "the first layer that parts: layer2.1.conv2" in bad.stdout


def test_compare_refuses_a_truncated_file_in_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    done = command("compare", "resnet20", tmp_path / "m.onnx", "--examples", 10)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("workbench: m.onnx is not an ONNX file")


def test_notebooks_of_a_longer_run_are_copies_of_one_process_and_know_nothing_of_each_other(folder):
    body = "\n".join([
        "import os, sys, matplotlib.pyplot as plt, psutil, torch",
        "from workbench.reporting.report import Report",
        "report = Report('x')",
        "report.headline('there before', 'transformers' in sys.modules)",
        "report.headline('left by others', getattr(torch, 'left', None))",
        "report.headline('threads', torch.get_num_threads())",
        "report.headline('threads not copied', "
        "psutil.Process(os.getppid()).parent().num_threads() - 1)",
        "report.headline('speaks over', get_ipython().kernel.parent.transport)",
        "report.headline('computes', float((torch.ones(500, 500) @ torch.ones(500, 500)).sum()))",
        "torch.left = report.folder.name",
        "axes = plt.plot([1, 2])"])
    for name in ("01_one", "02_two", "03_three"):
        write(folder, name, body)
    done = command("report", "--notebooks", folder, "--jobs", "1", "--out",
                   folder.parent / "reports")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("01_one", "02_two", "03_three"):
        left = folder.parent / "reports" / name
        said = {row["name"]: row["value"]
                for row in json.loads((left / "run.json").read_text())["headlines"]}
        assert said == {"there before": True, "left by others": None, "threads": machine.cores(),
                        "threads not copied": 0,
                        "speaks over": "ipc", "computes": 500.0**3}
        outputs = [output for cell in nbformat.read(left / f"{name}.ipynb", 4).cells
                   for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {})
                   for output in outputs), "a plot is shown at the end of its cell"


def test_a_notebook_whose_kernel_died_is_run_once_more(tmp_path):
    import subprocess
    import sys

    import nbformat

    dies = ("import ctypes\nfrom pathlib import Path\nmark = Path({!r})\n"
            "if not mark.exists():\n    mark.touch()\n    ctypes.string_at(0)")
    cells = [nbformat.v4.new_code_cell(dies.format(str(tmp_path / "mark")))]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=python), tmp_path / "dies.ipynb")
    told = [sys.executable, "-m", "workbench", "report", "dies", "--notebooks", str(tmp_path),
            "--out", str(tmp_path / "out")]
    ran = subprocess.run(told, capture_output=True, text=True, check=False)
    assert "its kernel died (exit code -11): Kernel died; once more" in ran.stdout
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "out" / ".failed"
                                                        / "dies.txt").read_text()
    assert "dies: passed" in ran.stdout
