"""The bargain about repetition: what scripts share is copied, the copies are equal, and so each
script runs in a folder of its own."""

import ast
import difflib
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import WITH_COMMON, run_script
from test_01_generate_data import teacher

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))
BLOCK = re.compile(
    r"^# Copied between scripts: (\w+)\n(.*?)^# End of copied block: \1$", re.MULTILINE | re.DOTALL
)


def copies():
    """{name of the block: {script: text}}"""
    found = defaultdict(dict)
    for script in SCRIPTS:
        for name, text in BLOCK.findall(script.read_text(encoding="utf-8")):
            assert script.name not in found[name], f"{script.name} holds the block {name} twice"
            found[name][script.name] = text
    return found


def test_there_are_blocks_and_every_marker_has_its_pair():
    assert copies(), "no block was found: the markers and the pattern in this test disagree"
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        blocks = len(BLOCK.findall(text))
        assert text.count("# Copied between scripts:") == blocks, script.name
        assert text.count("# End of copied block:") == blocks, script.name


@pytest.mark.parametrize("name", sorted(copies()))
def test_every_copy_is_identical(name):
    (first, text), *others = copies()[name].items()
    for script, other in others:
        diff = "\n".join(difflib.unified_diff(text.split("\n"), other.split("\n"), first, script))
        assert text == other, f"choose one version of {name} and paste it into both:\n{diff}"


@pytest.mark.parametrize("name", sorted(copies()))
def test_every_block_has_a_second_copy(name):
    assert len(copies()[name]) > 1, f"only {list(copies()[name])} has {name}: take the markers out"


def test_definitions_that_scripts_share_lie_in_blocks():
    holders = defaultdict(set)
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        spans = [
            (text.count("\n", 0, m.start()) + 1, text.count("\n", 0, m.end()) + 1)
            for m in BLOCK.finditer(text)
        ]
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not any(
                first < node.lineno < last for first, last in spans
            ):
                holders[node.name].add(script.name)
    shared = {name: scripts for name, scripts in holders.items() if len(scripts) > 1}
    assert holders and not shared.keys() - {"main", "Config"}, f"unmarked copies: {shared}"


SMALLEST = {
    "01": "--num_examples 3",
    "02": "--preset tiny --max_steps 0",
    "03": "--dataset_path {kit}/rows.jsonl --student_model {kit}/student --max_steps 0",
    "04": "--train_file {kit}/rows.jsonl --text_column prompt --model {kit}/student --max_steps 0",
    "05": "--dataset {kit}/rows.jsonl --model {kit}/student --max_steps 0",
    "06": "--preset cpu --max_steps 0 --n_streams 4 --n_episodes 4",
}


@pytest.mark.parametrize("name", [script.name for script in SCRIPTS])
def test_a_script_that_was_copied_out_runs_alone(name, kit, tmp_path):
    """02 and 06 with common.py; nothing else lies in the folder."""
    with teacher() as server:
        url = [server.url] if name[:2] == "01" else []
        run = run_script(tmp_path, name, *url, *SMALLEST[name[:2]].format(kit=kit).split())
    assert {path.name for path in tmp_path.glob("*.py")} == {
        name, *["common.py"] * (name in WITH_COMMON)}
    assert re.search("^done: ", run.stdout, re.MULTILINE)
