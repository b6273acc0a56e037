"""`harness submit`: the cluster file, the batch script, and what is refused before anything is submitted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness.config.io import dump_config, load_config
from harness.errors import ConfigError
from harness.launch import cli
from harness.launch.plan import LaunchPlan
from harness.launch.slurm.client import sbatch
from harness.launch.slurm.cluster import Cluster, load_cluster, with_options
from harness.launch.slurm.job_facts import own_run
from harness.launch.slurm.script import Place, job_script, srun_command
from harness.launch.slurm.sweep import Sweep, load_grid

ROOT = Path(__file__).parents[1]
MNIST = str(ROOT / "configs/mnist_cnn.yaml")
CPU = {"gpus_per_node": 0, "ranks_per_node": 4, "time_limit_minutes": 30}
GPU = {"gpus_per_node": 8, "cpus_per_rank": 12, "time_limit_minutes": 1440}
Write = Callable[..., str]


@pytest.fixture
def cluster_file(tmp_path: Path) -> Write:
    def write(**facts: object) -> str:
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(facts))
        return str(path)

    return write


def script(cluster: Cluster, *, run_directory: str = "/runs/a") -> str:
    plan = LaunchPlan(
        command=("harness.train", f"{run_directory}/slurm/config.yaml"),
        run_directory=Path(run_directory),
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_on_a_node,
        threads_per_rank=cluster.cpus_per_rank,
    )
    place = Place(Path("/work"), packages=Path("/code"), python="/venv/bin/python")
    return job_script(plan, cluster, place, job_name="a")


# ---------------------------------------------------------------- the cluster file


def test_the_example_has_every_key_of_a_cluster_file_and_nothing_else() -> None:
    text = (ROOT / "slurm/cluster.example.yaml").read_text()
    keys = set(re.findall(r"^(?:# )?([a-z_]+):", text, flags=re.MULTILINE))
    assert keys == set(Cluster.model_fields)
    assert load_cluster(ROOT / "slurm/cluster.example.yaml").ranks_on_a_node == 8


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({**CPU, "partiton": "main"}, ["partiton: unknown key (nearest: partition; allowed: part"]),
        (
            {**CPU, "container": {"runtime": "podman"}},
            ["container.runtime: 'podman' is not one of none, appt"],
        ),
        (
            {**CPU, "nodes": 0, "style": "mpirun"},
            ["2 problems", "nodes: 0 is not a whole number", "style: "],
        ),
        ({"gpus_per_node": 8}, ["time_limit_minutes: missing; wanted: a whole number, at least 1"]),
        ({"gpus_per_node": 0, "time_limit_minutes": 5}, ["gpus_per_node is 0, so say how many CPU ranks"]),
        ({**GPU, "ranks_per_node": 4}, ["ranks_per_node is 4 and gpus_per_node is 8"]),
        ({**CPU, "time_limit_minutes": 1, "signal_lead_seconds": 60}, ["signal_lead_seconds 60 is not less than"]),
        ({**CPU, "partition": "a; rm -rf ~"}, ["partition: 'a; rm -rf ~' is refused: one word is wanted"]),
        ({**CPU, "setup": ["a\nb"]}, ["setup.0: 'a\\nb' is refused: one line of text"]),
        ({**CPU, "container": {"runtime": "pyxis"}}, ["runtime apptainer or pyxis wants an image"]),
        ({**CPU, "container": {"image": "a.sif"}}, ["an image wants one of these runtimes"]),
    ],
)
def test_a_wrong_cluster_file_is_told_in_the_words_of_a_wrong_configuration(
    cluster_file: Write, facts: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster(cluster_file(**facts))
    for word in words:
        assert word in str(caught.value)


def test_a_cluster_file_that_cannot_be_read_is_told_with_one_that_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; use slurm/cluster\.example\.yaml"):
        load_cluster(tmp_path / "nowhere.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder: cannot be read"):
        load_cluster(tmp_path / "folder")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="the file is empty; start with a fact of the site"):
        load_cluster(tmp_path / "empty.yaml")


def test_options_of_the_command_line_stand_in_the_place_of_the_files_facts() -> None:
    cluster = with_options(Cluster(**GPU), nodes=3, gpus=2, time_limit_minutes=60)
    assert (cluster.nodes, cluster.ranks_on_a_node, cluster.time_limit_minutes) == (3, 2, 60)
    assert with_options(Cluster(**CPU), nodes=None, gpus=7, time_limit_minutes=None).ranks_on_a_node == 7
    with pytest.raises(ConfigError, match=r"--gpus 16: a node of this cluster has 8 .* --nodes 2 for 16 in all"):
        with_options(Cluster(**GPU), nodes=None, gpus=16, time_limit_minutes=None)
    with pytest.raises(ConfigError, match="signal_lead_seconds 120 is not less than the time limit of 2 minutes"):
        with_options(Cluster(**CPU), nodes=None, gpus=None, time_limit_minutes=2)


# ---------------------------------------------------------------- the script


CPU_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=a
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=30
#SBATCH --signal=USR1@120
#SBATCH --chdir=/work
#SBATCH --output=/runs/a/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# Written by `harness submit`, which submits these very bytes: change the cluster file instead. Slurm sends the signal
# above to every rank; launch/slurm/job.py, which takes this shell's place, decides what comes after the ranks.
set -e
export PYTHONSAFEPATH=1
export PYTHONPATH=/code"${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1

exec /venv/bin/python -m harness.launch.slurm.job \\
  --run-directory /runs/a \\
  --script /runs/a/slurm/train.sbatch \\
  --max-crash-requeues 3 \\
  --preflight-seconds 120 \\
  --expect SLURM_JOB_NUM_NODES=1 \\
  --expect SLURM_NTASKS_PER_NODE=1 \\
  -- \\
  srun --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --export=ALL --kill-on-bad-exit=1 --wait=0 \\
  --open-mode=append /venv/bin/python -m harness.launch.slurm.node --style torchrun --ranks-per-node 4 -- \\
  harness.train /runs/a/slurm/config.yaml
"""


