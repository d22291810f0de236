"""Tasks of lm-eval: our answers are those that its own model class gets from transformers, document for document."""

import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that these tests need lies on the disk

yaml = pytest.importorskip("yaml")
lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")  # two large packages and what they stand on

WORDS = "the cat sat on a mat and the dog ran to it with some of our old red hats".split()
STORIES = ["Once upon a time, there was a little girl named Lily.", "One day, a big dog came to the park. ", "Tom was"]


def sentence(start, count):
    return " ".join(WORDS[(start * 7 + i * i) % len(WORDS)] for i in range(count))


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
        "documents": [
            {
                "question": ["", STORIES[0], "ends in blanks  "][i] if i < 3 else sentence(i, 4 * i),
                "choices": [" mat", " Lily and a cat", " the dog ran", sentence(i, 1 + i % 5)],
                "answer": i % 4,
            }
            for i in range(19)
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "documents": [{"text": text} for text in [*STORIES, "a", *(sentence(i, 30 * i) for i in range(1, 6))]],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": " the end",
        "generation_kwargs": {"until": ["\n\n", " park", "the"], "max_gen_toks": 14, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "documents": [{"text": text} for text in [*STORIES, *(sentence(i, 9 * i) for i in range(1, 6))]],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks over local files."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        task = dict(task)
        lines = [json.dumps(document) for document in task.pop("documents")]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
        files = {"data_files": {"test": f"{directory}/{name}.jsonl"}, "cache_dir": f"{directory}/cache"}
        whole = {"task": f"our_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | task
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory, shared):
    """A trained Llama that reads bos before a text, and a random one that has no bos and reads little at once."""
    return {"stories": shared / "models" / "stories260K", "random": random_llama(tmp_path_factory.mktemp("random"))}


def random_llama(directory):
    """A directory of a tiny Llama, with a byte-level vocabulary that names no bos, as Qwen has it."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, trainers

    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|end|>"], initial_alphabet=letters, show_progress=False
    )
    words.train_from_iterator([sentence(i, 50) for i in range(20)], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def theirs(directory, tasks):
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        device="cpu",
        batch_size=3,
        tasks=[f"our_{name}" for name in TASKS],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
    )
    return found["results"], found["samples"]


@pytest.mark.parametrize("name", ["stories", "random"])
def test_each_document_is_answered_as_by_the_model_class_for_transformers(name, models, tasks, tmp_path, command):
    results, samples = theirs(models[name], tasks)
    asked = ["evaluate", f"--pretrained={models[name]}", f"--workdir={tmp_path}", f"--harness_path={tasks}"]
    asked += ["--harness=our_*", "--config.train.batch_size=5"]  # which eight devices do not divide
    found = json.loads(command(*asked).splitlines()[-1])
    for task, expected in samples.items():
        (path,) = (tmp_path / "evaluations").glob(f"0-lm_eval-*-harness-{task}.jsonl")
        lines = path.read_text().splitlines()
        ours = [json.loads(line) for line in lines]
        assert len(ours) == len(expected) > 5
        for one, other in zip(ours, expected, strict=True):
            assert one["doc"] == other["doc"]
            for response, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                same(response, wanted)
    for task, scores in results.items():
        for metric, value in scores.items():
            if "," in metric and not isinstance(value, str):
                assert found[f"harness/{task}/{metric.removesuffix(',none')}"] == pytest.approx(value, rel=1e-4)
    assert (found["step"], found["harness/lm_eval"]) == (0, lm_eval.__version__)


def same(response, wanted):
    if isinstance(wanted, str):
        assert response == wanted
    elif isinstance(wanted, float):
        assert response == pytest.approx(wanted, abs=1e-4, rel=1e-6)
    else:
        assert response[0] == pytest.approx(wanted[0], abs=1e-4)
        assert response[1] == wanted[1]
