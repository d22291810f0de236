"""The command line: names the verb, loads the config, turns failures into exit codes.

python -m lslm_jax.main [VERB] --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
"""

import argparse
import json
import keyword
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lslm_jax import atomic, config_checks, config_loading, environment, malloc, peers
from lslm_jax.config import Config
from lslm_jax.errors import ConfigError, LslmError
from lslm_jax.train import preemption

VERBS = {
    "train": "prepare the data if needed, train or go on training, evaluate, save (the default)",
    "prepare": "clean text, train the vocabulary, write token shards",
    "evaluate": "evaluate a checkpoint on the held-out examples",
    "generate": "continue, translate, classify or answer prompts, as the model was trained to",
    "export": "write a checkpoint as a Hugging Face directory",
    "import": "read a pretrained model whole, compare it with its origin, make a run of it",
    "audit": "prove from the ledger of a run that no row of its data was lost or read twice in an epoch",
    "verify": "compare the files of a run, or of a copy of one, with their sha256",
    "plan": "compile the train step for hardware that need not be there; tell what it needs and how fast it can be",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all flags")


def parser() -> argparse.ArgumentParser:
    """All flags but the settings themselves, which are `--config.KEY=VALUE`."""
    about = "Trains, evaluates and runs language models. --config.KEY=VALUE changes a setting; --config.help lists all."
    verbs = "; ".join(f"{verb}: {what}" for verb, what in VERBS.items())
    flags = _Parser(prog="lslm", allow_abbrev=False, description=about)
    flags.add_argument("verb", nargs="?", choices=VERBS, default="train", metavar="VERB", help=verbs)
    flags.add_argument("--config", metavar="FILE[:ARGUMENT]", help="config file, .py or .json; :smoke shrinks it")
    flags.add_argument("--workdir", metavar="DIR", help="run directory: data, checkpoints, metrics, samples")
    flags.add_argument(
        "--pretrained", metavar="DIR", help="a Hugging Face model (a directory, hf://ORG/NAME) to begin with"
    )
    flags.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    chosen = flags.add_argument_group("evaluate, generate, export").add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the latest)")
    chosen.add_argument("--best", action="store_true", help="use the checkpoint kept by checkpoint.best")
    held_out = flags.add_argument_group("evaluate")
    held_out.add_argument("--split", choices=("valid", "test"), default="valid", help="what was held out, and for what")
    held_out.add_argument("--harness", metavar="TASKS", help="tasks of lm-eval instead, as hellaswag,arc_easy")
    held_out.add_argument("--harness_path", metavar="DIR", help="directory of more tasks, as .yaml files of lm-eval")
    held_out.add_argument("--fewshot", type=int, metavar="N", help="examples before each question of such a task")
    held_out.add_argument("--limit", type=int, metavar="N", help="at most so many examples of such a task")
    text = flags.add_argument_group("generate")
    text.add_argument("--prompt", action="append", metavar="TEXT", help="text, or question; may be repeated")
    text.add_argument("--context", metavar="FILE", help="text in which the questions are answered")
    text.add_argument(
        "--prompts", metavar="FILE", help='a JSON line {"prompt": ...} each; in a chat {"messages": [...]}'
    )
    text.add_argument("--chat", action="store_true", help="take prompts for a user's words, and answer them")
    text.add_argument("--json", action="store_true", help="print one JSON line a prompt")
    written = flags.add_argument_group("export")
    written.add_argument("--to", metavar="DIR", help="where to write it")
    types = ("float32", "bfloat16", "float16", "int8", "int4")
    written.add_argument("--adapter", action="store_true", help="write what LoRA trained alone, in PEFT's format")
    written.add_argument(
        "--dtype",
        choices=types,
        help="of the weights: in the files, or (int8, int4 too) held by evaluate, generate",
    )
    taken = flags.add_argument_group("import")
    taken.add_argument("--check", action="store_true", help="compare it with transformers, layer by layer")
    taken.add_argument("--reference", metavar="FILE", help="compare it with what this safetensors file says")
    taken.add_argument("--tolerance", type=float, default=1e-3, metavar="X", help="of logits, and of hidden states")
    planned = flags.add_argument_group("plan")
    planned.add_argument("--topology", metavar="NAME", help="v5p:4x4x4, 2xv5p:4x4x4, h200:8, h200:4x8, cpu:8, ...")
    planned.add_argument("--memory", type=int, metavar="BYTES", help="of a device that a program may take")
    planned.add_argument("--price", type=float, metavar="USD", help="of a device for an hour")
    planned.add_argument("--search", action="store_true", help="try meshes, remat and parts of a batch; rank what fits")
    planned.add_argument("--picture", metavar="FILE.html", help="draw which axis splits what, and a device's memory")
    several = flags.add_argument_group("many processes, where no scheduler tells")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    return flags


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code; the cause of a failure is one line on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        result = _run(argv)
    except LslmError as error:
        if "--debug" in argv:
            traceback.print_exc()
        elif not error.told:
            print(f"lslm: {error}", file=sys.stderr)
        peers.end(error.exit_code, str(error))
    except KeyboardInterrupt:  # before or after the training loop, which catches it and saves
        print("lslm: interrupted", file=sys.stderr)
        peers.end(130, "interrupted")
    except Exception as error:
        peers.explain(error)
        traceback.print_exc()
        peers.end(1, f"{type(error).__name__}: {error}".partition("\n")[0])
    if result is not None:
        print(json.dumps(result))
    peers.end()


