"""Configs are read from files and flags, refused in one line where they cannot work, and written back as they were."""

import dataclasses
import json
import sys
from dataclasses import replace
from typing import get_args

import forked
import pytest

from lslm_jax.config import Config, DataConfig, MixtureSource, ModelConfig, Source, TrainConfig, loading, validation
from lslm_jax.config.loading import describe, digest, from_dict, load, override, smoke, to_dict, to_json
from lslm_jax.config.validation import fill_sizes, resolve_vocabulary, validate
from lslm_jax.errors import ConfigError, InputMissing, LslmError

PLAIN = """
from lslm_jax.config import Config, DataConfig, TrainConfig

def get_config():
  return Config(data=DataConfig(files=("a.txt",)), train=TrainConfig(steps=7))
"""
WITH_ARGUMENT = """
from lslm_jax.config import Config, DataConfig, ModelConfig

def get_config(size):
  return Config(data=DataConfig(files=("a.txt",)), model=ModelConfig(num_layers=int(size or 3)))
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path as text."""

    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def good(**changes):
    return replace(Config(data=DataConfig(files=("a.txt",))), **changes)


def test_a_python_file_returns_the_config_it_builds(write):
    assert load(write("c.py", PLAIN)).train.steps == 7


def test_what_follows_the_colon_is_handed_to_the_file(write):
    path = write("c.py", WITH_ARGUMENT)
    assert load(f"{path}:24").model.num_layers == 24
    assert load(path).model.num_layers == 3


def test_json_holds_only_what_differs_and_is_never_executed(write):
    config = load(write("c.json", '{"train": {"steps": 7}, "data": {"files": ["a.txt"], "valid_fraction": 0}}'))
    assert config == replace(
        Config(), train=TrainConfig(steps=7), data=DataConfig(files=("a.txt",), valid_fraction=0.0)
    )
    with pytest.raises(ConfigError, match="is not JSON"):
        load(write("d.json", PLAIN))


@pytest.mark.parametrize("name", ["c.py", "c.json"])
def test_smoke_shrinks_any_config_and_keeps_its_kind(write, name):
    model = ModelConfig(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, gated=True, dtype="bfloat16")
    config = good(model=model)
    source = f"from lslm_jax.config import *\ndef get_config():\n  return {config!r}\n"
    path = write(name, source if name == "c.py" else to_json(config))
    small = load(f"{path}:smoke")
    assert small == smoke(load(path))
    assert validate(small).model.num_kv_heads == 2 and validate(small).model.num_heads == 4
    assert (small.model.num_layers, small.model.d_model, small.train.steps) == (2, 64, 20)
    assert (small.model.gated, small.data.files) == (True, ("a.txt",))


def test_a_config_survives_the_way_to_json_and_back():
    config = good(
        data=DataConfig(mixture=(MixtureSource(name="a", files=("x", "y"), weight=2.0), MixtureSource(name="b"))),
        seed=3,
    )
    assert from_dict(json.loads(to_json(config))) == config
    assert from_dict(to_dict(validate(good()))) == validate(good())
    assert to_json(config).endswith("}\n")


