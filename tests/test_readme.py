"""What README and the docstrings tell people to type exists: flags, files, links."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from conftest import free_port

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch_multigpu.sh", ROOT / "multi_gpu_train.slurm",
         *sorted(ROOT.glob("[0-9][0-9]_*.py"))]
LAUNCHERS = "python|torchrun|accelerate launch|./launch_multigpu.sh|sbatch"
COMMAND = re.compile(
    rf"(?:^|\s)({LAUNCHERS})\b([^\n`#]*?)\b(\d\d_\w+\.py)([^\n`#|&>]*)"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def documented_commands():
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for launcher, options, script, flags in COMMAND.findall(text):
            command = f"{launcher}{options}{script} {flags.strip()}"
            yield pytest.param(launcher, options, script, flags, id=f"{page.name}: {command}")


@pytest.mark.parametrize(("launcher", "options", "script", "flags"), documented_commands())
def test_every_documented_command_parses(launcher, options, script, flags, monkeypatch):
    options = [*shlex.split(options), script]
    if launcher == "torchrun":
        assert torch.distributed.run.parse_args(options).training_script == script
    elif launcher == "accelerate launch":
        assert launch_command_parser().parse_args(options).training_script == script
    elif launcher == "sbatch":  # its options, then the batch script
        assert options[-2] == "multi_gpu_train.slurm" and all(x[:2] == "--" for x in options[:-2])
    spec = importlib.util.spec_from_file_location("lesson", ROOT / script)
    lesson = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(ROOT)
    spec.loader.exec_module(lesson)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags.replace("...", ""))])
    config = lesson.parse_config(lesson.Config, getattr(lesson, "PRESETS", {}))
    assert isinstance(config, lesson.Config)


def test_commands_are_found_in_readme_and_in_every_script():
    pages = {param.id.split(":")[0] for param in documented_commands()}
    assert pages == {page.name for page in PAGES}


def test_relative_links_exist():
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_the_numbers_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "results/fill_readme.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    text = fill.README.read_text(encoding="utf-8")
    assert fill.filled(text) == text, "python results/fill_readme.py"
    assert {f"{lesson:02}" for lesson in range(7)} <= {*re.findall(r"<!-- results/(\d\d)_", text)}


def blocks(pattern):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [x for x in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if pattern in x]


def run_block(block, folder, timeout=600):
    """As a reader would: copied into a shell, in a folder with the scripts."""
    for script in [ROOT / "common.py", *ROOT.glob("[0-9][0-9]_*.py")]:
        shutil.copy(script, folder)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                        "PET_MASTER_PORT": str(free_port())}  # torchrun's --master_port
    block = "trap 'kill $(jobs -p) 2> /dev/null' EXIT\n" + block  # leaves no server behind
    return subprocess.run(["bash", "-e", "-c", block], cwd=folder, env=env, text=True,
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def test_the_check_of_several_gpus_runs(tmp_path):
    (block,) = blocks("check.py")
    output = run_block(block, tmp_path)
    assert "rank 0 of 2 on cpu" in output and "rank 1 of 2 on cpu" in output


def test_the_chain_of_all_lessons_runs(tmp_path):
    """With few steps, otherwise to the letter."""
    (block,) = blocks("transformers serve")
    for pattern, tiny in {
        r"--max_steps \d+": "--max_steps 10", r"--num_epochs \d+": "--max_steps 5",
        r"--num_examples \d+": "--num_examples 4 --keep_truncated", r"--max_tokens \d+":
        "--max_tokens 8", "--preset cpu": "--preset cpu --max_steps 2 --n_streams 4 "
        "--n_source_episodes 12 --n_episodes 4 --n_rollouts 2", "8000": str(free_port()),
        r"(05_sft.*)": r"\1 --max_answers 4 --max_new_tokens 8",
    }.items():
        block, found = re.subn(pattern, tiny, block)
        assert found, pattern
    output = run_block(block, tmp_path)
    assert len(re.findall("^done: ", output, re.MULTILINE)) == 7, output[-3000:]
    for folder in ("base", "small", "tuned", "student", "classifier", "ad"):
        assert (tmp_path / folder / "final_model").is_dir(), folder


def run_it_and_expect(script):
    """The last command under Run it, and the line under Expect up to the first word left out."""
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    command, line = re.search(r"([^\n#]+)(?:#[^\n]*)?\nExpect +(done: .*)", doc).groups()
    return command, re.split(r",? (?:\.\.\. )?in [\d.]+ min", line)[0]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A folder with the data of README's chain and what 02 has trained, and what 02 has printed."""
    folder = tmp_path_factory.mktemp("course")
    (block,) = blocks("transformers serve")
    data = block[: block.index("torchrun")]
    command, _ = run_it_and_expect(ROOT / "02_opt_multi_gpu_ddp.py")
    return folder, run_block(data + command, folder, timeout=3600)


# Not 01: it needs a teacher; the chain above has one.
@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the manual that is learned is of 3.11")
@pytest.mark.parametrize("script", PAGES[-5:], ids=lambda path: path.name)
def test_a_run_ends_as_the_docstring_says(script, course):
    folder, output = course
    command, expected = run_it_and_expect(script)
    if script.name[:2] != "02":
        output = run_block(command, folder, timeout=3600)
    line = re.search("^done: .*", output, re.MULTILINE)
    assert line, output[-3000:]
    wanted, own = (re.split(r"(\d[\d.]*)", text) for text in (expected, line[0]))
    n = len(wanted) - 1  # it ends with a number: words and numbers by turns
    assert n > 1 and own[:n:2] == wanted[:n:2]
    assert [*map(float, own[1:n:2])] == pytest.approx([*map(float, wanted[1:n:2])], rel=1e-2)
