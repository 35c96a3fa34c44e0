"""Every command in the documents runs, every link has a target, and every quoted error text exists."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from postgres_server import PostgresServer

from mbqueue.buckets import STORE_VARIABLE
from mbqueue.cli import main
from mbqueue.cli.app import app
from mbqueue.project import ENVIRONMENT_VARIABLE
from mbqueue.settings import parse_settings
from mbqueue.topology import QUEUE_VARIABLE

ROOT = Path(__file__).parent.parent
#: The page on which every command is followed by its output.
TUTORIAL = "docs/tutorials/first-run.md"
#: Pages that a reader works through in this order, running their commands in the same project.
RUN_IN_ORDER = (
    TUTORIAL,
    "README.md",
    "docs/tutorials/first-session.md",
    "docs/reference/experiment-file.md",
    "docs/how-to/sessions.md",
    "docs/how-to/data.md",
    "docs/how-to/targets.md",
    "docs/how-to/leaderboard.md",
    "docs/how-to/recover.md",
    "docs/reference/status-json.md",
    "docs/reference/python.md",
    "docs/how-to/steer.md",
    "docs/how-to/drives.md",
    "docs/how-to/many-machines.md",
    "docs/how-to/slurm.md",
)
#: The placeholders that the documents use for a reader's own server and bucket.
SERVER, BUCKET = "postgresql://me@server/mbqueue", "s3://my-bucket/chgnet"
#: Pages generated from the commands; tests/cli runs their examples.
COMMAND_PAGES = sorted(ROOT.glob("docs/reference/commands/*.md"))
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {*COMMAND_PAGES})

#: Each command in the documents that this test does not run → the reason, or where it is run.
LEFT_OUT = {
    "python3 -m venv .venv": "`make` does the same before it runs the tests",
    "source .venv/bin/activate": "the same",
    "pip install .": "installs into the environment of the tests",
    "!pip install -q /content/drive/MyDrive/mbqueue && pip install -q --no-deps matbench==0.6 && mbqueue doctor": "a "
    "cell of Colab; the notebook's, which do the same, are run in tests/test_notebook.py",
    "pip install --no-deps matbench==0.6": "the same",
    "pip install 'mbqueue[postgresql]'": "the same",
    "pip install 'mbqueue[objects]'": "the same",
    "mbqueue doctor": "run from docs/tutorials/first-session.md",
    "mbqueue work --background": "run from docs/tutorials/first-session.md",
    "mbqueue work --devices 0,1,2": "needs three GPUs; run with cpu,cpu in tests/session/test_devices.py",
    "pip install 'mbqueue[slurm]'": "installs into the environment of the tests",
    "mbqueue launch slurm --gpus 5 --time 2h --partition gpu": "needs Slurm; tests/api/test_launching.py",
    "pip install 'mbqueue[board]'": "installs into the environment of the tests",
    "mbqueue board": "serves until Ctrl-C; tests/web/test_serving.py",
    "mbqueue board --host 0.0.0.0": "the same; tests/web/test_access.py",
    "pip install 'mbqueue[search]'": "installs into the environment of the tests",
    "mbqueue enqueue rates": "needs the search file above it; tests/search/test_sessions.py",
    "mbqueue work": "run from README.md",
    "mbqueue status rates": "tests/search/test_sessions.py",
    "mbqueue report rates": "tests/search/test_sessions.py",
    "mbqueue export-study rates --output study.db": "tests/search/test_sessions.py",
    "mbqueue promote rates --name tuned": "tests/search/test_sessions.py",
    "mbqueue enqueue full_finetune --seeds 0-2": "tests/cli/test_commands.py",
    "mbqueue enqueue mine --seeds 0-2": "tests/cli/test_data_commands.py",
    "mbqueue blend full_finetune.seed0 full_finetune.seed1 full_finetune.seed2 --name blended": "run with two seeds of "
    "a small experiment in tests/session/test_blends.py",
    "mbqueue blend full_finetune.seed0 full_finetune.seed1 slower --weights fitted --name blended": "the same",
    "mbqueue enqueue full_finetune --seeds 0-2 --set train.validation_seed=0": "tests/cli/test_commands.py",
    "mbqueue predict-again full_finetune --test-strains 8 --name strained": "the same",
    "mbqueue enqueue full_finetune --set train.soup=5 --name soup": "tests/train/test_options.py",
    "mbqueue logs -f": "run from docs/tutorials/first-session.md",
    "mbqueue stop": "the same",
    "%load_ext tensorboard": "a magic of Colab",
    "%tensorboard --logdir PROJECT/state/logs/tensorboard": "the same",
    "mbqueue enqueue full_finetune --dataset data/mine.jsonl --name mine": "needs a file of the reader's own; "
    "the forms are tested in tests/data",
    "mbqueue enqueue scalar_head --dataset matbench_log_kvrh": "would download the file in the next session; run "
    "with a made one in tests/session/test_official_task.py",
    'mbqueue enqueue scalar_head --name mine --dataset data/mine.csv --target-column gap --set target.name="band gap" '
    "--set target.unit=eV --set target.kind=scalar": "needs a file of the reader's own; "
    "tests/cli/test_data_commands.py",
    "mbqueue predict data/new.csv results/daily/*/mine.seed*/model_fold_*.pth": "needs files of the reader's own; "
    "tests/cli/test_data_commands.py",
    "mbqueue report full_finetune --png pictures": "needs a browser; tests/results/test_pictures.py",
    "make demo": "run in CI by itself",
    "make test": "runs this test",
    "make test-kernels": "takes minutes; tests/train/test_offline.py runs a part of it",
}
#: Commands that appear only in running text → the test that runs the command, or why no test does.
NAMED_IN_TEXT = {
    "mbqueue --project DIR status": "tests/cli/conftest.py",
    "mbqueue enqueue mine": "tests/cli/test_data_commands.py",
    "mbqueue init project": "tests/test_project.py",
    "mbqueue launch local --workers 2 --time 2h": "tests/api/test_launching.py",
    "mbqueue board --read-only": "tests/web/test_access.py",
    "mbqueue migrate-queue sqlite": "tests/queue/test_migrating.py",
    "MBQUEUE_QUEUE=sqlite mbqueue recover --force": "tests/drive/test_clusters.py",
    "mbqueue cache prune --all": "tests/cli/test_data_commands.py",
    "mbqueue retry EXPERIMENT": "tests/cli/test_commands.py",
    "mbqueue events rates.003": "tests/search/test_sessions.py",
    "mbqueue retry rates.003": "tests/search/test_searches.py",
    "mbqueue resume rates": "tests/search/test_sessions.py",
    "make test-oldest": "Makefile",
    "pip install mfusepy": "tests/drive/fuse_check.py",
    "pip install 'mbqueue[png]'": "pyproject.toml",
    "pip install tensorboard": "pyproject.toml",
    "python tools/public_address.py OWNER/NAME": "tests/test_documents.py",
    "python tests/drive/fuse_check.py": "tests/drive/fuse_check.py",
}
_COMMAND = re.compile(r"^(mbqueue|pip|python|source|git|make|[!%])\S*")
_IN_TEXT = re.compile(r"^(?:MBQUEUE_[A-Z_]+=\S+ )*(?:(?:mbqueue|pip|python|git|make|pytest) .+|… -k .+)")
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", path.read_text(), re.MULTILINE | re.DOTALL):
        indent = len(match[1])
        text = "".join(line[indent:] for line in match[3].splitlines(keepends=True))
        yield Block(str(path.relative_to(ROOT)), match[2], text)


def commands(block: Block) -> Iterator[tuple[list[str], str]]:
    """(arguments, expected error) of each line that begins with ``$``."""
    lines = block.text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("$ "):
            yield shlex.split(line[2:]), after if after.startswith("error:") else ""


def make_small(project: Path) -> None:
    """Shrink the documents' full trainings to a few crystals and seconds."""
    for path in (project / "jobs").glob("*.toml"):
        text = path.read_text()
        text = re.sub(r'dataset = "matbench_mp_e_form"', 'dataset = "sample"', text)
        text = re.sub(r"limit = 0", "limit = 20", text)
        text = re.sub(r"epochs = [1-9]\d*", "epochs = 1", text)
        text = text.replace("folds = [0, 1, 2, 3, 4]", "folds = [0, 1]")
        path.write_text(text)