def test_equal_settings_have_equal_digests_and_others_do_not():
    assert digest(good()) == digest(good())
    assert digest(good()) != digest(good(seed=1))
    assert digest(good().model) == digest(good(seed=1).model)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "3", 3),
        ("train.steps", "100", 100),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.gated", "true", True),
        ("model.gated", "False", False),
        ("log.tensorboard", "0", False),
        ("model.norm", "rmsnorm", "rmsnorm"),
        ("data.files", "a.txt, b.txt", ("a.txt", "b.txt")),
        ("data.files", "", ()),
        ("log.profile", "3,5", (3, 5)),
        ("tokenizer.path", "a=b,c", "a=b,c"),
        ("mesh.data", "-1", -1),
    ],
)
def test_a_flag_sets_a_key_to_what_its_text_spells(key, text, value):
    config = override(Config(), [(key, text)])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_the_last_of_two_flags_wins():
    assert override(Config(), [("seed", "1"), ("seed", "2")]).seed == 2


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.stps", "1", "unknown key --config.train.stps; did you mean train.steps?"),
        ("learning_rat", "1", "unknown key --config.learning_rat; did you mean optimizer.learning_rate?"),
        ("learning_rate", "1", "unknown key --config.learning_rate; did you mean optimizer.learning_rate?"),
        ("modle.d_model", "1", "unknown key --config.modle.d_model; did you mean model.d_model?"),
        ("seed.x", "1", "unknown key --config.seed.x; did you mean seed?"),
        ("zzzzz", "1", "unknown key --config.zzzzz; --config.help lists all"),
        ("model", "1", "--config.model is a section: set one of its keys, as model.family"),
        ("train.batch_size", "3.5", "train.batch_size wants a whole number, got '3.5'"),
        ("train.z_loss", "high", "train.z_loss wants a number, got 'high'"),
        ("model.gated", "maybe", "model.gated wants true or false, got 'maybe'"),
        ("model.norm", "batchnorm", "model.norm wants one of layernorm, rmsnorm; got 'batchnorm'"),
        ("log.profile", "a,b", "log.profile wants a whole number, got 'a'"),
        ("data.mixture", "a", "data.mixture cannot be set by a flag: write it in the config file"),
    ],
)
def test_a_bad_flag_is_one_line_that_says_what_would_do(key, text, message):
    refused(lambda: override(Config(), [(key, text)]), message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.json",
            "{",
            "{path} is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("c.json", "[]", "{path}: the config wants nested keys, got []"),
        ("c.json", '{"train": 3}', "{path}: train wants nested keys, got 3"),
        ("c.json", '{"train": {"stesp": 3}}', "{path}: unknown key train.stesp; did you mean steps?"),
        ("c.json", '{"train": {"steps": "3"}}', "{path}: train.steps wants a whole number, got '3'"),
        ("c.json", '{"train": {"steps": true}}', "{path}: train.steps wants a whole number, got True"),
        ("c.json", '{"train": {"ema": null}}', "{path}: train.ema wants a number, got None"),
        ("c.json", '{"data": {"files": "a.txt"}}', "{path}: data.files wants a list, got 'a.txt'"),
        ("c.json", '{"data": {"mixture": [{}]}}', "{path}: data.mixture.name is missing"),
        ("c.json", '{"model": {"norm": ["x"]}}', "{path}: model.norm wants one of layernorm, rmsnorm; got ['x']"),
        ("c.py", "x = 1\n", "{path} defines no get_config()"),
        ("c.py", "def get_config():\n  return 3\n", "{path}: get_config() returned int, not a Config"),
        (
            "c.py",
            "from lslm_jax.config import *\ndef get_config():\n  return Config(train=TrainConfig(stpes=3))\n",
            "{path}:3: TrainConfig has no field 'stpes'; did you mean steps?",
        ),
        (
            "c.py",
            "from lslm_jax.config import *\ndef get_config():\n  return Config(train=TrainConfig(steps=3.5))\n",
            "{path}: train.steps wants a whole number, got 3.5",
        ),
        (
            "c.py",
            "from lslm_jax import config\ndef get_config():\n  return config.Confg()\n",
            "{path}:3: AttributeError: module 'lslm_jax.config' has no attribute 'Confg'",
        ),
        ("c.py", "def get_config(:\n", "{path}:1: SyntaxError: invalid syntax"),
        (
            "c.py",
            "import os\nmissing = os.environ['NO_SUCH_VARIABLE']\n",
            "{path}:2: KeyError: 'NO_SUCH_VARIABLE'",
        ),
        (
            "c.py",
            "from lslm_jax.errors import ConfigError\ndef get_config():\n  raise ConfigError('sizes are 1b and 8b')\n",
            "sizes are 1b and 8b",
        ),
        ("c.py", "import no_such_module\n", "{path}:1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(write, name, text, message):
    path = write(name, text)
    refused(lambda: load(path), message.replace("{path}", path))


@pytest.mark.parametrize("name", ["c.py", "c.json"])
def test_an_argument_nobody_reads_is_refused(write, name):
    path = write(name, PLAIN if name == "c.py" else "{}")
    refused(lambda: load(f"{path}:24"), f"{path} takes no argument but smoke, got '24'")


def test_a_missing_file_is_a_missing_input():
    refused(lambda: load("nowhere.py"), "config file nowhere.py does not exist", InputMissing, 66)
    refused(lambda: load("nowhere.py:smoke"), "config file nowhere.py does not exist", InputMissing, 66)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("train.steps=0", "train.steps must be positive, got 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be positive, got nan"),
        ("seed=-1", "seed must not be negative, got -1"),
        ("model.dropout=1.0", "model.dropout must be in [0, 1), got 1.0"),
        ("optimizer.b2=1", "optimizer.b2 must be in [0, 1), got 1.0"),
        ("generate.top_p=1.5", "generate.top_p must be in [0, 1], got 1.5"),
        (
            "model.num_heads=10",
            "model.d_model=768 is not divisible by model.num_heads=10: set model.head_dim or use d_model=760 or 770",
        ),
        ("model.num_kv_heads=5", "model.num_heads=12 is not divisible by model.num_kv_heads=5"),
        (
            "model.positions=rotary model.head_dim=63",
            "rotary positions need an even head width, got 63 (model.head_dim)",
        ),
        ("model.attention=cudnn", "model.attention=cudnn needs model.dtype=bfloat16"),
        (
            "model.num_experts=4 model.experts_per_token=5",
            "model.experts_per_token=5 is more than model.num_experts=4: use at most 4",
        ),
        ("model.shared_experts=1", "model.shared_experts=1 needs model.num_experts"),
        ("model.expert_capacity=1.5", "model.expert_capacity=1.5 needs model.num_experts"),
        ("model.num_experts=6 mesh.expert=4", "model.num_experts=6 is not divisible by mesh.expert=4: use 4 or 8"),
        (
            "model.num_experts=4 model.lora_rank=8 model.lora_targets=mlp.up",
            "model.lora_targets=mlp.up names no projection: "
            "there are attention.q, attention.k, attention.v, attention.o",
        ),
        ("data.files=", "data: source=files needs files"),
        (f"seed={2**63}", "seed must be at most 4294967295, got 9.223e+18"),
        (f"train.batch_size={10**30}", "train.batch_size must be at most 16777216, got 1e+30"),
        (f"train.steps={10**30}", "train.steps must be at most 2147483647, got 1e+30"),
        (f"log.profile=1,{10**400}", "log.profile is too large"),
        (f"model.num_layers={10**9}", "model.num_layers must be at most 10000, got 1e+09"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate must be finite, got inf"),
        ("optimizer.warmup_from=1.5", "optimizer.warmup_from must be in [0, 1], got 1.5"),
        ("data.source=tfds", "data: source=tfds needs tfds, the data set's name"),
        (
            "data.packing=bins data.mask_documents=false",
            "data.packing=bins needs data.mask_documents=true: several pieces or padding share a row",
        ),
        (
            "data.valid_files=b.txt data.valid_fraction=0.1",
            "data: valid_files and valid_fraction exclude each other: validation is held out in one way",
        ),
        ("data.valid_split=test", "data: valid_split does not go with source=files"),
        (
            "data.source=tfds data.tfds=lm1b data.valid_files=b.txt",
            "data: valid_files does not go with source=tfds",
        ),
        ("data.test_split=test", "data: test_split does not go with source=files"),
        ("data.source=tfds data.tfds=a data.test_files=b", "data: test_files does not go with source=tfds"),
        (
            "data.source=tfds data.tfds=a data.example=pair task.objective=seq2seq",
            "data: example=pair needs target_key, the feature that holds the target",
        ),
        ("data.labels=a,b,a", "data: labels must differ, got a, b, a"),
        ("task.objective=masked", "task.objective=masked needs model.family=encoder, not decoder"),
        ("model.family=encoder", "task.objective=causal needs model.family=decoder, not encoder"),
        (
            "task.objective=seq2seq model.family=encoder",
            "task.objective=seq2seq needs model.family=encoder_decoder or decoder, not encoder",
        ),
        (
            "task.objective=span_corruption model.family=decoder",
            "task.objective=span_corruption needs model.family=encoder_decoder, not decoder",
        ),
        (
            "task.objective=seq2seq model.family=encoder_decoder",
            "data: task.objective=seq2seq learns from example=pair or label or qa, not text",
        ),
        ("data.example=qa", "data: task.objective=causal learns from example=text or chat, not qa"),
        (
            "task.objective=tagging model.family=encoder data.example=label",
            "data: task.objective=tagging learns from example=tags, not label",
        ),
        ("data.seq_len=2048", "data.seq_len=2048 is longer than model.max_length=1024"),
        (
            "train.batch_size=10 train.accumulate=4",
            "train.batch_size=10 is not divisible by train.accumulate=4: use 8 or 12",
        ),
        ("train.accumulate=128", "train.batch_size=64 is not divisible by train.accumulate=128: use 128"),
        (
            "optimizer.name=lion optimizer.nesterov=true",
            "optimizer.nesterov does not go with optimizer.name=lion",
        ),
        (
            "checkpoint.best=loss",
            "checkpoint.best wants eval/NAME with NAME one of loss, perplexity, pseudo_perplexity, bits_per_byte, mse, "
            "accuracy, bleu, chrf, exact_match, f1, f1_macro, matthews, pearson, spearman; got 'loss'",
        ),
        ("log.profile=5", "log.profile wants a first and a last step, as 100,105, got 5"),
        ("log.profile=9,5", "log.profile wants a first and a last step, as 100,105, got 9,5"),
        ("mesh.data=-1 mesh.fsdp=-1", "only one mesh axis may be -1"),
        ("mesh.tensor=-2", "mesh.tensor must be positive, -1 or 0, got -2"),
        ("mesh.dcn_data=0", "mesh.dcn_data must be positive, got 0"),
        ("mesh.tensor=8", "model.num_heads=12 is not divisible by mesh.tensor=8: use 8 or 16"),
        (
            "model.num_kv_heads=2 mesh.tensor=4",
            "model.num_kv_heads=2 is not divisible by mesh.tensor=4: use 4",
        ),
        (
            "data.seq_len=1004 mesh.context=4",
            "data.seq_len=1004 is not divisible by 2 * mesh.context=8, the chunks that balance causal attention: use "
            "1000 or 1008",
        ),
        ("mesh.fsdp=5", "model.d_model=768 is not divisible by mesh.fsdp=5: use 765 or 770"),
        ("mesh.stage=-1", "mesh.stage cannot be -1: say into how many stages the layers are split"),
        ("mesh.stage=5", "model.num_layers=12 is not divisible by mesh.stage=5: use 10 or 15"),
        (
            "mesh.stage=4 model.pipeline_rounds=2",
            "model.num_layers=12 is not divisible by mesh.stage * model.pipeline_rounds=8: use 8 or 16",
        ),
        ("mesh.stage=2 model.scan_layers=false", "mesh.stage=2 needs model.scan_layers=true"),
        (
            "mesh.stage=2 model.pipeline_rounds=2 model.microbatches=5",
            "model.microbatches=5 is not divisible by mesh.stage=2, as model.pipeline_rounds=2 needs: use 4 or 6",
        ),
    ],
)
def test_an_impossible_setting_is_one_line_that_names_its_keys(changes, message):
    assignments = [tuple(change.split("=", 1)) for change in changes.split()]
    refused(lambda: validate(override(good(), assignments)), message)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"name": "a"}], "data.mixture source a: source=files needs files"),
        ([{"name": "a", "source": "shards"}], "data.mixture source a: source=shards cannot be part of a mixture"),
        ([{"name": "a", "files": ("x",), "weight": 0.0}], "data.mixture source a: weight must be positive, got 0.0"),
        (
            [{"name": "../a", "files": ("x",)}],
            "data.mixture source ../a: the name must be a plain word other than train, valid and test",
        ),
        ([{"name": "a", "files": ("x",)}] * 2, "data.mixture names must differ, got a, a"),
    ],
)
def test_an_impossible_mixture_is_refused_by_the_name_of_its_source(sources, message):
    mixture = tuple(MixtureSource(**source) for source in sources)
    refused(lambda: validate(good(data=DataConfig(mixture=mixture))), message)


