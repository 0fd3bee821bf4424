"""The experiments' common part, and that each has its place in docs/experiments.md. CI runs the scripts themselves."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES, DOCUMENT = ROOT / "examples", ROOT / "docs" / "experiments.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="the documents are not part of this copy")
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("*.py") if not p.stem.startswith("_") and p.stem != "train_digits")


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _experiment

    yield _experiment
    sys.modules.pop("_experiment")


def test_there_are_ten():
    assert len(SCRIPTS) == 10
    assert len(re.findall(r"^## \d+\. ", DOCUMENT.read_text(), re.M)) == 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_has_its_place(name):
    """Claim and protocol before its tables, which a full run has written; a picture with words for it after them."""
    text = DOCUMENT.read_text()
    section = next(part for part in text.split("\n## ") if f"`python examples/{name}.py`" in part)
    before, tables, after = re.split(f"<!-- {name}: (?:begin|end) -->", section)
    assert "Claim" in before and "Protocol" in before
    assert "| ---" in tables and re.search(r"\*\*(Holds|Does not hold)\.\*\*", tables)
    alt, picture = re.search(r"!\[([^]]*)\]\(([^)]*)\)", after, re.S).groups()
    assert len(alt) > 20 and picture == f"figures/{name}.png" and (DOCUMENT.parent / picture).exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_what_it_is(name):
    """A docstring, a main(report), and what it claims is asserted somewhere."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    assert "Protocol" in ast.get_docstring(tree)
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    claims = [call for call in calls if getattr(call.func, "attr", None) == "claim"]
    assert any(
        not (k.arg == "expected" and getattr(k.value, "value", 0) is None) for c in claims for k in c.keywords
    ) or any(not c.keywords for c in claims)


def test_a_claim_that_comes_out_otherwise(experiment, tmp_path, capsys):
    report = experiment.Report("some", quick=True, figures=tmp_path)
    report.claim("as expected", True)
    report.claim("known not to", False, expected=False)
    report.claim("open", True, expected=None)
    assert report.surprises == []
    report.claim("lost", False)
    report.claim("came true", True, expected=False)
    assert report.surprises == ["lost", "came true"]
    assert "lost — does not hold" in capsys.readouterr().out


@pytest.mark.parametrize("expected", [True, False])
def test_the_command(experiment, monkeypatch, tmp_path, expected):
    """Its status tells; with --quick and --figures nothing is written but the picture."""
    monkeypatch.setattr(sys, "argv", ["examples/some.py", "--quick", "--figures", str(tmp_path / "new")])

    class Figure:
        def savefig(self, path, **options):
            Path(path).write_bytes(b"picture")

    def main(report):
        assert report.quick and report.name == "some"
        report.table("a title", ["", "x"], [["row", 1]])
        report.claim("a claim", expected)
        report.picture(Figure())

    before = DOCUMENT.read_text()
    with pytest.raises(SystemExit) as ended:
        experiment.run(main)
    assert ended.value.code == (0 if expected else 1)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["some-quick.png"]
    assert DOCUMENT.read_text() == before


def test_a_full_run_writes_its_part(experiment, monkeypatch, tmp_path):
    """And no other; as often as it is run."""
    monkeypatch.setattr(experiment, "DOCS", tmp_path)
    document = tmp_path / "experiments.md"
    document.write_text(
        "start\n<!-- one: begin -->\nancient\n<!-- one: end -->\n<!-- two: begin -->\nkept\n<!-- two: end -->\n"
    )
    for _ in range(2):
        report = experiment.Report("one", quick=False, figures=tmp_path)
        report.table("Numbers", ["", "a", "b"], [["row", 1, "2.0"]])
        report.claim("First.", True)
        report.claim("Second.", False, expected=None)
        report.write()
    text = document.read_text()
    assert "ancient" not in text and "kept" in text and text.startswith("start\n")
    assert "Numbers:\n\n|  | a | b |\n| --- | ---: | ---: |\n| row | 1 | 2.0 |\n" in text
    assert "- First. **Holds.**\n- Second. **Does not hold.**\n" in text
    with pytest.raises(SystemExit, match="no place for three"):
        experiment.Report("three", quick=False, figures=tmp_path).write()