def test_the_script_of_a_small_job() -> None:
    assert script(Cluster(**CPU)) == CPU_SCRIPT


def test_an_installed_harness_is_found_by_its_interpreter() -> None:
    plan = LaunchPlan(("m",), Path("/runs/a"), ranks_per_node=2, threads_per_rank=1)
    place = Place(Path("/work"), packages=None, python="/venv/bin/python")
    text = job_script(plan, Cluster(**CPU, container={"runtime": "apptainer", "image": "a.sif"}), place, job_name="a")
    assert "PYTHONPATH" not in text, "site-packages would stand before the standard library there"
    assert "--bind /work,/runs/a --pwd" in text


def test_the_script_asks_for_what_the_cluster_file_says() -> None:
    cluster = Cluster(
        **{**GPU, "nodes": 2, "style": "srun", "partition": "gpu", "account": "us", "qos": "high", "signal": "USR2"},
        constraint="a100&nvlink",
        memory_gb_per_node=900,
        modules=("cuda/12.8", "gcc"),
        setup=("export A=b",),
        scratch="/local",
        network_interface="ib0",
    )
    text = script(cluster)
    assert text.startswith("#!/bin/bash -l\n")  # where `module` is defined
    directives = re.findall("^#SBATCH --(.*)$", text, flags=re.MULTILINE)
    wanted = ["partition=gpu", "account=us", "qos=high", "constraint='a100&nvlink'", "nodes=2", "ntasks-per-node=8"]
    assert set(directives) >= {*wanted, "cpus-per-task=12", "gpus-per-node=8", "mem=900G", "signal=USR2@120"}
    lines = ["module load cuda/12.8 gcc", "export A=b", "export TMPDIR=/local"]
    lines += ["export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0", "  --interface ib0 \\"]
    assert set(text.splitlines()) >= {*lines, "  --expect SLURM_GPUS_ON_NODE=8 \\"}
    assert "srun --nodes=2 --ntasks-per-node=8 --cpus-per-task=12 --gpus-per-node=8 --export=ALL" in text


@pytest.mark.parametrize(
    ("container", "gpus", "words"),
    [
        (
            {"runtime": "apptainer", "image": "/images/a b.sif", "binds": ("/data",)},
            GPU,
            "apptainer exec --nv --bind /data,/work,/runs/a,/code --pwd /work /images/a b.sif /venv/bin/python -m",
        ),
        (
            {"runtime": "apptainer", "image": "a.sif"},
            CPU,
            "apptainer exec --bind /work,/runs/a,/code --pwd /work a.sif",
        ),
        (
            {"runtime": "pyxis", "image": "nvcr.io#x:1", "binds": ("/data:/d",)},
            GPU,
            "--container-image=nvcr.io#x:1 --container-mounts=/data:/d,/work:/work,/runs/a:/runs/a,/code:/code "
            "--container-workdir=/work /venv/bin/python -m harness.launch.slurm.node",
        ),
    ],
)
def test_every_task_runs_in_the_container(container: dict[str, object], gpus: dict[str, object], words: str) -> None:
    plan = LaunchPlan(("m",), Path("/runs/a"), ranks_per_node=2, threads_per_rank=1)
    place = Place(Path("/work"), packages=Path("/code"), python="/venv/bin/python")
    command = srun_command(plan, Cluster(**gpus, container=container), place)
    assert command[0] == "srun"
    assert words in " ".join(command)


