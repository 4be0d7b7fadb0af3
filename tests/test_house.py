"""Laws of the house, read from the sources: who imports whom, which files there are, and what is never done."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("config", "model", "plan", "engine", "run", "trainer", "entries")
ROOMS = {
    "model": {"decoder", "attention", "documents", "operations", "losses", "sampling", "activation_offload", "huggingface"},
    "plan": {"budget", "footprint", "machine"},
    "engine": {"distributed", "watch", "toolchain", "truth_check", "offload", "updates"},
    "run": {"state", "setup", "run_dir", "metrics", "checkpoint", "storage", "evaluate", "teacher", "page", "tracker"},
}
FOLDERS = tuple(ROOMS)
ENTRIES = ("train_pretrain", "train_distill", "prepare_data", "generate", "export_gguf")
BESIDE = {"memory": "plan", "report": "run"}
ENTRIES_IMPORT = {
    "scripts.train_pretrain": {"scripts.trainer", "scripts.prepare_data", "scripts.run.state", "scripts.engine.distributed"},
    "scripts.train_distill": {"scripts.trainer", "scripts.prepare_data", "scripts.run.state", "scripts.engine.distributed"},
    "scripts.prepare_data": {"scripts.run.storage", "scripts.plan.machine", "scripts.engine.distributed", "scripts.report"},
    "scripts.export_gguf": {"scripts.run.checkpoint", "scripts.run.run_dir", "scripts.run.storage"},
    "scripts.generate": {"scripts.run.checkpoint", "scripts.run.run_dir", "scripts.plan.machine", "scripts.report"},
}
WITHIN = {
    "ds.files": set(),
    "ds.corpus": {"ds.files"},
    "ds.tokenizer": {"ds.files"},
    "ds.encoder": {"ds.files", "ds.tokenizer"},
    "ds.shards": set(),
    "ds.pieces": {"ds.files", "ds.corpus", "ds.tokenizer", "ds.encoder", "ds.shards"},
    "ds.loader": {"ds.shards"},
}
MAY_KNOW = {
    "deepspeed": {"scripts.trainer", "scripts.engine.offload", "scripts.engine.distributed"},
    "os.environ": {"scripts.config", "scripts.engine.distributed"},
    "sys.argv": {f"scripts.{name}" for name in (*ENTRIES, *BESIDE)},
    "matplotlib": {"scripts.report"},
    "safetensors": {"scripts.model.huggingface"},
    "tokenizers": {"ds.tokenizer", "ds.encoder", "scripts.prepare_data", "scripts.generate", "scripts.export_gguf"},
    "tiktoken": {"ds.encoder"},
    "gguf": {"scripts.export_gguf"},
    "prompt_toolkit": {"scripts.generate"},
    "wandb": {"scripts.run.tracker"},
    "trackio": {"scripts.run.tracker"},
    "np.memmap": {"ds.shards"},
    "transformers": set(),
}
NEVER_IMPORTED = {
    "argparse", "optparse", "getopt", "click", "typer", "fire", "absl", "hydra", "yaml", "omegaconf", "configparser", "tomllib",
    "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib",
}  # fmt: skip
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
NEVER_SPELLED = {"torch.load", "torch.save", "np.load", "numpy.load", "os.getenv", "os.putenv", "os.system"}
TEMPERATURE_ROOMS = {"scripts.config", "scripts.model.losses", "scripts.model.sampling", "scripts.generate"}
PASSED_ON = {
    "scripts.run.teacher": {"distill_temperature"},
    "scripts.train_distill": {"distill_temperature", "temperature"},
}
LONGEST_FUNCTION_LINES, MOST_PARAMETERS = 40, 5
MOST_LINES = {"scripts.trainer": 300, "scripts.config": 650}
MOST_LINES_ELSEWHERE = 450
CONTRACT = {"generate"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(), path.name)
    for folder in ("ds", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.stem != "__init__"
}
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def imported(tree: ast.AST) -> set[str]:
    """Dotted names; `from scripts import losses` counts as scripts.losses, `from scripts.losses import x` too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            whole = node.module in ("ds", "scripts", *(f"scripts.{folder}" for folder in FOLDERS))
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {str(node.module)}
    return names


