"""Model cards: usage and provenance, without local directories, and without Markdown that comes from the data."""

import json

import pytest

from lslm_jax.config import Config, DataConfig, MixtureSource, ModelConfig, TaskConfig, TokenizerConfig, TrainConfig
from lslm_jax.convert import model_card


def written(config: Config, metrics=None) -> str:
    return model_card.write(config, "llama", "LlamaForCausalLM", 12345, metrics or {})


def test_a_card_shows_usage_data_and_metrics():
    config = Config(data=DataConfig(files=("texts/a.txt", "b/*.jsonl")), model=ModelConfig(max_length=64))
    text = written(config, {"eval/loss": 1.25, "step": 4, "mfu": None})
    assert text.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lslm_jax\n- llama\n---"
    )
    assert "A `llama` model of 12,345 parameters, trained with lslm_jax (causal) on\n\n- a.txt\n- `*.jsonl`\n" in text
    assert "model = LlamaForCausalLM.from_pretrained(directory)" in text and "at most 64 tokens" in text
    assert "| eval/loss | 1.25 |\n| step | 4 |\n\n" in text
    assert "pipeline_tag" not in written(Config(task=TaskConfig(objective="seq2seq")))


def test_a_card_names_the_model_that_it_was_made_from():
    begun = TrainConfig(init_from="/home/me/models/smollm2")
    assert "taken over by lslm_jax (causal) from the weights of smollm2." in written(Config(train=begun))
    tuned = Config(train=TrainConfig(init_from="hf://org/name@main"), data=DataConfig(tfds="lm1b"))
    assert "trained with lslm_jax (causal) from the weights of hf://org/name@main on\n\n- lm1b\n" in written(tuned)
    assert " on\n\n- synthetic\n" in written(Config())


def test_directories_of_this_machine_are_left_out():
    mixture = (MixtureSource(name="one", files=("/home/me/one.txt",), valid_files=("/home/me/v.txt",)),)
    config = Config(
        data=DataConfig(
            mixture=mixture, dir="/home/me/data", chat_template="~/me/chat.jinja", data_dir="/home/me/tfds"
        ),
        tokenizer=TokenizerConfig(path="gs://me/secret/tokenizer.json"),
        train=TrainConfig(init_from="/home/me/run/checkpoints/20"),
    )
    text = written(config)
    assert "/me" not in text and "secret" not in text
    settings = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert settings["data"]["mixture"][0]["files"] == ["one.txt"] and settings["data"]["dir"] == "data"
    assert settings["tokenizer"]["path"] == "tokenizer.json" and settings["train"]["init_from"] == "20"


@pytest.mark.parametrize("name", ["a\n# b.txt", "<script>x</script>", "[x](http://y)", "a`b|c", "- x", "**b**"])
def test_names_from_the_data_are_shown_and_not_interpreted(name):
    config = Config(data=DataConfig(files=(f"texts/{name.replace('/', '')}",), labels=(name, "```")))
    plain = written(Config(data=DataConfig(files=("texts/a.txt",), labels=("a", "b"))), {"eval/f1/a": 0.5})
    text = written(config, {f"eval/f1/{name}": 0.5})
    assert text.count("\n") == plain.count("\n")
    outside = text.partition("```json")[0]
    source = outside.partition(" on\n\n")[2].splitlines()[0]
    assert source.startswith("- `") and source.count("`") == 2
    [row] = [line for line in outside.splitlines() if line.startswith("| `eval/f1/")]
    assert row.replace("\\|", "").count("|") == 3 and row.count("`") == 2
