"""The command line: names the verb, loads the config, turns failures into exit codes.

python -m lslm_jax.main [VERB] --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
"""

import argparse
import contextlib
import errno
import json
import keyword
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lslm_jax.runtime import lazy_imports

try:
    from etils import epath

    from lslm_jax.cli import command_flags, summary
    from lslm_jax.config import Config, loading, setting_flags, validation
    from lslm_jax.errors import ConfigError, InputMissing, LslmError, SaveError
    from lslm_jax.parallel import heartbeat
    from lslm_jax.resilience import preemption
    from lslm_jax.runtime import atomic_io, environment, huge_pages
except ModuleNotFoundError as missing:  # started by an interpreter that has not the packages of the project
    lazy_imports.refuse_missing(missing)

VERBS = command_flags.COMMANDS
parser = command_flags.parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code; the cause of a failure is one line on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv == ["help"]:
        parser().print_help()
        raise SystemExit(0)
    try:
        if (result := _run(argv)) is not None:
            print(json.dumps(result))
        _flush()
    except LslmError as error:
        if "--debug" in argv:
            traceback.print_exc()
        elif not error.told:
            print(f"lslm: {error}", file=sys.stderr)
        heartbeat.end(error.exit_code, str(error))
    except KeyboardInterrupt:  # before or after the training loop, which catches it and saves
        print("lslm: interrupted", file=sys.stderr)
        heartbeat.end(130, "interrupted")
    except ModuleNotFoundError as error:
        lazy_imports.refuse_missing(error)
    except BrokenPipeError:  # whoever read the output has ended, as `head` does
        _drop_stdout()
        heartbeat.end(128 + signal.SIGPIPE, "nobody reads the output")
    except Exception as error:
        heartbeat.explain(error)
        if (known := _explain(error)) and "--debug" not in argv:
            print(f"lslm: {known[1]}", file=sys.stderr)
            heartbeat.end(*known)
        traceback.print_exc()
        heartbeat.end(1, f"{type(error).__name__}: {error}".partition("\n")[0])
    heartbeat.end()


def _flush() -> None:
    """Writes what stdout still holds; SaveError where its file or device is full."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_stdout()
        raise SaveError(f"could not write the output: {error.strerror}") from error


def _drop_stdout() -> None:
    """Leaves nothing in stdout for the interpreter to write when it ends."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # stdout may be no file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _explain(error: Exception) -> tuple[int, str] | None:
    """Exit code and line for an error of the operating system that no caller expected; None for other errors."""
    if isinstance(error, MemoryError):
        return 1, f"out of memory: {error}".removesuffix(": ")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        if error.filename is None:  # as of stdout
            _drop_stdout()
        return SaveError.exit_code, f"could not write {error.filename or 'the output'}: {error.strerror}"
    if error.filename is None:
        return None
    cause = f"{error.filename}: {error.strerror}"
    return InputMissing.exit_code, f"cannot use {cause}"


def _run(argv: Sequence[str]) -> dict[str, Any] | None:
    if asked := [word for word in argv if word.partition("=")[0] == "--config.help"]:
        print(loading.help_text(asked[-1].partition("=")[2]))
        return None
    settings, rest = setting_flags.split(argv)
    flags = command_flags.parse(rest)
    if flags.workdir:
        atomic_io.place(flags.workdir)  # rejects an unknown scheme
    environment.raise_open_file_limit()
    if flags.verb == "verify":  # which needs no config
        from lslm_jax.cli.verify import verify

        setting_flags.require_none(settings, "verify")
        return _present(verify(epath.Path(_named(flags.workdir))), flags)
    config = _load(flags, setting_flags.assignments(settings))

    if flags.verb == "plan":
        from lslm_jax.plan import topology

        topology.prepare(flags.topology)
    # Not before the config is known to be sound: this imports jax.
    environment.quiet_libraries()
    from lslm_jax.checkpoint import provenance
    from lslm_jax.cli import commands
    from lslm_jax.parallel import multihost
    from lslm_jax.resilience import deterministic_step
    from lslm_jax.runtime import compile_cache

    environment.check_jax_options()

    if config.train.reproducible:
        deterministic_step.fix_threads()
    if flags.verb != "plan":  # for which one process is enough, whatever hardware it is for
        multihost.start(flags.coordinator, flags.processes, flags.process, config.train.watchdog)
        provenance.check_processes(config, vars(flags))
    if flags.workdir:
        compile_cache.keep(flags.workdir)
    result = getattr(commands, flags.verb + "_" * keyword.iskeyword(flags.verb))(config, flags)
    return result if flags.verb == "plan" else _present(result, flags)  # of a plan stderr has the table


