"""`use:`: whose code a configuration may bring, and what is said where it cannot be brought."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config import use
from harness.config.io import dump_config, load_config, load_stored
from harness.config.use import load_used
from harness.errors import ConfigError
from harness.launch import cli
from harness.launch.slurm.preflight import USED_FILES, used_file_problems

CONFIG: dict[str, Any] = {
    "use": ["my_parts.py"],
    "run": {"name": "a", "max_steps": 1},
    "model": {"kind": "tower", "width": 3},
    "data": {"source": "csv", "path": "rows.csv", "targets": ["y"], "global_batch": 4},
    "task": {"kind": "classification", "num_classes": 2},
    "optim": {"kind": "adam", "peak_lr": 0.1},
}
TOWER = """\
import harness

@harness.model("tower")
class Tower:
    def __init__(self, width: int):
        self.width = width
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a file of parts, and a configuration beside it that uses it; the working directory is another folder."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def written(source: str = TOWER, *, name: str = "my_parts.py", folder: Path = tmp_path, **sections: Any) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))
        (folder / "a.yaml").write_text(json.dumps({**CONFIG, **sections}))
        return folder / "a.yaml"

    yield written
    use.unload()


def refusal(path: Path, *overrides: str) -> str:
    """Return the one problem of a configuration."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).removeprefix("ConfigError: ")


# ---------------------------------------------------------------- what is found


def test_a_file_beside_the_configuration_brings_its_kinds(write: Write, tmp_path: Path) -> None:
    loaded = load_config(write())
    assert loaded.config.use == ("my_parts.py",)
    assert loaded.config.model.model_dump() == {"kind": "tower", "width": 3}
    assert loaded.config.model.build.__self__.plain.make("w").width == "w"  # type: ignore[attr-defined]
    assert loaded.used.names == (str(tmp_path / "my_parts.py"),)
    assert loaded.parts is not None
    assert loaded.parts.of("model")["tower"].origin == "my_parts.py line 3"


def test_a_file_in_the_working_directory_is_found_as_well(write: Write, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "my_parts.py").rename(tmp_path / "elsewhere" / "my_parts.py")
    assert load_config(path).config.model.kind == "tower"


def test_the_kinds_are_for_the_configurations_that_use_the_file_alone(write: Write) -> None:
    path = write()
    load_config(path)
    said = refusal(path, "use=[]")
    assert "'tower' is not one of cnn, gpt, mlp, perceptron, pretrained (built in, all of them; one of yours" in said


def test_an_override_brings_a_file_from_anywhere(write: Write, tmp_path: Path) -> None:
    path = write(use=[])
    assert load_config(path, [f"use=[{tmp_path / 'my_parts.py'}]"]).config.model.kind == "tower"
    assert load_config(path, ["use=[../my_parts.py]"]).config.model.kind == "tower"


def test_two_folders_may_have_files_of_one_name(write: Write, tmp_path: Path) -> None:
    for width in (3, 4):
        folder = tmp_path / str(width)
        layers = folder / "layers.py"
        layers.parent.mkdir()
        layers.write_text(f"WIDTH = {width}\n")
        source = TOWER.replace("import harness", "import harness\nfrom layers import WIDTH").replace(": int", "=WIDTH")
        path = write(source, folder=folder, model={"kind": "tower"})
        loaded = load_config(path)
        assert loaded.config.model.model_dump() == {"kind": "tower", "width": width}
        assert [Path(file.file).name for file in loaded.used.files] == ["my_parts.py", "layers.py"]
    assert str(tmp_path / "3") not in sys.path


def test_a_file_that_has_changed_is_read_again_and_one_that_has_not_is_not(write: Write) -> None:
    path = write()
    first = load_config(path)
    assert type(load_config(path).config.model) is type(first.config.model)
    write(TOWER.replace("width: int", "width: int, depth: int = 2"))
    second = load_config(path)
    assert second.config.model.model_dump() == {"kind": "tower", "width": 3, "depth": 2}
    assert second.used.files[0].sha256 != first.used.files[0].sha256
    assert not list(path.parent.rglob("__pycache__")), "nothing is left in somebody's folder"


def test_what_is_built_can_be_imported_by_another_process(write: Write, tmp_path: Path) -> None:
    load_config(write())
    from my_parts import Tower  # type: ignore[import-not-found]

    pickled = tmp_path / "pickled"
    pickled.write_bytes(pickle.dumps(Tower(7)))
    program = (
        "import pickle, sys; from pathlib import Path; from harness.config.use import load_used\n"
        f"load_used(['my_parts.py'], folder=Path({str(tmp_path)!r}))\n"
        f"print(pickle.loads(Path({str(pickled)!r}).read_bytes()).width)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its processes get our `sys.path`
        assert pool.apply(Tower, (8,)).width == 8


@pytest.mark.parametrize(("script", "module"), [("my_parts.py", "__main__"), ("other.py", "my_parts")])
def test_a_file_that_is_the_script_or_that_it_has_imported_is_not_imported_twice(
    write: Write, tmp_path: Path, script: str, module: str
) -> None:
    train = (
        "if __name__ == '__main__':\n"
        "    from harness.config.io import load_config\n"
        f"    print(load_config({str(tmp_path / 'a.yaml')!r}).config.model.plain.module)\n"
    )
    write(TOWER + train)
    (tmp_path / "other.py").write_text("import my_parts\n" + train)
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": str(Path(use.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout == f"{module}\n", done.stderr


def test_an_installed_package_brings_its_kinds_by_its_entry_point(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "acme_parts-1.2.dist-info").mkdir(parents=True)
    (site / "acme_parts.py").write_text(TOWER)
    described = "Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.2\n"
    (site / "acme_parts-1.2.dist-info" / "METADATA").write_text(described)
    points = site / "acme_parts-1.2.dist-info" / "entry_points.txt"
    points.write_text("[harness.parts]\nacme = acme_parts\n")
    monkeypatch.setattr(use._LOADER, "packages", {})
    monkeypatch.syspath_prepend(str(site))
    path = write("", use=["acme"])
    try:
        loaded = load_config(path)
        assert loaded.parts is not None
        assert loaded.parts.of("model")["tower"].origin == "entry point acme of distribution acme-parts 1.2"
        assert loaded.used.names == ("acme",)
        wanted = "use: no installed package has an entry point 'acem' in the group harness.parts (nearest: acme)"
        assert refusal(path, "use=[acem]").startswith(wanted)
    finally:
        use.forget({"acme_parts"})
        sys.modules.pop("acme_parts", None)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["../my_parts.py", "/somewhere/my_parts.py", "a/../../my_parts.py"])
def test_a_file_outside_the_folder_is_refused_with_what_to_type(write: Write, name: str) -> None:
    assert refusal(write(use=[name])) == (
        f"use: {name} leads out of the configuration's folder; put the file into it, or start where it lies and write "
        f"use: [my_parts.py], or name it on the command line: 'use=[{name}]'"
    )


def test_a_file_that_is_there_twice_is_refused_with_both_places(write: Write, tmp_path: Path) -> None:
    path = write()
    other = tmp_path / "elsewhere" / "my_parts.py"
    other.write_text(TOWER)
    assert refusal(path) == (
        f"use: my_parts.py is there twice, {tmp_path / 'my_parts.py'} and {other}; remove or rename one of them"
    )
    other.unlink()
    other.symlink_to(tmp_path / "my_parts.py")  # the same file
    assert load_config(path).config.model.kind == "tower"


def test_a_file_that_is_not_there_is_told_with_the_nearest(write: Write, tmp_path: Path) -> None:
    assert refusal(write(use=["my_part.py"])) == (
        f"use: there is no file my_part.py in {tmp_path} nor {tmp_path / 'elsewhere'} (nearest: my_parts.py)"
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import harness\ndef f(:\n", "use: my_parts.py line 2: invalid syntax: def f(:"),
        ("\nraise ValueError('no\\nluck')\n", "use: my_parts.py line 2 raised ValueError: no luck"),
        (
            "import harness\nimport einpos\n",
            "use: my_parts.py line 2 imports 'einpos', which is not installed here; pip install what it belongs to",
        ),
        (
            "class Tower: ...\n",
            'use: my_parts.py registers no part; put @harness.model("NAME"), @harness.data, @harness.task or '
            "@harness.tracker over a class of it",
        ),
        (
            "from harness.train import main\nmain(['a.yaml'])\n",
            "use: my_parts.py calls harness.train.main when it is imported; guard what starts a training with "
            '`if __name__ == "__main__":`',
        ),
        (
            "import sys\nsys.exit(0)\n",
            "use: my_parts.py line 2 ends the program when it is imported; guard what starts a training with "
            '`if __name__ == "__main__":`',
        ),
        (
            f"{TOWER}\n@harness.model('tower')\ndef again(): ...\n",
            "use: there are two parts for model 'tower': my_parts.py line 3 and my_parts.py line 8; rename one of them",
        ),
        (
            "import harness\n@harness.model('mlp')\ndef again(): ...\n",
            "use: my_parts.py line 2: the model 'mlp' is built in; choose another name",
        ),
    ],
)
def test_what_keeps_a_file_from_being_used_is_told_with_its_line(write: Write, source: str, sentence: str) -> None:
    path, before, modules = write(source), list(sys.path), set(sys.modules)
    assert refusal(path) == sentence
    assert sys.path == before
    assert "my_parts" not in set(sys.modules) - modules
    write()
    assert load_config(path).config.model.kind == "tower", "it can be mended in the same process"


def test_a_process_group_that_is_made_when_a_file_is_imported_is_refused(write: Write, tmp_path: Path) -> None:
    path = write(
        f"""\
        import torch.distributed
        torch.distributed.init_process_group("gloo", init_method="file://{tmp_path / "group"}", rank=0, world_size=1)
        """
    )
    program = f"from harness.config.io import load_config; load_config({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "use: my_parts.py starts torch.distributed when it is imported; guard" in done.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("json.py", "use: json.py has the name of another module, "),
        ("sys.py", "use: sys.py has the name of another module, built into Python; rename the file"),
        ("my-parts.py", "use: my-parts.py cannot be imported by its name; call it my_parts.py"),
        ("yaml.py", "use: yaml.py has the name of another module, "),
    ],
)
def test_a_file_whose_name_would_import_something_else_is_refused(write: Write, name: str, sentence: str) -> None:
    assert refusal(write(name=name, use=[name])).startswith(sentence)


def test_two_files_with_one_kind_are_told_with_both_places(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(TOWER)
    assert refusal(write(use=["my_parts.py", "other.py"])) == (
        "there are two parts for model 'tower': my_parts.py line 3 and other.py line 3; rename one of them"
    )


@pytest.mark.parametrize(
    ("value", "sentence"), [("my_parts.py", "use: 'my_parts.py' is not a list"), ([1], "use.0: 1")]
)
def test_use_is_a_list_of_texts(write: Write, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(use=value, model={"kind": "mlp", "hidden": [1]}))
    assert sentence in str(caught.value)


def test_a_tracker_that_nobody_registers_is_told_with_the_nearest(write: Write) -> None:
    source = f"{TOWER}\n@harness.tracker('lines')\nclass Lines: ...\n"
    path = write(source, tracking={"own": ["lines"]})
    assert load_config(path).config.tracking.own == ("lines",)
    assert "tracking.own: no file of `use` registers a tracker 'lnes' (nearest: lines)" in refusal(
        path, "tracking.own=[lnes]"
    )


# ---------------------------------------------------------------- strangers


@pytest.fixture
def stored(write: Write, tmp_path: Path) -> Path:
    """Return the configuration in a run directory that names a file which must not run."""
    config = load_config(write()).config
    run = tmp_path / "runs" / "a"
    (run / "slurm").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    for path in (run / "config.yaml", run / "slurm" / "config.yaml"):
        path.write_text(dump_config(config))
        (path.parent / "my_parts.py").write_text("raise SystemExit('a stranger says hello')")
    use.unload()
    return run / "config.yaml"


@pytest.mark.parametrize("name", ["config.yaml", "slurm/config.yaml"])
def test_a_stored_configuration_is_not_followed_in_what_it_uses(stored: Path, name: str) -> None:
    path = stored.parent / name
    assert refusal(path).split("\n  ")[1] == (
        f"use: {path} lies in a run directory, whose `use` is not followed: it may be somebody else's. Start the "
        "configuration that the run was started with, or say yourself which code it may bring: 'use=[\"my_parts.py\"]'"
    )


def test_who_says_so_may_start_a_stored_configuration_with_a_file_of_his_own(stored: Path, tmp_path: Path) -> None:
    assert load_config(stored, [f"use=[{tmp_path / 'my_parts.py'}]"]).config.model.kind == "tower"


def test_what_only_reads_a_run_keeps_unknown_kinds_as_plain_data_and_imports_nothing(stored: Path) -> None:
    config = load_stored(stored)
    assert not config.model.is_known
    assert config.model.model_dump() == {"kind": "tower", "width": 3}
    assert config.use == ("my_parts.py",)
    assert "my_parts" not in sys.modules
    assert load_stored(stored) == config
    assert dump_config(config).split("\n", 1)[1] == stored.read_text().split("\n", 1)[1]


def test_a_kind_of_ours_is_held_to_its_keys_in_a_run_directory_too(stored: Path) -> None:
    stored.write_text(stored.read_text().replace("kind: tower", "kind: mlp"))
    with pytest.raises(ConfigError, match=r"model\.hidden: missing"):
        load_stored(stored)


# ---------------------------------------------------------------- commands


def test_check_shows_where_a_part_comes_from_and_its_keys(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(TOWER.replace("width: int", "classes: int, width: int = 2, deep: bool = True"))
    assert cli.main(["check", "--no-data", str(path)]) == 0
    line = "part       model tower: my_parts.py line 3; keys classes: from the data, width: 2, deep: True"
    assert line in capsys.readouterr().out.splitlines()


def test_parts_lists_the_kinds_with_their_keys(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert cli.main(["parts", str(tmp_path / "my_parts.py")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model   tower           my_parts.py line 3; keys width: from the data" in lines
    assert any(line.startswith("data    csv             built in; keys path: wanted") for line in lines)
    assert cli.main(["parts"]) == 0
    assert "tower" not in capsys.readouterr().out


def test_a_check_of_a_file_that_is_used_takes_less_than_three_seconds_of_work(write: Write) -> None:
    path = write()
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "harness.launch.cli", "check", "--no-data", str(path)], capture_output=True, check=False
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
    assert time.monotonic() > 0


# ---------------------------------------------------------------- jobs


def test_each_node_compares_the_files_that_a_job_uses(tmp_path: Path) -> None:
    file, listed = tmp_path / "my_parts.py", tmp_path / USED_FILES
    assert list(used_file_problems(listed)) == []
    file.write_text(TOWER)
    used = load_used([str(file)], folder=tmp_path, is_typed=True)
    listed.write_text(json.dumps([entry.to_json() for entry in used.files]))
    assert list(used_file_problems(listed)) == []
    file.write_text(TOWER + "# other\n")
    (problem,) = used_file_problems(listed)
    assert problem.startswith(f"{file} is not the file that was submitted (sha256 ")
    file.unlink()
    (problem,) = used_file_problems(listed)
    assert problem == f"{file}, which the run uses, cannot be read (No such file or directory)"
    use.unload()


def test_a_job_is_told_its_files_by_absolute_paths(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.launch.slurm.cluster import Cluster
    from harness.launch.slurm.submit import prepare
    from harness.launch.slurm.submit import write as write_job

    monkeypatch.chdir(tmp_path)
    cluster = Cluster.model_validate({"gpus_per_node": 0, "ranks_per_node": 2, "time_limit_minutes": 5})
    submission = prepare(load_config(write(run={"name": "a", "max_steps": 1})), cluster)
    assert f'use=["{tmp_path / "my_parts.py"}"]' in submission.script
    write_job(submission)
    job = tmp_path / "runs" / "a" / "slurm"
    (entry,) = json.loads((job / USED_FILES).read_text())
    assert entry["file"] == str(tmp_path / "my_parts.py")
    assert "lies in a run directory" in refusal(job / "config.yaml")
    started = load_config(job / "config.yaml", [f'use=["{tmp_path / "my_parts.py"}"]'])
    assert started.config.model.kind == "tower"


def test_the_tasks_of_a_sweep_use_the_same_files(tmp_path: Path) -> None:
    from harness.launch.slurm.sweep import load_grid

    grid = tmp_path / "grid.yaml"
    grid.write_text("use: [[a.py], [b.py]]\n")
    with pytest.raises(ConfigError, match="use: all tasks of a sweep use the same files; name them in the config"):
        load_grid(grid)
