"""The states of replicas, with sidecars and servers that we write here. Real ones are test_faults.py's. No vLLM."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_server import serving

from megatron_rlsc.rollout.admission import RefusedError, UnreachableError
from megatron_rlsc.rollout.fleet import Fleet, FleetError, Replica
from megatron_rlsc.rollout.sidecar import Sidecar, SidecarError


class OurSidecar(Sidecar):
    """One that needs no vLLM: it starts, and is ready, as often as it is allowed to."""

    def __init__(self, log_path: Path, url: str, *, ready: int = 99, startable: int = 99) -> None:
        super().__init__(Path("python"), Path("model"), dtype="float32", max_model_len=10, seed=1, log_path=log_path)
        self.key, self.served_at, self.ready_left = "secret", url, ready
        self.startable = startable
        self.starts, self.running = 0, False
        log_path.write_text("its last words")

    def start(self) -> None:
        assert not self.running
        self.starts += 1
        if self.starts > self.startable:
            raise SidecarError("port 7 of 127.0.0.1: Address already in use")
        self.url, self.running = self.served_at, True

    def wait_until_ready(self) -> None:
        self.ready_left -= 1
        if self.ready_left < 0:
            self.running = False
            raise SidecarError("it ended with status 1. its last words")

    def has_ended(self) -> bool:
        return not self.running

    def terminate(self) -> None:
        self.running = False

    def stop(self) -> None:
        self.running = False


def ours(tmp_path: Path, url: str, count: int = 2, **arguments: int) -> list[Replica]:
    sidecars = [OurSidecar(tmp_path / f"{index}.log", url, **arguments) for index in range(count)]
    return [Replica(index=i, url="", key="secret", sidecar=sidecar) for i, sidecar in enumerate(sidecars)]


def states(fleet: Fleet) -> list[str]:
    return [replica.state for replica in fleet.replicas]


def wait_for(fleet: Fleet, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(fleet.ready()) < count:
        assert time.monotonic() < deadline, states(fleet)
        time.sleep(0.01)


def test_a_lost_sidecar_of_ours_is_started_again_within_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as url, Fleet(ours(tmp_path, url), longest=10, restarts=2) as fleet:
        fleet.wait_until_ready()
        first, second = fleet.replicas
        assert states(fleet) == ["ready", "ready"]
        assert first.url == url

        first.version = "run:1"
        fleet.lose(first, "its engine is dead")
        fleet.lose(first, "and again")  # by another who waits for it: nothing
        assert (first.version, first.state, first.losses) == ("", "ending", 1)
        assert "its engine is dead" in first.reason and first.reason.endswith("0.log:\nits last words")
        assert [replica.index for replica in fleet.ready()] == [1]
        wait_for(fleet, 2)
        assert first.version == "", "it has had no push since"
        assert capsys.readouterr().err.count("is back") == 1

        fleet.lose(first, "once more")
        wait_for(fleet, 2)
        fleet.lose(first, "too often")
        assert states(fleet) == ["out", "ready"]
        with pytest.raises(FleetError) as failed:
            fleet.lose(second, "broken too")
        assert "no replica is left: --sidecar-restarts 2 are used up" in str(failed.value)
        assert "too often" in str(failed.value) and "broken too" in str(failed.value)
        assert str(failed.value).count("its last words") == 2


def test_a_sidecar_that_ends_by_itself_is_noticed(tmp_path: Path) -> None:
    with serving() as url, Fleet(ours(tmp_path, url), restarts=1) as fleet:
        fleet.wait_until_ready()
        fleet.replicas[1].sidecar.terminate()  # type: ignore[union-attr]
        assert [replica.index for replica in fleet.ready()] == [0]
        assert "ended by itself" in fleet.replicas[1].reason
        wait_for(fleet, 2)


@pytest.mark.parametrize(
    ("able", "reason"), [({"ready": 1}, "ended with status 1"), ({"startable": 1}, "port 7 of .* already in use")]
)
def test_a_restart_that_fails_is_one_of_the_restarts(tmp_path: Path, able: dict[str, int], reason: str) -> None:
    with serving() as url, Fleet(ours(tmp_path, url, 1, **able), restarts=3) as fleet:
        fleet.wait_until_ready()
        fleet.lose(fleet.replicas[0], "its engine is dead")
        with pytest.raises(FleetError, match=rf"(?s)--sidecar-restarts 3 are used up.*{reason}"):
            fleet.wait_for_one()
        assert fleet.replicas[0].sidecar.starts == 4  # type: ignore[union-attr]


def test_a_run_that_starts_with_fewer_than_it_was_given_does_not_start(tmp_path: Path) -> None:
    with serving() as url, Fleet(ours(tmp_path, url, ready=0), restarts=3) as fleet:
        with pytest.raises(SidecarError, match="ended with status 1"):
            fleet.wait_until_ready()


def test_all_sidecars_of_ours_end_with_the_fleet(tmp_path: Path) -> None:
    with serving() as url:
        with Fleet(ours(tmp_path, url)) as fleet:
            pass
        assert all(replica.sidecar.has_ended() for replica in fleet.replicas if replica.sidecar)


def test_a_lost_server_of_others_is_tried_again() -> None:
    with serving() as url:
        fleet = Fleet([Replica(index=0, url=url, key="secret")], timeout=20, retry_seconds=0.1)
        fleet.start()
        fleet.wait_until_ready()
    port = int(url.rsplit(":", 1)[1])
    fleet.lose(fleet.replicas[0], "its connection broke")
    assert states(fleet) == ["away"]
    assert fleet.ready() == []
    deadline = time.monotonic() + 20
    while "ConnectError" not in fleet.replicas[0].reason:  # it was tried, in vain
        assert time.monotonic() < deadline and fleet.ready() == []
        time.sleep(0.01)
    with serving(port):
        assert fleet.wait_for_one() == fleet.replicas


def test_servers_of_others_that_do_not_come_back_end_the_run() -> None:
    fleet = Fleet([Replica(index=0, url="http://127.0.0.1:9", key="k")], timeout=0.5, retry_seconds=0.1)
    fleet.lose(fleet.replicas[0], "its connection broke")
    with pytest.raises(
        FleetError, match=r"(?s)no replica was back within 0\.5 s .*replica 0 \(http://127.*ConnectError"
    ):
        fleet.wait_for_one()


def test_servers_of_others_may_come_up_after_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as url:
        port = int(url.rsplit(":", 1)[1])
    fleet = Fleet([Replica(index=0, url=url, key="secret")], timeout=20)
    fleet.start()
    time.sleep(0.5)
    with serving(port):
        fleet.wait_until_ready()
    assert capsys.readouterr().err.count(f"waiting up to 20 s (--sidecar-timeout) for replica 0 ({url})") == 1


def test_a_server_that_is_not_up_in_time_or_not_ours_is_named() -> None:
    absent = Fleet([Replica(index=3, url="http://127.0.0.1:9", key="k")], timeout=0.3)
    absent.start()
    with pytest.raises(UnreachableError, match=r"replica 3 \(http://127\.0\.0\.1:9\) is not up after 0\.3 s: GET"):
        absent.wait_until_ready()
    with serving() as url:
        fleet = Fleet([Replica(index=0, url=url, key="another")])
        fleet.start()
        with pytest.raises(RefusedError, match=f"{url} refuses our key"):
            fleet.wait_until_ready()
        fleet = Fleet([Replica(index=0, url=url, key="secret")], longest=11)
        fleet.start()
        with pytest.raises(RefusedError, match=f"need 11 tokens, {url} holds 10"):
            fleet.wait_until_ready()
