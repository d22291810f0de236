"""From conversations in a file to an answer: trained, stopped, resumed, evaluated, asked, exported and asked again."""

import json
import pathlib
import random

import pytest

from lslm_jax.main import main

pytestmark = pytest.mark.usefixtures("one_device")

COLOURS = ("red", "blue", "green", "gold")
SETTINGS = {
    "model": {"num_layers": 2, "d_model": 64, "num_heads": 4, "max_length": 80, "positions": "rotary"},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": 120, "batch_size": 16, "accumulate": 2},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
    "checkpoint": {"every": 100},
    "eval": {"every": 0},
    "generate": {"prompts": ["say red"], "temperature": 0.0, "max_tokens": 20},
    "log": {"tensorboard": False, "timing": False},
}


def run(capsys, *arguments: str, code: int = 0) -> str:
    """Runs a command; returns its stdout, or the one line on stderr of one that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    output = capsys.readouterr()
    assert stop.value.code == code, output.err
    return output.out if code == 0 else output.err.strip().splitlines()[-1].removeprefix("lslm: ")


def conversation(rng: random.Random) -> dict:
    asked = rng.choices(COLOURS, k=2)
    turns = [
        message
        for colour in asked
        for message in (
            {"role": "user", "content": f"say {colour}" + "." * rng.randrange(4)},
            {"role": "assistant", "content": colour},
        )
    ]
    return {"messages": turns}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    root, rng = tmp_path_factory.mktemp("chat"), random.Random(0)
    for name, count in (("train", 300), ("valid", 40)):
        lines = [json.dumps(conversation(rng)) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {"example": "chat", "files": [f"{root}/train.jsonl"], "valid_files": [f"{root}/valid.jsonl"]}
    data |= {"text_key": "messages", "chat_template": "configs/chat.jinja", "seq_len": 72, "packing": "bins"}
    (root / "config.json").write_text(json.dumps(SETTINGS | {"data": data}))
    return root


@pytest.mark.slow
def test_a_run_from_scratch_answers_and_so_does_what_it_exports(root, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    workdir = f"--workdir={root}/run"
    command = [f"--config={root}/config.json", workdir]
    first = json.loads(run(capsys, *command, "--config.train.steps=60", "--config.optimizer.schedule=constant"))
    result = json.loads(run(capsys, *command, "--config.optimizer.schedule=constant"))
    assert first["step"] == 60 and result["step"] == 120
    assert result["eval/loss"] < 0.1 and result["eval/accuracy"] > 0.97
    assert {"eval/perplexity", "eval/bits_per_byte"} <= set(result) and "gzip_bits_per_byte" not in result
    assert (root / "run" / "samples" / "120.txt").read_text() == "--- say red\nred\n"

    again = json.loads(run(capsys, "evaluate", workdir))
    measured = {name: again[name] for name in again if name not in ("split", "evaluation", "predictions")}
    assert measured == {name: result[name] for name in measured}
    assert run(capsys, "generate", workdir, "--prompt=say gold") == "gold\n"
    talk = [*conversation(random.Random(1))["messages"][:2], {"role": "user", "content": "say blue"}]
    (root / "prompts.jsonl").write_text(json.dumps({"messages": talk}) + '\n{"prompt": "say green.."}\n')
    lines = run(capsys, "generate", workdir, f"--prompts={root}/prompts.jsonl", "--json").splitlines()
    assert [(line["text"], line["ended"]) for line in map(json.loads, lines)] == [("blue", "eos"), ("green", "eos")]
    (root / "bad.jsonl").write_text(json.dumps({"messages": talk[:-1]}) + "\n")
    message = run(capsys, "generate", workdir, f"--prompts={root}/bad.jsonl", code=65)
    assert message == f"{root}/bad.jsonl:1: the last message is the assistant's: there is nothing to answer"

    written = json.loads(run(capsys, "export", workdir, f"--to={root}/out"))
    assert "chat_template.jinja" in written["files"]
    template = pathlib.Path("configs/chat.jinja").read_text()
    assert (root / "out" / "chat_template.jinja").read_text() == template
    exported = f"--pretrained={root}/out"
    assert (
        run(capsys, "generate", exported, "--chat", "--prompt=say gold", "--config.generate.max_tokens=9") == "gold\n"
    )
    plain = run(capsys, "generate", exported, "--prompt=say gold", "--config.generate.max_tokens=9")
    assert plain.startswith("say gold"), "without --chat it goes on with a text"
    message = run(capsys, "generate", exported, f"--prompts={root}/prompts.jsonl", code=2)
    assert message == "this model continues texts: messages are for one that chats (--chat)"
    (root / "out" / "chat_template.jinja").unlink()
    message = run(capsys, "generate", exported, "--chat", "--prompt=say gold", code=2)
    assert message == "the vocabulary has no chat template: name one by data.chat_template, a file in Jinja"

    tuned = [f"--config={root}/config.json", f"--workdir={root}/tuned", exported, "--config.train.steps=2"]
    assert json.loads(run(capsys, *tuned))["eval/loss"] < 0.5, "a model from nothing has 5"
