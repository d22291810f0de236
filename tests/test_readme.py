"""What the README and the configs tell a reader to type can be typed: flags, keys, values, files and targets exist."""

import ast
import pathlib
import re
import shlex

import pytest

from lslm_jax.config import Config, DataConfig, loading, validation
from lslm_jax.main import VERBS, parser

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = re.compile(rf"(?:python3? -m lslm_jax\.main|\blslm) (?=(?:{'|'.join(VERBS)}) |--)[^`]*")
SETTING = re.compile(r"--config\.([a-z_0-9.]+)=([^\s`|;&]*)")


def documents() -> dict[str, str]:
    """README and its neighbours, and the docstrings of the configs; lines that a backslash continues are joined."""
    texts = {path.name: path.read_text() for path in sorted(ROOT.glob("*.md"))}
    for path in sorted((ROOT / "configs").glob("*.py")):
        texts[f"configs/{path.name}"] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return {name: re.sub(r"\\\n\s*", "", text) for name, text in texts.items()}


DOCUMENTS = documents()
COMMANDS = [
    (name, match.group())
    for name, text in DOCUMENTS.items()
    for line in text.splitlines()
    for match in COMMAND.finditer(line)
]


def words(command: str) -> list[str]:
    """The arguments of a command up to a comment or the first pipe, as a shell splits them."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found = list(lexer)
    end = next((i for i, word in enumerate(found) if set(word) <= set("();<>|&")), len(found))
    return found[found.index("lslm_jax.main") + 1 if "lslm_jax.main" in found else 1 : end]


def base(flag: str | None) -> Config:
    """The config that a command names; any sound one where a run would have written it, or FILE stands for it."""
    if flag is None or not flag.startswith("configs/"):
        return Config(data=DataConfig(source="synthetic"))
    return loading.load(str(ROOT / flag))


@pytest.mark.parametrize("command", [command for _, command in COMMANDS])
def test_a_command_that_a_reader_is_told_to_type_is_understood(command):
    arguments = words(command)
    if "--config.help" in arguments:
        return
    settings = [word for word in arguments if word.startswith("--config.")]
    flags = parser().parse_args([word for word in arguments if word not in settings])
    assert (
        flags.workdir
        or flags.verb == "plan"
        or (flags.pretrained and (flags.verb in ("generate", "import") or flags.harness))
    )
    assert flags.config or flags.verb in ("evaluate", "generate", "export", "import", "audit", "verify")
    assert flags.verb != "generate" or flags.prompt or flags.prompts
    assignments = [tuple(setting.removeprefix("--config.").split("=", 1)) for setting in settings]
    validation.validate(loading.override(base(flags.config), assignments))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_in_the_text_is_a_key_and_a_value_of_its_type(document):
    settings = SETTING.findall(DOCUMENTS[document])
    loading.override(Config(), [(key, value) for key, value in settings if key != "help"])
    assert all(loading.help_text(value) for key, value in settings if key == "help")


def test_the_readme_and_every_config_tell_their_command():
    told = {document for document, _ in COMMANDS}
    assert told >= {name for name in DOCUMENTS if name == "README.md" or name.startswith("configs/")}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith("configs/")])
def test_the_command_of_a_config_is_about_that_config(name):
    assert any(f"--config={name}" in command for document, command in COMMANDS if document == name)


def test_every_target_that_the_readme_makes_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = re.findall(r"(?:^ +|`)make ([^`#\n]+)", DOCUMENTS["README.md"], re.MULTILINE)
    assert told
    assert {word for line in told for word in line.split() if "=" not in word} <= targets


def test_every_file_that_the_readme_points_to_exists():
    text = DOCUMENTS["README.md"]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(r"\b(?:configs|lslm_jax|launch|benchmarks|tests)/[\w./-]*\w", text)
    assert [path for path in {*links, *paths} if not (ROOT / path).exists()] == []
