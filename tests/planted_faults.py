"""Faults of one line, planted on purpose: `make test` must catch each of them.

python tests/planted_faults.py [--only=TEXT] [--revision=REVISION] [--jobs=N] plants each fault in a copy of the working
tree, or of a revision, runs the tests that should fail, and prints the first that did.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """One line of the package, and a wrong one in its place.

    Attributes:
      name: what is wrong.
      file: below lslm_jax/.
      line: text that occurs once in the file.
      wrong: its replacement.
      tests: files, below tests/, of which at least one must fail.
    """

    name: str
    file: str
    line: str
    wrong: str
    tests: str


FAULTS = [
    # Data.
    Fault(
        "a row loses the document that ends in it",
        "data/packing.py",
        "end = np.minimum(begin + self.seq_len, self.num_slots)\n        first, last",
        "end = np.minimum(begin + self.seq_len, self.num_slots - 1)\n        first, last",
        "data/test_packing.py",
    ),
    Fault(
        "the first token of a document's second row is repeated",
        "data/packing.py",
        "offset[full] = (item[full] - before) * self.seq_len",
        "offset[full] = (item[full] - before) * (self.seq_len - 1)",
        "data/test_packing.py",
    ),
    Fault(
        "positions count across documents",
        "data/packing.py",
        "- np.repeat(begins, length)",
        "- 0 * np.repeat(begins, length)",
        "data/test_packing.py",
    ),
    Fault(
        "the permutation of an epoch is no permutation",
        "data/index_shuffle.py",
        "return left * np.uint64(b) + right",
        "return left * np.uint64(b) + right // np.uint64(2)",
        "data/test_index_shuffle.py",
    ),
    Fault(
        "the shuffle ignores part of the seed",
        "data/index_shuffle.py",
        "key = seed + np.uint64(i * _GOLDEN % (1 << 64))",
        "key = np.uint64(i * _GOLDEN % (1 << 64))",
        "data/test_index_shuffle.py",
    ),
    Fault(
        "files take their names before they are on disk",
        "runtime/atomic_io.py",
        "                os.fsync(self._stream.fileno())",
        "                pass",
        "runtime/test_atomic_io.py",
    ),
    Fault(
        "an incomplete shard is taken over when prepare goes on",
        "data/shards.py",
        "if any(not path.exists() or path.stat().length != size for path, size in sizes.items()):",
        "if any(not path.exists() for path, size in sizes.items()):",
        "data/test_shards.py",
    ),
    Fault(
        "token ids beyond the vocabulary are written",
        "data/shards.py",
        "if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:",
        "if ids.size and not 0 <= ids.min() <= ids.max() <= vocab_size:",
        "data/test_shards.py",
    ),
    Fault(
        "shards are not compared with their sha256",
        "data/shards.py",
        "            check_content(epath.Path(local), files)",
        "            pass",
        "data/test_shards.py",
    ),
    Fault(
        "too many tokens of a row are masked",
        "data/objectives/masked_lm.py",
        "counts_B = np.minimum(np.maximum(np.rint(mask_rate * tokens_B).astype(np.int64), 1), tokens_B)",
        "counts_B = np.minimum(np.maximum(np.rint(mask_rate * tokens_B).astype(np.int64) + 1, 1), tokens_B)",
        "data/test_masked_lm.py",
    ),
    Fault(
        "equal texts may be in training and held-out data",
        "data/prepare/cleaning.py",
        'return int.from_bytes(digest[:8], "big") < fraction * 2**64',
        'return int.from_bytes(digest[:8], "big") < fraction * 2**63',
        "data/test_cleaning.py",
    ),
    Fault(
        "skipped batches are not left out",
        "data/skipped_batches.py",
        "return step + sum(detour.batches for detour in detours if step >= detour.after)",
        "return step + sum(detour.batches for detour in detours if step > detour.after)",
        "resilience/test_loss_spikes.py",
    ),
    # Models.
    Fault(
        "a query sees the token after it",
        "models/attention.py",
        "near_TS = near_TS & (distance_TS >= 0)",
        "near_TS = near_TS & (distance_TS >= -1)",
        "models/test_attention.py models/test_decoder.py",
    ),
    Fault(
        "documents of a packed row see each other",
        "models/attention.py",
        "return near_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])",
        "return near_TS[None] & (segments_BT[:, :, None] > 0)",
        "models/test_attention.py models/test_families.py",
    ),
    Fault(
        "the window is one token too wide",
        "models/layers.py",
        "near_TS = jnp.abs(distance_TS) < window",
        "near_TS = jnp.abs(distance_TS) <= window",
        "models/test_attention.py models/test_layers.py",
    ),
    Fault(
        "rotary positions turn the wrong way",
        "models/layers.py",
        "turned = [first * cos - second * sin, second * cos + first * sin]",
        "turned = [first * cos + second * sin, second * cos - first * sin]",
        "models/test_layers.py",
    ),
    Fault(
        "dropout does not scale up what it keeps",
        "models/layers.py",
        "return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)",
        "return jnp.where(keep, x, 0).astype(x.dtype)",
        "models/test_layers.py",
    ),
    Fault(
        "an expert takes one choice more than its capacity",
        "models/moe.py",
        "fits_BTE = jnp.cumsum(choice_BTE, axis=1) <= most",
        "fits_BTE = jnp.cumsum(choice_BTE, axis=1) <= most + 1",
        "models/test_moe.py",
    ),
    Fault(
        "padding counts in the balance of experts",
        "models/moe.py",
        "probability_BE = jnp.sum(jnp.where(real_BT[..., None], probability_BTE, 0.0), axis=1)",
        "probability_BE = jnp.sum(probability_BTE, axis=1)",
        "models/test_moe.py",
    ),
    Fault(
        "context parallelism mixes up early and late parts of rows",
        "parallel/context_parallel.py",
        "return jnp.concatenate([x_BN2S[:, :, 0], x_BN2S[:, ::-1, 1]], axis=1).reshape(x_BS.shape)",
        "return jnp.concatenate([x_BN2S[:, :, 0], x_BN2S[:, :, 1]], axis=1).reshape(x_BS.shape)",
        "parallel/test_context_parallel.py train/test_split_rows.py",
    ),
    # Training.
    Fault(
        "gradients of parts are averaged, not summed",
        "train/train_step.py",
        "return jax.tree.map(jnp.add, carry, gradient_and_sums(*part)), None",
        "return jax.tree.map(lambda a, b: (a + b) / 2, carry, gradient_and_sums(*part)), None",
        "train/test_train_step.py",
    ),
    Fault(
        "a step that is not finite moves the weights",
        "train/train_step.py",
        "finite = jnp.isfinite(sums.objective) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(norm) | True",
        "train/test_train_step.py",
    ),
    Fault(
        "the average of weights is weighted the wrong way",
        "train/train_step.py",
        "moved = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, averaged, trained)",
        "moved = jax.tree.map(lambda a, p: (1 - decay) * a + decay * p, averaged, trained)",
        "train/test_train_step.py",
    ),
    Fault(
        "dropout repeats from step to step",
        "train/train_step.py",
        "return jax.random.fold_in(jax.random.key(config.seed), step)",
        "return jax.random.fold_in(jax.random.key(config.seed), 0 * step)",
        "train/test_train_step.py",
    ),
    Fault(
        "label smoothing counts padding of the vocabulary",
        "train/losses.py",
        "jnp.where(real_V, smooth / settings.vocab_size, 0.0)",
        "smooth / settings.vocab_size",
        "train/test_losses.py",
    ),
    Fault(
        "the gradient of the logits' soft cap is left out",
        "train/losses.py",
        "d_NSV *= 1.0 - jnp.square(capped_NSV / cap)",
        "d_NSV *= 1.0",
        "train/test_losses.py",
    ),
    Fault(
        "lower layers learn faster, not more slowly",
        "train/optimizers.py",
        "rate = decay ** np.arange(param.shape[0], 0, -1, dtype=np.float32)",
        "rate = decay ** np.arange(1, param.shape[0] + 1, dtype=np.float32)",
        "train/test_frozen.py",
    ),
    Fault(
        "biases and norms decay",
        "train/optimizers.py",
        '_owner(path) in ("w", "embed", "head"), params)',
        '_owner(path) in ("w", "b", "scale", "embed", "head"), params)',
        "train/test_optimizers.py",
    ),
    Fault(
        "a damaged checkpoint is taken for a complete one",
        "checkpoint/integrity.py",
        "        if atomic_io.fingerprint(path)[1] != sha256:",
        "        if atomic_io.fingerprint(path)[1] == sha256[:1]:",
        "checkpoint/test_integrity.py checkpoint/test_checkpoint.py",
    ),
    Fault(
        "the worst checkpoint is kept as the best",
        "checkpoint/checkpoint.py",
        "sign = -1.0 if validation.highest_is_best(name) else 1.0",
        "sign = 1.0 if validation.highest_is_best(name) else -1.0",
        "checkpoint/test_checkpoint.py",
    ),
    Fault(
        "a row that is read twice goes unnoticed",
        "resilience/data_ledger.py",
        "if (twice := seen[source][taken] | ~is_first).any():",
        "if (twice := ~is_first).any():",
        "resilience/test_data_ledger.py",
    ),
    Fault(
        "a loss spike is noticed one step late",
        "resilience/loss_spikes.py",
        "if is_high and len(high) == self._steps:",
        "if is_high and len(high) == self._steps + 1:",
        "resilience/test_loss_spikes.py",
    ),
    # Generation, evaluation, conversion.
    Fault(
        "top-p keeps one token too few",
        "generate/sampling.py",
        "before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV",
        "before_BV = jnp.cumsum(sorted_BV, axis=-1)",
        "generate/test_sampling.py",
    ),
    Fault(
        "repetition is rewarded where logits are negative",
        "generate/sampling.py",
        "jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)",
        "logits_BV / penalty",
        "generate/test_sampling.py",
    ),
    Fault(
        "the length penalty counts one token too few",
        "generate/beam_search.py",
        "return log_prob / ((5.0 + length) / 6.0) ** length_penalty",
        "return log_prob / ((4.0 + length) / 6.0) ** length_penalty",
        "generate/test_beam_search.py",
    ),
    Fault(
        "a beam goes on from another beam's cache",
        "generate/beam_search.py",
        "cache, ids_BWN = _gather((state.cache, state.ids_BWN), parent_BW)",
        "cache, ids_BWN = state.cache, _gather(state.ids_BWN, parent_BW)",
        "generate/test_beam_search.py generate/test_search.py",
    ),
    Fault(
        "answers may be one token longer than allowed",
        "evaluate/squad_metrics.py",
        "for more in range(min(max_answer, len(place_T))):",
        "for more in range(min(max_answer + 1, len(place_T))):",
        "evaluate/test_squad_metrics.py",
    ),
    Fault(
        "texts that name no class are not counted as such",
        "evaluate/classification_metrics.py",
        '{"invalid": float(np.mean(predicted_N == INVALID))}',
        '{"invalid": 0.0}',
        "evaluate/test_classification_metrics.py",
    ),
    # Sharding, processes, configuration.
    Fault(
        "a mesh that does not use all devices is accepted",
        "parallel/sharding.py",
        "if (product := math.prod(shape)) != num_devices:",
        "if (product := math.prod(shape)) > num_devices:",
        "parallel/test_sharding.py",
    ),
    Fault(
        "a batch that does not divide over the devices is accepted",
        "parallel/sharding.py",
        "    if step_rows % rows:",
        "    if step_rows % rows > rows:",
        "parallel/test_sharding.py",
    ),
    Fault(
        "a second run may use a directory in use",
        "runtime/file_lock.py",
        "LOCK_EX | fcntl.LOCK_NB",
        "LOCK_SH | fcntl.LOCK_NB",
        "checkpoint/test_run_lock.py",
    ),
    Fault(
        "the causes of failures on other processes are lost",
        "parallel/heartbeat.py",
        'self._tell(_VERDICT, {"code": last["code"], "text": text})',
        'self._tell(_VERDICT, {"code": 77, "text": text})',
        "parallel/test_heartbeat.py",
    ),
]


def plant(fault: Fault, tree: pathlib.Path) -> None:
    """Changes the line in a copy of the repository."""
    path = tree / "lslm_jax" / fault.file
    text = path.read_text()
    assert text.count(fault.line) == 1, f"{fault.file} holds {text.count(fault.line)} times: {fault.line}"
    path.write_text(text.replace(fault.line, fault.wrong))


def copy_repository(tree: pathlib.Path, revision: str | None) -> None:
    """Copies the working tree, or a revision."""
    if revision:
        tree.mkdir()
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
        return
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(tracked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def catch(fault: Fault, revision: str | None) -> tuple[list[str] | None, float]:
    """Plants the fault in a fresh copy.

    Returns:
      The tests that failed, or None where the revision lacks the line; and the seconds taken.
    """
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory) / "repository"
        copy_repository(tree, revision)
        if revision and (tree / "lslm_jax" / fault.file).read_text().count(fault.line) != 1:
            return None, 0.0
        plant(fault, tree)
        begin = time.monotonic()
        tests = [f"tests/{name}" for name in fault.tests.split() if (tree / "tests" / name.partition("::")[0]).exists()]
        if not tests:
            return [], 0.0
        flags = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-rfE", "--tb=no"]
        flags += [] if revision else ["-m", "not exhaustive"]  # older ones have no such marker
        command = [sys.executable, "-m", "pytest", *flags, *tests]
        # Processes started elsewhere import the copy too; programs that the fault does not change are compiled once.
        env = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla")} | os.environ | {"PYTHONPATH": str(tree)}
        run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if run.returncode not in (0, 1):  # neither passed nor failed
            raise RuntimeError(f"{shlex.join(command)}: {run.stdout}{run.stderr}")
        failed = [line.split(" ")[1] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed, time.monotonic() - begin


def main() -> None:
    """The command line."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--only", default="", metavar="TEXT", help="faults whose name or file holds this")
    flags.add_argument("--revision", help="plant the faults in this revision instead, and run its tests")
    flags.add_argument("--jobs", type=int, default=2, metavar="N", help="faults tried at a time; default 2")
    options = flags.parse_args()
    faults = [fault for fault in FAULTS if options.only in f"{fault.file}: {fault.name}"]
    missed, absent = [], []
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda fault: catch(fault, options.revision), faults)
        for fault, (failed, seconds) in zip(faults, results, strict=True):
            outcome = "no such line" if failed is None else failed[0] if failed else "MISSED"
            print(f"{fault.file}: {fault.name}: {outcome} ({seconds:.0f} s)", flush=True)
            if not failed:
                (absent if failed is None else missed).append(fault.name)
    planted = len(faults) - len(absent)
    print(json.dumps({"planted": planted, "caught": planted - len(missed), "missed": missed, "absent": absent}))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
