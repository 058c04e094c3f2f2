"""Run a function on N ranks: real processes, from a notebook cell, a test or the command line.

    launch(hello, world_size=4)     ->   [value of rank 0, value of rank 1, ...]

A *fork server* (a small process with torch already imported) forks each rank, so four ranks start in a
fraction of a second; plain `fork` breaks once the parent has used CUDA or threads, and `spawn` imports torch
anew in every rank and cannot run a function that was typed into a cell. The function travels by cloudpickle.

What a rank prints goes into a file of its own and is replayed in rank order with a `[rank r]` prefix, so a run
prints the same every time. When ranks fail, the **first** cause is reported: the others only see that a
connection closed. Ranks notice when their parent is gone and leave with it.

Under `torchrun` the ranks exist already: `launch` then joins them and returns this rank's value alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal

import cloudpickle
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its functions' defaults would keep the first process group alive
from torch._C._distributed_c10d import FileStore, Store

from .config import UserError
from .mesh import GROUPS

GRACE = 60.0  # seconds that ranks get to finish after an interrupt, before they are killed
_PEER_GONE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process|Connection (refused|closed)|ncclRemote"
)
_WAITED = re.compile(r"Timed out waiting \d+ ?ms|Watchdog caught collective operation timeout")  # gloo; NCCL
_context = get_context("forkserver")
# Imported once here, not in every rank; the optimizers import the compiler (torch._dynamo) at their first use.
_context.set_forkserver_preload(["torch._dynamo", *(f"picotron_mini.{each}" for each in ("launch", "train", "verify"))])


_in_rank = False  # whether this process is one that `launch` started


class RankError(RuntimeError):
    """A rank failed. The message holds the first failing rank's own traceback."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


@dataclass
class _Failure:
    rank: int
    when: float
    text: str
    user_error: UserError | None = None
    silent: bool = False  # ended without a word, as after SIGKILL, or hangs

    @property
    def order(self) -> tuple[int, float]:
        """First causes first: a death or a hang; an error of its own; one that waited in vain; one whose peer is gone.

        From 2 on it is a complaint about another rank.
        """
        if _WAITED.search(self.text):
            return (2, self.when)
        return (0 if self.silent else 3 if _PEER_GONE.search(self.text) else 1, self.when)


def under_torchrun() -> bool:
    """Whether this process is a rank that `torchrun` (or a scheduler like it) has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def first_rank() -> bool:
    """Whether this process is the one that speaks: the only one, or rank 0 of those that `torchrun` has started."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def launch(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    device: str = "cpu",
    timeout: float | None = 300.0,
    output: Literal["replay", "live", "hide"] = "replay",
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks with `torch.distributed` ready, and return their values in rank order.

    Args:
        fn: any function, also one defined in a notebook cell. Its value must be picklable.
        device: "cpu" runs gloo, "cuda" runs NCCL with GPU `local rank` of this machine.
        timeout: seconds for everything; then each rank's stack is shown and the ranks are killed. `None`: no limit.
        output: "replay" prints what ranks printed when they are done, "live" lets rank 0 print at once and shows
            the others only if something fails, "hide" prints nothing.

    Raises:
        RankError: a rank raised, was killed, or did not end in time.
        UserError: a rank raised one; it is handed through as it is. Or this is a rank.
        KeyboardInterrupt: on Ctrl-C, after the ranks have stopped. Ranks get SIGTERM first, and if all of them
            return a value all the same (a training run that saves itself), that value is returned instead.
    """
    if _in_rank:  # a rank has imported a file that calls it on import; its ranks would import it again, without end
        raise UserError(
            "launch was called inside a rank; a file that ranks import must call it in a function, or below "
            '`if __name__ == "__main__":`'
        )
    if under_torchrun():
        return [_join_torchrun(fn, args, world_size, device)]
    payload = cloudpickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="picotron-") as folder:
        ranks = _start(payload, world_size, device, Path(folder), output)
        values, failures = _collect(ranks, Path(folder), timeout)
        first = min(failures, key=lambda f: f.order) if failures else None
        if output == "replay" or (first and output == "live"):
            replayed = range(1 if output == "live" else 0, world_size)  # rank 0 of a live launch has printed already
            # after a failure the other ranks' complaints that a peer is gone say nothing
            _replay(Path(folder), replayed, replayed if first is None else range(first.rank, first.rank + 1))
        if first:
            if first.user_error is not None:
                raise first.user_error
            raise RankError(first.rank, f"rank {first.rank} of {world_size} failed:\n{first.text}")
    return [values[rank] for rank in range(world_size)]


def _start(payload: bytes, world_size: int, device: str, folder: Path, output: str) -> list[tuple[Any, Any]]:
    """Start every rank; returns (process, connection) a rank."""
    ranks = []
    _start_fork_server()
    # multiprocessing would import the caller's main script in each rank. Nothing there is needed (the function
    # travels by value), and a script without an `if __name__` guard would start ranks of its own.
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            # stdout and stderr as they are now; the fork server knows those of when it was started
            live = (DupFd(1), DupFd(2)) if output == "live" and rank == 0 else None
            arguments = (payload, rank, world_size, device, str(folder), live)
            process = _context.Process(target=_rank_main, args=(*arguments, dict(os.environ), theirs))
            with _put_off(signal.SIGINT, signal.SIGTERM):  # else there could be a rank that is not in the list
                process.start()
                theirs.close()
                ranks.append((process, ours))
    except BaseException:  # Ctrl-C, say: those that have started would wait for the others
        _signal_all(dict(enumerate(ranks)), signal.SIGKILL)
        for process, _ in ranks:
            process.join()
        raise
    finally:
        sys.modules["__main__"] = main
    return ranks


def _start_fork_server() -> None:
    """If it does not run yet. Ctrl-C while it imports torch is not its business: it and the ranks inherit the mask."""
    with _put_off(signal.SIGINT, signal.SIGTERM):
        resource_tracker.ensure_running()  # it unblocks signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _put_off(*signals: signal.Signals) -> Iterator[None]:
    """Signals that arrive within the block take effect at its end; a mask would not do, libraries have threads."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers, and none runs them
        known = [each for each in signals if signal.getsignal(each) is not None]  # None: not Python's, leave it
        before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in known}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    for number in came:
        signal.raise_signal(number)


