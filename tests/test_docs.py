"""The pages of the documentation run as they stand, print what they say they print, and lead to what is there.

```python                  run, in order; a page begins without names, in an empty folder
```text title="Prints"     what the block before it prints
```bash                    its `jaxquant` lines are run in the same folder
```python title="Qwix"     another library's code: its syntax alone
"""

import contextlib
import io
import re
import shlex
import types
from pathlib import Path

import jax
import pytest

import jaxquant as jq
from jaxquant.cli.main import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages that another test runs, because what they show needs several devices or processes, or more than running.
ELSEWHERE = {
    "algorithms.md": "test_examples.py",
    "devices.md": "test_export.py",
    "training.md": "test_examples.py",
}
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python\n" in path.read_text())


def shell(line: str) -> None:
    """Runs a line of a bash block if it is ours; where its file would have to be downloaded, only reads its options."""
    program, *arguments = shlex.split(line, comments=True) or [""]
    if program != "jaxquant":
        assert program in ("", "pip", "python"), line
        scripts = [argument for argument in arguments if argument.endswith(".py")]
        assert all((ROOT / script).exists() for script in scripts), line
    elif arguments[0] == "eval":
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0, line
    else:
        assert main(arguments) == 0, line


def run(language: str, code: str, names: dict) -> str:
    """Runs a block and gives back what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                shell(line)
        else:
            exec(code, names)
    return printed.getvalue()


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for language, title, code in BLOCK.findall((DOCS / page).read_text()):
            if language in ("python", "bash") and not title:
                printed = run(language, code, names)
            elif language == "python":
                compile(code, title, "exec")
            elif 'title="Prints"' in title:
                assert trimmed(code) == trimmed(printed)


def test_other_pages_are_run_elsewhere():
    assert set(ELSEWHERE) <= set(PAGES)
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_block_has_a_language_and_an_end(page):
    text = (DOCS / page).read_text()
    assert len(BLOCK.findall(text)) == text.count("```") / 2


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / ".mkdocs.yml").read_text()
    assert [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in navigation] == []


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    public = [name for name, value in vars(jq).items() if name[0] != "_" and not isinstance(value, types.ModuleType)]
    assert "quantized" in public
    assert [name for name in public if not re.search(rf"^(::: jaxquant|\| `jq)[\w.]*\.{name}\b", text, re.M)] == []


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / page).read_text())
    there = [link for link in links if "://" not in link]
    assert [link for link in there if not ((ROOT / page).parent / link).exists()] == []