@pytest.mark.parametrize(
    "changes",
    [
        "task.objective=causal model.family=decoder data.example=text",
        "task.objective=masked model.family=encoder data.example=text",
        "task.objective=span_corruption model.family=encoder_decoder data.example=text",
        *(
            f"task.objective=seq2seq model.family={family} data.example={example}"
            for family in ("decoder", "encoder_decoder")
            for example in ("pair", "label", "qa")
        ),
        "task.objective=classification model.family=encoder data.example=label",
        "task.objective=regression model.family=encoder data.example=label",
        "task.objective=tagging model.family=encoder data.example=tags",
        "task.objective=qa model.family=encoder data.example=qa",
    ],
)
def test_every_objective_goes_with_its_family_and_its_examples(changes):
    validate(override(good(), [tuple(change.split("=", 1)) for change in changes.split()]))


def test_checking_fills_in_the_sizes_that_follow_from_others():
    model = validate(good()).model
    assert (model.num_kv_heads, model.head_dim, model.d_ff) == (12, 64, 3072)
    given = ModelConfig(num_kv_heads=4, head_dim=32, d_ff=100, num_decoder_layers=3)
    assert fill_sizes(given) == given
    assert validate(validate(good())) == validate(good())


def test_the_vocabulary_is_the_tokenizers_unless_a_larger_one_is_asked_for():
    assert resolve_vocabulary(ModelConfig(), 512).vocab_size == 512
    assert resolve_vocabulary(ModelConfig(vocab_size=1000), 512).vocab_size == 1000
    refused(
        lambda: resolve_vocabulary(ModelConfig(vocab_size=256), 512),
        "model.vocab_size=256 is smaller than the tokenizer's 512 tokens",
    )