EVERYTHING = {
    "modules": ("a",),
    "setup": ("true",),
    "scratch": "/tmp/a b",
    "network_interface": "lo",
    "container": {"runtime": "apptainer", "image": "/images/it's one.sif"},
}


@pytest.mark.parametrize("run_directory", ["/runs/a", '/it\'s a "run" 50% $HOME `x` #1; rm -rf ~/a'])
@pytest.mark.parametrize("facts", [CPU, {**GPU, **EVERYTHING}])
def test_a_shell_reads_the_script_without_a_complaint(
    tmp_path: Path, run_directory: str, facts: dict[str, object]
) -> None:
    path = tmp_path / "a.sh"
    path.write_text(script(Cluster(**facts), run_directory=run_directory))
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    # SC2016: a dollar in single quotes, which is what it is quoted for.
    done = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_bash_gives_the_job_the_words_that_were_meant(tmp_path: Path) -> None:
    run_directory = '/it\'s a "run" 50% $HOME `x` #1; rm -rf ~'
    text = script(Cluster(**CPU), run_directory=run_directory).replace("exec /venv/bin/python", "printf '%s\\n'")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--run-directory") + 1] == run_directory
    assert words[-1] == f"{run_directory}/slurm/config.yaml"
    assert "50%% " in text  # or Slurm would put something in the place of a % in the name of the log


def test_a_path_that_no_script_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a\\nb.*a character that a batch script cannot hold"):
        script(Cluster(**CPU), run_directory="/runs/a\nb")


