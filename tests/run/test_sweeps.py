"""The scripts of sweeps/, launchers, and what a sweep does when it is started again."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import main
from config.compose import LAUNCHERS, check_command_line
from config.schema import ConfigError
from harness.report.runs import open_runs
from harness.run import interrupt
from harness.run.checkpoint import Checkpoints
from harness.run.folder import RunFolder
from harness.run.launching import ERRORS, MOST_LINES, requeued_after_checkpoint
from tests.commands import Commands, Run, command_line
from tests.conftest import ROOT
from tests.forked import Forks

SCRIPTS = sorted(path.name for path in (ROOT / "sweeps").glob("*.sh") if path.name != "common.sh")
NARROW = {  # the later setting counts: each script over few runs
    "ablations.sh": ["seed=1", "ablation=full_method"],
    "editors.sh": ["dataset=zsre", "editor=stableedit,ultraedit"],
    "grid.sh": ["editor.lr=0.1", "editor.alpha=1,10"],
    "long.sh": ["seed=1,2", "editor=stableedit", "editor.passes=1", "model.lr=0.1", "downstream_eval_steps=0"],
    "seeds.sh": ["seed=1,2"],
}
SHORT = ("num_seq=2", "num_seq_zsre=1", "evaluation.sample=2")
ONE = "sweeps/${hydra:job.num}"  # where a run alone would be: resume=auto looks below sweeps/
TURNS = ("num_seq=4", "num_seq_zsre=2", "checkpoint_every=50")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """main.main() sets one for SIGTERM, which a process of its own would have taken with it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def sweep(run: Commands, name: str, *overrides: str) -> Path:
    """The folder of a sweep, whose runs resume=auto finds below this test's folder."""
    folder = run.folder / "sweeps" / name
    line = run.line("-m", "resume=auto", *overrides, f"hydra.sweep.dir={run.folder}/sweeps/{name}", run=ONE)
    with command_line(line):
        main.main()
    return folder


def runs_in(folder: Path) -> dict[Path, bytes]:
    """The runs below, not through links, each with its run.json."""
    return {path.parent: path.read_bytes() for path in folder.rglob("run.json")}


# ---------------------------------------------------------------------------------------------------------------------
# The scripts: what they start