def _collect(
    ranks: list[tuple[Any, Any]], folder: Path, timeout: float | None
) -> tuple[dict[int, Any], list[_Failure]]:
    """Wait for every rank's value, or for the first failure and what follows within a second."""
    values: dict[int, Any] = {}
    failures: list[_Failure] = []
    deadline = time.monotonic() + timeout if timeout else None
    interrupted = False
    running = dict(enumerate(ranks))
    try:
        while running:
            try:
                _wait_for_one(running, folder, values, failures)
            except KeyboardInterrupt:
                if interrupted:  # a second Ctrl-C: no more waiting
                    raise
                interrupted, deadline = True, time.monotonic() + GRACE
                _signal_all(running, signal.SIGTERM)
            if failures:
                deadline = min(deadline or float("inf"), failures[0].when + 1.0)
            if deadline and time.monotonic() > deadline:
                first = min(failures, key=lambda f: f.order, default=None)
                # who only saw a peer leave says nothing about those that still run
                if not interrupted and running and (first is None or first.order[0] == 2):
                    waited = f"rank {first.rank} waited for it until its timeout" if first else ""
                    failures += _hung(running, folder, waited or f"no end after {timeout:g} s")
                break
    finally:
        _signal_all(running, signal.SIGKILL)
        for process, conn in ranks:
            process.join()
            conn.close()
    if interrupted and len(values) < len(ranks):
        raise KeyboardInterrupt
    return values, failures


def _wait_for_one(
    running: dict[int, tuple[Any, Any]], folder: Path, values: dict[int, Any], failures: list[_Failure]
) -> None:
    ready = connection.wait([c for _, c in running.values()], timeout=0.1)
    for rank in [r for r, (_, c) in running.items() if c in ready]:
        process, conn = running.pop(rank)
        try:
            kind, value = cloudpickle.loads(conn.recv_bytes())
        except EOFError:  # the pipe closed without a word
            process.join()
            text = f"it ended without a result, {_exit_text(process.exitcode)}{_last_words(folder / f'{rank}.err')}"
            failures.append(_Failure(rank, time.monotonic(), text, silent=True))
            continue
        if kind == "value":
            values[rank] = value
        else:
            failures.append(value)


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def _last_words(errors: Path, lines: int = 40) -> str:
    """The end of what a rank wrote to stderr: an abort in C++ tells its reason nowhere else."""
    words = errors.read_text(errors="replace").rstrip().splitlines() if errors.exists() else []
    return ". The end of its stderr:\n" + "\n".join(words[-lines:]) if words else ""


