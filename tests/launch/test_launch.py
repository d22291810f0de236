"""What is in launch/ is sound: scripts by shellcheck, manifests by their published schemas, flags by our own."""

import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from lslm_jax.config import loading, validation
from lslm_jax.errors import LslmError
from lslm_jax.main import parser

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
EXITS = {"config": 2, "data": 65, "input": 66, "numeric": 70, "save": 74, "refused": 76}  # another try would not mend

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@scripts
def test_scripts_are_executable_and_pass_shellcheck(script):
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@scripts
def test_scripts_say_how_they_are_called(script, tmp_path):
    environ = dict.fromkeys(("PROJECT", "ZONE", "NAME", "TYPE", "BUCKET"), "x") | {"PATH": "/usr/bin:/bin"}
    found = subprocess.run([script], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2 and script.name in found.stderr


def manifests():
    return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


def test_pods_end_for_good_with_exactly_the_codes_that_another_try_does_not_mend():
    codes = {error.exit_code for error in LslmError.__subclasses__()} - {75, 77}
    assert codes == set(EXITS.values())
    for manifest in manifests():
        for job in manifest["spec"]["replicatedJobs"]:
            (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
            assert rule["action"] == "FailJob" and set(rule["onExitCodes"]["values"]) == codes
    assert yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["resources"]["job_recovery"][
        "recover_on_exit_codes"
    ] == [75, 77, 134, 143]
    (case,) = re.findall(r"^ +([\d |]+)\) pause", (LAUNCH / "tpu_vm.sh").read_text(), re.MULTILINE)
    assert {int(code) for code in case.split("|")} == {75, 77, 134, 137, 143, 255}


CLOUD = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  *describe*) echo ACTIVE ;;
  *lslm_jax.main*) exit "$CODE" ;;
esac
"""


def keep(tmp_path, code, *arguments):
    """Runs `tpu_vm.sh keep` with a stub of the cloud's tool whose trainer ends with a code; returns what it called."""
    tool, calls = tmp_path / "bin" / "gcloud", tmp_path / "calls"
    tool.parent.mkdir()
    tool.write_text(CLOUD)
    tool.chmod(0o755)
    environ = dict.fromkeys(("PROJECT", "ZONE", "NAME", "TYPE"), "x") | {
        "BUCKET": "gs://b",
        "PAUSE": "0",
        "SLICES": "4",
    }
    environ |= {"PATH": f"{tool.parent}:/usr/bin:/bin", "CALLS": str(calls), "CODE": str(code)}
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "keep", "a.py", "run", *arguments], env=environ, timeout=60)
    assert done.returncode == code
    return calls.read_text().splitlines()


@pytest.mark.parametrize(("code", "slices"), [(0, 1), (1, 1), (130, 1), (139, 1), (65, 1), (75, 4), (255, 4)])
def test_a_slice_is_made_anew_only_after_a_preemption_and_not_without_end(tmp_path, code, slices):
    assert sum(" create " in call for call in keep(tmp_path, code)) == slices


def test_arguments_reach_the_hosts_as_words_and_not_as_commands(tmp_path):
    flag = "--config.generate.stop=a; touch /tmp/x"
    (call,) = [call for call in keep(tmp_path, 0, flag) if "lslm_jax.main" in call]
    inner = call.partition("--command=")[2]
    words = subprocess.run(
        ["bash", "-c", f"set -- {inner.partition('&& ')[2]}; printf '%s\\n' \"$@\""], capture_output=True
    )
    assert words.stdout.decode().splitlines()[-1] == flag


def commands():
    """Arguments of the trainer in every file of launch/, shell variables left in."""
    for manifest in manifests():
        for job in manifest["spec"]["replicatedJobs"]:
            (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
            yield container["args"]
    for path in [*SCRIPTS, LAUNCH / "skypilot.yaml", *LAUNCH.glob("Dockerfile.*")]:
        for line in re.findall(r"(?:--config|lslm train) .*|--config[.=].*", path.read_text()):
            yield [word.rstrip(".,'") for word in re.findall(r"--[\w.]+=\S+", line)]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("Dockerfile.*")), ids=lambda path: path.name)
def test_an_image_is_of_one_exact_version_and_does_not_run_as_root(path):
    text = path.read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    (base,) = re.findall(r"^ARG BASE=(.+)$", text, re.MULTILINE)
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)  # a patch release of Python and a release of Debian
    assert version and f"inspect {base} --format" in text, "the way to pin its digest names the same tag"
    assert re.findall(r"^FROM (.+)$", text, re.MULTILINE) == ["${BASE}"]
    constraints = f"constraints/py{version[1].replace('.', '')}.txt"
    installs = re.findall(r"pip install .+", text)
    assert all(constraints in install or "--no-deps" in install for install in installs) and len(installs) == 2
    assert (ROOT / constraints).is_file()
    # Everything after USER, and so the command, is run by that user; a form without a shell gets SIGTERM.
    (user,) = (number for number, line in enumerate(lines) if line.startswith("USER "))
    assert lines[user] == "USER lslm" and "useradd --create-home --uid 1000 lslm" in text
    assert not any(line.startswith(("RUN", "COPY", "USER")) for line in lines[user + 1 :])
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "lslm_jax.main"]'


def test_every_setting_that_they_name_is_one():
    seen = 0
    for arguments in commands():
        settings = [argument for argument in arguments if argument.startswith("--config.")]
        pairs = [setting.removeprefix("--config.").split("=", 1) for setting in settings if "$" not in setting]
        validation.validate(loading.override(loading.load(str(ROOT / "configs/llama_8b.py")), pairs))
        parser().parse_args([argument for argument in arguments if argument not in settings])
        seen += len(pairs)
    assert seen > 8