def _run(argv: Sequence[str]) -> dict[str, Any] | None:
    if "--config.help" in argv:
        for entry in config_loading.describe():
            print(f"{entry.key} ({entry.type}; {entry.default})\n    {entry.doc}")
        return None
    settings = [flag for flag in argv if flag.startswith("--config.")]
    flags = parser().parse_args([flag for flag in argv if flag not in settings])
    if flags.workdir:
        atomic.place(flags.workdir)  # rejects an unknown scheme
    environment.raise_open_file_limit()
    if flags.verb == "verify":  # which needs no config, nor jax
        from etils import epath

        from lslm_jax.verify import verify

        return verify(epath.Path(_named(flags.workdir)))
    config = _load(flags, settings)

    if flags.verb == "plan":
        from lslm_jax.plan import topology

        topology.prepare(flags.topology)
    # Not before the config is known to be sound: this imports jax.
    environment.quiet_libraries()
    from lslm_jax import compile_cache, distributed, verbs
    from lslm_jax.train import identity, reproducible

    environment.check_jax_options()

    if config.train.reproducible:
        reproducible.fix_threads()
    if flags.verb != "plan":  # for which one process is enough, whatever hardware it is for
        distributed.start(flags.coordinator, flags.processes, flags.process, config.train.watchdog)
        identity.check_processes(config, vars(flags))
    if flags.workdir:
        compile_cache.keep(flags.workdir)
    return getattr(verbs, flags.verb + "_" * keyword.iskeyword(flags.verb))(config, flags)


def _load(flags: argparse.Namespace, settings: Sequence[str]) -> Config:
    assignments = []
    for setting in settings:
        key, equals, text = setting.removeprefix("--config.").partition("=")
        if not equals:
            raise ConfigError(f"{setting} has no value: write {setting}=VALUE")
        assignments.append((key, text))
    config = _base(flags)
    if flags.chat and not config.data.is_chat:
        if config.task.objective != "causal" or config.data.mixture:
            raise ConfigError("--chat needs a model that continues texts")
        config = replace(config, data=replace(config.data, example="chat"))
    return config_checks.validate(config_loading.override(config, assignments))


def _base(flags: argparse.Namespace) -> Config:
    """The config before settings of the command line: a file's, the run's own, or that of a pretrained model."""
    if flags.verb == "import" and not flags.pretrained:
        raise ConfigError("import needs --pretrained=DIR, the model to read")
    harnessed = flags.verb == "evaluate" and flags.harness is not None
    planned = flags.verb == "plan"
    needs_run = not (planned or (flags.pretrained and (flags.verb in ("generate", "import") or harnessed)))
    reads = not planned and (flags.verb != "import" or bool(flags.workdir))
    if flags.pretrained:
        from lslm_jax.convert import pretrained

        source = pretrained.describe(flags.pretrained)
        if not (needs_run or flags.config):
            return pretrained.default_config(source, reads=reads)
    if needs_run:
        _named(flags.workdir)
    if not flags.config:
        if flags.verb in ("train", "prepare") or flags.pretrained or not flags.workdir:
            raise ConfigError("--config=FILE is missing, as --config=configs/quickstart.py")
        flags.config = f"{flags.workdir}/config.json"
    config = config_loading.load(flags.config)
    if not flags.pretrained:
        return config
    return pretrained.configure(config, source, reads=reads, trains=flags.verb in ("train", "plan"))


def _named(workdir: str | None) -> str:
    if not workdir:
        raise ConfigError("--workdir=DIR is missing: where the run lives")
    return workdir


def run() -> NoReturn:
    """The command, in a process of its own."""
    malloc.ensure_large_pages()
    preemption.end_on_signals(sys.argv[1:])
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code:
            peers.end_soon(stop.code)  # a thread that hangs, in a save that failed, must not keep the process
        raise


if __name__ == "__main__":
    run()
