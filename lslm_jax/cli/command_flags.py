"""The commands of the command line and their flags: one table of which flag belongs to which command.

A flag of another command is rejected with the setting or the command that does the same; none is ignored. This module
imports nothing slow, so that a mistake is reported at once.
"""

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lslm_jax.errors import ConfigError

COMMANDS = {
    "train": "prepare the data if needed, train or resume training, evaluate, save (the default)",
    "prepare": "clean text, train the tokenizer, write token shards",
    "evaluate": "evaluate a checkpoint on the held-out examples, or on any files (--files)",
    "generate": "continue, translate, classify or answer prompts, as the model was trained to",
    "export": "write a checkpoint as a Hugging Face directory",
    "import": "read a pretrained model completely, compare it with its origin, make a run of it",
    "audit": "prove from the ledger of a run that no row of its data was lost or read twice in an epoch",
    "verify": "compare the files of a run, or of a copy of one, with their sha256",
    "plan": "compile the train step for hardware that need not be present; report memory and speed bounds",
}
EXAMPLES = {
    "": (
        "--config=configs/quickstart.py --workdir=runs/quickstart",
        'generate --workdir=runs/quickstart --prompt="def main():"',
        "generate --help",
    ),
    "train": (
        "--config=configs/quickstart.py --workdir=runs/quickstart",
        "--config=configs/quickstart.py --workdir=runs/fast --config.optimizer.learning_rate=0.003",
        "--pretrained=hf://ORG/NAME --config=my_config.py --workdir=runs/tuned",
    ),
    "prepare": ("prepare --config=configs/quickstart.py --workdir=runs/quickstart",),
    "evaluate": (
        "evaluate --workdir=runs/quickstart",
        "evaluate --workdir=runs/quickstart --files README.md docs/*.md",
        "evaluate --workdir=runs/quickstart --best --split=test",
        "evaluate --workdir=runs/quickstart --harness=hellaswag,arc_easy --limit=100",
    ),
    "generate": (
        'generate --workdir=runs/quickstart --prompt="def main():"',
        "generate --workdir=runs/quickstart --prompts=prompts.txt --json",
        'generate --pretrained=hf://ORG/NAME --chat --prompt="Who are you?"',
        "generate --workdir=runs/squad --prompt=Who? --context=text.txt",
    ),
    "export": (
        "export --workdir=runs/quickstart --to=exported",
        "export --workdir=runs/tuned --adapter --to=adapter",
    ),
    "import": ("import --pretrained=DIR --check", "import --pretrained=hf://ORG/NAME --workdir=runs/imported"),
    "audit": ("audit --workdir=runs/quickstart",),
    "verify": ("verify --workdir=runs/quickstart",),
    "plan": (
        "plan --config=configs/llama_8b.py --topology=v5p:4x4x4 --price=4.2",
        "plan --config=configs/gpt2_small.py --topology=h200:8 --search",
    ),
}
_ABOUT = "Trains, evaluates and runs language models."
_SETTINGS = "--config.KEY=VALUE changes a setting; --config.help lists all of them, --config.help=SECTION those of one."
_ALL = tuple(COMMANDS)
_READERS = ("evaluate", "generate", "export")
_IN_PROCESSES = tuple(command for command in COMMANDS if command not in ("verify", "plan"))


class Flag(NamedTuple):
    """One flag.

    Attributes:
      name: without its dashes.
      commands: the commands that accept it.
      options: keyword arguments of `argparse.ArgumentParser.add_argument`.
      instead: what to use with another command, by its name; "" holds for all that are not listed.
    """

    name: str
    commands: Sequence[str]
    options: Mapping[str, Any]
    instead: Mapping[str, str] = {}