def _hung(running: dict[int, tuple[Any, Any]], folder: Path, why: str) -> list[_Failure]:
    """What each rank that did not end was doing, from its own stack."""
    _signal_all(running, signal.SIGUSR1)
    time.sleep(0.5)
    found = []
    for rank in running:
        stack = (folder / f"{rank}.stack").read_text(errors="replace")
        stack = stack.partition(f'  File "{__file__}"')[0].strip()  # how the rank was started is no news
        found.append(f"rank {rank} was at:\n{stack or '(no stack: it had not started)'}")
    text = f"{why}. Still running: {len(found)} rank(s).\n" + "\n".join(found)
    return [_Failure(min(running), time.monotonic(), text, silent=True)]


def _signal_all(running: dict[int, tuple[Any, Any]], number: signal.Signals) -> None:
    for process, _ in running.values():
        with contextlib.suppress(ProcessLookupError, TypeError):  # it ended in the meantime
            os.kill(process.pid, number)


def _replay(folder: Path, outputs: range, errors: range) -> None:
    for name, ranks, stream in (("out", outputs, sys.stdout), ("err", errors, sys.stderr)):
        for rank in ranks:
            for line in (folder / f"{rank}.{name}").read_text(errors="replace").splitlines():
                print(f"[rank {rank}] {line}", file=stream)


# --- inside a rank ----------------------------------------------------------------------------------------


def _rank_main(
    payload: bytes, rank: int, size: int, device: str, folder: str, live: Any, env: dict[str, str], conn: Any
) -> None:
    global _in_rank
    _in_rank = True
    for name in set(os.environ) - set(env):
        del os.environ[name]
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means, and says SIGTERM
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{folder}/{rank}.{name}", "wb", buffering=0) as file:
            os.dup2(live[number - 1].detach() if live else file.fileno(), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (lives as long as the rank)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr)  # a crash in C++ shows where Python was
    stack = open(f"{folder}/{rank}.stack", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    torch.set_num_threads(1)
    # else TORCH_DISTRIBUTED_DEBUG would count as it was when the fork server started
    dist.set_debug_level_from_env()  # type: ignore[attr-defined]
    try:
        fn, args = cloudpickle.loads(payload)
        store = FileStore(f"{folder}/store", size)
        with _process_group(rank, size, rank, device, store):
            value = fn(*args)
        message = ("value", value)
    except BaseException as error:
        failure = _Failure(rank, time.monotonic(), traceback.format_exc().rstrip())
        if isinstance(error, UserError):
            failure.user_error = error
        message = ("failure", failure)
    try:
        data = cloudpickle.dumps(message)
    except Exception as error:
        if isinstance(message[1], _Failure):  # a UserError with something odd inside: its words can travel
            failure = replace(message[1], user_error=UserError(str(message[1].user_error)))
        else:
            text = f"its value of type {type(message[1]).__name__} cannot be pickled: {error}"
            failure = _Failure(rank, time.monotonic(), text)
        message = ("failure", failure)
        data = cloudpickle.dumps(message)
    with contextlib.suppress(BrokenPipeError):  # the launcher is gone
        conn.send_bytes(data)
    sys.stdout.flush()
    sys.stderr.flush()
    if message[0] == "failure":
        os._exit(1)  # a failed rank must not wait for peers in a destructor


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _process_group(rank: int, size: int, local_rank: int, device: str, store: Store | None) -> Any:
    """`torch.distributed` for the length of a `with` block, with a barrier before it is taken down."""
    options: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(minutes=10)}
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        options |= {"backend": "nccl", "device_id": torch.device("cuda", local_rank)}
        # a group's messages go one after the other, says torch at the first one: `Mesh.build` counts on it
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    if store is not None:
        options["store"] = store
        if device == "cpu":  # all ranks are on this machine: stay on the loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(rank=rank, world_size=size, **options)
    yield
    if size > 1:  # a rank that leaves early would reset its peers' connections
        dist.barrier(device_ids=[local_rank] if device == "cuda" else None)
    GROUPS.clear()  # what still knew a group kept its threads, and one that frees a tensor while Python ends aborts
    dist.destroy_process_group()


def _join_torchrun(fn: Callable[..., Any], args: tuple[Any, ...], world_size: int, device: str) -> Any:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != world_size:
        raise UserError(f"torchrun started {size} ranks and the layout needs {world_size}; make them equal")
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        with _process_group(rank, size, int(os.environ["LOCAL_RANK"]), device, None):
            return fn(*args)
    except UserError:
        raise
    except Exception as error:
        raise RankError(rank, f"rank {rank} of {size} failed:\n{traceback.format_exc().rstrip()}") from error


def raise_on_sigterm() -> list[int]:
    """Let SIGTERM interrupt this process as Ctrl-C does, so that a launcher stops its ranks in good order.

    Returns:
        A list to which each SIGTERM that arrives adds its number.
    """
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handler)
    return caught
