"""Every flag belongs to some commands and is rejected by all others; misspelled flags and commands name the nearest."""

import dataclasses
import shlex
import subprocess
import sys

import pytest

from lslm_jax.cli import command_flags
from lslm_jax.cli.command_flags import COMMANDS, FLAGS, parse
from lslm_jax.config import Config, DataConfig, MixtureSource, loading, setting_flags, validation
from lslm_jax.config.loading import describe, with_value
from lslm_jax.errors import ConfigError
from lslm_jax.main import main

ALL = [flag for flags in FLAGS.values() for flag in flags]
OTHERS = [(command, flag.name) for command in COMMANDS for flag in ALL if command not in flag.commands]
OWN = [(command, flag.name) for command in COMMANDS for flag in ALL if command in flag.commands]
CONFIG = validation.validate(Config(data=DataConfig(files=("a.txt",))))


def written(name: str) -> str:
    """A flag with a value of its type."""
    options = next(flag.options for flag in ALL if flag.name == name)
    if options.get("action") == "store_true":
        return f"--{name}"
    if "choices" in options:
        return f"--{name}={options['choices'][0]}"
    return f"--{name}=0" if "type" in options else f"--{name}=x"


def companions(name: str) -> list[str]:
    """Another flag without which this one has no effect."""
    needed = [needs[0] for flag, needs, _ in command_flags._NEEDS if flag == name]
    return [written(other) for other in needed]


@pytest.mark.parametrize(("command", "name"), OTHERS)
def test_a_flag_of_another_command_is_rejected_by_name(command, name):
    with pytest.raises(ConfigError, match=rf"^--{name} is a flag of .*, not of `{command}`"):
        parse([command, written(name)])


@pytest.mark.parametrize(("command", "name"), OWN)
def test_a_flag_of_the_command_is_accepted(command, name):
    assert name in command_flags.given(parse([command, written(name), *companions(name)]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --dtype=bfloat16", "--config.model.dtype"),
        ("--step=4", "train.init_from=RUN/checkpoints/N"),
        ("train --best", "--config.checkpoint.best"),
        ("train --split=test", "data.test_files"),
        ("train --to=x", "--config.checkpoint.export_every"),
        ("train --check", "import --pretrained=DIR --check"),
        ("generate --files=x", "--prompts=FILE"),
        ("evaluate --prompt=x", "--files=FILE"),
    ],
)
def test_the_rejection_names_the_setting_or_command_that_does_it(line, message):
    with pytest.raises(ConfigError) as error:
        parse(line.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --files=a --split=test", "--split and --files exclude each other: *"),
        ("evaluate --harness=a --split=test", "--split and --harness exclude each other: *"),
        ("evaluate --harness=a --files=b", "--files and --harness exclude each other: *"),
        ("generate --pretrained=a --step=3", "--step and --pretrained exclude each other: *"),
        ("export --adapter --dtype=bfloat16", "--adapter and --dtype exclude each other: *"),
        ("import --tolerance=1", "--tolerance is for a comparison: *"),
        ("import --check --reference=x", "--check and --reference exclude each other: *"),
        ("evaluate --limit=3", "--limit is for tasks of lm-eval: *"),
        ("plan --search --price=3", "--search and --price exclude each other: *"),
        ("generate --pretrained=a --workdir=b", "--pretrained and --workdir exclude each other: *"),
        ("evaluate --step=1 --best", "--step and --best exclude each other: *"),
    ],
)
def test_a_flag_that_another_one_would_make_ineffective_is_rejected(line, message):
    with pytest.raises(ConfigError) as error:
        parse(line.split())
    assert str(error.value).startswith(message.removesuffix("*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate --promt=x", "unknown flag --promt; did you mean --prompt?"),
        ("generate --promts x", "unknown flag --promts; did you mean --prompts?"),
        ("--workdri=x", "unknown flag --workdri; did you mean --workdir?"),
        ("evaluate --file=x", "unknown flag --file; did you mean --files?"),
        ("train --zzzzzz", "unknown flag --zzzzzz; `lslm train --help` lists all flags"),
        ("generat --workdir=x", "unknown command generat; did you mean generate?"),
        ("evalute", "unknown command evalute; did you mean evaluate?"),
        ("xyzxyz", f"unknown command xyzxyz: the commands are {', '.join(COMMANDS)}"),
        ("generate hello", "unexpected argument 'hello' after generate: text with blanks needs quotes"),
    ],
)
def test_a_misspelled_flag_or_command_names_the_nearest(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"lslm: {message}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_its_flags_alone_and_examples_that_are_understood(command, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([command, "--help"])
    page = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and page.startswith(f"usage: lslm {command} ")
        and COMMANDS[command] in page.replace("\n", " ")
    )
    shown = {word.strip("[],=") for line in page.partition("examples:")[0].splitlines() for word in line.split()}
    assert {flag.name for flag in ALL if f"--{flag.name}" in shown} == {f.name for f in ALL if command in f.commands}
    examples = [line.strip() for line in page.partition("examples:\n")[2].splitlines()]
    assert examples == [f"lslm {line}" for line in command_flags.EXAMPLES[command]]
    for line in examples:
        words = shlex.split(line)[1:]
        assert parse([word for word in words if not word.startswith("--config.")]).verb == command


