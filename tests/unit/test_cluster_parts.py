"""The small parts around the launcher: cores, plan, console, model folders, notes, processes."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from pdserve.cluster import runfile
from pdserve.cluster.console import Console
from pdserve.cluster.cores import SPINS, Share, divide, own_cores
from pdserve.cluster.model_files import ModelError, check_model, read_json, resolve_model
from pdserve.cluster.plan import ClusterPlan, plan_cluster, roles_of
from pdserve.cluster.process import Command, Exit, start, stop
from pdserve.cluster.redis_server import find_redis_server, private_redis
from pdserve.cluster.router_settings import RouterSettings
from pdserve.cluster.runfile import RunNote, own_age_s, start_ticks, write_note
from pdserve.cluster.settings import UpSettings, WorkerSettings
from pdserve.cluster.supervisor import Backoff
from pdserve.protocol.errors import PdserveError

# cores


@pytest.mark.parametrize(
    ("cores", "workers", "quota", "shares"),
    [
        ([0, 1], 2, None, [Share((0,), 1), Share((1,), 1)]),
        ([0, 1], 1, None, [Share((0, 1), 2)]),
        ([4, 5, 6, 7, 8], 2, None, [Share((4, 5, 6), 3), Share((7, 8), 2)]),
        ([0, 1], 3, None, [Share((), 1)] * 3),
        (range(64), 2, 8, [Share((), 4), Share((), 4)]),
        (range(2), 2, 64, [Share((0,), 1), Share((1,), 1)]),
        (range(64), 2, 1, [Share((), 1), Share((), 1)]),
    ],
)
def test_cores_are_divided(
    cores: list[int], workers: int, quota: int | None, shares: list[Share]
) -> None:
    assert divide(cores, workers, quota) == shares


def test_nothing_is_oversubscribed_nor_given_twice() -> None:
    for count in range(1, 20):
        for workers in range(1, count + 1):
            shares = divide(range(count), workers)
            given = [cpu for share in shares for cpu in share.cpus]
            assert sorted(given) == list(range(count))
            assert all(share.threads == len(share.cpus) >= 1 for share in shares)


def test_own_cores_are_those_of_this_process() -> None:
    assert set(own_cores()) == os.sched_getaffinity(0)


def test_backoff_grows_to_a_limit() -> None:
    backoff = Backoff(first_s=0.1, last_s=5.0)
    delays = [backoff.delay_s(deaths) for deaths in (1, 2, 3, 7, 1000)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 5.0, 5.0])


# plan


def planned(settings: UpSettings, environment: dict[str, str] | None = None) -> ClusterPlan:
    return plan_cluster(
        settings,
        divide(range(4), len(roles_of(settings))),
        redis="unix://:pw@/r.sock",
        secret="the secret",
        port=1234,
        logs=Path("/logs"),
        environment=environment or {},
    )


def test_a_plan_names_workers_by_role_and_pins_them() -> None:
    plan = planned(UpSettings(prefill=2, decode=1, colocated=1))
    assert [command.name for command in plan.workers] == [
        "prefill-0", "prefill-1", "decode-0", "colocated-0",
    ]  # fmt: skip
    first, *_, last = plan.workers
    assert list(first.argv)[:4] == [sys.executable, "-P", "-m", "pdserve.prefill_worker"]
    assert {"--worker-id=prefill-0", "--threads=1", "--cpus=0"} <= set(first.argv)
    assert list(last.argv)[3:5] == ["pdserve.decode_worker", "--accept-prompts"]
    assert first.env["OMP_NUM_THREADS"] == "1"
    assert first.env["GOMP_SPINCOUNT"] == str(SPINS)
    assert "--port=1234" in plan.routers[0].argv
    assert first.log == Path("/logs/prefill-0.log")


def test_several_routers_share_the_port() -> None:
    [alone] = planned(UpSettings()).routers
    assert alone.name == "router" and "--share-port=True" not in alone.argv
    both = planned(UpSettings(routers=2)).routers
    assert [router.name for router in both] == ["router-0", "router-1"]
    for router in both:
        assert "--port=1234" in router.argv and "--share-port=True" in router.argv


def test_secrets_travel_in_the_environment_alone() -> None:
    settings = UpSettings(router=RouterSettings(api_key=("key-1", "key-2")))
    plan = planned(settings, {"PATH": "/bin", "PDSERVE_PORT": "9", "PDSERVE_CONFIG": "c.yaml"})
    for command in (*plan.workers, *plan.routers):
        assert command.env["PDSERVE_SECRET"] == "the secret"
        assert command.env["PDSERVE_REDIS"] == "unix://:pw@/r.sock"
        assert command.env["PATH"] == "/bin"
        assert not {"PDSERVE_PORT", "PDSERVE_CONFIG"} & set(command.env), "resolved already"
        for hidden in ("the secret", "pw@", "key-1"):
            assert hidden not in " ".join(command.argv)
            assert hidden not in repr(command)
    assert plan.routers[0].env["PDSERVE_API_KEY"] == "key-1,key-2"


def test_worker_ids_are_unique_in_a_redis_of_the_users() -> None:
    settings = UpSettings(redis="redis://elsewhere", worker=WorkerSettings())
    names = [command.name for command in planned(settings).workers]
    assert all(str(os.getpid()) in name for name in names)


# console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_a_few_lines() -> None:
    out = io.StringIO()
    console = Console(out)
    for percent in range(101):
        console.show("w", "loading", percent / 100)
    console.show("w", "ready")
    console.show("w", "ready")
    lines = out.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["0%", "25%", "50%", "75%", "100%", "ready"]


def test_on_a_terminal_live_lines_stay_below_what_is_said() -> None:
    out = Terminal()
    console = Console(out)
    console.show("a", "loading", 0.5)
    console.show("b", "ready")
    console.say("a sentence")
    drawn = out.getvalue().rpartition("\x1b[2A\x1b[J")[2]
    assert drawn.splitlines() == ["a sentence", "  a  loading 50%", "  b  ready"]
    console.settle()
    console.say("ready http://x")
    assert out.getvalue().endswith("a: loading 50%\nb: ready\nready http://x\n")


def test_a_reader_that_is_gone_does_not_matter() -> None:
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    console = Console(Broken())
    console.say("x")
    console.show("a", "loading")
    console.settle()


# model folders


def test_the_demo_model_is_the_default() -> None:
    folder = resolve_model("")
    assert folder.parts[-2:] == ("demo", "model")
    check_model(folder, weights=True)


def test_bad_model_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path / "no"))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(config))
    with pytest.raises(ModelError, match="is not valid JSON"):
        check_model(resolve_model(str(tmp_path)), weights=False)
    config.write_text("{}")
    with pytest.raises(ModelError, match="does not name an architecture"):
        check_model(tmp_path, weights=False)
    config.write_text('{"architectures": ["X"]}')
    check_model(tmp_path, weights=False)
    with pytest.raises(ModelError, match="--load-format dummy"):
        check_model(tmp_path, weights=True)
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")


# notes of running clusters


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "pdserve"


def note(pid: int, started: int, folder: Path) -> RunNote:
    return RunNote(
        pid=pid,
        started=started,
        url="u",
        redis="r",
        cluster="c",
        log_dir="l",
        folder=str(folder),
        secret="s",
    )


def test_notes_of_the_dead_are_cleaned_up(notes: Path, tmp_path: Path) -> None:
    left = tmp_path / "left-behind"
    left.mkdir()
    mine = note(os.getpid(), start_ticks(os.getpid()) or 0, tmp_path / "mine")
    path = write_note(mine)
    assert path.stat().st_mode & 0o777 == 0o600
    assert notes.stat().st_mode & 0o777 == 0o700
    reused = mine.started + 1  # the pid lives, but belongs to another process
    write_note(note(1, reused, left))
    assert runfile.running() == [mine]
    assert not left.exists()
    assert [path.name for path in notes.iterdir()] == [f"{os.getpid()}.json"]


def test_a_folder_that_others_can_read_is_refused(notes: Path) -> None:
    notes.mkdir(mode=0o755)
    notes.chmod(0o755)
    with pytest.raises(PdserveError, match="mode 700"):
        runfile.running()


def test_the_age_of_a_process_counts_from_its_start() -> None:
    assert 0 < own_age_s() < 24 * 3600
    assert start_ticks(2**22 + 1) is None


# processes


def test_how_a_process_ended_is_said_in_words() -> None:
    lines = ("Traceback", "w: error: The port is taken.", "See help.")
    assert Exit(2, 0.1, lines).sentence == "w: error: The port is taken."
    assert Exit(1, 0.1, ("a", "b")).sentence == "b"
    assert Exit(1, 0.1, ()).sentence == "it wrote nothing"
    assert str(Exit(3, 0.1, ())) == "exit status 3"
    assert str(Exit(-signal.SIGSEGV, 0.1, ())) == "killed by SIGSEGV"


def test_a_child_reports_its_own_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("of an earlier one\n")
    code = "import sys; print('out'); print(sys.stdin.read(), file=sys.stderr); sys.exit(5)"
    command = Command(
        name="x",
        argv=[sys.executable, "-P", "-u", "-c", code],
        env=os.environ,
        log=log,
        stdin=b"given",
    )

    async def main() -> Exit:
        child = start(command)
        end = await child.wait()
        child.signal(signal.SIGTERM)  # ended already: nothing happens
        await stop([child], 1.0)
        return end

    end = asyncio.run(main())
    assert (end.returncode, end.log_lines) == (5, ("out", "given"))


def test_a_private_redis_shows_no_password(tmp_path: Path) -> None:
    redis = private_redis(tmp_path, tmp_path / "redis.log")
    password = redis.url.removeprefix("unix://:").partition("@")[0]
    assert len(password) >= 32
    assert password not in " ".join(redis.command.argv)
    assert password not in repr(redis.command)
    assert redis.command.argv[0] == find_redis_server()


def test_settings_are_frozen() -> None:
    for settings in (UpSettings(), RouterSettings(), WorkerSettings()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.redis = "x"  # type: ignore[misc]