@cache
def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@cache
def spelled(tree: ast.AST) -> set[str]:
    """Dotted names as they are used; `from os import environ` counts as os.environ."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return names | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@cache
def words(tree: ast.AST) -> set[str]:
    """Every identifier of the code: names, attributes, arguments, keywords, functions."""
    fields = ("id", "attr", "arg", "name")
    return {
        str(getattr(node, field)) for node in ast.walk(tree) for field in fields if isinstance(getattr(node, field, 0), str)
    }


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def storey(module: str) -> int:
    """Where a module of scripts/ stands in ORDER."""
    _, *parts = module.split(".")
    name = parts[0] if len(parts) > 1 or parts[0] in ORDER else BESIDE.get(parts[0], "entries")
    return ORDER.index(name)


@every_module
def test_module_imports_only_what_lies_upstream(module):
    house = {name for name in imported(MODULES[module]) if name.split(".")[0] in ("ds", "scripts", "tests")}
    if module.startswith("ds."):
        assert house <= WITHIN[module]
        return
    assert house <= set(MODULES), "an import of something that is no module"
    upstream = {name for name in house if name.startswith("scripts.")}
    assert all(storey(name) <= storey(module) for name in upstream)
    if module in ENTRIES_IMPORT:
        above_model = {name for name in upstream if storey(name) > ORDER.index("model")}
        assert above_model <= ENTRIES_IMPORT[module]


def test_imports_have_no_circle():
    waiting = {module: {name for name in imported(tree) if name in MODULES} for module, tree in MODULES.items()}
    while waiting:
        free = {module for module, needed in waiting.items() if not needed & waiting.keys()}
        assert free, waiting
        waiting = {module: needed for module, needed in waiting.items() if module not in free}


def test_only_the_rooms_of_the_design_are_there():
    for folder in ("ds", "scripts"):
        present = {path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
        files = {path.name for path in (ROOT / folder).glob("*.py")}
        assert present == files | (set(FOLDERS) if folder == "scripts" else set())
    for folder, names in ROOMS.items():
        assert {module.split(".")[2] for module in MODULES if module.startswith(f"scripts.{folder}.")} == names
    standing = {module.split(".")[1] for module in MODULES if module.startswith("scripts.") and module.count(".") == 1}
    assert standing == {"config", "trainer", *ENTRIES, *BESIDE}


@every_module
def test_no_file_is_too_long(module):
    lines = len((ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines())
    assert lines <= MOST_LINES.get(module, MOST_LINES_ELSEWHERE)


@every_module
def test_no_function_has_more_than_five_parameters_that_are_not_keyword_only(module):
    for function in functions(MODULES[module]):
        names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
        given = names[1:] if names[:1] in (["self"], ["cls"], ["ctx"]) else names
        assert len(given) <= MOST_PARAMETERS or function.name in CONTRACT, function.name


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """What functions say of their parameters and results; autograd's own forward and backward are left out."""
    for function in functions(tree):
        every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        if [argument.arg for argument in every[:1]] != ["ctx"]:
            yield from filter(None, [function.returns, *(argument.annotation for argument in every)])


@every_module
def test_no_value_is_an_anonymous_tuple_whose_fields_have_meanings(module):
    for annotation in annotations(MODULES[module]):
        for node in ast.walk(annotation):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "tuple":
                assert ast.unparse(node.slice).endswith("...)"), ast.unparse(annotation)
    for function in functions(MODULES[module]):
        if [argument.arg for argument in function.args.args[:1]] != ["ctx"]:
            given = [node.value for node in ast.walk(function) if isinstance(node, ast.Return | ast.Yield)]
            assert not any(isinstance(value, ast.Tuple) for value in given), function.name


PRIVATE = {
    name: {str(getattr(node, "name", "")) for node in tree.body if str(getattr(node, "name", "")).startswith("_")}
    for name, tree in MODULES.items()
}
TESTS = {path.name: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}


IMPORT_LINE = re.compile(r"from ([\w.]+) import (\([^)]*\)|[^\n]*)")


def private_uses(source: str) -> set[str]:
    """Private functions and classes of the house that a source imports or reads from a module, also in a script within it."""
    found, read = set(), set(re.findall(r"\b(\w+)\.(_\w+)", source))
    lines = [(module, line) for module, line in IMPORT_LINE.findall(source) if module in PRIVATE]
    for module, names in PRIVATE.items():
        stem = module.split(".")[-1]
        found |= {f"{stem}.{name}" for name in names if (stem, name) in read}
    for module, line in lines:
        found |= {f"{module.split('.')[-1]}.{name}" for name in PRIVATE[module] & set(re.findall(r"\w+", line))}
    return found


@pytest.mark.parametrize("name", [*MODULES, *TESTS])
def test_no_private_name_is_used_outside_its_module(name):
    source = TESTS[name] if name in TESTS else (ROOT / f"{name.replace('.', '/')}.py").read_text()
    assert private_uses(source) == set()


