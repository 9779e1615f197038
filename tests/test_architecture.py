"""The rooms of the package import each other in one direction, and only models/ knows what a model is made of."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.models import MODELS

PACKAGE = Path(__file__).resolve().parents[1] / "rwkv_bone"
SIZES = {"vocab_size": 8, "n_layer": 2, "n_embd": 64, "head_size": 32}

# Files outside models/ that may name a version's parameters, and why.
NAMES_ALLOWED = {
    "files/known.py": "names of releases, such as RWKV-x060-World-1B6-v2.1",
    "interop/rwkv_peft.py": "reads files of RWKV-PEFT, whose names are fixed",
}
# Components of names that are words of their own (g1: a chat template and the releases it is for), or parts named in flags.
GENERIC = {"emb", "head", "att", "ffn", "key", "value", "receptance", "gate", "output", "g1", "weight", "bias"}


def module_name(path: Path) -> str:
    parts = ["rwkv_bone", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def room(module: str) -> str:
    """`rwkv_bone.training.loop` -> `training`; a file of the package's root -> its own name."""
    return [*module.split("."), ""][1]


def relative(module: str) -> str:
    return SOURCES[module].relative_to(PACKAGE).as_posix()


def outside(*rooms: str) -> list[str]:
    return [module for module in SOURCES if room(module) not in rooms]


def imports_of(module: str, at_start: bool = False) -> set[str]:
    """Absolute names of the modules that a module imports; `at_start`: without those inside functions and for types alone."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in SOURCES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(TREES[module])
    return found


def imported_rooms(module: str) -> set[str]:
    return {room(name) for name in imports_of(module) if name.split(".")[0] == "rwkv_bone"} - {""}


def strings(module: str) -> list[str]:
    """The strings of a module's code, without docstrings."""
    statements = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Expr)]
    docstrings = {id(node.value) for node in statements}
    constants = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def names_used(module: str) -> set[str]:
    """Attributes, and words in strings: by which a module can reach a parameter."""
    attributes = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    return attributes | {word for text in strings(module) for word in re.findall(r"\w+", text)}


def parameter_words() -> set[str]:
    """Components of the names of every version's parameters, but for generic words."""
    words: set[str] = set()
    for version, kind in MODELS.items():
        if version == "hf":  # whose names are those of transformers, which is slow to import
            words.update(("embed_tokens", "lm_head", "self_attn", "input_layernorm", "q_proj", "o_proj", "down_proj"))
            continue
        shapes = kind.shapes(kind.new_sizes(**SIZES), initial_state="state" in kind.capabilities)
        words.update(word for name in shapes for word in name.split(".") if not word.isdigit())
    return words - GENERIC - {"blocks"}


# ---------------------------------------------------------------- models


def test_there_are_names_to_look_for():
    words = parameter_words()
    assert len(words) > 10 and {"ln_x", "ln_out"} <= words


def test_no_parameter_of_a_version_is_named_outside_models():
    words = parameter_words()
    named = {relative(module): names_used(module) & words for module in outside("models")}
    assert {path: found for path, found in named.items() if found and path not in NAMES_ALLOWED} == {}
    assert not [path for path in NAMES_ALLOWED if not named[path]], "exceptions that nothing needs any more"


def test_no_block_is_walked_outside_models():
    for module in outside("models"):
        attributes = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute) and node.attr == "blocks"]
        in_strings = [text for text in strings(module) if re.search(r"\bblocks\\?\.\S", text)]
        assert relative(module) in NAMES_ALLOWED or not (attributes or in_strings), (relative(module), in_strings)


def test_no_version_is_imported_outside_models():
    public = {"rwkv_bone.models", "rwkv_bone.models.base"}
    found = {relative(module): {name for name in imports_of(module) if room(name) == "models"} for module in outside("models")}
    assert {path: names - public for path, names in found.items() if names - public} == {}


# ---------------------------------------------------------------- who imports whom

MAY_NOT = {
    "data": {"models", "peft", "files", "interop", "training", "merging", "generate", "evaluate", "compare"},
    "peft": {"models", "files", "interop", "data", "training", "merging", "generate", "evaluate", "compare", "config"},
    "models": {"peft", "files", "interop", "data", "training", "merging", "generate", "evaluate", "compare", "config"},
    "ops": {"models", "peft", "files", "interop", "data", "training", "merging", "generate", "evaluate", "compare", "config"},
    "files": {"training", "data", "merging", "generate", "evaluate", "compare", "config"},
    "interop": {"training", "merging", "generate", "evaluate", "compare"},
    "training": {"merging", "evaluate", "compare"},
}


@pytest.mark.parametrize("importing", MAY_NOT)
def test_rooms_import_in_one_direction(importing):
    assert importing in map(room, SOURCES)
    wrong = {module: imported_rooms(module) & MAY_NOT[importing] for module in SOURCES if room(module) == importing}
    assert not {module: rooms for module, rooms in wrong.items() if rooms}


@pytest.mark.parametrize(
    ("package", "home"),
    [("lightning", "training"), ("deepspeed", "training"), ("transformers", "models.hf")],
)
def test_a_heavy_package_is_imported_in_one_place(package, home):
    users = {module for module in SOURCES if package in {name.split(".")[0] for name in imports_of(module)}}
    assert all(f"{module}.".startswith(f"rwkv_bone.{home}.") for module in users), users


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("generate.command, rwkv_bone.evaluate.command, rwkv_bone.plot", "lightning deepspeed transformers matplotlib"),
        ("data.jsonl_to_binidx", "torch"),  # whose workers start in a third of a second
    ],
)
def test_what_needs_no_heavy_package_imports_none(modules, heavy):
    code = f"import sys, rwkv_bone.{modules}; print(set({heavy.split()}) & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_no_import_goes_in_a_circle():
    edges = {}
    for module in SOURCES:
        edges[module] = {name for name in imports_of(module, at_start=True) if name in SOURCES}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for following in sorted(edges[module] - {module}):
                walk(following, [*path, module])
            done.add(module)

    for module in SOURCES:
        walk(module, [])