def test_without_arguments_there_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    output = capsys.readouterr()
    assert stop.value.code == 0 and output.err == ""
    assert "usage: lslm" in output.out and all(command in output.out for command in COMMANDS)


# Settings that a command takes from its run.


def another(value, hint: str):
    """Another value of the same type as this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "x")
    return next((choice for choice in hint.split(" | ") if choice != str(value)), "x") if " | " in hint else f"{value}x"


@pytest.mark.parametrize("command", setting_flags.READERS)
def test_every_setting_has_an_effect_on_a_reading_command_or_is_rejected(command):
    accepted, rejected = set(), set()
    for entry in describe():
        if entry.key == "data.mixture":
            continue
        value = another(setting_flags.value_of(CONFIG, entry.key), entry.type)
        flags = parse([command, "--workdir=run"])
        flags.settings = [entry.key]
        try:
            setting_flags.check_effect(flags, with_value(CONFIG, entry.key, value), CONFIG)
            accepted.add(entry.key)
        except ConfigError as error:
            assert str(error).startswith(f"--config.{entry.key} has no effect on {command}: ")
            rejected.add(entry.key)
        setting_flags.check_effect(flags, CONFIG, CONFIG)  # the value that the run has is no mistake
    assert {
        "train.steps",
        "optimizer.learning_rate",
        "log.every",
        "tokenizer.vocab_size",
        "clean.min_chars",
    } <= rejected
    if command == "audit":
        assert {"data.files", "data.valid_files", "data.text_key", "generate.top_k"} <= rejected
    else:  # compared with the checkpoint
        assert {"model.d_model", "model.norm_eps", "task.objective"} <= accepted
        assert {"data.files", "data.valid_fraction", "model.dropout"} <= rejected
    read = {"evaluate": "eval.batches", "generate": "generate.top_k", "export": "generate.stop", "audit": "seed"}[
        command
    ]
    assert read in accepted


@pytest.mark.parametrize(
    ("command", "key", "value", "objectives"),
    [
        ("evaluate", "generate.beams", 2, ("seq2seq",)),
        ("generate", "generate.beams", 2, ("causal", "seq2seq")),
        ("evaluate", "task.stride", 3, ("qa",)),
        ("evaluate", "task.mask_rate", 0.5, ("masked", "span_corruption")),
    ],
)
def test_a_setting_of_other_objectives_is_rejected(command, key, value, objectives):
    flags = parse([command, "--workdir=run"])
    flags.settings = [key]
    for objective in ("causal", "masked", "seq2seq", "qa", "classification"):
        own = with_value(CONFIG, "task.objective", objective)
        config = with_value(own, key, value)
        if objective in objectives:
            setting_flags.check_effect(flags, config, own)
        else:
            with pytest.raises(ConfigError, match=rf"^--config.{key} has no effect on {command}: it is for task.obj"):
                setting_flags.check_effect(flags, config, own)


def test_files_to_evaluate_on_may_have_other_columns_and_other_cleaning():
    flags = parse(["evaluate", "--workdir=run", "--files=a.csv"])
    for key, value in (("data.text_key", "review"), ("clean.min_chars", 7), ("data.document", "line")):
        flags.settings = [key]
        setting_flags.check_effect(flags, with_value(CONFIG, key, value), CONFIG)
    flags.settings = ["data.valid_fraction"]
    with pytest.raises(ConfigError, match="to evaluate on other examples use --files=FILE"):
        setting_flags.check_effect(flags, with_value(CONFIG, "data.valid_fraction", 0.5), CONFIG)


@pytest.mark.parametrize("key", ["data.files", "data.text_key", "data.valid_fraction", "data.source"])
def test_settings_of_the_single_source_are_rejected_beside_a_mixture(key):
    mixture = (MixtureSource(name="one", files=("a.txt",)),)
    config = dataclasses.replace(CONFIG, data=DataConfig(mixture=mixture))
    with pytest.raises(ConfigError, match=rf"^--config.{key} has no effect on a mixture: set it for each source "):
        setting_flags.check_mixture([key], config)
    setting_flags.check_mixture(["data.seq_len", "data.dir", "train.steps"], config)
    setting_flags.check_mixture([key], CONFIG)


@pytest.mark.parametrize(
    ("settings", "split"),
    [
        ({"data.test_files": "t.txt"}, "test"),
        ({"data.valid_files": "v.txt"}, None),
        ({"data.valid_files": "v.txt", "data.test_files": "t.txt"}, None),
        ({"data.test_files": ""}, None),
    ],
)
def test_the_test_files_of_a_run_stand_for_its_test_split(settings, split):
    own = Config(data=DataConfig(files=("a.txt",), valid_files=("v.txt",), test_files=("t.txt",)))
    flags = parse(["evaluate", "--workdir=run"])
    assert setting_flags.take_held_out_files(flags, list(settings.items()), own) == list(settings.items())
    assert (flags.split, flags.files) == (split, None)


# Derived sizes, lists and paths.


@pytest.mark.parametrize(
    ("given", "flag", "expected"),
    [
        ({}, "model.d_model=64", {"d_model": 64, "head_dim": 16, "d_ff": 256, "num_kv_heads": 4, "vocab_size": 300}),
        ({}, "model.num_heads=8", {"num_heads": 8, "head_dim": 4, "num_kv_heads": 8, "d_ff": 128}),
        ({}, "model.num_layers=3", {"num_layers": 3, "num_decoder_layers": 3, "d_ff": 128}),
        ({}, "tokenizer.vocab_size=500", {"vocab_size": 0, "d_ff": 128}),
        ({}, "model.vocab_size=512", {"vocab_size": 512}),
        ({"d_ff": 96}, "model.d_model=64", {"d_model": 64, "head_dim": 16, "d_ff": 96}),
        ({"num_kv_heads": 2}, "model.num_heads=8", {"num_heads": 8, "num_kv_heads": 2, "head_dim": 4}),
        ({}, "train.steps=3", {"d_ff": 128, "head_dim": 8, "vocab_size": 300}),
    ],
)
def test_sizes_of_a_run_follow_those_that_they_are_derived_from(given, flag, expected):
    model = {"num_layers": 1, "d_model": 32, "num_heads": 4, "vocab_size": 300} | given
    run = validation.validate(loading.from_dict({"model": model, "data": {"files": ["a.txt"]}}))
    key, _, text = flag.partition("=")
    found = loading.override(loading.release_derived(run, [key]), [(key, text)])
    found = validation.validate(found).model
    assert {name: getattr(found, name) for name in expected} == expected


def test_sizes_that_a_config_file_leaves_open_stay_open():
    config = loading.from_dict({"model": {"d_ff": 3072}})
    assert loading.release_derived(config, ["model.d_model"]) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["Hello, world"]', ("Hello, world",)),
        ('["a,b.txt", "c.txt"]', ("a,b.txt", "c.txt")),
        ("a.txt,b.txt", ("a.txt", "b.txt")),
        ("[ab]*.txt", ("[ab]*.txt",)),
        ("[]", ()),
    ],
)
def test_an_item_of_a_list_may_hold_a_comma_in_json(text, value):
    assert loading.override(Config(), [("data.files", text)]).data.files == value
    assert loading.override(Config(), [("generate.prompts", text)]).generate.prompts == value


def test_a_file_with_a_comma_in_its_name_is_one_item(tmp_path):
    (tmp_path / "a,b.txt").write_text("x")
    name = f"{tmp_path}/a,b.txt"
    assert loading.override(Config(), [("data.files", name)]).data.files == (name,)
    assert loading.override(Config(), [("generate.prompts", name)]).generate.prompts == tuple(name.split(","))


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {"tokenizer.path": "~/t.model", "train.init_from": "~/run", "data.dir": "~/data"}
    config = validation.validate(loading.override(CONFIG, list(keys.items())))
    for key, value in keys.items():
        assert setting_flags.value_of(config, key) == value.replace("~", str(tmp_path))
    (tmp_path / "c.json").write_text('{"seed": 5}')
    assert loading.load("~/c.json").seed == 5


def test_steps_of_a_flag_take_the_place_of_epochs_of_a_file_but_not_of_a_flag():
    config = with_value(CONFIG, "train.epochs", 2.0)
    assert loading.override(config, [("train.steps", "7")]).train.epochs == 0
    assert loading.override(config, [("seed", "7")]).train.epochs == 2
    with pytest.raises(ConfigError, match=r"train.steps and train.epochs exclude each other"):
        loading.override(config, [("train.steps", "7"), ("train.epochs", "1")])


def test_a_missing_package_names_the_interpreter_and_the_cure(tmp_path):
    code = (
        "import sys\n"
        "class Without:\n"
        "  def find_spec(self, name, *rest):\n"
        "    if name.partition('.')[0] == 'etils': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import runpy; runpy.run_module('lslm_jax.main', run_name='__main__')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith(f"lslm: {sys.executable} has no package 'etils': ")
    assert process.stderr.count("\n") == 1


def test_the_home_directory_is_expanded_in_every_flag_that_names_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = {
        "evaluate": "--workdir=~/run --config=~/c.py --files ~/a.txt ~/b*.txt",
        "generate": "--pretrained=~/model --context=~/text --prompts=~/prompts.jsonl",
        "export": "--workdir=~ --to=~/out",
        "import": "--pretrained=hf://a/b --reference=~/x.safetensors",
        "plan": "--config=~/c.py --picture=~/p.html",
    }
    found = {verb: command_flags.parse([verb, *line.split()]) for verb, line in words.items()}
    assert (
        found["evaluate"].files == ["/home/me/a.txt", "/home/me/b*.txt"] and found["evaluate"].config == "/home/me/c.py"
    )
    assert [getattr(found["generate"], name) for name in ("pretrained", "context", "prompts")] == [
        "/home/me/model",
        "/home/me/text",
        "/home/me/prompts.jsonl",
    ]
    assert (found["export"].workdir, found["export"].to) == ("/home/me", "/home/me/out")
    assert (found["import"].pretrained, found["import"].reference) == ("hf://a/b", "/home/me/x.safetensors")
    assert found["plan"].picture == "/home/me/p.html"
