"""The processes of a run watch over each other: none waits for ever for one that is gone, and they end together.

A collective whose peer is dead may never return, and what JAX does about it, an abort of everyone after minutes, names
no cause. Here each process shows a sign of life in the key-value store that jax.distributed runs on process 0; process
0 looks at all of them and passes the verdict, which all others wait for. Where process 0 itself is killed, its store is
gone with it, and JAX aborts the others (SIGABRT) before they can say anything better.

One process has nobody to watch: `end` is `sys.exit` then.
"""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from lslm_jax.errors import PeerLost

_BEAT = 2.0  # seconds between two signs of life
_SUSPICION = 10.0  # seconds of silence that are enough where a collective has failed
_GRACE = 30.0  # seconds in which the others may come to the same end by themselves
_PARTING = 15.0  # seconds at most that process 0, which holds the store, leaves to the others to hear the verdict
_FAREWELL = 1800.0  # seconds to wait for the others at a good end
_ENDING = 10.0  # seconds that the interpreter may take to end after a failure
_ALIVE, _LEFT, _VERDICT = "lslm/alive/", "lslm/left/", "lslm/verdict"

_watch: "_Watch | None" = None


def begin(store: Any, process: int, processes: int, patience: float) -> None:
    """Starts watching, in two threads, until `end` or the interpreter's end.

    Args:
      store: the client of jax.distributed.
      process: this one.
      processes: how many there are.
      patience: seconds without a sign of life after which a process counts as lost.
    """
    global _watch
    _watch = _Watch(store, process, processes, patience)
    atexit.register(_watch.stop)


def end(code: int = 0, text: str = "") -> NoReturn:
    """Ends this process with `code`; the others, if there are any, end with it too if it is not 0, and are told `text`.

    With 0, waits for the others before.
    """
    if _watch:
        _watch.end(code, text)
    sys.exit(code)


def end_now(code: int, text: str) -> NoReturn:
    """The same from any thread, whatever the others are doing."""
    print(f"lslm: {text}", file=sys.stderr)
    if _watch:
        time.sleep(_BEAT)  # the others, which may be stuck as well, have something to write too
        _watch.end(code, text)
    _leave(code)


def end_soon(code: int) -> None:
    """Lets the interpreter end as usual, but ends the process with `code` where that takes too long."""
    timer = threading.Timer(_ENDING, _leave, [code])
    timer.daemon = True
    timer.start()


def explain(error: Exception) -> None:
    """Where the runtime has failed in the midst of others, ends this process if one of them turns out to be gone."""
    if _watch and (type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)):
        _watch.suspect()


class _Watch:
    def __init__(self, store: Any, process: int, processes: int, patience: float):
        self._store, self._me, self._patience, self._grace = store, process, patience, _GRACE
        now = self._beaten = time.monotonic()
        # The last sign of each process, and when it came.
        self._seen: dict[str, tuple[str, float]] = {str(number): ("", now) for number in range(processes)}
        self._parted: dict[str, float] = {}  # when process 0 learnt of an end
        self._over = threading.Event()
        works = (self._beat, self._look)
        self._threads = [threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No thread may be in the store when the interpreter ends."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def end(self, code: int, text: str) -> None:
        """Returns if all is well, when all have come this far."""
        if code:
            self._part(code, text)
        self._tell(f"{_LEFT}{self._me}", {"code": 0})
        try:
            self._store.wait_at_barrier("lslm/end", int(_FAREWELL * 1000))
        except RuntimeError:  # this one's work is done: it is for those that are not there to complain
            _leave(0)
        if self._me == 0:
            self._tell(_VERDICT, {"code": 0})
        self.stop()

    def suspect(self) -> None:
        """Waits as long as a verdict, which ends this process, can take to come."""
        self._patience, self._grace = min(self._patience, _SUSPICION), 0.0
        time.sleep(self._patience + 3 * _BEAT + _PARTING)

    def _beat(self) -> None:
        for count in itertools.count():
            if not self._tell(f"{_ALIVE}{self._me}", {"count": count, "host": socket.gethostname()}):
                return  # the store is gone, as `_look` finds out
            self._beaten = time.monotonic()
            if self._over.wait(_BEAT):
                return

    def _look(self) -> None:
        while not self._over.is_set():
            verdict = self._verdict()
            if self._over.is_set() or (verdict and not verdict["code"]):
                return
            if verdict:
                if self._me == 0 or "lost" in verdict:
                    print(f"lslm: {verdict['text']}", file=sys.stderr)
                self._part(verdict["code"], verdict["text"])
            if self._me == 0:
                self._judge()

    def _verdict(self) -> dict[str, Any] | None:
        """What process 0 has found, which is waited for for a while; that it is gone is found by whoever asks it."""
        try:
            return json.loads(self._store.blocking_key_value_get(_VERDICT, int(_BEAT * 1000)))
        except RuntimeError as error:
            silent, text = time.monotonic() - self._beaten, "process 0 is gone"
            if "DEADLINE_EXCEEDED" in str(error):
                if silent < self._patience:
                    return None
                text = f"process 0 has not answered for {silent:.0f} s"
        return {"code": PeerLost.exit_code, "text": text, "lost": True}

    def _judge(self) -> None:
        """Process 0: whether any has failed, or is silent for too long."""
        left = self._read(_LEFT)
        for process, last in left.items():
            if last["code"] and time.monotonic() - self._parted.setdefault(process, time.monotonic()) > self._grace:
                text = f"process {process} has ended with exit code {last['code']}: {last['text'] or 'as it says'}"
                self._tell(_VERDICT, {"code": last["code"], "text": text})
                return
        signs = self._read(_ALIVE)
        for process, (sign, since) in self._seen.items():
            now, new = time.monotonic(), signs.get(process, {})
            if str(new) != sign:
                self._seen[process] = str(new), now
            elif now - since > self._patience and process not in left:
                where = f" on {new['host']}" if new else ""
                text = f"process {process}{where} has not answered for {now - since:.0f} s"
                self._tell(f"{_LEFT}{process}", {"code": PeerLost.exit_code, "text": text})
                self._tell(_VERDICT, {"code": PeerLost.exit_code, "text": text})
                return

    def _read(self, directory: str) -> dict[str, dict[str, Any]]:
        try:
            found = self._store.key_value_dir_get(directory)
        except RuntimeError:  # nothing there yet
            return {}
        return {key.rpartition("/")[2]: json.loads(value) for key, value in found}

    def _tell(self, key: str, value: dict[str, Any]) -> bool:
        try:
            self._store.key_value_set(key, json.dumps(value), allow_overwrite=True)
        except RuntimeError:
            return False
        return True

    def _part(self, code: int, text: str) -> NoReturn:
        """Ends; process 0 when all others that live have heard why."""
        self._over.set()
        last = {"code": code, "text": text}
        if self._me == 0:
            self._tell(_VERDICT, last)
            deadline = time.monotonic() + _PARTING
            while time.monotonic() < deadline and self._read(_LEFT).keys() | {"0"} < self._seen.keys():
                time.sleep(0.1)
        else:
            # Not through `_tell` alone: where the store is frozen with process 0, nothing would come back.
            telling = threading.Thread(target=self._tell, args=(f"{_LEFT}{self._me}", last), daemon=True)
            telling.start()
            telling.join(_PARTING)
        _leave(code)


def _leave(code: int) -> NoReturn:
    """Without the interpreter's and JAX's own ends, which wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