def _present(result: dict[str, Any] | None, flags: argparse.Namespace) -> dict[str, Any] | None:
    """Prints a result as a table where stdout is a terminal; returns it where it is to be printed as JSON."""
    if result is None or not sys.stdout.isatty():
        return result
    print(summary.text(result, flags.verb, flags.workdir))
    return None


def _load(flags: argparse.Namespace, assignments: list[tuple[str, str]]) -> Config:
    """The config of a command: a file's or the run's own, with the settings of the command line, checked."""
    config = _base(flags)
    own = None
    if flags.verb in setting_flags.READERS and not flags.pretrained:
        own = _own_config(flags.workdir) or config
    if own and flags.verb == "evaluate":
        assignments = setting_flags.take_held_out_files(flags, assignments, own)
    flags.settings = [key for key, _ in assignments]
    if flags.pretrained and "train.init_from" in flags.settings:
        raise ConfigError("--pretrained and train.init_from exclude each other: each names the first weights of a run")
    if not flags.pretrained and flags.config and flags.config.endswith(".json"):
        config = loading.release_derived(config, flags.settings)
    if flags.chat and not config.data.is_chat:
        if config.task.objective != "causal" or config.data.mixture:
            raise ConfigError("--chat needs a model that continues texts")
        config = replace(config, data=replace(config.data, example="chat"))
    config = loading.override(config, assignments)
    setting_flags.check_mixture(flags.settings, config)
    config = validation.validate(config)
    if own:
        setting_flags.check_effect(flags, config, validation.validate(own))
    return config


def _own_config(workdir: str) -> Config | None:
    """The config that a run was started with; None where it has none."""
    path = f"{workdir}/config.json"
    return loading.load(path) if atomic_io.exists(epath.Path(path)) else None


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
    if not flags.pretrained and (flags.verb in setting_flags.READERS or (planned and not flags.config)):
        _require_run(flags.workdir)
    if not flags.config:
        if flags.verb in ("train", "prepare") or flags.pretrained or not flags.workdir:
            raise ConfigError("--config=FILE is missing, as --config=configs/quickstart.py")
        flags.config = f"{flags.workdir}/config.json"
    config = loading.load(flags.config)
    if not flags.pretrained:
        return config
    return pretrained.configure(config, source, reads=reads, trains=flags.verb in ("train", "plan"))


def _require_run(workdir: str | None) -> None:
    """Raises an InputMissing where a command that reads a run names a directory that does not exist."""
    if not workdir:
        return
    path = epath.Path(workdir)
    if atomic_io.is_remote(path) or path.is_dir():
        return
    near = atomic_io.similar(path)
    hint = f"did you mean {near}?" if near else "--workdir names the directory of a trained run"
    raise InputMissing(f"there is no run {workdir}: {hint}")


def _named(workdir: str | None) -> str:
    if not workdir:
        raise ConfigError("--workdir=DIR is missing: where the run lives")
    return workdir


def run() -> NoReturn:
    """The command, in a process of its own."""
    huge_pages.ensure_large_pages()
    preemption.end_on_signals(sys.argv[1:])
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code:
            heartbeat.end_soon(stop.code)  # a thread that hangs, in a save that failed, must not keep the process
        raise


if __name__ == "__main__":
    run()
