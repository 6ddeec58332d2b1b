"""Work on a real Ray of this machine: the same results as one process, and an interrupted run goes on."""

import json
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btp_export import cli
from btp_export.measuring import spread_answers
from btp_export.planning import spread_reference
from btp_export.spreading import Cluster, connected
from calibrate.calibrate import DROPPED_SAMPLES
from graphs.records.errors import InputError, UnavailableError
from tests.plans import PLAN


@pytest.fixture(scope="module", autouse=True)
def local() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray")  # a short one: names of sockets are limited
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=folder,
            _node_ip_address="127.0.0.1", log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        yield
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def square(number: int) -> int:
    if number < 0:
        raise InputError("a negative number", wanted="another")
    return number * number


def test_results_and_errors() -> None:
    with connected("local") as cluster:
        assert cluster is not None
        assert dict(cluster.results(square, [(n,) for n in range(5)])) == {n: n * n for n in range(5)}
        with pytest.raises(InputError, match="a negative number"):
            list(cluster.results(square, [(-1,)]))
    with connected(None) as cluster:
        assert cluster is None
    with pytest.raises(InputError, match="without an address"), connected(" "):
        pass


def evaluated(capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> tuple[Any, str]:
    arguments = ["eval", str(root), "--plans", "none,btp", "--samples", "40", "--threads", "1", "--json"]
    assert cli.main([*arguments, *more]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_eval(tiny_bundle: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the second of six parts, then whole: the document is that of one process."""
    root = tiny_bundle(PLAN, text_tokens=32).root
    wanted, _ = evaluated(capsys, root)
    results = Cluster.results

    def interrupted(self: Cluster, *arguments: Any, **options: Any) -> Iterator[Any]:
        for count, result in enumerate(results(self, *arguments, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "results", interrupted)
        arguments = ["eval", str(root), "--plans", "none,btp", "--samples", "40", "--threads", "1"]
        assert cli.main([*arguments, "--ray", "local"]) == 130
    capsys.readouterr()
    asked = []

    def watched(self: Cluster, function: Any, parts: Any, **options: Any) -> Iterator[Any]:
        asked.extend(parts)
        return results(self, function, parts, **options)

    monkeypatch.setattr(Cluster, "results", watched)
    got, said = evaluated(capsys, root, "--ray", "local")
    assert got == wanted
    assert "2 of 6 parts are there" in said and len(asked) == 4
    asked.clear()
    got, said = evaluated(capsys, root, "--ray", "local")
    assert got == wanted and len(asked) == 6, "what was done is forgotten once it is whole"
    assert spread_answers.PART == 16


def test_calibrate(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted among the passes over candidates, then whole: the plan, with its record, is that of one process."""
    arguments = ["calibrate", "--model", str(tiny_checkpoint), "--samples", "26", "--answer-tokens", "2", "--no-cache"]
    arguments += ["--drop-bound", "0.1"]  # four candidates where there are twenty-five without it
    assert cli.main([*arguments, "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    results, asked = Cluster.results, list[str]()

    def watched(self: Cluster, function: Any, parts: Any, **options: Any) -> Iterator[Any]:
        for entry in results(self, function, parts, **options):
            asked.append(function.__name__)
            if len(asked) == 7:
                raise KeyboardInterrupt
            yield entry

    monkeypatch.setattr(Cluster, "results", watched)
    assert cli.main([*arguments, "--ray", "local"]) == 130
    assert asked == ["_statistics"] * 4 + ["_logits"] * 3
    capsys.readouterr()
    assert cli.main([*arguments, "--ray", "local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == wanted
    assert asked[7:] and "_statistics" not in asked[7:], "the measurements were there"
    assert DROPPED_SAMPLES % spread_reference.PART == 0


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise ConnectionError("nothing answers\nat all")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refused)
    with pytest.raises(UnavailableError, match="no Ray cluster at auto: nothing answers\n"), connected("auto"):
        pass


def test_an_address_where_nothing_listens_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks for a quarter of an hour."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("nothing listens there"))
    for address in (f"127.0.0.1:{port}", f"ray://[::1]:{port}", "127.0.0.1:99999"):
        with pytest.raises(UnavailableError, match="no Ray cluster at "), connected(address):
            pass


def test_sigterm_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with 130 and says that it was interrupted; Ray's handler would end it with 15."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number)))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with connected("local"):
        assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_left_of_a_ray_that_is_gone_starts_no_other() -> None:
    """An interrupt can leave the generator of results open until its cluster has been shut down."""
    import ray

    with connected("local") as cluster:
        assert cluster is not None
        results = cluster.results(square, [(n,) for n in range(5)])
        next(results)
        ray.shutdown()
        results.close()
    assert not ray.is_initialized()