def test_every_key_is_documented():
    entries = list(describe())
    keys = [entry.key for entry in entries]
    assert len(keys) == len(set(keys)) == len(leaves(to_dict(Config())))
    assert all(entry.doc.endswith(".") and "\n" not in entry.doc for entry in entries)
    by_key = {entry.key: entry for entry in entries}
    assert by_key["train.steps"] == ("train.steps", "int", "10000", "Optimizer steps.")
    assert by_key["model.norm"].type == "layernorm | rmsnorm"
    assert by_key["data.files"].type == "str, ..." and by_key["data.files"].doc
    documented = set(loading._field_docs())
    for kind in (Source, MixtureSource, *(type(getattr(Config(), field.name)) for field in dataclasses.fields(Config))):
        if dataclasses.is_dataclass(kind):
            assert {(kind.__name__, name) for name in kind.__annotations__} <= documented


def test_the_keys_that_scripts_rely_on_are_there():
    keys = {entry.key for entry in describe()}
    relied_on = """
        seed data.source data.files data.tfds data.split data.seq_len data.mixture train.steps train.batch_size
        train.accumulate optimizer.name optimizer.learning_rate optimizer.schedule mesh.data mesh.fsdp mesh.tensor
        checkpoint.every checkpoint.keep eval.every log.every
    """
    assert set(relied_on.split()) <= keys
    assert {"tfds", "files", "shards", "synthetic"} == set(get_args(Source.__annotations__["source"]))


