"""Manifests in launch/ obey the schemas that Kubernetes and SkyPilot publish in their packages.

These take minutes to install: `make test-parity` runs this, `make test` does not.
"""

import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


@pytest.mark.slow
def test_manifests_obey_the_schemas_of_kubernetes_and_skypilot(tmp_path):
    """Their packages hold the schemas; they are installed for this test alone."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = [python, "-m", "pip", "install", "--quiet", "skypilot", "kubernetes-validate", "jsonschema", "pyyaml"]
    if subprocess.run(wanted, capture_output=True).returncode:
        pytest.skip("no package index to install skypilot and kubernetes-validate from")
    check = tmp_path / "check.py"
    check.write_text(CHECK)
    found = subprocess.run([python, check, LAUNCH], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


CHECK = """
import pathlib, sys
import jsonschema, kubernetes_validate, yaml
from sky.utils import schemas

launch = pathlib.Path(sys.argv[1])
task = yaml.safe_load((launch / "skypilot.yaml").read_text())
jsonschema.validate(task, schemas.get_task_schema())
jsonschema.validate(task["resources"], schemas.get_resources_schema())
for manifest in yaml.safe_load_all((launch / "gke_jobset.yaml").read_text()):
    for job in manifest["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        kubernetes_validate.validate(whole | job["template"], "1.33", strict=True)
"""
