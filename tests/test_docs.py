"""What README and docs tell users to type is run, in order, on the demo model; links lead somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from btp_export import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")),
]
WITH_EXAMPLES = ["README.md", *(page for page in PAGES if page not in ("README.md", "CONTRIBUTING.md"))]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's pictures and one of the user's, where the examples run one after the other."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    shutil.copyfile(ROOT / "docs" / "images" / "scene.png", folder / "scene.png")
    return folder


def run_in_shell(line: str, folder: Path) -> tuple[int, str, str]:
    """The line as a user types it: exit code, standard output, standard error."""
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def run_here(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The same in this process, which has the libraries loaded already: half the time of most commands."""
    code = cli.main(shlex.split(line)[1:])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.timeout(900)  # README.md calibrates and exports the demo, which takes a minute of processor time
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(
    page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README.md comes first: it makes the bundle that the other pages use.

    Its first command, and commands that need a shell, are run by one; all others and Python run here.
    """
    if page != "README.md" and not (workplace / "my-bundle").exists():
        pytest.skip("README.md makes the bundle")
    monkeypatch.chdir(workplace)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)  # btp-export is found, as in an environment that is activated
    for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(text, page, "exec"), {"__name__": "__main__"})
            continue
        lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        assert lines, f"no line of the block starts with a dollar sign:\n{text}"
        for line in lines:
            here = line.startswith("btp-export ") and not set("|&;<>$*`\\") & set(line)
            first = page == "README.md" and not (workplace / "my-bundle").exists()
            code, out, err = run_here(line, capsys) if here and not first else run_in_shell(line, workplace)
            assert code == 0, f"{line}\n{out}{err}"
            assert "Traceback" not in err
            assert out, f"{line} printed nothing"


def test_the_readme_shows_what_its_commands_print() -> None:
    """`make readme` fills it in; numbers differ from run to run and are not compared."""
    from benchmarks.readme import BLOCK as COMMANDS

    blocks = COMMANDS.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 4
    for block in blocks:
        command, *output = block.splitlines()
        assert command.startswith("$ btp-export ") and output and not any(line.startswith("$") for line in output)


def test_the_examples_left_a_whole_bundle(workplace: Path) -> None:
    """README.md exports it, and docs/report.md adds its report."""
    if not (workplace / "my-bundle" / "report").exists():
        pytest.skip("README.md and docs/report.md make the bundle")
    from graphs.files.bundle import Bundle

    bundle = Bundle.open(workplace / "my-bundle", check="full")
    report = json.loads((bundle.root / "report" / "report.json").read_text())
    assert report["verification"]["passed"] and report["compression"] == bundle.plan.compression
    assert str(workplace) not in (bundle.root / "report" / "report.json").read_text()
    assert (bundle.root / "report" / "index.html").stat().st_size > 10_000
    assert not list(workplace.glob(".*"))


def test_what_an_export_costs_is_said_as_it_was_measured() -> None:
    """One source, benchmarks/results/export_cost.md: other pages repeat its numbers or refer to it."""
    text = (ROOT / "benchmarks" / "results" / "export_cost.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^## llava-1\.5-7b,.*?^\| everything[^|]*\| ([\d.]+) s \| (\d+) MiB", text, re.M | re.S)
    seconds, gib = f"{float(row[0]):.0f} s", f"{float(row[1]) / 1024:.1f} GiB"
    said = {
        page: re.findall(r"LLaVA-1\.5-7B is exported in ([\d.]+ s) with ([\d.]+ \w+)", content)
        for page in PAGES
        if "export_cost.md" in (content := (ROOT / page).read_text(encoding="utf-8"))
    }
    assert said["README.md"] == [(seconds, gib)] and said["docs/full-size.md"] == []
    full_size = (ROOT / "docs" / "full-size.md").read_text(encoding="utf-8")
    assert "| `export --model llava-1.5-7b" not in full_size, "a second measurement of the same"


def test_the_record_of_a_plan_is_described(workplace: Path) -> None:
    if not (workplace / "my-bundle").exists():
        pytest.skip("README.md makes the bundle")
    record = json.loads((workplace / "my-bundle" / "plan.json").read_text(encoding="utf-8"))["calibration"]
    page = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    assert [key for key in record if f"`{key}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert not missing
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        pointed = (ROOT / page).parent / target if target else ROOT / page
        assert anchor in anchors(pointed.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """What headings are called in addresses: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "index.md" and f"({page})" not in index] == []


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and text.count("\n") > 190
