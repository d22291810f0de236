"""Models by their address on the Hub: from a real server that speaks its protocol, in processes of their own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import pytest
from etils import epath

from lslm_jax.config import Config, ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import hf_hub
from lslm_jax.convert.export import Exporter, export
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.errors import ConfigError
from lslm_jax.models.build_model import build_model

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {"num_layers": 1, "d_model": 32, "num_heads": 2, "positions": "rotary", "norm": "rmsnorm", "activation": "silu"}
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "missing": (404, "RepoNotFound"),
}


class Hub(http.server.ThreadingHTTPServer):
    """The Hub with one model, `some/model` and its branch `main`, `some/gated`, whose files are kept back, and others
    that it refuses. It is told of each request: `asked`. While `mute`, it takes requests and does not answer.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.mute = files, [], threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        while self.server.mute.is_set():
            time.sleep(0.1)
        parts = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        match parts:
            case ["api", "models", "some", "model" | "gated" as name]:
                self.say({"id": f"some/{name}", "sha": COMMIT, "siblings": []})
            case ["api", "models", "some", "model", "revision", "main" | "v1.0"]:
                self.say({"id": "some/model", "sha": COMMIT, "siblings": []})
            case ["api", "models", "some", "model", "revision", *_]:
                self.refuse(404, "RevisionNotFound")
            case ["api", "models", "some", "model" | "gated", "tree", *_]:
                files = self.server.files.items()
                entry = lambda name, content: {"type": "file", "path": name, "size": len(content), "oid": of(content)}
                self.say([entry(name, content) for name, content in files])
            case ["api", "models", "some", name, *_] if name in REFUSALS:
                self.refuse(*REFUSALS[name])
            case ["some", "model", "resolve", _, *name] if "/".join(name) in self.server.files:
                content = self.server.files["/".join(name)]
                self.answer(200, content, {"ETag": f'"{of(content)}"', "X-Repo-Commit": COMMIT})
            case _:
                self.refuse(403, "GatedRepo")

    do_HEAD = do_GET

    def say(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code):
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def of(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny decoder as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model") / "model"
    config = Config(model=fill_sizes(ModelConfig(**LLAMA, gated=True, bias=False, max_length=64, vocab_size=259)))
    model = jax.jit(lambda: build_model(config.model, jax.random.key(0), "causal"))()
    export(epath.Path(directory), model, Exporter(config, Bytes(), []), {})
    return directory


@pytest.fixture
def server(directory):
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files |= {"pytorch_model.bin": b"pickled", "onnx/config.json": b"{}", "consolidated.safetensors": b"twice"}
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.mute.clear()
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def environment(server, tmp_path):
    """Variables of a user who has no cache yet."""
    mine = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | mine


@pytest.fixture
def start(environment):
    """Starts a process that generates from the model of each address, one after another."""
    program = """
import contextlib, io, json, sys
from lslm_jax.main import main
for address in sys.argv[1:]:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(["generate", "--prompt=abc", f"--pretrained={address}"])
    except SystemExit as stop:
        print(json.dumps([stop.code, errors.getvalue().strip().splitlines()[-1]]))
"""

    def start(*addresses, **more):
        process = [sys.executable, "-c", program, *addresses]
        return subprocess.Popen(process, env=environment | more, stdout=subprocess.PIPE, text=True)

    return start


def outcomes(process):
    """The exit code and the last line on stderr of each command of a process."""
    output, _ = process.communicate()
    return [tuple(json.loads(line)) for line in output.splitlines()]


@pytest.fixture
def read(environment):
    """Reads a model in a process of its own: what it is, its tensors and its vocabulary, and the files there are."""
    program = """
import json, pathlib, sys
from lslm_jax.convert import pretrained, safetensors_io
from lslm_jax.data.tokenizers.loading import load_tokenizer
for address in sys.argv[1:]:
    source = pretrained.describe(address)
    assert pretrained.describe(address).directory == source.directory
    tensors = safetensors_io.open_directory(source.directory)
    tensors = {name: tensor.read().tobytes().hex() for name, tensor in tensors.items()}
    words = load_tokenizer(pretrained.vocabulary(source.directory))
    root = pathlib.Path(source.directory)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    print(json.dumps([[source.settings, tensors, words.facts()], files]))
"""

    def read(*addresses, **more):
        process = [sys.executable, "-c", program, *addresses]
        found = subprocess.run(process, env=environment | more, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return list(map(json.loads, found.stdout.splitlines()))

    return read


NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_a_model_is_fetched_once_without_what_is_not_read_and_then_needs_no_hub(server, directory, read):
    [(expected, _), (model, files)] = read(str(directory), "hf://some/model")
    assert model == expected
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx", "README.md"} & set(files)
    before = len(server.asked)
    [(model, _)] = read("hf://some/model", HF_HUB_OFFLINE="1")
    assert model == expected
    assert len(server.asked) == before
    [(model, _)] = read("hf://some/model@v1.0")
    assert model == expected and len(server.asked) > before
    assert not any("/resolve/" in path for path in server.asked[before:])
    [(model, _)] = read("hf://some/model", **NOWHERE)
    assert model == expected


REFUSED = {
    "some/gated": (66, "some/gated is gated: ask for access at HUB/some/gated, then set HF_TOKEN"),
    "some/private": (66, "HUB has no model some/private, or it is private: then set HF_TOKEN"),
    "some/missing": (66, "HUB has no model some/missing, or it is private"),
    "some/model@v9": (66, "HUB has no such revision as some/model@v9"),
    "some/model/more/of/it": (2, "hf://some/model/more/of/it does not name a model: write hf://ORG/NAME or"),
    "some/model@../../other": (2, "hf://some/model@../../other does not name a model"),
    "../model": (2, "hf://../model does not name a model"),
    "": (2, "hf:// does not name a model"),
}


def test_what_cannot_be_had_is_told_in_a_line(server, start):
    results = outcomes(start(*(f"hf://{address}" for address in REFUSED)))
    for (code, line), (expected_code, message) in zip(results, REFUSED.values(), strict=True):
        assert code == expected_code and line.startswith("lslm: " + message.replace("HUB", server.address)), line


def test_without_a_network_it_says_so_soon(server, start):
    server.mute.set()
    begun = time.monotonic()
    unanswered = start("hf://some/model@v1.0")
    refused = start("hf://some/model", **NOWHERE)
    offline = start("hf://some/model", HF_HUB_OFFLINE="1")
    line = "lslm: http://127.0.0.1:9 is out of reach, and the cache does not hold all of some/model"
    assert outcomes(refused) == [(66, line)]
    line = "lslm: HF_HUB_OFFLINE is set, and the cache does not hold all of some/model"
    assert outcomes(offline) == [(66, line)]
    [(code, line)] = outcomes(unanswered)
    assert code == 66 and line.startswith(f"lslm: {server.address} is out of reach")
    assert time.monotonic() - begun < hf_hub._PATIENCE + 60


def test_a_path_is_itself(tmp_path):
    assert hf_hub.local(tmp_path) == hf_hub.local(str(tmp_path)) == epath.Path(tmp_path)


@pytest.mark.parametrize("address", ["m@v1..2", "m@a/../b", "m@./a", "m@/a", "m@a//b", "m@a/..", "a..b", "o/m@.."])
def test_no_part_of_an_address_leads_elsewhere(address):
    with pytest.raises(ConfigError, match=f"hf://{address} does not name a model"):
        hf_hub.local(f"hf://{address}")