# Numbers that are not settings: formats, formulas, and what has no effect on a result that anybody would want another of.
NOT_SETTINGS = {
    "ds.files": {"(PIECE_BYTES, COMPRESSED_BYTES)", "COMPRESSIONS"},
    "ds.corpus": {"(PARQUET_BATCH_ROWS, HEAD_BYTES)", "LONGEST_JSON_WORD"},
    "ds.tokenizer": {
        "PIECE_CHARACTERS", "BLOCK_BYTES", "PRINTABLE_BYTES", "OTHER_BYTES", "BYTE_SYMBOLS", "RARE_BYTES",
        "LARGEST_FILE_BYTES", "LARGEST_VOCABULARY_IDS", "SHOWN_CHARACTERS",
    },
    "ds.encoder": {"(BATCH_CHARACTERS, BATCH_PIECES)"},
    "ds.shards": {
        "(MAGIC, VERSION)", "(DIGEST_AT, DIGEST_BYTES)", "BLOCK_BYTES", "(LABEL_MAGIC, LABEL_VERSION)",
        "(HASHED_BYTES, HASHING_THREADS)",
    },
    "ds.pieces": {"PIECE_BYTES", "BATCH_TOKENS", "COUNTED_BYTES", "COMPARED_DOCUMENTS", "LENGTH_CLASSES"},
    "ds.loader": {"NUM_ROUNDS", "SCAN_TOKENS", "PERMUTED_ROWS", "REMEMBERED_COUNTS"},
    "scripts.model.huggingface": {"LARGEST_JSON_BYTES", "LARGEST_TEMPLATE_BYTES"},
    "scripts.model.documents": {"TILE_ROWS"},
    "scripts.model.losses": {"IGNORED", "HALF_GRADIENT_SCALE"},
    "scripts.model.sampling": {"LEAST_TEMPERATURE"},
    "scripts.plan.footprint": {"(LABEL_CHUNK_BYTES, LABEL_COPIES)", "(DOCUMENT_BYTES, WINDOW_BYTES)"},
    "scripts.plan.budget": {
        "TOKENS_A_PARAMETER", "WIDTHS", "SIZES", "(MOST_ROWS, MOST_MICRO_BATCH_TOKENS)",
        "(BYTES_A_TOKEN, LONGEST_WARMUP_STEPS)", "SOLD_CARDS",
    },
    "scripts.plan.machine": {"LARGEST_LIMIT", "BACKWARD_SHARE", "NOTABLE_SWAP_BYTES"},
    "scripts.report": {"(SHOWN_CHARACTERS, SHOWN_NAME_CHARACTERS, TABLE_COLUMNS)", "BEHIND"},
    "scripts.run.page": {"(MOST_POINTS, MOST_SAMPLES, MOST_EVENTS)", "NUM_COLORS"},
    "scripts.run.teacher": {"LEAST_BLOCK_TOKENS"},
    "scripts.memory": {"NAME_COLUMNS", "NUMBER_COLUMNS"},
    "scripts.engine.watch": {"STOPPED", "FAILED", "READ_BYTES"},
    "scripts.engine.distributed": {"MESSAGE_BYTES", "IS_VALUE_ERROR"},
    "scripts.engine.updates": {"NEWTON_SCHULZ", "LEAST_NORM", "RMS_OF_ADAMW", "ROW_ELEMENTS", "WORDS", "HIGH_HALF"},
    "scripts.engine.truth_check": {
        "LEARNING_RATE", "MOST_TRIES", "MOST_STEPS", "FEWEST_MICRO_BATCHES", "MOST_MICRO_BATCHES", "PLAIN_ROWS", "ROUNDING",
        "CUTS", "BOUNDS", "(SHORT_MOMENTS, SHORT_MUON_UPDATE)",
    },
    "scripts.run.storage": {"HASH_BYTES", "DIGEST_BYTES"},
    "scripts.run.run_dir": {"FOLDERS"},
    "scripts.run.checkpoint": {"FORMAT", "TEXTS_BYTES", "LARGEST_STEP"},
    "scripts.prepare_data": {"FORMAT_VERSION"},
}  # fmt: skip


def holds_a_number(value: ast.expr) -> bool:
    """Whether a number above zero stands in it: zeros are where a count begins."""
    numbers = [node.value for node in ast.walk(value) if isinstance(node, ast.Constant) and type(node.value) in (int, float)]
    return any(numbers)


@every_module
def test_settings_live_in_the_configuration(module):
    tree = MODULES[module]
    assert isinstance(tree, ast.Module)
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    named = [
        (node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value)
        for body in bodies
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    constants = {ast.unparse(target) for target, value in named if value is not None and holds_a_number(value)}
    assert module == "scripts.config" or constants <= NOT_SETTINGS.get(module, set())


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
    for secret in MAY_KNOW.keys() - {"transformers"}:
        knowing = {name for name, tree in MODULES.items() if any(secret in prefixes(n) for n in imported(tree) | spelled(tree))}
        assert knowing & MAY_KNOW[secret], secret


@every_module
def test_only_the_trainer_initializes_the_engine_and_calls_its_backward_and_step(module):
    calls = [name.split(".") for name in called(MODULES[module])]
    assert module == "scripts.trainer" or not any(name[-1] in ("backward", "step") and "engine" in name for name in calls)
    assert module == "scripts.trainer" or "deepspeed.initialize" not in spelled(MODULES[module])
    assert module in ("scripts.trainer", "scripts.engine.truth_check") or not any(n[-1] in ("backward", "step") for n in calls)


def test_the_trainer_reads_from_the_top():
    """Setup, then the loop, one step, one micro-batch, and what the ranks learn of it."""
    names = [node.name for node in MODULES["scripts.trainer"].body if isinstance(node, ast.FunctionDef)]  # pyright: ignore
    assert names[:5] == ["set_up", "train", "run_step", "run_micro_batch", "reduce_over_ranks"]


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
