"""The tracking section: what goes before what, and what is refused before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.io import load_config
from harness.config.tracking import Tracking, Wandb, tracking_problems, wandb_settings
from harness.errors import ConfigError
from tests.wandb_server import WandbServer

REPOSITORY = Path(__file__).parents[1]
MNIST = REPOSITORY / "configs/mnist_cnn.yaml"
KEY = "0123456789abcdef0123456789abcdef01234567"


def tracking(**wandb: object) -> Tracking:
    return Tracking.model_validate({"wandb": wandb})


def test_nothing_is_tracked_elsewhere_unless_the_configuration_says_so() -> None:
    assert wandb_settings(Tracking(), {"WANDB_MODE": "online", "WANDB_PROJECT": "p"}) is None
    assert wandb_settings(tracking(mode="disabled"), {}) is None
    assert load_config(MNIST).config.tracking.wandb is None


def test_a_variable_goes_before_the_configuration_and_that_before_the_default() -> None:
    environment = {"WANDB_MODE": "online", "WANDB_TAGS": "a, b", "WANDB_RUN_GROUP": "g", "WANDB_NOTES": " "}
    settings = wandb_settings(tracking(project="mine", group="mine", notes="mine"), environment)
    assert settings == Wandb(mode="online", project="mine", group="g", notes="mine", tags=("a", "b"))
    assert wandb_settings(tracking(mode="online"), {"WANDB_MODE": "disabled"}) is None
    assert wandb_settings(tracking(mode="online"), {"WANDB_MODE": "dryrun"}) == Wandb(mode="offline")


def test_a_variable_that_its_setting_does_not_allow_is_named() -> None:
    (problem,) = tracking_problems(tracking(), {"WANDB_PROJECT": "a/b"})
    assert problem.startswith("WANDB_PROJECT: ")
    assert "none of / \\ # ? % :" in problem
    (problem,) = tracking_problems(tracking(), {"WANDB_MODE": "shared"})
    assert problem.startswith("WANDB_MODE: ")


def test_an_id_that_names_no_folder_is_refused() -> None:
    (problem,) = tracking_problems(tracking(), {"WANDB_RUN_ID": "a/b"})
    assert problem.startswith("WANDB_RUN_ID: 'a/b' has more in it than letters")
    assert tracking_problems(tracking(), {"WANDB_RUN_ID": "a-1"}) == []
    assert tracking_problems(Tracking(), {"WANDB_RUN_ID": "a/b"}) == []


@pytest.mark.parametrize("project", ["a/b", "", " ", "x" * 129, "50%"])
def test_a_project_that_wandb_would_refuse_is_refused_first(project: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.wandb\.project: .* 1 to 128 characters and none of"):
        load_config(MNIST, [f"tracking.wandb.project='{project}'"])


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.wandb={KEY}",
        f"tracking.wandb.project={KEY}",
        f"tracking.wandb.mode={KEY}",
        f"tracking.wandb.api_key={KEY}",
        f"tracking.wandb.notes='my key is {KEY}.'",
        f"tracking.wandb.tags=[a, local-{KEY}]",
        f"tracking.wandb.entity=wandb_v1_{KEY}",
    ],
)
def test_a_configuration_with_a_key_in_it_is_refused_without_showing_it(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(MNIST, [override])
    assert "looks like an API key" in str(raised.value)
    assert "WANDB_API_KEY" in str(raised.value)
    assert KEY not in str(raised.value)


def test_online_without_a_key_says_what_to_type(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    (problem,) = tracking_problems(tracking(mode="online"), home)
    assert problem.startswith("tracking.wandb.mode: online wants an API key for api.wandb.ai")
    assert "wandb login, or tracking.wandb.mode=offline" in problem
    assert tracking_problems(tracking(mode="offline"), home) == []
    assert tracking_problems(tracking(mode="online"), {**home, "WANDB_API_KEY": KEY}) == []


def test_a_key_in_a_netrc_file_counts_for_the_server_it_is_for(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine wandb.here.org:8080\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    home = {"HOME": str(tmp_path)}
    assert tracking_problems(tracking(mode="online"), {**home, "WANDB_BASE_URL": "https://wandb.here.org:8080"}) == []
    assert len(tracking_problems(tracking(mode="online"), {**home, "WANDB_BASE_URL": "https://wandb.here.org"})) == 1
    assert len(tracking_problems(tracking(mode="online"), home)) == 1
    assert tracking_problems(tracking(mode="online"), {"NETRC": str(tmp_path / ".netrc"), "HOME": "/"}) != []


@pytest.mark.slow
def test_a_key_for_the_server_of_a_wandb_login_counts_without_a_variable_that_names_it(tmp_path: Path) -> None:
    server = WandbServer()
    for name, variables in (("home", {}), ("own", {"WANDB_CONFIG_DIR": str(tmp_path / "settings")})):
        home = {"HOME": str(tmp_path / name), **variables}
        Path(home["HOME"]).mkdir()
        login = [sys.executable, "-m", "wandb", "login", "--host", server.url, KEY]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | home
        environment["TMPDIR"] = str(tmp_path)
        subprocess.run(login, env=environment, check=True, capture_output=True, timeout=60)
        assert tracking_problems(tracking(mode="online"), home) == []
        (problem,) = tracking_problems(tracking(mode="online"), {**home, "WANDB_BASE_URL": "https://api.wandb.ai"})
        assert "an API key for api.wandb.ai" in problem
    server.die()


def test_a_tracker_that_is_not_installed_is_told_in_a_moment_without_torch(tmp_path: Path) -> None:
    # A look-up that knows neither package stands for a machine without them.
    script = f"""
import importlib.util, sys
look_up = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("wandb", "tensorboard") else look_up(name)
import harness.train
code = harness.train.main([{str(MNIST)!r}, "tracking={{wandb: {{}}, tensorboard: {{}}}}"])
sys.exit(99 if "torch" in sys.modules or "wandb" in sys.modules else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2, done.stderr
    assert "wandb is not installed; pip install 'harness-train[wandb]', or tracking.wandb=null" in done.stderr
    assert "tensorboard is not installed; pip install 'harness-train[tensorboard]'" in done.stderr


def test_a_module_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Tracking.model_validate({"own": ["mine.Lines"]})
    (problem,) = tracking_problems(own, {})
    assert problem == "tracking.own: there is no module mine here or in PYTHONPATH, for mine.Lines"
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert tracking_problems(own, {}) == []
    with pytest.raises(ConfigError, match=r"tracking\.own"):
        load_config(MNIST, ["tracking.own=[Lines]"])
