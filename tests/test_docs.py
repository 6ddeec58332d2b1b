"""What README and docs tell users to type is run, in order, on the demo model; links lead somewhere."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.examples import ROOT, commands, examples, first_command, run_here, run_in_shell

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")),
]
WITH_EXAMPLES = ["README.md", *(page for page in PAGES if page not in ("README.md", "CONTRIBUTING.md"))]


@pytest.fixture(scope="module")
def workplace(first_example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the first example ran, in which the others run one after the other."""
    return shutil.copytree(first_example, tmp_path_factory.mktemp("docs") / "workplace")


@pytest.mark.timeout(900)  # README.md calibrates and exports the demo, which takes half a minute of processor time
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README.md comes first: it makes the bundle that the other pages use.

    Commands that need a shell, and those that only run a bundle, which load little, are run by one; all others and
    Python run here.
    """
    monkeypatch.chdir(workplace)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)  # btp-export is found, as in an environment that is activated
    for kind, text in examples(page):
        if kind == "python":
            exec(compile(text, page, "exec"), {"__name__": "__main__"})
            continue
        for line in commands(text):
            if line == first_command():
                assert Path("my-bundle").is_dir(), "it was run"
            elif (
                line.startswith("btp-export run ")
                or not line.startswith("btp-export ")
                or set("|&;<>$*`\\") & set(line)
            ):
                run_in_shell(line)
            else:
                run_here(line)


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
        pytest.skip("docs/report.md adds the report")
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