def test_loading_and_checking_is_fast_and_imports_nothing_slow(write):
    code = (
        "import sys; from lslm_jax.config import loading, validation; "
        "validation.validate(loading.override(loading.load(sys.argv[1]), [('seed', '1')])); "
        "list(loading.describe()); "
        "print(*{name.split('.')[0] for name in sys.modules} & {'jax', 'tensorflow', 'flax', 'numpy', 'orbax'})"
    )
    command = [sys.executable, "-c", code, write("c.py", PLAIN)]
    fastest = 10.0
    for _ in range(3):
        result, seconds = forked.timed(command)
        assert result.returncode == 0, result.stderr
        fastest = min(fastest, seconds)
    assert result.stdout.strip() == ""
    assert fastest < 1.0


def refused(action, message, kind=ConfigError, exit_code=2):
    with pytest.raises(LslmError) as error:
        action()
    assert str(error.value) == message
    assert type(error.value) is kind and error.value.exit_code == exit_code


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"character_coverage": 0.5}, "tokenizer.character_coverage must be in [0.98, 1], got 0.5"),
        ({"user_symbols": ["<a>", "<a>"]}, "tokenizer.user_symbols must differ and not be empty, got <a>, <a>"),
        ({"user_symbols": [""]}, "tokenizer.user_symbols must differ and not be empty, got "),
        ({"user_symbols": ["<a>", "</s>"]}, "tokenizer.user_symbols=</s> is a token of any trained vocabulary: *"),
        ({"user_symbols": ["<0x41>"]}, "tokenizer.user_symbols=<0x41> is a token of any trained vocabulary: *"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_is_refused(settings, message):
    config = loading.from_dict({"tokenizer": settings, "data": {"files": ["a.txt"]}})
    with pytest.raises(ConfigError) as error:
        validation.validate(config)
    assert str(error.value).startswith(message.removesuffix("*"))
