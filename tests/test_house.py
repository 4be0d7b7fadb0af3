"""Laws of the house, read from the sources: who imports whom, which files there are, and what is never done."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "ds.corpus": set(),
    "ds.tokenizer": set(),
    "ds.shards": set(),
    "ds.loader": {"ds.shards"},
    "scripts.config": set(),
    "scripts.model": {"scripts.config"},
    "scripts.losses": {"scripts.config"},
    "scripts.memory": {"scripts.config"},
    "scripts.report": set(),
    "scripts.offload": set(),
    "scripts.preflight": {"scripts.config", "scripts.model", "scripts.losses", "scripts.memory", "scripts.offload"},
    "scripts.lifecycle": {"scripts.config"},
    "scripts.checkpoint": {"scripts.offload", "scripts.model", "scripts.config"},
    "scripts.evaluate": {"scripts.losses"},
    "scripts.generate": {"scripts.checkpoint", "scripts.model", "scripts.config", "ds.tokenizer"},
    "scripts.prepare_data": {"scripts.config", "ds.corpus", "ds.tokenizer", "ds.shards", "ds.loader"},
    "scripts.trainer": {
        "scripts.preflight", "scripts.offload", "scripts.lifecycle", "scripts.checkpoint", "scripts.evaluate", "scripts.memory",
        "scripts.report", "scripts.model", "scripts.config", "ds.loader",
    },
    "scripts.train_pretrain": {"scripts.trainer", "scripts.losses", "scripts.prepare_data", "scripts.config"},
    "scripts.train_distill": {"scripts.trainer", "scripts.losses", "scripts.prepare_data", "scripts.config"},
}  # fmt: skip
MAY_KNOW = {
    "deepspeed": {"scripts.trainer", "scripts.offload"},
    "os.environ": {"scripts.config", "scripts.trainer"},
    "sys.argv": {
        "scripts.train_pretrain",
        "scripts.train_distill",
        "scripts.prepare_data",
        "scripts.generate",
        "scripts.memory",
    },
    "matplotlib": {"scripts.report"},
    "safetensors": {"scripts.checkpoint"},
    "tokenizers": {"ds.tokenizer", "scripts.prepare_data", "scripts.generate"},
    "mmap": {"ds.shards"},
    "transformers": set(),
}
NEVER_IMPORTED = {
    "argparse", "optparse", "getopt", "click", "typer", "fire", "absl", "hydra", "yaml", "omegaconf", "configparser", "tomllib",
    "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib",
}  # fmt: skip
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
NEVER_SPELLED = {"torch.load", "torch.save", "np.load", "numpy.load", "os.getenv", "os.putenv", "os.system"}
TEMPERATURE_ROOMS = {"scripts.config", "scripts.losses", "scripts.model", "scripts.generate"}
PASSED_ON = {"scripts.trainer": {"sample_temperature"}, "scripts.train_distill": {"distill_temperature"}}
TRAINER_ROOMS = {"scripts.trainer", "scripts.preflight"}
LONGEST_FUNCTION_LINES = 40
MODULES = {
    f"{path.parent.name}.{path.stem}": ast.parse(path.read_text(), path.name)
    for folder in ("ds", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.stem != "__init__"
}
every_module = pytest.mark.parametrize("module", MODULES)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names; `from scripts import losses` counts as scripts.losses, `from scripts.losses import x` too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            whole = node.module in ("ds", "scripts")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {str(node.module)}
    return names


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def spelled(tree: ast.AST) -> set[str]:
    """Dotted names as they are used; `from os import environ` counts as os.environ."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return names | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def words(tree: ast.AST) -> set[str]:
    """Every identifier of the code: names, attributes, arguments, keywords, functions."""
    fields = ("id", "attr", "arg", "name")
    return {
        str(getattr(node, field)) for node in ast.walk(tree) for field in fields if isinstance(getattr(node, field, 0), str)
    }


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@every_module
def test_module_imports_only_what_lies_upstream(module):
    house = {name for name in imported(MODULES[module]) if name.split(".")[0] in ("ds", "scripts", "tests")}
    assert house <= MAY_IMPORT[module]


def test_law_of_imports_has_no_circle():
    done: set[str] = set()
    while waiting := set(MAY_IMPORT) - done:
        free = {name for name in waiting if MAY_IMPORT[name] <= done}
        assert free, waiting
        done |= free


def test_only_the_files_of_the_design_are_there():
    assert set(MODULES) <= set(MAY_IMPORT)
    for folder in ("ds", "scripts"):
        present = {path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
        assert present == {f"{name.split('.')[1]}.py" for name in MODULES if name.startswith(folder)} | {"__init__.py"}


@every_module
def test_module_begins_with_a_docstring_of_what_it_owns(module):
    docstring = ast.get_docstring(MODULES[module])
    assert docstring and docstring.splitlines()[0].endswith((".", ":"))


@every_module
def test_public_functions_and_classes_have_docstrings_and_types(module):
    for node in MODULES[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None or node.name.startswith("_"), node.name


@every_module
def test_no_function_is_longer_than_forty_lines(module):
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions(MODULES[module])}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION_LINES} == {}


@every_module
def test_there_are_no_flags_no_yaml_no_pickle_and_no_code_from_data(module):
    tree = MODULES[module]
    assert not {name.split(".")[0] for name in imported(tree)} & NEVER_IMPORTED
    assert not called(tree) & NEVER_CALLED
    assert not spelled(tree) & NEVER_SPELLED


@every_module
@pytest.mark.parametrize("secret", MAY_KNOW)
def test_only_its_own_room_knows_it(module, secret):
    known = set(chain.from_iterable(prefixes(name) for name in imported(MODULES[module]) | spelled(MODULES[module])))
    assert secret not in known or module in MAY_KNOW[secret]


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def test_each_secret_is_known_by_a_room_that_may():
    """Else the law above would be about a name that nobody uses."""
    for secret in ("deepspeed", "os.environ", "sys.argv", "matplotlib", "safetensors", "tokenizers"):
        knowing = {name for name, tree in MODULES.items() if any(secret in prefixes(n) for n in imported(tree) | spelled(tree))}
        assert knowing & MAY_KNOW[secret], secret


@every_module
def test_only_the_trainer_calls_backward_and_step(module):
    calls = [name.split(".") for name in called(MODULES[module])]
    assert module == "scripts.trainer" or not any(name[-1] in ("backward", "step") and "engine" in name for name in calls)
    assert module in TRAINER_ROOMS or not any(name[-1] in ("backward", "step") for name in calls)


@every_module
def test_only_losses_and_sampling_know_temperature(module):
    known = {word for word in words(MODULES[module]) if "temperature" in word.lower()}
    assert known <= PASSED_ON.get(module, set()) or module in TEMPERATURE_ROOMS


@every_module
def test_no_default_hides_outside_the_config(module):
    """An argument may be absent or start at zero; every other number is given by the caller, who has it from the config."""
    for function in functions(MODULES[module]):
        defaults = [ast.unparse(value) for value in function.args.defaults + function.args.kw_defaults if value]
        assert set(defaults) <= {"None", "0"}, function.name


@every_module
def test_nothing_is_put_off_and_nothing_is_swallowed(module):
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", source)
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not all(isinstance(line, ast.Pass) for line in node.body), node.lineno
    assert "contextlib.suppress" not in spelled(MODULES[module])


def test_data_side_knows_nothing_of_training():
    for module, tree in MODULES.items():
        if module.startswith("ds."):
            assert not {"torch", "deepspeed"} & {name.split(".")[0] for name in imported(tree)}
