"""The structure: which room may import which, what requirements.txt must name, and the lines that the README quotes."""

import ast
import re
import sys

import pytest
from conftest import ROOT

# room -> the rooms that it may import. weights/__main__.py is a command of its own, so it may use command/.
MAY_IMPORT = {
    "attention": set(),
    "scheduler": set(),
    "clip": {"attention"},
    "unet": {"attention"},
    "vae": {"attention"},
    "weights": {"clip", "unet", "vae", "scheduler", "weights"},
    "weights.__main__": {"weights", "command"},
    "command": {"command"},
    "magicmix": {"command", "weights", "clip", "scheduler"},
    "lab": {"lab", "magicmix", "command", "weights", "clip", "unet", "vae", "attention", "scheduler"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", "weights/*.py", "command/*.py", "lab/**/*.py")
    for path in ROOT.glob(pattern)
}


def imports(path):
    """Every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:  # from weights import names: the module, or what stands in it
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module


def room(module):
    return module if module in MAY_IMPORT else module.partition(".")[0]


def test_imports_run_one_way():
    assert {room(module) for module in FILES} == set(MAY_IMPORT)
    for module, path in FILES.items():
        ours = {name for name in imports(path) if name.partition(".")[0] in MAY_IMPORT}
        outside = {name for name in ours if name.partition(".")[0] not in MAY_IMPORT[room(module)]}
        assert not outside, f"{module} imports {outside}"


def test_no_circle():
    """Among modules, so within the rooms as well."""
    edges = {module: {n for n in imports(path) if n in FILES and n != module} for module, path in FILES.items()}
    for package in [m for m in FILES if FILES[m].name == "__init__.py"]:
        for module in edges:
            if module.startswith(f"{package}."):  # a package is imported before what lies in it
                edges[module].discard(package)
    done = set()
    while ready := {module for module in edges if module not in done and edges[module] <= done}:
        done |= ready
    assert not edges.keys() - done, f"a circle among {sorted(edges.keys() - done)}"


PACKAGES = {"PIL": "pillow"}  # import name -> package, where they differ
OPTIONAL = {"pillow_heif"}  # used where it is installed: HEIC pictures, which few layouts are


@pytest.mark.parametrize(("rooms", "file"), [("magicmix command weights", "requirements.txt")])
def test_what_is_imported_is_required(rooms, file):
    required = set(re.findall(r"^([\w-]+)==", (ROOT / file).read_text(), re.MULTILINE))
    found = set()
    for module, path in FILES.items():
        if not module.startswith("lab"):
            found |= {name.partition(".")[0] for name in imports(path)}
    third = found - set(sys.stdlib_module_names) - set(MAY_IMPORT) - OPTIONAL
    assert {PACKAGES.get(name, name) for name in third} == required


def test_the_readme_quotes_the_code():
    """Every line of the algorithm's table stands in the file that the table names."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| the paper | the code |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 9
    file = None
    for row in table:
        code = row.rsplit(" | ", 1)[1]
        names = re.findall(r"`(\w+\.py)`", code)
        file = names[0] if names else file
        quoted = re.findall(r"`([^`]+)`", code)[-1]
        assert quoted in (ROOT / file).read_text(), (file, quoted)


PAGES = [path for folder in (".", "docs", "weights/tiny", "lab/port") for path in (ROOT / folder).glob("*.md")]


def test_the_readme_names_files_that_exist():
    for page in PAGES:
        prose = re.sub(r"`[^`]*`", "", page.read_text())  # code may look like a link
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", prose):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def prose(path):
    """The lines of a Markdown file that are neither code nor a row of a table."""
    is_code = False
    for line in path.read_text().splitlines():
        is_code ^= line.startswith("```")
        if not is_code and not line.startswith(("|", "#", "!")):
            yield line


def test_prose_has_lines_that_fit():
    for page in PAGES:
        assert [line for line in prose(page) if len(line) > 120] == [], page
