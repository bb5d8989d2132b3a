"""Keys of the environment appear nowhere; no script can run what a user hands in."""

import ast
import os
import re
import shutil
import uuid

import harness
import pytest
from conftest import run_script
from test_01_generate_data import NAME, read, teacher

SECRETS = {name: f"marked-{name}-{uuid.uuid4().hex}" for name in (
    "OPENAI_API_KEY", "HF_TOKEN", "MY_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")}
FILES = sorted([*harness.ROOT.glob("0[1-6]_*.py"), harness.ROOT / "common.py"])

def assert_secret(*folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = [f"{name} in {path}" for path in files for name, secret in SECRETS.items()
             if secret.encode() in path.read_bytes()]
    assert len(files) > 3 and not found

@harness.SLOW
@pytest.mark.parametrize("way", ["to the end", "bad input", "damaged checkpoint", "killed"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_keys_are_in_no_file_and_no_line_that_training_writes(script, way, tmp_path):
    (tmp_path / "tmp").mkdir()  # torchrun's error files
    folder, flags = harness.fresh(script, tmp_path / "run"), []
    if way == "bad input":
        flags = ["--seed=x"]
    elif way == "damaged checkpoint":
        shutil.copytree(harness.finished(script) / "out", folder / "out")
        for path in (folder / "out").rglob("checkpoint*.pt"):
            path.write_bytes(b"PK" + path.read_bytes()[:100])
        flags = ["--resume"]
    with harness.launched(folder, script, *flags, TMPDIR=str(tmp_path / "tmp"), **SECRETS) as run:
        if way == "killed":
            run.wait_for_step(3)
            harness.workers(run, script)[0].kill()
        run.process.wait(120)
    assert_secret(tmp_path)

def test_keys_are_in_no_file_and_no_line_that_01_writes(tmp_path):
    faults = [None, "empty", "garbage", "refusal", lambda handler, body: (
        400, {"error": {"message": handler.headers["authorization"]}})]
    with teacher(lambda prompt, asked: faults[len(prompt) % 5]) as server:
        run_script(tmp_path, NAME, server.url, "--output_path=rows.jsonl", "--num_examples=40",
                   **SECRETS)
    assert len(read(tmp_path / "rows.jsonl")) == 40
    assert_secret(tmp_path)

def calls(tree):
    """(dotted name, keyword arguments) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords}, node

@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_can_run_what_a_user_hands_in(path):
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for name in node.names}
    assert not imported & {"pickle", "subprocess", "marshal", "shelve", "dill", "joblib"}
    for name, keywords, node in calls(tree):
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        assert name not in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp",
                            "compile", "__import__"), where
        assert "shell" not in keywords, where
        assert keywords.get("trust_remote_code", "False") == "False", where
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if name == "yaml.load":
            assert re.search(r"yaml\.(BaseLoader|SafeLoader)", where), where

def test_the_check_above_sees_what_it_forbids():
    found = [name for name, *_ in calls(ast.parse("eval('1')\nimport os\nos.system('x')"))]
    assert found == ["eval", "os.system"] and os.environ["HF_HUB_OFFLINE"] == "1"
