"""How much memory there is, from made-up proc and sys trees of machines and containers."""

from pathlib import Path

import pytest

from graphs.files.memory import available_memory, check_memory
from graphs.records.errors import InputError

MIB = 2**20


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n"


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, proc__meminfo=MEMINFO)) == 8 * MIB


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


STAT = f"anon 1\ninactive_file {MIB // 4}\nactive_file {MIB * 3 // 4}\n"


@pytest.mark.parametrize(("limit", "used", "wanted"), [("max", 5, 8), (6, 4, 3), (2, 3, 0)])
def test_a_group_of_version_2(limit: str | int, used: int, wanted: int, tmp_path: Path) -> None:
    """1 MiB of what is used are file pages that could be dropped."""
    folder = tmp_path / "sys/fs/cgroup/user/job"
    tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/user/job\n")
    most = limit if limit == "max" else str(int(limit) * MIB)
    tree(folder, **{"memory.max": most, "memory.current": str(used * MIB), "memory.stat": STAT})
    assert available_memory(tmp_path) == wanted * MIB


def test_the_least_of_all_groups_above_counts(tmp_path: Path) -> None:
    tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/user/job\n")
    for name, limit in (("user", 3), ("user/job", 7)):
        tree(tmp_path / "sys/fs/cgroup" / name, **{"memory.max": str(limit * MIB), "memory.current": str(MIB)})
    assert available_memory(tmp_path) == 2 * MIB


def test_a_group_of_version_1_in_a_container(tmp_path: Path) -> None:
    """Inside a container the path of the process is not mounted, its group is the root that is seen."""
    tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    tree(
        tmp_path / "sys/fs/cgroup/memory",
        **{"memory.limit_in_bytes": str(5 * MIB), "memory.usage_in_bytes": str(2 * MIB)},
        **{"memory.stat": f"active_file 7\ntotal_inactive_file {MIB // 2}\ntotal_active_file {MIB // 2}\n"},
    )
    assert available_memory(tmp_path) == 4 * MIB


def test_too_little_is_refused_with_the_numbers(tmp_path: Path) -> None:
    tree(tmp_path, proc__meminfo=f"MemAvailable: {3 * 2**20} kB\n")
    check_memory(3 * 2**30, "calibrating", do="less", root=tmp_path)
    with pytest.raises(InputError, match=r"calibrating needs about 4\.5 GiB of memory, 3\.0 GiB are available"):
        check_memory(9 * 2**29, "calibrating", do="less", root=tmp_path)
    check_memory(2**50, "calibrating", do="less", root=tmp_path / "a system that says nothing")


def test_the_user_s_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, proc__meminfo=MEMINFO)
    for limit, memory in (("0.0078125", 8 * MIB), ("1", 8 * MIB), ("0.00390625", 4 * MIB), ("", 8 * MIB)):
        monkeypatch.setenv("BTP_MEMORY_GIB", limit)
        assert available_memory(tmp_path) == memory
    for limit in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("BTP_MEMORY_GIB", limit)
        with pytest.raises(InputError, match=f"BTP_MEMORY_GIB={limit}"):
            available_memory(tmp_path)


def test_this_machine_has_some() -> None:
    there = available_memory()
    assert there is None or 2**20 < there < 2**50
