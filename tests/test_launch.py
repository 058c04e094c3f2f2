"""Real processes: what comes back, what is printed, what is said when they fail, and that none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from picotron_mini import launch as launch_module
from picotron_mini.config import ConfigError, UserError
from picotron_mini.launch import RankError, launch

SECONDS = 60  # that something which must happen gets, on a machine busy with other things


# --- what comes back --------------------------------------------------------------------------------------


def rank_and_sum(word: str) -> tuple[str, int, float]:
    rank = dist.get_rank()
    time.sleep(0.1 * (dist.get_world_size() - rank))  # the last rank is done first
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    return word, rank, x.item()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_in_rank_order(ranks, size: int) -> None:
    total = size * (size - 1) / 2
    assert ranks(rank_and_sum, "hello", world_size=size) == [("hello", rank, total) for rank in range(size)]
    assert not multiprocessing.active_children()


CELL = """
import torch
import torch.distributed as dist

scale = 10

def helper(x):
    return scale * x

def cell():
    x = torch.tensor(helper(dist.get_rank()))
    dist.all_reduce(x)
    return x.item()

answer = launch(cell, world_size=2)
"""


def test_functions_of_a_notebook_cell_with_what_they_use() -> None:
    cell: dict[str, Any] = {"__name__": "__main__", "launch": launch}
    exec(CELL, cell)
    assert cell["answer"] == [10, 10]
    here = 5
    assert launch(lambda: here + dist.get_rank(), world_size=2) == [5, 6]


def surroundings() -> dict[str, Any]:
    return {
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "set": os.environ.get("PICOTRON_TEST_SET"),
        "deleted": os.environ.get("PICOTRON_TEST_DELETED"),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "main": vars(sys.modules["__main__"]).get("__file__"),
        "pid": os.getpid(),
    }


def test_ranks_see_the_environment_as_it_is_now(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(surroundings, world_size=1)  # the fork server has started, and knows the environment of before
    monkeypatch.setenv("PICOTRON_TEST_SET", "now")
    (first, second) = ranks(surroundings, world_size=2)
    assert first["set"] == second["set"] == "now"
    monkeypatch.delenv("PICOTRON_TEST_SET")
    assert ranks(surroundings, world_size=1)[0]["set"] is None
    assert first["backend"] == "gloo"
    assert first["threads"] == 1
    assert first["interface"] in ("lo", "lo0")  # nothing listens beyond this machine
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


def sums_different_types() -> int:
    x = torch.ones(1, dtype=torch.int32 if dist.get_rank() == 0 else torch.float32)
    dist.all_reduce(x)
    return int(x[0])


def test_the_debug_level_is_that_of_now(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = ranks(sums_different_types, world_size=2)
    assert first == 1 + 0x3F800000  # the bits of 1.0 as a whole number: gloo compares nothing
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    with pytest.raises(RankError, match="Detected mismatch between collectives"):
        ranks(sums_different_types, world_size=2)


# --- what is printed --------------------------------------------------------------------------------------


def talk() -> None:
    rank = dist.get_rank()
    time.sleep(0.1 * (2 - rank))
    print("first")
    os.system("echo from a child")  # not through Python's sys.stdout
    print(f"second\nthird of {rank}", flush=True)
    print("oops", file=sys.stderr)


def test_output_is_replayed_in_rank_order(capfd: pytest.CaptureFixture[str]) -> None:
    launch(talk, world_size=2)
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        f"[rank {rank}] {line}" for rank in (0, 1) for line in ("first", "from a child", "second", f"third of {rank}")
    ]
    assert [line for line in err.splitlines() if "oops" in line] == ["[rank 0] oops", "[rank 1] oops"]


def test_live_output_is_that_of_rank_0_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    launch(talk, world_size=2, output="live")
    out, err = capfd.readouterr()
    assert out.splitlines() == ["first", "from a child", "second", "third of 0"]
    assert "oops" in err.splitlines()
    assert "[rank" not in out + err


def test_output_can_be_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    launch(talk, world_size=2, output="hide")
    assert "first" not in capfd.readouterr().out


def talk_and_fail() -> None:
    print("here", dist.get_rank())
    dist.barrier()  # else rank 1 may be gone before rank 0 has found it, and rank 0 says nothing
    if dist.get_rank() == 1:
        raise ValueError("no")


def test_what_ranks_said_before_a_failure_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError):
        launch(talk_and_fail, world_size=2)
    assert capfd.readouterr().out.splitlines() == ["[rank 0] here 0", "[rank 1] here 1"]
    with pytest.raises(RankError):
        launch(talk_and_fail, world_size=2, output="live")
    assert sorted(capfd.readouterr().out.splitlines()) == ["[rank 1] here 1", "here 0"]


# --- failures ---------------------------------------------------------------------------------------------


def one_fails(which: int, how: str) -> None:
    """Rank `which` fails while the others wait for it in a collective, and then see a closed connection."""
    if dist.get_rank() == which:
        time.sleep(0.2)
        if how == "raises":
            divide_by(0)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(7)
        if how == "abort":
            os.write(2, b"malloc(): corrupted top size\n")  # as the C library does, behind Python's back
            os.abort()
        if how == "sys.exit":
            sys.exit("enough")
    dist.all_reduce(torch.ones(1))


def divide_by(number: int) -> float:
    return 1 / number


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", ["ZeroDivisionError: division by zero", "in divide_by"]),
        ("SIGKILL", ["it ended without a result, killed by SIGKILL"]),
        ("exits", ["it ended without a result, exit status 7"]),
        ("abort", ["killed by SIGABRT. The end of its stderr:\nmalloc(): corrupted top size", "in one_fails"]),
        ("sys.exit", ["SystemExit: enough"]),
    ],
)
def test_the_first_failing_rank_is_reported(ranks, which: int, how: str, said: list[str]) -> None:
    with pytest.raises(RankError) as error:
        ranks(one_fails, which, how, world_size=3)
    assert error.value.rank == which
    assert str(error.value).startswith(f"rank {which} of 3 failed:\n")
    for part in said:
        assert part in str(error.value)
    assert not multiprocessing.active_children()


def fails_only_as_a_consequence() -> None:
    """Rank 1 leaves at once and its error arrives last; rank 0 complains at once about the closed connection."""
    if dist.get_rank() == 1:
        try:
            raise ValueError("the cause")
        finally:
            dist.destroy_process_group()
            time.sleep(0.5)
    dist.all_reduce(torch.ones(1))


def test_a_cause_that_is_told_late_is_still_the_cause(ranks) -> None:
    with pytest.raises(RankError, match="the cause") as error:
        ranks(fails_only_as_a_consequence, world_size=2)
    assert error.value.rank == 1


def first_collective_never_matched() -> None:
    if dist.get_rank() == 0:
        waits_for_rank_1()
    else:
        spins()


def waits_for_rank_1() -> None:
    dist.recv(torch.empty(1), src=1)


def spins() -> None:
    while True:
        pass


def test_a_hang_ends_at_the_deadline_and_shows_each_stack(ranks) -> None:
    with pytest.raises(RankError) as error:
        ranks(first_collective_never_matched, world_size=2, timeout=3)
    text = str(error.value)
    assert "no end after 3 s. Still running: 2 rank(s)." in text
    first, second = text.split("rank 1 was at:")
    assert "in waits_for_rank_1" in first
    assert "in spins" in second
    assert "multiprocessing" not in text  # how a rank is started is no news
    assert not multiprocessing.active_children()


def one_is_waited_for_in_vain() -> None:
    if dist.get_rank() == 0:
        work = dist.irecv(torch.empty(1), src=1)
        assert work is not None
        work.wait(timedelta(seconds=1))  # as any message does after the process group's ten minutes
    spins()


def test_a_rank_that_hangs_is_the_cause_and_not_the_one_that_waited_for_it(ranks) -> None:
    with pytest.raises(RankError) as error:
        ranks(one_is_waited_for_in_vain, world_size=2, timeout=None)
    assert error.value.rank == 1
    text = str(error.value)
    assert "rank 0 waited for it until its timeout. Still running: 1 rank(s)." in text and "in spins" in text


def one_message_too_few() -> None:
    if dist.get_rank() == 0:
        work = dist.irecv(torch.empty(1), src=1)
        assert work is not None
        work.wait(timedelta(seconds=1))
    elif dist.get_rank() == 2:
        dist.recv(torch.empty(1), src=0)


def test_whoever_waited_in_vain_comes_before_whoever_saw_it_leave(ranks) -> None:
    with pytest.raises(RankError, match="Timed out waiting") as error:
        ranks(one_message_too_few, world_size=3, timeout=30)
    assert error.value.rank == 0


def one_sees_a_peer_leave_while_another_runs() -> None:
    if dist.get_rank() == 0:
        raise RuntimeError("[a.cc:1] Connection closed by peer [127.0.0.1]:1")
    spins()


def test_a_rank_that_still_runs_is_not_blamed_because_another_saw_a_peer_leave(ranks) -> None:
    with pytest.raises(RankError, match="Connection closed by peer") as error:
        ranks(one_sees_a_peer_leave_while_another_runs, world_size=2, timeout=30)
    assert error.value.rank == 0


def test_an_error_of_ones_own_that_speaks_of_time_is_still_the_cause(ranks) -> None:
    with pytest.raises(RankError, match="the download timed out") as error:
        ranks(download_fails, world_size=2)
    assert error.value.rank == 1


def download_fails() -> None:
    if dist.get_rank() == 1:
        raise TimeoutError("the download timed out")
    dist.barrier()


def one_is_slow_to_start() -> None:
    if dist.get_rank() == 0:
        time.sleep(3600)


def test_only_ranks_that_still_run_are_shown(ranks) -> None:
    with pytest.raises(RankError) as error:
        ranks(one_is_slow_to_start, world_size=2, timeout=3)
    assert error.value.rank == 0
    assert "one_is_slow_to_start" in str(error.value)


def user_mistake() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("tp=3 does not divide 4")
    dist.all_reduce(torch.ones(1))


def test_a_mistake_of_the_user_is_handed_through(ranks) -> None:
    with pytest.raises(ConfigError, match=r"^tp=3 does not divide 4$"):
        ranks(user_mistake, world_size=2)


def returns_what_cannot_travel() -> Any:
    return threading.Lock() if dist.get_rank() == 1 else 0


def test_a_file_that_starts_ranks_on_import_starts_no_more_in_them(tmp_path: Path) -> None:
    """A rank imports it for the function's sake. Each generation would start another, until memory is full."""
    (tmp_path / "eager.py").write_text(
        "from picotron_mini.launch import launch\ndef fn():\n    return 1\nlaunch(fn, world_size=2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import eager"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "launch was called inside a rank" in done.stderr


def test_a_value_that_cannot_be_pickled(ranks) -> None:
    with pytest.raises(RankError, match="its value of type lock cannot be pickled") as error:
        ranks(returns_what_cannot_travel, world_size=2)
    assert error.value.rank == 1


def raises_what_cannot_travel() -> None:
    class Odd(Exception):
        def __init__(self) -> None:
            super().__init__("odd")
            self.lock = threading.Lock()

    raise Odd


def test_an_exception_that_cannot_be_pickled(ranks) -> None:
    with pytest.raises(RankError, match="Odd: odd"):
        ranks(raises_what_cannot_travel, world_size=1)


def raises_a_mistake_that_cannot_travel() -> None:
    error = ConfigError("a mistake")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def test_a_mistake_that_cannot_be_pickled_is_still_told(ranks) -> None:
    with pytest.raises(UserError, match=r"^a mistake$"):
        ranks(raises_a_mistake_that_cannot_travel, world_size=1)


# --- nothing is left behind -------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie runs nothing
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def wait_until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, f"waited {SECONDS} s in vain: {what}"
        time.sleep(0.02)


def pids_in(folder: Path, number: int) -> list[int]:
    def ready() -> bool:
        files = list(folder.glob("*.pid"))
        return len(files) == number and all(f.read_text().endswith(".") for f in files)

    wait_until(ready, f"{number} ranks have started")
    return [int(f.read_text()[:-1]) for f in sorted(folder.glob("*.pid"))]


def sleep_for_ever(folder: Path, at_sigterm: str = "die") -> str:
    def stop(*_: Any) -> None:
        raise InterruptedError

    signal.signal(signal.SIGTERM, {"die": signal.SIG_DFL, "ignore": signal.SIG_IGN, "return": stop}[at_sigterm])
    (folder / f"{dist.get_rank()}.pid").write_text(f"{os.getpid()}.")
    try:
        while True:
            time.sleep(0.1)
    except InterruptedError:
        return f"rank {dist.get_rank()} saved itself"


@contextmanager
def signal_when_ready(folder: Path, *numbers: signal.Signals) -> Iterator[None]:
    """Send signals to this process as soon as two ranks have written their pids, as a user's Ctrl-C would."""

    def send() -> None:
        pids_in(folder, 2)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_ctrl_c_stops_the_ranks(ranks, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), signal_when_ready(tmp_path, signal.SIGINT):
        ranks(sleep_for_ever, tmp_path, world_size=2, timeout=None)
    assert not any(alive(pid) for pid in pids_in(tmp_path, 2))


def test_sigterm_can_mean_the_same(ranks, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    launch_module.raise_on_sigterm()
    try:
        with pytest.raises(KeyboardInterrupt), signal_when_ready(tmp_path, signal.SIGTERM):
            ranks(sleep_for_ever, tmp_path, world_size=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not any(alive(pid) for pid in pids_in(tmp_path, 2))


def test_ranks_may_save_themselves(ranks, tmp_path: Path) -> None:
    with signal_when_ready(tmp_path, signal.SIGINT):
        values = ranks(sleep_for_ever, tmp_path, "return", world_size=2)
    assert values == ["rank 0 saved itself", "rank 1 saved itself"]
    assert not any(alive(pid) for pid in pids_in(tmp_path, 2))


def test_ranks_that_do_not_listen_are_killed(ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "GRACE", 1.0)
    with pytest.raises(KeyboardInterrupt), signal_when_ready(tmp_path, signal.SIGINT):
        ranks(sleep_for_ever, tmp_path, "ignore", world_size=2)
    assert not any(alive(pid) for pid in pids_in(tmp_path, 2))


def test_a_second_ctrl_c_does_not_wait(ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "GRACE", 3600.0)
    with pytest.raises(KeyboardInterrupt), signal_when_ready(tmp_path, signal.SIGINT, signal.SIGINT):
        ranks(sleep_for_ever, tmp_path, "ignore", world_size=2)
    assert not any(alive(pid) for pid in pids_in(tmp_path, 2))


def test_ctrl_c_while_ranks_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    context = launch_module._context
    pipes = iter([context.Pipe(), context.Pipe()])

    def pipe() -> Any:
        try:
            return next(pipes)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(context, "Pipe", pipe)
    with pytest.raises(KeyboardInterrupt):
        launch(rank_and_sum, "never", world_size=3)
    assert not multiprocessing.active_children()


# A script without `if __name__ == "__main__"`: ranks must not run it again.
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from picotron_mini.launch import launch

with open("started", "a") as file:
    file.write("once ")

def work(folder, seconds):
    Path(folder, f"{dist.get_rank()}.pid").write_text(f"{os.getpid()}.")
    time.sleep(seconds)
    x = torch.ones(1)
    dist.all_reduce(x)
    return x.item()

print(launch(work, ".", float(sys.argv[1]), world_size=2))
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr
    assert (tmp_path / "started").read_text() == "once "


@pytest.mark.slow
def test_ranks_leave_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen([sys.executable, "script.py", "3600"], cwd=tmp_path) as parent:
        pids = pids_in(tmp_path, 2)
        assert all(alive(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), "the ranks leave")


# --- under torchrun ---------------------------------------------------------------------------------------

JOINED = """
import os, sys, torch, torch.distributed as dist
from picotron_mini.config import MeshShape, UserError
from picotron_mini.launch import launch
from picotron_mini.mesh import Mesh

def work():
    import torch._dynamo  # as the first optimizer does
    mesh = Mesh.build(MeshShape(tp=2))
    x = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(x, group=mesh["tp"].group)
    return dist.get_rank(), x.item()

try:
    print(f"joined {launch(work, world_size=2)}\\n", end="", flush=True)  # one write: two ranks share the pipe
except UserError as error:
    print(f"refused {error}\\n", end="", flush=True)
assert not dist.is_initialized()
# a thread of gloo that frees a tensor while Python ends aborts the process
tasks = os.listdir("/proc/self/task") if sys.platform == "linux" else []
left = [name for name in (open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks) if "gloo" in name]
assert not left, left
"""


def torchrun(folder: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "joined.py").write_text(JOINED)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "joined.py"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    return subprocess.Popen(
        command, cwd=folder, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_host(ranks: int) -> list[str]:
    return ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", free_port()]


def lines(text: str) -> list[str]:
    return sorted(re.sub(r"^\[default\d\]:", "", line) for line in text.splitlines())


@pytest.mark.slow
def test_joins_the_ranks_of_torchrun(tmp_path: Path) -> None:
    with torchrun(tmp_path, *one_host(2)) as agent:
        out, err = agent.communicate(timeout=2 * SECONDS)
    assert lines(out) == ["joined [(0, 3.0)]", "joined [(1, 3.0)]"], err
    assert agent.returncode == 0


@pytest.mark.slow
def test_torchrun_with_another_number_of_ranks(tmp_path: Path) -> None:
    with torchrun(tmp_path, *one_host(3)) as agent:
        out, err = agent.communicate(timeout=2 * SECONDS)
    said = "refused torchrun started 3 ranks and the layout needs 2; make them equal"
    assert lines(out) == [said] * 3, err


@pytest.mark.slow
def test_two_agents_as_two_hosts(tmp_path: Path) -> None:
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    with (
        torchrun(tmp_path, *meet, "--node-rank", "0") as first,
        torchrun(tmp_path, *meet, "--node-rank", "1") as second,
    ):
        outputs = [agent.communicate(timeout=2 * SECONDS) for agent in (first, second)]
    assert [lines(out) for out, _ in outputs] == [["joined [(0, 3.0)]"], ["joined [(1, 3.0)]"]], outputs