# ---------------------------------------------------------------- the command


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    tmp_path: Path, cluster_file: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = [MNIST, "--cluster", cluster_file(**CPU), f"run.output_root={tmp_path}/runs", "--nodes", "2"]
    assert cli.main(["submit", *arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in text
    assert f"exec {sys.executable} -m harness.launch.slurm.job" in text
    assert not (tmp_path / "runs").exists()


SBATCH = """\
#!/bin/sh
cp "$1" {folder}/submitted 2> /dev/null
for word in "$@"; do cp "$word" {folder}/submitted 2> /dev/null; done
echo 17
"""


def test_what_is_submitted_is_what_a_dry_run_prints_and_the_configuration_of_that_moment(
    tmp_path: Path, cluster_file: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    overrides = [f"run.output_root={tmp_path}/runs", "optim.peak_lr=3e-4"]
    arguments = [MNIST, "--cluster", cluster_file(**CPU), *overrides]
    assert cli.main(["submit", *arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    run = tmp_path / "runs/mnist-cnn"
    run.mkdir(parents=True)
    (run / "exit.json").write_text('{"code": 0}')
    assert cli.main(["submit", *arguments]) == 0
    assert capsys.readouterr().out.startswith("job 17: ")
    assert (tmp_path / "submitted").read_text() == printed
    assert (run / "slurm/config.yaml").read_text() == dump_config(load_config(MNIST, overrides).config)
    assert not (run / "exit.json").exists(), "how the run ended before would be taken for the end of this job"


@pytest.mark.parametrize(
    ("facts", "arguments", "message"),
    [
        (CPU, ["data.global_batch=62"], "62 does not divide over 4 ranks; use 60 or 64"),
        (CPU, ["--nodes", "3"], "1 problem in 3 nodes x 4 ranks\n  data.global_batch: 64 does not divide over 12"),
        (GPU, ["--gpus", "9"], "--gpus 9: a node of this cluster has 8"),
        (CPU, ["run.name=a b"], "run.name: 'a b' is refused: a run name has"),
        (CPU, ["run.name=a;reboot"], "run.name: 'a;reboot' is refused"),
        (CPU, ["--time-limit-minutes", "0"], "argument --time-limit-minutes: '0' is not a whole number"),
        (CPU, ["--check", "--dry-run"], "not allowed with argument --check"),
        (CPU, [], "sbatch is not on the PATH"),
        (CPU, ["--check"], "sbatch is not on the PATH"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    tmp_path: Path,
    cluster_file: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    facts: dict[str, object],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    given = [MNIST, "--cluster", cluster_file(**facts), f"run.output_root={tmp_path}/runs", *arguments]
    assert cli.main(["submit", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- sweeps


GRID = "optim.peak_lr: [1e-3, 3e-4]\nmodel.hidden: [[8], [16, 16]]\n"


def test_a_grid_is_every_value_with_every_other(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    assert load_grid(tmp_path / "grid.yaml") == [
        ("optim.peak_lr=0.001", "model.hidden=[8]"),
        ("optim.peak_lr=0.001", "model.hidden=[16, 16]"),
        ("optim.peak_lr=0.0003", "model.hidden=[8]"),
        ("optim.peak_lr=0.0003", "model.hidden=[16, 16]"),
    ]
    assert len(load_grid(ROOT / "slurm/sweep.example.yaml")) == 4


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("optim.peak_lr: 1", "optim.peak_lr: 1 is not a list of values"),
        ("optim.peak_lr: []", "optim.peak_lr: [] is not a list of values"),
        ("run.name: [a, b]", "run.name: every task has a directory of its own"),
        ("optim.peek_lr: [1, 2]", "task 0 of"),
        ("optim.peak_lr: [1, -2]", "task 1 of"),
        ("data.global_batch: [64, 62]", "62 does not divide over 4 ranks"),
        ("[1, 2]", "is not a mapping; start with a key and its values"),
        ("a: " + str(list(range(40))) + "\nb: " + str(list(range(40))), "more than 1,000 tasks"),
    ],
)
def test_a_wrong_grid_is_told_before_anything_is_submitted(
    tmp_path: Path, cluster_file: Write, capsys: pytest.CaptureFixture[str], *, grid: str, message: str
) -> None:
    (tmp_path / "grid.yaml").write_text(grid)
    given = [MNIST, "--cluster", cluster_file(**CPU), f"run.output_root={tmp_path}/runs"]
    assert cli.main(["submit", *given, "--sweep", str(tmp_path / "grid.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_script_of_a_sweep_is_an_array_with_a_folder_for_each_task(
    tmp_path: Path, cluster_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    given = [MNIST, "--cluster", cluster_file(**CPU), f"run.output_root={tmp_path}/runs", "run.name=sweep"]
    arguments = [*given, "--sweep", str(tmp_path / "grid.yaml"), "--at-once", "2", "--dry-run"]
    assert cli.main(["submit", *arguments]) == 0
    text = capsys.readouterr().out
    folder = f"{tmp_path}/runs/sweep"
    lines = ["#SBATCH --array=0,1,2,3%2", f"#SBATCH --output={folder}/logs/slurm-%A_%a.log"]
    lines += [f"  --run-directory {folder}/@TASK@ \\", f"  --script {folder}/slurm/train.sbatch \\"]
    assert set(text.splitlines()) >= set(lines)
    assert own_run(f"{folder}/@TASK@/slurm/config.yaml", 7) == f"{folder}/007/slurm/config.yaml"
    assert own_run("/data/TASK,/runs/@TASK@,/code", 3) == "/data/TASK,/runs/003,/code"


@pytest.mark.parametrize(("wandb", "group"), [("{}", "sweep"), ("{group: mine}", "mine")])
def test_the_runs_of_a_sweep_are_a_group_in_wandb(tmp_path: Path, wandb: str, group: str) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    overrides = [f"run.output_root={tmp_path}/runs", "run.name=sweep", f"tracking.wandb={wandb}"]
    sweep = Sweep(MNIST, overrides, tmp_path / "grid.yaml", Cluster(**CPU), at_once=None)
    configs = sweep.submission([0, 3]).configs
    assert list(configs) == ["000", "003"]
    assert all(yaml.safe_load(text)["tracking"]["wandb"]["group"] == group for text in configs.values())


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm: apt-get install slurm-client")
@pytest.mark.parametrize("host", ["no-such-host.invalid", "nowhere(127.0.0.1)"])
def test_a_controller_that_does_not_answer_is_no_fault_of_the_cluster_file(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "slurm.conf"
    lines = ("ClusterName=x", f"SlurmctldHost={host}", "SlurmctldPort=6999", "NodeName=a", "PartitionName=p Nodes=a")
    path.write_text("\n".join([*lines, "MessageTimeout=2", "AuthType=auth/none", "CredType=cred/none"]))
    monkeypatch.setenv("SLURM_CONF", str(path))
    with pytest.raises(ConfigError, match="Slurm does not answer"):
        sbatch("#!/bin/sh\ntrue\n")