def place(folder: Path, python: str) -> Path:
    """A folder in which the scripts take themselves to be in the project; `python` is the text of .venv/bin/python."""
    (folder / "sweeps").mkdir(parents=True)
    for path in (ROOT / "sweeps").glob("*.sh"):
        (folder / "sweeps" / path.name).symlink_to(path)
    for name in ("main.py", "config"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(python, encoding="utf-8")
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    return folder


def started(folder: Path, script: str, *settings: str, code: int = 0) -> tuple[int, list[list[str]]]:
    """The script's exit code, and the arguments of each python that it starts, which ends with `code`."""
    place(folder, f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >> calls; echo >> calls; exit {code}\n')
    done = subprocess.run(["sh", f"sweeps/{script}", *settings], cwd=folder, check=False, timeout=30)
    calls = folder / "calls"
    said = calls.read_text(encoding="utf-8").strip().split("\n\n") if calls.exists() else []
    return done.returncode, [call.splitlines() for call in said]


def jobs(call: list[str]) -> int:
    """Of a sweep: the combinations of its comma lists. Of a key that is set twice the later setting counts."""
    settings = dict(word.split("=", 1) for word in call if "=" in word)
    return math.prod(len(value.split(",")) for value in settings.values())


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_a_script_is_posix_shell(script: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / "sweeps" / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_sweeps_that_compose_and_resume_and_then_reports(tmp_path: Path, script: str) -> None:
    settings = ["num_seq=3", "dataset.train_path=b.json", "dataset.valid_path=a file.json"]
    code, calls = started(tmp_path, script, *settings)
    sweeps = [call for call in calls if call[0] == "main.py"]
    assert code == 0
    for call in sweeps:
        assert call[1:3] == ["-m", "resume=auto"]
        assert call[-3:] == settings
        check_command_line([*call[1:-1], "dataset.valid_path=a.json"])
    header = (ROOT / "sweeps" / script).read_text(encoding="utf-8")
    assert re.findall(r"(\d+) runs", header) == [str(sum(map(jobs, sweeps)))]
    reports = [call for call in calls if call not in sweeps]
    assert calls == sweeps + reports
    tables = [call for call in reports if "--leaderboard" in call]
    assert len(reports) - len(tables) == (script != "editors.sh")  # where there is no data to report on
    assert len(tables) == (script in ("editors.sh", "long.sh"))
    for call in reports:
        folder = call[-1]
        assert call in (
            ["-m", "harness.report", folder, "--to", folder],
            ["-m", "harness.report", "--leaderboard", folder, "--to", folder],
        )
        assert all(f"hydra.sweep.dir={folder}/" in word for call in sweeps for word in call if "sweep.dir" in word)


@pytest.mark.parametrize(
    ("settings", "located"),
    [
        ([], 2),  # of the five data sets those with subjects
        (["dataset=zsre"], 1),
        (["dataset=fever", "dataset.valid_path=zsre.json"], 0),
        (["dataset=fever", "editor.fact_token=last"], 1),
        (["dataset=jsonl", "dataset.fields.subject=s"], 1),
    ],
)
def test_editors_that_ask_for_subjects_run_where_there_are_some(
    tmp_path: Path, settings: list[str], located: int
) -> None:
    _, calls = started(tmp_path, "editors.sh", *settings)
    found = 0
    for call in calls:
        words = dict(word.split("=", 1) for word in call if "=" in word)
        if "memit" in words.get("editor", "").split(","):
            found += len(words["dataset"].split(","))
    assert found == located


def test_two_scripts_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "date").write_text("#!/bin/sh\necho 2026-01-01_00-00-00\n")
    (tmp_path / "date").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    calls = [call for name in ("one", "two") for call in started(tmp_path / name, "seeds.sh")[1]]
    folders = {call[-1] for call in calls if "harness.report" in call}
    assert len(folders) == 2
    assert all(folder.startswith("outputs/sweeps/seeds/2026-01-01_00-00-00") for folder in folders)


@pytest.mark.parametrize("setting", ["hydra.sweep.dir=x", "hydra.run.dir=x"])
def test_a_script_says_where_its_runs_go(tmp_path: Path, capfd: pytest.CaptureFixture[str], setting: str) -> None:
    assert started(tmp_path, "seeds.sh", setting) == (1, [])
    assert capfd.readouterr().err.startswith(f"error: {setting}: the script puts its runs below outputs/sweeps")


@pytest.mark.parametrize(("code", "sweeps"), [(1, 3), (130, 1), (143, 1), (137, 1)])
def test_a_failed_job_leaves_the_rest_to_run_and_a_signal_does_not(tmp_path: Path, code: int, sweeps: int) -> None:
    ended, calls = started(tmp_path, "ablations.sh", code=code)
    assert ended == code
    assert [call[0] for call in calls].count("main.py") == sweeps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_reaches_the_run_which_ends_in_its_own_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    python = """#!/bin/sh
trap 'sleep 0.3; echo stopped; exit 143' TERM
echo started
for i in $(seq 100); do sleep 0.05; done
"""
    place(tmp_path, python)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # no shell takes up what it was started to ignore
    with subprocess.Popen(["sh", "sweeps/ablations.sh"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as script:
        signal.signal(signal.SIGINT, before)
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        script.send_signal(number)
        assert script.communicate(timeout=30)[0] == "stopped\n", "and no other sweep is started"
        assert script.returncode == 143


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ([], "dataset.valid_path"),
        (["num_seq=20", "dataset.train_path=b.json"], "dataset.valid_path"),
        (["dataset.valid_path=a.json", "num_seq=20"], "dataset.train_path"),
    ],
)
def test_thousands_of_facts_need_files_that_have_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: list[str], lacking: str
) -> None:
    """The shipped sample has not, and each of the runs would find out by itself."""
    assert started(tmp_path, "long.sh", *settings) == (1, [])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {lacking} is not set, ")
    assert "dataset.valid_path=FILE" in line
    assert "dataset.train_path=FILE" in line


def test_another_data_set_may_have_thousands_of_facts(tmp_path: Path) -> None:
    code, calls = started(tmp_path, "long.sh", "dataset=synthetic")
    assert code == 0
    assert all("dataset=synthetic" in call for call in calls if call[0] == "main.py")


def test_an_editor_of_ones_own_choice_runs_without_what_others_lack(tmp_path: Path) -> None:
    """Ablations are StableEdit's, and kept keys are those of two others."""
    _, calls = started(tmp_path, "long.sh", "dataset=counterfact", "editor=ultraedit")
    assert not any(word.startswith(("ablation=", "editor.keep_keys=")) for call in calls for word in call)


def test_the_step_size_of_raw_rows_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR_WITHOUT_LN", "12.5")
    _, calls = started(tmp_path, "ablations.sh")
    assert ["editor.lr=12.5" in call for call in calls] == ["ablation=without_ln" in call for call in calls]
    assert sum("editor.lr=12.5" in call for call in calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The scripts: started again


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("python")
    with Forks(folder, folder) as forks:
        yield forks.stand_in()


def shell(folder: Path, script: str, *settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LR_WITHOUT_LN": "0.2"}
    return subprocess.run(
        ["sh", f"sweeps/{script}", *settings],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_started_again_runs_nothing_twice(run: Commands, tmp_path: Path, python: str, script: str) -> None:
    place(tmp_path, python)
    line = [word for word in run.line(*SHORT) if not word.startswith("hydra.run.dir")]
    first = shell(tmp_path, script, *line, *NARROW[script])
    assert first.returncode == 0, first.stderr
    before = runs_in(tmp_path / "outputs")
    again = shell(tmp_path, script, *line, *NARROW[script])
    assert again.returncode == 0, again.stderr
    assert runs_in(tmp_path / "outputs") == before
    assert len(before) >= 2  # some sweeps of a script, so narrowed, are the same run
    jobs = again.stdout.count("[HYDRA] \t#")
    assert again.stdout.count("finished already") == jobs >= 2
    reports = list((tmp_path / "outputs").rglob("report.html"))
    assert len(reports) == 2, "one a start"
    folders = {path.parents[0 if script != "editors.sh" else 1] for path in reports}
    one, other = ({found.folder for found in open_runs([folder])} for folder in folders)
    assert one == other


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_kill_and_past_a_failure(run: Commands, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a first job that was killed, one that fails, and one that has not been begun."""
    kill = """
import os, signal, sys
from harness.run.folder import RunFolder
append = RunFolder.append_turn
def die(self, line):
    append(self, line)
    if line["turn"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.append_turn = die
import main
main.main()
"""
    settings = ("num_seq=4,9,3", "num_seq_zsre=2", "checkpoint_every=2", f"hydra.sweep.dir={run.folder}/sweeps/a")
    line = run.line("-m", "resume=auto", *settings, run=ONE)
    environment = {**os.environ, "XDG_CACHE_HOME": str(run.folder / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", kill, *line], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (killed,) = runs_in(run.folder / "sweeps" / "a")
    with pytest.raises(SystemExit, match="num_seq=9"):
        sweep(run, "b", *settings[:-1])
    said = capfd.readouterr()
    assert f"going on after turn 2 of the run in {killed}" in said.out
    assert "this job failed: num_seq=9" in said.out
    assert [Run(folder).json("run.json")["status"] for folder in runs_in(run.folder / "sweeps")] == ["finished"] * 2
    assert len(open_runs([run.folder / "sweeps" / "b"])) == 2


def test_a_sweep_holds_the_runs_it_found(run: Commands) -> None:
    """Also those of another sweep; a job that failed once is tried again in its own folder."""
    first = sweep(run, "first", *SHORT, "seed=1,2")
    failed = sorted(runs_in(first))[1]
    RunFolder.open(failed).fail("a disk that was full")
    second = sweep(run, "second", *SHORT, "seed=1,2,3")
    links = {path.name: path.resolve() for path in second.rglob("*") if path.is_symlink()}
    assert links == {"0": sorted(runs_in(first))[0], "1": failed}
    assert Run(failed).json("run.json")["status"] == "finished"
    assert [one.folder for one in open_runs([second])] == [*links.values(), *runs_in(second)]


def test_a_report_names_a_run_that_is_gone(run: Commands) -> None:
    first = sweep(run, "first", *SHORT, "seed=1")
    second = sweep(run, "second", *SHORT, "seed=1,2")
    first.rename(first.with_name("elsewhere"))
    with pytest.raises(ValueError, match=r"second/.*0: points at a run that is gone \(.*first.*\); bring it back, or"):
        open_runs([second])


def test_a_job_that_fails_by_the_machine_is_named(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(main, "to_run_config", lambda _: (_ for _ in ()).throw(stale))
    logged = []
    monkeypatch.setattr(main.log, "exception", logged.append)
    with command_line(run.line("-m", "seed=1")), pytest.raises(OSError, match="Stale"):
        main.main()
    assert logged == ["this job failed"]


def test_jobs_that_differ_only_in_where_they_are_shown_are_one_run(run: Commands) -> None:
    assert len(runs_in(sweep(run, "groups", *SHORT, "tracker.group=a,b"))) == 1


def test_an_error_of_a_job_can_come_from_another_process(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python makes of a pickled ConfigError, which takes a list, is not what it said."""
    mistakes = ConfigError(["seed=1: wrong", "num_seq=2: wrong"])
    monkeypatch.setattr(main, "to_run_config", lambda _: (_ for _ in ()).throw(mistakes))
    ended = []
    monkeypatch.setattr(main, "error_line", lambda error, line=main.error_line: ended.append(error) or line(error))
    assert run.refused("-m", "seed=1,2") == f"error: {mistakes}"
    assert str(pickle.loads(pickle.dumps(ended[-1]))) == str(mistakes)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers

installed = {
    "joblib": importlib.util.find_spec("joblib") is not None,
    **dict.fromkeys(("submitit_local", "submitit_slurm", "slurm"), importlib.util.find_spec("submitit") is not None),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_not_installed(launcher: str) -> None:
    if installed[launcher]:
        pytest.skip("it is installed here")
    with pytest.raises(ConfigError, match=f"^hydra/launcher={launcher}: .* -r requirements-launchers.txt$"):
        check_command_line(["-m", "seed=1,2", f"hydra/launcher={launcher}"])


def test_launchers_are_pinned() -> None:
    lines = (ROOT / "requirements-launchers.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in packages)
    assert {"hydra-joblib-launcher", "hydra-submitit-launcher"} <= {line.partition("==")[0] for line in packages}


def test_slurm_needs_slurm_and_runs_that_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed["slurm"]:
        pytest.skip("hydra-submitit-launcher is not installed")
    line = ["-m", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        check_command_line(line)
    (tmp_path / "sbatch").touch(mode=0o755)
    with pytest.raises(ConfigError, match="set resume=auto"):
        check_command_line(line)
    check_command_line([*line, "resume=auto"])


@pytest.mark.parametrize("choice", ["hydra/launcher=joblib hydra.launcher.n_jobs=2", "hydra/launcher=submitit_local"])
def test_jobs_in_processes_of_their_own(run: Commands, choice: str) -> None:
    """Side by side, with the base model's scores in one cache, and found by the next sweep."""
    if not installed[choice.split()[0].partition("=")[2]]:
        pytest.skip("the launcher is not installed")
    line = run.line("-m", "resume=auto", *SHORT, "editor=stableedit,ultraedit", *choice.split(), run=ONE)
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(run.folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, str(ROOT / "main.py"), *line, f"hydra.sweep.dir={run.folder}/sweeps/parallel"]
    subprocess.run(command, cwd=run.folder, env=environment, check=True, timeout=200)
    before = runs_in(run.folder / "sweeps" / "parallel")
    assert len(before) == 2
    together = [Run(folder).scores() for folder in sorted(before)]
    assert together[0]["base"] == together[1]["base"]
    again = sweep(run, "again", *SHORT, "editor=stableedit,ultraedit")
    assert runs_in(run.folder / "sweeps") == before
    assert {one.folder for one in open_runs([again])} == set(before)


@pytest.fixture
def put_back() -> Iterator[list[int]]:
    """A launcher's handler, as submitit sets it before a run starts; the signals it was called with."""
    calls: list[int] = []

    def handler(number: int, _frame: object) -> None:
        calls.append(number)
        signal.raise_signal(signal.SIGTERM)  # while the job is put back, too
        raise SystemExit(144)

    before = signal.signal(signal.SIGUSR2, handler)
    yield calls
    assert signal.signal(signal.SIGUSR2, before) is handler


def ended(run: Commands, *overrides: str) -> Run:
    """A run that its launcher put back into the queue."""
    with command_line(run.line(*TURNS, *overrides)), pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 144
    return Run(run.folder / "run")


@pytest.mark.parametrize("later", [(), (signal.SIGTERM,), (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM)])
def test_a_job_is_put_back_into_the_queue_with_a_checkpoint(
    run: Commands, monkeypatch: pytest.MonkeyPatch, put_back: list[int], later: tuple[signal.Signals, ...]
) -> None:
    """A signal in the middle of a turn; those that SLURM sends later come then, with the checkpoint, and at the end."""
    append, save, close = RunFolder.append_turn, Checkpoints.save, RunFolder.__exit__
    monkeypatch.setattr(interrupt, "ECHO", 0.0)

    def signalled(self: RunFolder, line: dict[str, object]) -> None:
        append(self, line)
        if line["turn"] == 2:
            signal.raise_signal(signal.SIGUSR2)
            for number in later:
                signal.raise_signal(number)

    def again(work: Callable[..., None]) -> Callable[..., None]:
        def then(*arguments: object) -> None:
            for number in later:
                signal.raise_signal(number)
            work(*arguments)

        return then

    monkeypatch.setattr(RunFolder, "append_turn", signalled)
    monkeypatch.setattr(Checkpoints, "save", again(save))
    monkeypatch.setattr(RunFolder, "__exit__", again(close))
    stopped = ended(run)
    assert put_back == [signal.SIGUSR2]
    assert stopped.json("run.json")["status"] == "interrupted"
    assert [path.name for path in (stopped.folder / "checkpoints").iterdir()] == ["turn_3"]


def test_a_job_is_put_back_into_the_queue_before_its_first_turn(
    run: Commands, monkeypatch: pytest.MonkeyPatch, put_back: list[int]
) -> None:
    def asked(*_: object) -> None:
        signal.raise_signal(signal.SIGUSR2)
        pytest.fail("went on")

    monkeypatch.setattr(main.job, "load_model", asked)
    assert not (ended(run).folder / "checkpoints").exists()
    assert put_back == [signal.SIGUSR2]


def test_sigterm_alone_is_no_launchers_business(
    run: Commands, monkeypatch: pytest.MonkeyPatch, put_back: list[int]
) -> None:
    """Before there is a turn to finish."""
    monkeypatch.setattr(main.job, "load_model", lambda *_: signal.raise_signal(signal.SIGTERM))
    with command_line(run.line(*TURNS)), pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 128 + signal.SIGTERM
    assert put_back == []


def test_srun_is_told_how_many_cpus_a_task_has() -> None:
    """SLURM 22.05 to 23.x: it does not take that from sbatch."""
    slurm = OmegaConf.load(ROOT / "config" / "hydra" / "launcher" / "slurm.yaml")
    composed = OmegaConf.to_container(slurm, resolve=True)
    assert isinstance(composed, dict)
    script = "\n".join([*composed["setup"], 'echo "${SRUN_CPUS_PER_TASK-unset}"'])

    def told(**environment: str) -> str:
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.strip()

    assert told(SLURM_CPUS_PER_TASK="8") == "8"
    assert told() == "unset"


def test_a_signal_that_no_launcher_waits_for_keeps_its_meaning() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with requeued_after_checkpoint():
        assert signal.getsignal(signal.SIGUSR2) is before


@pytest.mark.parametrize("module", ERRORS)
def test_a_job_without_a_result(
    run: Commands, monkeypatch: pytest.MonkeyPatch, module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that ran out of memory, say."""
    error = type(ERRORS[module], (RuntimeError,), {})
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{ERRORS[module]: error}))

    def lost() -> None:
        raise error("\n".join(f"line {i}" for i in range(100)))

    monkeypatch.setattr(main, "run_job", lost)
    message = run.refused("-m", "seed=1,2")
    assert "resume=auto" in message
    assert capfd.readouterr().err.splitlines() == [f"line {i}" for i in range(100 - MOST_LINES, 100)]
