"""What the documents say of the tests, and what the tests know of the messages."""

import ast
import re
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastbn.__file__).parent  # which may be installed elsewhere
CONTRACT = ROOT / "docs" / "contract.md"
LINK = re.compile(r"\]\(\.\./(tests/test_\w+\.py)::(\w+)\)")


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(not CONTRACT.exists(), reason="the documents are not part of this copy")
def test_every_promise_has_its_test():
    """Each link leads to a test, and each row of a table has a link."""
    text = CONTRACT.read_text()
    links = LINK.findall(text)
    assert len(links) > 50
    missing = [f"{file}::{name}" for file, name in links if name not in functions(ROOT / file)]
    assert not missing
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    heads = {
        line
        for line, below in zip(text.splitlines(), text.splitlines()[1:], strict=False)
        if set(below) <= set("|- ") and below
    }
    bare = [row for row in rows if row not in heads and not LINK.search(row)]
    assert not bare


def messages(path):
    """Line and plain pieces of each message that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = node.exc.args[0]
            parts = said.values if isinstance(said, ast.JoinedStr) else [said]
            plain = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            if plain:
                yield node.lineno, plain


def words(text):
    """In words alone: a test may cut a message where a number stands, or write it as a regular expression."""
    return " ".join(re.findall(r"[A-Za-z_]+", text))


STOCK = {"and", "must", "be", "have", "has", "is", "shape", "dtype", "at", "least", "most", "a", "an", "s", "x"}
STOCK |= {"or", "the", "not", "of", "in", "to"}


def test_every_message_is_tested_for_its_text():
    """Of each error in checks.py and the trainer, three words that it always has (or all) are in some test."""
    tests = words(" ".join(path.read_text().replace("\\", "") for path in Path(__file__).parent.glob("test_*.py")))
    untested = []
    files = [PACKAGE / "checks.py", *sorted((PACKAGE / "nn").glob("*.py"))]
    for place, line, pieces in ((file.name, *message) for file in files for message in messages(file)):
        said = [words(piece).split() for piece in pieces]
        n = min(3, max(map(len, said)))
        windows = [" ".join(piece[i : i + n]) for piece in said for i in range(len(piece) - n + 1)]
        windows = [window for window in windows if not set(window.split()) <= STOCK] or windows
        if not any(window in tests for window in windows):
            untested.append(f"{place}:{line}: {' … '.join(pieces)}")
    assert not untested, "\n".join(untested)


def test_ci_runs_the_sanitizers():
    """The script that shows promise 5, which no test can within itself, is what CI and make run."""
    script = ROOT / ".ci" / "sanitize"
    if not script.exists():
        pytest.skip("the scripts are not part of this copy")
    assert ".ci/sanitize quick" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/sanitize" in (ROOT / "Makefile").read_text()
    assert "-fsanitize=address,undefined" in script.read_text() and "valgrind" in script.read_text()


def test_messages_about_arguments_are_in_one_place():
    """The operations and the layers raise nothing of their own; what is about the host or a file stands elsewhere."""
    allowed = {"backends.py", "demo.py", "bench.py", "checks.py", "__main__.py", "convert.py", "estimators.py"}
    own = [
        f"{path.name}:{line} {pieces}"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name not in allowed
        for line, pieces in messages(path)
    ]
    assert not own, "\n".join(own)
