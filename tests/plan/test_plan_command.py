"""`plan` on the command line: a report and JSON, exit 2 and a change that was tried where memory is short."""

import json
import re
import time
from html.parser import HTMLParser

import pytest
from tiny_plans import CONFIG, CPU

from lslm_jax.config import loading
from lslm_jax.config.validation import validate
from lslm_jax.main import main
from lslm_jax.plan.compile_step import compile_step, resolve
from lslm_jax.plan.estimates import figures
from lslm_jax.plan.suggest_fix import changed


@pytest.fixture
def plan(tmp_path, capsys):
    """plan(flag, ...): the exit code, the JSON of stdout's last line or None, and stderr."""
    (tmp_path / "config.json").write_text(loading.to_json(CONFIG))

    def run(*flags):
        with pytest.raises(SystemExit) as stop:
            main(["plan", f"--config={tmp_path}/config.json", *flags])
        output = capsys.readouterr()
        lines = output.out.splitlines()
        return stop.value.code, json.loads(lines[-1]) if lines else None, output.err

    return run


def test_a_plan_needs_no_data_no_workdir_and_no_other_package(plan, tmp_path):
    code, found, report = plan("--topology=cpu:8", f"--picture={tmp_path}/plan.html", "--price=2")
    assert code == 0
    assert found["topology"] == "cpu:8" and found["devices"] == 8 and found["mesh"] == {"fsdp": 8}
    assert found["attention"] == "xla"
    assert {each["kind"] for each in found["collectives"]} == {"all-gather", "all-reduce"}
    assert found["compile_seconds"] > 0 and found["run"]["steps"] == 1000
    for said in ("parameters", "all-gather", "fsdp", "checkpoint", "MiB", "xla attention"):
        assert said in report
    page = (tmp_path / "plan.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<svg") == 1 and "http" not in page
    assert re.search(r"<title>Plan of \S+/config.json on 8 x cpu</title>", page) and "3 layers, d_model 64" in page
    assert ", 0 ms" not in report and "inside a slice or host" in report, "no link speed of CPUs is known"
    assert re.search(r"blocks\.mlp\.up\.w<td>3 x 64<span[^>]*>fsdp</span> x 256<", page)


def test_what_does_not_fit_is_told_with_a_change_that_was_tried_and_does(plan):
    _, free, _ = plan("--topology=cpu:8")
    limit = int(free["memory"]["needed"] * 0.9)
    code, found, report = plan("--topology=cpu:8", f"--memory={limit}")
    assert code == 2 and found["memory"]["fits"] is False and found["memory"]["limit"] == limit
    last = report.splitlines()[-1]
    assert last.startswith("lslm: does not fit: ") and last.endswith(f"use {found['advice']['flags']}, which fits")
    settings = tuple(found["advice"]["settings"].items())
    again = figures(compile_step(changed(resolve(validate(CONFIG)), settings), CPU), CPU, limit, None)
    assert again["memory"]["fits"] and again["memory"]["needed"] == found["advice"]["figures"]["memory"]["needed"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["cpu:2", pytest.param("cpu:8", marks=pytest.mark.exhaustive)])
def test_where_nothing_helps_more_devices_are_asked_for(plan, topology):
    code, found, report = plan(
        f"--topology={topology}", "--memory=1000", "--config.model.remat=full", "--config.mesh.tensor=1"
    )
    assert code == 2 and found["advice"] is None
    assert report.splitlines()[-1].endswith("on each device: nothing that was tried makes it fit: use more devices")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v5p:4x4", "--topology=v5p:4x4 is none: write one like v5e:4x4, v5p:4x4x4"),
        ("--topology=v5e:4x444444444", "--topology=v5e:4x444444444 is none: write one like v5e:4x4"),
        ("--topology=v5e:4444x4444", "--topology=v5e:4444x4444 has more than 131072 devices"),
        ("--picture=plan.png", "--picture=plan.png: a plan is drawn as HTML"),
        ("--config.train.batch_size=12", "train.batch_size=12 is not divisible by data*fsdp=8"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_compiled(flag, message, plan):
    begun = time.monotonic()
    code, found, report = plan(flag)
    assert code == 2 and found is None and time.monotonic() - begun < 10
    (line,) = report.splitlines()
    assert line.startswith(f"lslm: {message}")


def test_a_pretrained_models_config_is_enough(plan, tmp_path):
    (tmp_path / "hub").mkdir()
    settings = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_theta": 10000.0},
        **{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
        **{"intermediate_size": 128, "vocab_size": 1000, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    }
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings))
    code, found, _ = plan("--topology=cpu:8", f"--pretrained={tmp_path}/hub")
    assert code == 0
    assert found["parameters"]["mlp"] == 2 * 3 * 64 * 128


@pytest.mark.slow
def test_a_search_ranks_what_fits_in_processes_of_its_own(plan):
    code, found, report = plan("--topology=cpu:2", "--search", "--config.train.batch_size=4")
    assert code == 0
    meshes = {json.dumps(each["mesh"]) for each in found["found"]}
    assert {'{"data": 2}', '{"fsdp": 2}', '{"tensor": 2}'} <= meshes
    assert all(each["settings"]["model.remat"] == "none" for each in found["found"])  # as nothing is said of memory
    assert all(each["flags"] in report for each in found["found"])
