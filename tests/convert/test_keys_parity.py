"""Perturbed JSON files of a directory: as transformers and PEFT read them, or rejected by name; never another model."""

import collections
import copy
import json
import os
import random
import shutil
import warnings

import hf_key_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_parity import CASES, example, load, make, our_outputs, their_outputs

from lslm_jax.convert import generation, hf_keys, pretrained
from lslm_jax.data.tokenizers import to_hf
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import LslmError
from lslm_jax.generate import decode

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # what peft calls, they are to remove
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

# One case of each family; how often each is perturbed, in the fast form and in the long one.
FAMILIES = ["gpt2", "llama3", "mistral", "mixtral", "qwen2-windows", "qwen3", "gemma2", "gemma3", "smollm3", "olmo2"]
FAMILIES += ["pythia", "bert-classification", "roberta-masked", "distilbert-qa", "modernbert-classification", "t5"]
FAMILIES += ["flan-t5", "marian"]
FEW, MANY = 6, int(os.environ.get("FUZZ", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
long = [pytest.mark.exhaustive, pytest.mark.skipif("FUZZ" not in os.environ, reason="hours: set FUZZ=200")]
forms = pytest.mark.parametrize("times", [FEW, pytest.param(MANY, marks=long)])


def test_the_table_of_keys_is_that_of_the_installed_packages():
    made = hf_key_table.build()
    assert made["versions"] == hf_keys.table()["versions"], "regenerate it: python tests/convert/hf_key_table.py FILE"
    assert made == hf_keys.table()


def another(rng, value):
    """A value of the same kind, or of another, that differs."""
    match value:
        case bool():
            return rng.choice([not value, None, "yes"])
        case int():
            return rng.choice([value + 1, 2 * value, value // 2, 0, -1, None, float(value), str(value), value + 7])
        case float():
            return rng.choice([value * 1.5, value / 2, 0.0, -value, None, 1, "0.5"])
        case str():
            return rng.choice(["gelu", "silu", "relu", "gelu_new", "linear", "mean", "eager", None, 3, value + "x"])
        case list():
            return rng.choice([value[::-1], value[:1], [*value, *value[-1:]], [], None])
        case dict():
            return rng.choice([dict(list(value.items())[1:]), {}, None, value | {"extra": 1}])
    return rng.choice([True, 1, 3, 0.5, "full", [1], {"rope_type": "linear", "factor": 2.0}])


def perturbed(rng, content, more):
    """A copy with one or two keys changed, nulled, removed or added; and which."""
    content, touched = copy.deepcopy(content), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        key = rng.choice(sorted({*content, *more} if rng.random() < 0.5 else content))
        how = rng.choice(["change", "change", "null", "remove", "add"])
        if how == "remove":
            content.pop(key, None)
        elif how == "null":
            content[key] = None
        elif how == "add":
            key = rng.choice(sorted(more))
            content[key] = another(rng, more[key])
        else:
            content[key] = another(rng, content.get(key, more.get(key)))
        touched.append(key)
    return content, touched


FAULTS = ("SILENT", "traceback", "rejected without a name")


class Tally:
    """Counts of outcomes, and notes of those that are faults."""

    def __init__(self):
        self.counts, self.faults = collections.Counter(), []

    def add(self, outcome, note=None):
        self.counts[outcome] += 1
        if outcome in FAULTS:
            self.faults.append(f"{outcome}: {note}")

    def reject(self, error, touched, note):
        named = any(key in str(error) for key in touched)
        outcome = "rejected by name" if named else "rejected without a name"
        self.add(outcome if isinstance(error, LslmError) else "traceback", f"{note}: {error!r}")

    def check(self, name):
        print("\n".join([f"{name}: {dict(self.counts)}", *self.faults]), flush=True)
        assert not self.faults, "\n".join(map(str, self.faults))


SKIPPED = {"architectures", "model_type", "id2label", "label2id", "num_labels"}  # have tests of their own


def settings_of(name):
    family = hf_keys.table()["families"]
    kind = pretrained_kind(name)
    more = (
        family[kind]["defaults"]
        | dict.fromkeys(family[kind]["other"])
        | dict.fromkeys(["sliding_window", "rope_theta"])
    )
    return {key: value for key, value in more.items() if key not in SKIPPED and not key.startswith("_")}


def pretrained_kind(name):
    config = getattr(transformers, ("Gemma3Text" if CASES[name].name == "Gemma3" else CASES[name].name) + "Config")
    return config.model_type


def theirs_say(directory, case, batch):
    """Logits of transformers, or None where it does not take the directory, or makes up some weights."""
    try:
        model, report = type(make(case)).from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager", dtype="float32"
        )
        if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return None
        with torch.no_grad():
            return their_outputs(model.eval(), case, batch)[0].numpy()
    except Exception:
        return None


def ours_say(directory, case, batch):
    with jax.disable_jit():  # a cached program an operation: a tenth of the time of compiling each model
        _, model = load(directory, case.objective, scan_layers=True)
        return np.asarray(our_outputs(model, case, jax.tree.map(jnp.asarray, batch))[1])


def agree(ours, theirs, case, batch):
    counted = batch.segments_BT > 0 if case.objective == "qa" else batch.weights_BT > 0
    return np.allclose(ours[..., : theirs.shape[-1]][counted], theirs[counted], atol=1e-4, equal_nan=True)


@forms
@pytest.mark.parametrize("name", FAMILIES)
def test_a_perturbed_config_is_read_as_transformers_reads_it_or_rejected_by_name(name, times, tmp_path):
    case, rng, tally = CASES[name], random.Random(f"{name}{SEED}"), Tally()
    make(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content, more = json.loads(path.read_text()), settings_of(name)
    base = {key: value for key, value in content.items() if key not in SKIPPED}
    source = pretrained.describe(tmp_path)
    batch = example(case, source.model)
    known = {source.model: ours_say(tmp_path, case, batch)}
    for _ in range(times):
        changed, touched = perturbed(rng, base, more)
        changed |= {key: content[key] for key in SKIPPED if key in content}
        path.write_text(json.dumps(changed))
        note = f"{touched}: { {key: changed.get(key, 'gone') for key in touched} }"
        try:
            model = pretrained.describe(tmp_path).model
            ours = known[model] if model in known else ours_say(tmp_path, case, batch)
        except Exception as error:
            tally.reject(error, touched, note)
            continue
        theirs = theirs_say(tmp_path, case, batch)
        if theirs is None:
            tally.add("refused by transformers")
        else:
            tally.add("equal" if agree(ours, theirs, case, batch) else "SILENT", note)
    tally.check(name)


GENERATION = {
    "eos_token_id": [2, 9],
    "max_new_tokens": 16,
    "do_sample": False,
    "num_beams": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "temperature": 0.7,
    "top_p": 0.9,
    "suppress_tokens": [5],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[6], [8, 9], [3, 4, 5]],
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 2,
    "early_stopping": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


class Words:
    """A tokenizer whose ids are its text."""

    vocab_size, bos_id, eos_id, pad_id, adds_bos = 131, 1, 2, 0, False

    def decode(self, ids):
        return " ".join(map(str, ids))


def their_text(directory, case, ids):
    try:
        model = type(make(case)).from_pretrained(directory, attn_implementation="eager", dtype="float32").eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = {} if model.generation_config.max_new_tokens else {"max_new_tokens": 16}
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **settings
            )
        start = 1 if case.objective == "seq2seq" else len(ids)
        return out[0, start:].tolist(), model.generation_config
    except Exception:
        return None, None


@pytest.mark.parametrize("name", ["llama3", "marian"])
@forms
def test_a_perturbed_generation_config_writes_what_transformers_writes_or_is_rejected_by_name(name, times, tmp_path):
    case, rng, tally = CASES[name], random.Random(f"g{name}{SEED}"), Tally()
    make(case).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    source, model = load(tmp_path, case.objective)
    known = set(hf_keys.table()["generation"]) - {"watermarking_config", "compile_config", "continuous_batching_config"}
    more = dict.fromkeys(known) | hf_keys.table()["generation_defaults"]
    ids = np.random.default_rng(1).integers(3, 131, 6).tolist()
    for _ in range(times):
        base = GENERATION | rng.choice([{}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": True}])
        base |= {"decoder_start_token_id": 0} if case.objective == "seq2seq" else {}
        changed, touched = perturbed(rng, base, more)
        path.write_text(json.dumps(changed))
        note = f"{ {key: changed.get(key, 'gone') for key in touched} } of {changed}"
        try:
            settings = generation.read(epath.Path(tmp_path), source.settings, Words())  # type: ignore[arg-type]
        except Exception as error:
            tally.reject(error, touched, note)
            continue
        if settings.temperature > 0:
            tally.add("drawn at random")
            continue
        theirs, config = their_text(tmp_path, case, ids)
        if theirs is None:
            tally.add("refused by transformers")
            continue
        given = ids[:-1] if case.objective == "seq2seq" else ids
        words = Words()
        words.eos_id = 2 if case.objective != "seq2seq" else ids[-1]  # which it puts behind a source
        words.bos_id = 0 if case.objective == "seq2seq" else 1
        settings = adapted(settings, words)
        ours = decode.generate(model, words, [given], settings, 0)[0]
        ends = (config and config.eos_token_id) or []
        ends = ends if isinstance(ends, list) else [ends]
        expected = theirs[: next((i for i, id in enumerate(theirs) if id in ends), len(theirs))][:16]
        ours = [int(id) for id in ours.text.split()][:16]
        tally.add("equal" if ours == expected else "SILENT", f"{note}: {ours} is not {expected}")
    tally.check(name)


def adapted(settings, words):
    """Settings for a tokenizer whose end of text is another id than 2."""
    if words.eos_id == 2:
        return settings
    ends = (*([2] if settings.eos else []), *settings.stop_ids)
    import dataclasses

    return dataclasses.replace(settings, eos=False, stop_ids=ends, bos=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A directory with a small Llama and one with an adapter for it."""
    root, case = tmp_path_factory.mktemp("adapter"), CASES["llama3"]
    make(case).save_pretrained(root / "base")
    base = type(make(case)).from_pretrained(root / "base")
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(root / "adapter")
    return root


@forms
def test_a_perturbed_adapter_config_is_read_as_peft_reads_it_or_rejected_by_name(times, adapter, tmp_path):
    case, rng, tally = CASES["llama3"], random.Random(f"a{SEED}"), Tally()
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    base = {key: value for key, value in content.items() if key not in ("base_model_name_or_path", "peft_type")}
    batch = example(case, pretrained.describe(adapter / "base").model)
    for _ in range(times):
        changed, touched = perturbed(rng, base, hf_keys.table()["adapter"]["defaults"])
        changed |= {"peft_type": "LORA", "base_model_name_or_path": str(adapter / "base")}
        path.write_text(json.dumps(changed))
        note = f"{ {key: changed.get(key, 'gone') for key in touched} }"
        try:
            ours = ours_say(tmp_path / "adapter", case, batch)
        except Exception as error:
            tally.reject(error, touched, note)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = type(make(case)).from_pretrained(adapter / "base", attn_implementation="eager")
                model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
            with torch.no_grad():
                theirs = their_outputs(model, case, batch)[0].numpy()
        except Exception:
            tally.add("refused by peft")
            continue
        tally.add("equal" if agree(ours, theirs, case, batch) else "SILENT", note)
    tally.check("adapter_config.json")


TEXTS = ["the cat sat", "Naïve Café <|end|> 1234", "  two  blanks", "<s>x</s>", ""]


def byte_level(directory):
    import tokenizers as package

    made = package.ByteLevelBPETokenizer()
    texts = ["the cat sat on the mat and the dog", "Naïve café 1234"] * 20
    made.train_from_iterator(texts, vocab_size=290, special_tokens=["<|end|>", "<pad>"])
    made.save(str(directory / "tokenizer.json"))
    settings = dict.fromkeys(["eos_token", "bos_token", "unk_token"], "<|end|>") | {"pad_token": "<pad>"}
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 64}
    return settings | {"clean_up_tokenization_spaces": False}, {"model_type": "gpt2"}


def word_pieces(directory):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "na", "##ive", "cafe", "x", "two", "1"]
    (directory / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = transformers.BertTokenizer(vocab=str(directory / "vocab.txt"))
    tokenizer.save_pretrained(directory)
    (directory / "vocab.txt").unlink()
    return json.loads((directory / "tokenizer_config.json").read_text()), {"model_type": "bert"}


def generic(directory):
    settings, _ = byte_level(directory)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|turn|>"]}
    import tokenizers as package

    size = package.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    settings |= {"added_tokens_decoder": {str(size): {"content": "<|turn|>", "special": True, "normalized": False}}}
    return settings, {"model_type": "llama"}


@pytest.mark.parametrize("kind", [byte_level, word_pieces, generic])
@forms
def test_a_perturbed_tokenizer_config_gives_the_ids_of_transformers_or_is_rejected_by_name(kind, times, tmp_path):
    rng, tally = random.Random(f"t{kind.__name__}{SEED}"), Tally()
    base, config = kind(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    left_out = {
        "name_or_path",
        "vocab_file",
        "tokenizer_file",
        "gguf_file",
        "tokenizer_object",
        "post_processor",
        "token",
    }
    left_out |= {"cache_dir", "revision", "subfolder", "proxies", "force_download", "local_files_only", "init_inputs"}
    more = {key: None for key in hf_keys.table()["tokenizer"] if key not in left_out and not key.startswith("_")}
    path = tmp_path / "tokenizer_config.json"
    for number in range(times):
        changed, touched = perturbed(rng, base, more)
        path.write_text(json.dumps(changed))
        note = f"{ {key: changed.get(key, 'gone') for key in touched} }"
        try:
            ours = load_tokenizer(tmp_path / "tokenizer.json")
            family = "encoder" if config["model_type"] == "bert" else "decoder"
            files = to_hf.files(ours, family, config["model_type"], 64)
        except Exception as error:
            tally.reject(error, touched, note)
            continue
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
            expected = [theirs(text)["input_ids"] for text in TEXTS]
            pairs = dict(theirs("the cat", "sat"))
        except Exception:
            tally.add("refused by transformers")
            continue
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "config.json").write_text(json.dumps(config))
        for name, text in files.items():
            (out / name).write_bytes(text)
        again = transformers.AutoTokenizer.from_pretrained(out)
        plain = [ours.encode(text).tolist() for text in TEXTS[:3:2]]
        same = plain == [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:3:2]]
        same &= [again(text)["input_ids"] for text in TEXTS] == expected and dict(again("the cat", "sat")) == pairs
        if changed.get("eos_token"):
            same &= ours.eos_id == theirs.eos_token_id
        tally.add("equal" if same else "SILENT", note)
        shutil.rmtree(out)
    tally.check(kind.__name__)