def test_every_command_in_the_documents_runs_in_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    postgres_server: PostgresServer,
) -> None:
    for variable in (ENVIRONMENT_VARIABLE, QUEUE_VARIABLE, STORE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    ours = {SERVER: postgres_server.url(), BUCKET: (tmp_path / "bucket").as_uri()}
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ran = []
    for name in RUN_IN_ORDER:
        names: dict[str, object] = {"__name__": "document"}
        for block in blocks(ROOT / name):
            if block.language == "console":
                for written, error in commands(block):
                    arguments = [reduce(lambda text, pair: text.replace(*pair), ours.items(), a) for a in written]
                    printed = run(arguments, error, block, monkeypatch, capsys)
                    if name == TUTORIAL:
                        check_shown(block, shlex.join(written), printed)
                    ran.append(arguments[0])
            elif block.language == "python":
                exec(compile(block.text, block.document, "exec"), names)
                capsys.readouterr()
    torch.set_num_threads(threads)
    assert len(ran) > 20


#: Patterns for text that differs between two runs: the project's folder, device, days, bars, curves and numbers.
_VARYING = (
    (r"\S*/my-project", "PROJECT"),
    (r"(session \S+) on .*?, ", r"\1 on DEVICE, "),
    (r"\b\d{8}T\d{6}Z-[0-9a-f]+", "ID"),
    (r"[░█]+", "BAR"),
    (r"[▁-▇]+", "CURVE"),
    (r"\b(\d+h)?\d+m\b", "TIME"),
    (r"[-−]?\d+(\.\d+)?", "N"),
    (r"\s+", " "),
)


def shape(line: str) -> str:
    return reduce(lambda text, pair: re.sub(*pair, text), _VARYING, line.strip())


def test_the_shape_of_a_line_keeps_its_words_and_drops_its_numbers() -> None:
    assert shape("12:33:15  first fold 0 epoch 1: committed; best epoch so far 1") == shape(
        "09:01:59  first fold 1 epoch 12: committed; best epoch so far 10"
    )
    assert shape("jobs: 2 ready, 5 waiting") != shape("jobs: 2 ready, 5 failed")


def check_shown(block: Block, command: str, printed: str) -> None:
    """Check that each line below a command was printed; an ellipsis may replace any lines."""
    lines = block.text.splitlines()
    start = lines.index(f"$ {command}") + 1
    shown = list(takewhile(lambda line: not line.startswith("$ "), lines[start:]))
    shapes = {shape(line) for line in printed.splitlines()}
    for line in shown:
        assert line == "…" or shape(line) in shapes, f"{line!r} is shown below {command}, which printed:\n{printed}"


def run(
    arguments: list[str], error: str, block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command from a document as a reader would, and return its output."""
    if arguments[0] == "cd":
        monkeypatch.chdir(arguments[1])
        return ""
    if arguments[0] == "export":
        monkeypatch.setenv(*arguments[1].split("=", 1))
        return ""
    if arguments[1] == "predict":
        arguments = [*small_prediction(arguments)]
    assert arguments[0] == "mbqueue", f"{block.document} has a command that is not run here: {arguments}"
    with pytest.raises(SystemExit) as ended:
        main(arguments[1:])
    said = capsys.readouterr()
    told = f"{block.document}: {' '.join(arguments)}\n{said.out}\n{said.err}"
    if error:
        assert ended.value.code, told
        assert error in said.err, told
    else:
        assert ended.value.code in ({75} if "--max-jobs" in arguments else {None, 0}), told
    if arguments[1] == "init":
        make_small(Path(arguments[2]))
    return said.err + said.out


def small_prediction(arguments: list[str]) -> Iterator[str]:
    """The same ``predict`` on a few crystals of the sample, with file names expanded as in a shell."""
    lines = gzip.decompress((ROOT / "mbqueue/data/sample/flla_sample.jsonl.gz").read_bytes()).splitlines(keepends=True)
    Path("few.jsonl").write_bytes(b"".join(lines[:20]))
    for argument in arguments:
        if argument == "sample":
            yield "few.jsonl"
        else:
            yield from sorted(map(str, Path().glob(argument))) if "*" in argument else [argument]


def test_every_document_with_commands_is_run() -> None:
    having = {b.document for path in DOCUMENTS for b in blocks(path) if b.language in ("console", "python")}
    assert having
    assert having <= set(RUN_IN_ORDER)


def test_every_command_that_is_not_run_is_named_with_its_reason() -> None:
    indented = {
        line.strip()
        for path in DOCUMENTS
        for line in _FENCED.sub("", path.read_text()).splitlines()
        if line.startswith("    ") and _COMMAND.match(line.strip())
    }
    lines = {re.sub(r"\s+#.*", "", line) for line in indented}
    # Measurements take minutes to hours; other tests cover the logic of their scripts.
    measurements = {line for line in lines if line.startswith("python -m benchmarks.")}
    assert lines - measurements == set(LEFT_OUT)
    for line in measurements:
        assert (ROOT / f"{line.split()[2].replace('.', '/')}.py").exists(), line


def named_in_text() -> Iterator[str]:
    """Yield every command with an argument between backticks; replace an ellipsis with the last pytest file."""
    subcommands = {*_subcommands(typer.main.get_command(app))}
    for path in DOCUMENTS:
        before = ""
        for code in re.findall(r"`([^`]+)`", _FENCED.sub("", path.read_text())):
            for command in " ".join(code.split()).split(" && "):
                if not _IN_TEXT.match(command) or set(command.split()[1:]) <= subcommands:
                    continue
                if "pytest" in command:
                    before = re.sub(r" -k .*", "", command[command.index("pytest") :])
                yield command.replace("…", before)


def _subcommands(command: Any) -> Iterator[str]:
    for name, below in getattr(command, "commands", {}).items():
        yield name
        yield from _subcommands(below)


def test_every_command_named_in_the_text_is_tried_somewhere() -> None:
    run_in_blocks = {
        " ".join(arguments) for path in DOCUMENTS for b in blocks(path) for arguments, _ in commands(b) if arguments
    }
    named = set(named_in_text()) - set(LEFT_OUT) - run_in_blocks
    others = {command for command in named if "pytest " not in command and "-m benchmarks." not in command}
    assert others == set(NAMED_IN_TEXT)
    for where in NAMED_IN_TEXT.values():
        assert (ROOT / where).is_file(), where
    for command in named - others:
        module = re.search(r"-m (benchmarks\.\w+)", command)
        assert module is None or (ROOT / f"{module[1].replace('.', '/')}.py").exists(), command


def test_every_pytest_line_in_the_documents_selects_a_test() -> None:
    lines = [shlex.split(command[command.index("pytest") :]) for command in named_in_text() if "pytest " in command]
    assert lines
    files = sorted({word for line in lines for word in line if word.endswith(".py")})
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not missing
    collected = collected_from(files)
    for line in lines:
        chosen = line[line.index("-k") + 1] if "-k" in line else ""
        for file in (word for word in line if word.endswith(".py")):
            assert any(id_.startswith(f"{file}::") and is_chosen(id_, chosen) for id_ in collected), " ".join(line)


def collected_from(files: list[str]) -> list[str]:
    """The ids of the tests in these files, collected in this process, which has already imported most packages."""
    ids: list[str] = []

    class Collected:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            ids.extend(item.nodeid for item in session.items)

    options = ["--collect-only", "-q", "-p", "no:unraisableexception", f"--rootdir={ROOT}"]
    assert pytest.main([*options, *(str(ROOT / file) for file in files)], [Collected()]) == 0
    return ids


def is_chosen(test_id: str, expression: str) -> bool:
    """Whether pytest's ``-k expression`` selects a test."""
    name = test_id.partition("::")[2].lower()
    words = [
        word if word in ("and", "or", "not") else str(word.lower() in name)
        for word in re.findall(r"[^\s()]+", expression)
    ]
    return not words or bool(eval(" ".join(words)))


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"(?:^    |`)make (?:PYTHON=\S+ )?([a-z]+)", path.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= targets


def test_every_piece_of_settings_in_the_documents_is_valid() -> None:
    found = [block for path in DOCUMENTS for block in blocks(path) if block.language == "toml"]
    assert found
    for block in found:
        parse_settings(tomllib.loads(block.text), source="the block")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in headings(linked), f"{path.name} links to {target}"


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    pages = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(pages) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    readme = (ROOT / "README.md").read_text()
    pictures = [ROOT / name for name in re.findall(r"!\[[^]]*\]\((docs/images/[^)]+)\)", readme)]
    assert len(readme.splitlines()) < 80
    assert len(pictures) == 2
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in found}


def test_the_page_of_the_experiment_file_is_what_the_definitions_say() -> None:
    tool_of_page = tool("experiment_page")
    assert tool_of_page.page() == tool_of_page.PAGE.read_text(), "Run: python tools/experiment_page.py"


def test_the_pages_of_the_commands_are_what_the_commands_say() -> None:
    written = {path.name: path.read_text() for path in COMMAND_PAGES}
    assert written == tool("command_pages").pages(), "Run: python tools/command_pages.py"


def test_every_place_says_the_same_public_address() -> None:
    public_address = tool("public_address")
    for place in public_address.BADGE_PLACES:
        expected = public_address.rewritten(place, public_address.address())
        assert (ROOT / place).read_text() == expected, "Run: python tools/public_address.py OWNER/NAME"
        assert "someone/theirs" in public_address.rewritten(place, "someone/theirs")
    spelled_out = [path for path in DOCUMENTS if re.search(r"\bREPOSITORY\b", path.read_text())]
    assert not spelled_out, "a placeholder was left"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUOTED = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "reference" / "errors.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_error_text_is_one_that_the_program_says(quoted: str) -> None:
    # A space next to an ellipsis may belong to the part that varies.
    pieces = [re.escape(piece.strip()) for piece in quoted.split("…")]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in said_by_the_program()), quoted


@cache
def said_by_the_program() -> tuple[str, ...]:
    """Return every text in the package and the Makefile, without the placeholders of f-strings."""
    texts = [(ROOT / "Makefile").read_text()]
    for path in (ROOT / "mbqueue").rglob("*.py"):
        texts += [text(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, TEXTS)]
    return tuple(texts)


TEXTS = (ast.Constant, ast.JoinedStr, ast.BinOp)


def text(node: Any) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return ""
