"""Child processes: they start, tell why they died, end when asked and when not, and never outlive us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from equipment.waiting import until
from lrm.processes import ChildProcess, ProcessError, free_port


def _python(code: str, log: Path, **options: object) -> ChildProcess:
    return ChildProcess.start([sys.executable, "-c", code], name="child", log_path=log, **options)


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody has reaped yet, does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _said(path: Path, text: str) -> None:
    await until(lambda: path.exists() and text in path.read_text(), f"{path.name} says {text!r}")


async def test_the_pid_is_the_programs_own_and_its_exit_code_is_told(tmp_path: Path) -> None:
    child = _python("import os; print(os.getpid(), flush=True); os._exit(7)", tmp_path / "log")
    assert await child.wait() == 7
    assert child.log_tail() == [str(child.pid)]
    assert child.exit_code == 7


async def test_several_can_wait_for_one_child_and_a_cancelled_wait_leaves_it_running(tmp_path: Path) -> None:
    child = _python("import sys; sys.stdin.read(); import time; time.sleep(60)", tmp_path / "log")
    waits = [asyncio.create_task(child.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    assert isinstance((await asyncio.gather(waits[0], return_exceptions=True))[0], asyncio.CancelledError)
    assert child.exit_code is None
    child.signal(signal.SIGINT)
    child.kill()
    assert len(set(await asyncio.gather(*waits[1:]))) == 1


async def test_an_early_death_is_told_with_its_last_lines(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    child = _python("import sys; sys.exit('the disk is on fire')", tmp_path / "log")
    with pytest.raises(ProcessError, match=r"child exited with code 1 before it was ready\n  \| the disk is on fire"):
        await child.wait_ready(never, timeout=10)


async def test_one_that_never_becomes_ready_is_told_after_the_timeout(tmp_path: Path) -> None:
    async def refused() -> bool:
        raise ConnectionRefusedError

    child = _python("import time; time.sleep(60)", tmp_path / "log")
    with pytest.raises(ProcessError, match=r"not ready within 0\.3 s and wrote nothing"):
        await child.wait_ready(refused, timeout=0.3)
    assert child.kill() == -signal.SIGKILL


async def test_a_program_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="no-such-program is not an executable file"):
        ChildProcess.start(["no-such-program"], name="child", log_path=tmp_path / "log")


async def test_a_file_that_cannot_be_executed_is_told_by_its_log(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELFnonsense")
    program.chmod(0o755)
    child = ChildProcess.start([program], name="child", log_path=tmp_path / "log")
    assert await child.wait() == 1
    assert "Exec format error" in child.log_tail()[-1]


async def test_stop_lets_it_end_by_itself(tmp_path: Path) -> None:
    code = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("ready", flush=True)
while True: signal.pause()
"""
    child = _python(code, tmp_path / "log")
    await _said(tmp_path / "log", "ready")
    assert await child.stop() == 3


@pytest.mark.parametrize("paused", [False, True])
async def test_stop_kills_what_ignores_it_even_when_paused(tmp_path: Path, *, paused: bool) -> None:
    code = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True: signal.pause()
"""
    child = _python(code, tmp_path / "log")
    await _said(tmp_path / "log", "ready")
    if paused:
        child.pause()
    assert await child.stop(grace=0.2) == -signal.SIGKILL


async def test_a_cancelled_stop_still_ends_and_reaps_it(tmp_path: Path) -> None:
    child = _python(
        "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); signal.pause()", tmp_path / "log"
    )
    await _said(tmp_path / "log", "ready")
    stopping = asyncio.create_task(child.stop(grace=60))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not Path(f"/proc/{child.pid}").exists()


async def test_what_the_child_has_started_is_stopped_with_it(tmp_path: Path) -> None:
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pid", child.pid, flush=True)
child.wait()
"""
    child = _python(code, tmp_path / "log")
    await _said(tmp_path / "log", "pid")
    grandchild = int(child.log_tail()[0].split()[1])
    await child.stop()
    await until(lambda: not _alive(grandchild), "the grandchild has ended")


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel binds a child's life to its parent's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_children_die_with_their_parent_even_on_kill_9(tmp_path: Path, number: signal.Signals) -> None:
    """A process of its own starts a child and is killed; the child must be gone without anybody telling it."""
    code = f"""
import pathlib, sys, time
from lrm.processes import ChildProcess
child = ChildProcess.start([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"],
                           name="child", log_path=pathlib.Path({str(tmp_path / "log")!r}))
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        await _said(tmp_path / "log", "up")
        assert _alive(pid)
        parent.send_signal(number)
    await until(lambda: not _alive(pid), "the orphan has ended")


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel binds a child's life to its parent's")
async def test_a_parent_that_dies_before_the_launcher_has_run_leaves_nothing(tmp_path: Path) -> None:
    """The launcher asks who its parent is after it has bound its life to it: there is no gap in between."""
    code = f"""
import os, pathlib, sys
from lrm.processes import ChildProcess
child = ChildProcess.start([sys.executable, "-c", "import time; time.sleep(60)"],
                           name="child", log_path=pathlib.Path({str(tmp_path / "log")!r}))
os.write(1, str(child.pid).encode())
os.kill(os.getpid(), 9)
"""
    for _ in range(5):
        done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, check=False)
        pid = int(done.stdout)
        await until(lambda pid=pid: not _alive(pid), "the orphan has ended")


async def test_all_of_it_works_on_uvloop_too(tmp_path: Path) -> None:
    """The daemon's loop is another one than the tests': start, wait, an early death, stop."""
    code = f"""
import pathlib, sys, uvloop
from lrm.processes import ChildProcess, ProcessError
log = pathlib.Path({str(tmp_path / "log")!r})
async def never():
    return False
async def main():
    start = lambda code: ChildProcess.start([sys.executable, "-c", code], name="child", log_path=log)
    print(await start("import os; os._exit(7)").wait())
    try:
        await start("import sys; sys.exit('gone')").wait_ready(never, 10)
    except ProcessError as error:
        print("gone" in str(error))
    print(await start("import time; time.sleep(60)").stop(grace=5))
uvloop.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split() == ["7", "True", "-15"], done.stderr


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    assert all(1024 < port < 32_768 for port in ports), "outside the range from which outgoing connections take theirs"


async def test_children_do_not_inherit_our_open_files(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as held:
        code = "import os; print(sorted(os.listdir('/proc/self/fd')), flush=True)"
        child = _python(code, tmp_path / "log")
        await child.wait()
        assert f"'{held.fileno()}'" not in child.log_tail()[0] or held.fileno() <= 3
    assert os.get_inheritable(0)