def _text(metavar: str, help: str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": help} | more


def _number(kind: type, metavar: str, help: str) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": help}


def _switch(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


_TYPES = ("float32", "bfloat16", "float16", "int8", "int4")
_PROCESSES = {
    "plan": "plan compiles in one process for any hardware: --topology=NAME",
    "verify": "verify is one process",
}
_TRAIN_DTYPE = "set --config.model.dtype"
_RESUME = (
    "training resumes from the latest checkpoint; another run starts at one with train.init_from=RUN/checkpoints/N"
)
_HOLD_OUT = "held-out examples are named by data.valid_files, data.valid_fraction, data.valid_split and data.test_files"
_HARNESS = {"": "tasks of lm-eval are run by `evaluate --harness=TASKS`"}
_PLAN = {"": "hardware is planned for by `plan`"}
_CHECK = {"": "a model is compared with its origin by `import --pretrained=DIR --check`"}

FLAGS = {
    "": [
        Flag(
            "config",
            [command for command in COMMANDS if command != "verify"],
            _text("FILE[:ARGUMENT]", "config file, .py or .json; :smoke shrinks it"),
            {"verify": "verify reads the config.json of --workdir"},
        ),
        Flag("workdir", _ALL, _text("DIR", "run directory: data, checkpoints, metrics, samples")),
        Flag(
            "pretrained",
            ("train", "prepare", "evaluate", "generate", "import", "plan"),
            _text("DIR", "a Hugging Face model (a directory, hf://ORG/NAME) to start from"),
            {
                "export": "make a run of it first, by `import --pretrained=DIR --workdir=RUN`",
                "": "make a run of it first, by `import --pretrained=DIR --workdir=RUN`",
            },
        ),
        Flag("debug", _ALL, _switch("show the traceback of a failure")),
    ],
    "evaluate, generate, export": [
        Flag(
            "step",
            _READERS,
            _number(int, "N", "checkpoint to use (default: the latest)"),
            {"train": _RESUME, "plan": "the length of a run is train.steps", "verify": "verify reads all checkpoints"},
        ),
        Flag(
            "best",
            _READERS,
            _switch("use the checkpoint kept by checkpoint.best"),
            {"train": "set --config.checkpoint.best=eval/loss to keep the best checkpoint"},
        ),
        Flag(
            "dtype",
            _READERS,
            {
                "choices": _TYPES,
                "help": "type of the weights: in exported files; or (also int8, int4) in memory of evaluate, generate",
            },
            {"train": _TRAIN_DTYPE, "plan": _TRAIN_DTYPE},
        ),
    ],
    "evaluate": [
        Flag(
            "files",
            ("evaluate",),
            _text(
                "FILE",
                "files to evaluate on, of any format that prepare reads, globs too; tokenized with the run's tokenizer",
                action="extend",
                nargs="+",
            ),
            {
                "train": "set --config.data.files=FILE",
                "prepare": "set --config.data.files=FILE",
                "generate": "use --prompts=FILE",
            },
        ),
        Flag(
            "source",
            ("evaluate",),
            _text("NAME", "source of data.mixture that --files are examples of"),
            {"": "the kind of source is data.source"},
        ),
        Flag(
            "split",
            ("evaluate",),
            {"choices": ("valid", "test"), "help": "which held-out set to evaluate on (default: valid)"},
            {"train": _HOLD_OUT, "prepare": _HOLD_OUT, "generate": "use --prompts=FILE"},
        ),
        Flag("harness", ("evaluate",), _text("TASKS", "tasks of lm-eval instead, as hellaswag,arc_easy"), _HARNESS),
        Flag(
            "harness_path", ("evaluate",), _text("DIR", "directory of more tasks, as .yaml files of lm-eval"), _HARNESS
        ),
        Flag("fewshot", ("evaluate",), _number(int, "N", "examples before each question of such a task"), _HARNESS),
        Flag(
            "limit",
            ("evaluate",),
            _number(int, "N", "at most so many examples of such a task"),
            {
                "train": "set --config.data.max_documents or --config.eval.batches",
                "prepare": "set --config.data.max_documents",
            },
        ),
    ],
    "generate": [
        Flag(
            "prompt",
            ("generate",),
            _text(
                "TEXT",
                "text, or question; may be repeated. Without any, on a terminal, prompts are asked for",
                action="append",
            ),
            {
                "train": "set --config.generate.prompts to see samples at each evaluation",
                "evaluate": "use --files=FILE",
            },
        ),
        Flag("context", ("generate",), _text("FILE", "text in which the questions are answered")),
        Flag(
            "prompts",
            ("generate",),
            _text(
                "FILE",
                'a prompt per line, or JSON lines {"prompt": ...} (in a chat {"messages": [...]}); .gz; - for stdin',
            ),
            {
                "train": "set --config.generate.prompts to see samples at each evaluation",
                "evaluate": "use --files=FILE",
            },
        ),
        Flag(
            "chat",
            ("generate",),
            _switch("treat each prompt as a user message (applies the chat template)"),
            {"train": "set --config.data.example=chat", "prepare": "set --config.data.example=chat"},
        ),
        Flag(
            "json",
            ("generate",),
            _switch("print one JSON line per prompt"),
            {"": "other commands print one JSON line on stdout anyway"},
        ),
    ],
    "export": [
        Flag(
            "to",
            ("export",),
            _text("DIR", "directory to write"),
            {
                "train": "set --config.checkpoint.export_every=N, or use `export --to=DIR` afterwards",
                "import": "use --workdir=DIR",
                "prepare": "set --config.data.dir=DIR",
                "plan": "use --picture=FILE.html",
            },
        ),
        Flag(
            "adapter",
            ("export",),
            _switch("write the LoRA adapter alone, in PEFT's format"),
            {"train": "set --config.model.lora_rank=N"},
        ),
    ],
    "import": [
        Flag("check", ("import",), _switch("compare it with transformers, layer by layer"), _CHECK),
        Flag(
            "reference",
            ("import",),
            _text("FILE", "compare it with the outputs stored in this safetensors file"),
            _CHECK,
        ),
        Flag(
            "tolerance",
            ("import",),
            _number(float, "X", "largest difference of logits and hidden states (default: 0.001)"),
            _CHECK,
        ),
    ],
    "plan": [
        Flag("topology", ("plan",), _text("NAME", "v5p:4x4x4, 2xv5p:4x4x4, h200:8, h200:4x8, cpu:8, ..."), _PLAN),
        Flag("memory", ("plan",), _number(int, "BYTES", "device memory that a program may use"), _PLAN),
        Flag("price", ("plan",), _number(float, "USD", "price per device-hour"), _PLAN),
        Flag(
            "search",
            ("plan",),
            _switch("try meshes, remat policies and gradient accumulation; rank those that fit"),
            _PLAN,
        ),
        Flag(
            "picture", ("plan",), _text("FILE.html", "draw which axis splits what, and the memory of a device"), _PLAN
        ),
    ],
    "several processes, where no scheduler starts them": [
        Flag(
            "coordinator", _IN_PROCESSES, _text("HOST:PORT", "address of process 0, and a free port there"), _PROCESSES
        ),
        Flag("processes", _IN_PROCESSES, _number(int, "N", "number of processes"), _PROCESSES),
        Flag("process", _IN_PROCESSES, _number(int, "I", "number of this process, from 0"), _PROCESSES),
    ],
}
_NAMED = {flag.name: flag for flags in FLAGS.values() for flag in flags}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all flags")


def parser(page: str = "") -> argparse.ArgumentParser:
    """The parser of all flags except the settings themselves, which are `--config.KEY=VALUE`.

    Args:
      page: command whose flags and examples `--help` shows. Empty: all commands and all flags.
    """
    found = _Parser(
        prog=f"lslm {page}".rstrip(),
        allow_abbrev=False,
        description=f"{page}: {COMMANDS[page]}. {_SETTINGS}" if page else f"{_ABOUT} {_SETTINGS}",
        epilog="examples:\n" + "\n".join(f"  lslm {line}" for line in EXAMPLES[page]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = "; ".join(f"{command}: {help}" for command, help in COMMANDS.items())
    help = argparse.SUPPRESS if page else f"{commands}; `lslm COMMAND --help` shows one"
    found.add_argument("verb", nargs="?", default="train", metavar="COMMAND", help=help)
    for title, flags in FLAGS.items():
        group = found.add_argument_group(title) if title else found
        for flag in flags:
            hidden = {"help": argparse.SUPPRESS} if page and page not in flag.commands else {}
            group.add_argument(f"--{flag.name}", **{**flag.options, **hidden})
    return found


def _page(argv: Sequence[str]) -> str:
    """The command that `--help` is about; "" for none."""
    asks = {"-h", "--help"} & {*argv}
    return next((word for word in argv if asks and word in COMMANDS), "")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line without its settings.

    Raises:
      ConfigError: an unknown flag or command, a flag of another command, or flags that exclude each other.
    """
    flags, rest = parser(_page(argv)).parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(_unknown_flag(word.partition("=")[0], flags.verb))
    if flags.verb not in COMMANDS:
        raise ConfigError(f"unknown command {flags.verb}{_nearest(flags.verb, list(COMMANDS))}")
    if rest:
        remedy = f"write `lslm {rest[0]} ...`" if rest[0] in COMMANDS else "text with blanks needs quotes"
        raise ConfigError(f"unexpected argument {rest[0]!r} after {flags.verb}: {remedy}")
    for name in given(flags):
        if flags.verb not in _NAMED[name].commands:
            raise ConfigError(_of_another_command(_NAMED[name], flags.verb))
    for message in _exclusions(flags):
        raise ConfigError(message)
    _expand_home(flags)
    return flags


def _expand_home(flags: argparse.Namespace) -> None:
    """Expands `~` in all flags that name a file or directory: shells do not expand it behind a `=`."""
    for name, flag in _NAMED.items():
        value = getattr(flags, name)
        if value and str(flag.options.get("metavar", "")).startswith(("FILE", "DIR")):
            is_list = isinstance(value, list)
            setattr(flags, name, [*map(os.path.expanduser, value)] if is_list else os.path.expanduser(value))


def given(flags: argparse.Namespace) -> list[str]:
    """Names of the flags that the command line sets."""
    values = {name: getattr(flags, name) for name in _NAMED}
    return [name for name, value in values.items() if value is not None and value is not False]


def _of_another_command(flag: Flag, command: str) -> str:
    *others, last = [f"`{name}`" for name in flag.commands]
    owners = f"{', '.join(others)} and {last}" if others else last
    instead = flag.instead.get(command, flag.instead.get("", ""))
    return f"--{flag.name} is a flag of {owners}, not of `{command}`" + f": {instead}" * bool(instead)


def _unknown_flag(name: str, command: str) -> str:
    if name.startswith("--config."):  # which are settings, and were taken out before
        return f"unknown flag {name}"
    own = [flag.name for flag in _NAMED.values() if command in flag.commands]
    wanted = name.lstrip("-")
    for known in (own, list(_NAMED)):
        if near := difflib.get_close_matches(wanted, known, n=1, cutoff=0.6):
            return f"unknown flag {name}; did you mean --{near[0]}?"
    if command in COMMANDS:
        return f"unknown flag {name}; `lslm {command} --help` lists all flags"
    return f"unknown flag {name}; --help lists all flags"


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f": the commands are {', '.join(known)}"


def _exclusions(flags: argparse.Namespace) -> list[str]:
    """Why flags of one command do not go together: each would be ignored beside the other."""
    names = set(given(flags))
    found = []
    if flags.verb == "generate" and {"pretrained", "workdir"} <= names:
        found.append("--pretrained and --workdir exclude each other: each names the model that generates")
    for name, other, why in _PAIRS:
        if {name, other} <= names:
            found.append(f"--{name} and --{other} exclude each other: {why}")
    for name, needs, where in _NEEDS:
        if name in names and not names & set(needs):
            found.append(f"--{name} is for {where}")
    return found


_PAIRS = (
    ("step", "best", "each names a checkpoint"),
    ("step", "pretrained", "a pretrained model has no steps"),
    ("best", "pretrained", "a pretrained model has no steps"),
    ("split", "files", "--files are the examples to evaluate on"),
    ("split", "harness", "tasks of lm-eval bring their own examples"),
    ("files", "harness", "tasks of lm-eval bring their own examples"),
    ("check", "reference", "a model is compared with transformers, or with a file"),
    ("adapter", "dtype", "an adapter is written in float32"),
    ("search", "price", "--search ranks by time; plan the mesh that it finds for its price"),
    ("search", "picture", "plan the mesh that it finds to draw it"),
)
_NEEDS = (
    ("harness_path", ("harness",), "tasks of lm-eval: add --harness=TASKS"),
    ("fewshot", ("harness",), "tasks of lm-eval: add --harness=TASKS"),
    ("limit", ("harness",), "tasks of lm-eval: add --harness=TASKS, or set --config.eval.batches"),
    ("source", ("files",), "files: add --files=FILE"),
    ("tolerance", ("check", "reference"), "a comparison: add --check or --reference=FILE"),
)
