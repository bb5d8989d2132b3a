"""End training runs of two processes at random moments, start them again, compare with undisturbed
runs: the same log, the same weights, nobody left alive. Adds up the counts in results/08_faults.md.

    python tests/faults/kill.py --moments 10 [--script 02] [--seed 1]"""

import argparse
import random
import re
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from harness import ROOT, SCRIPTS, kill_all, launched, make_material, none_left, outcome, workers

PHASES = "start-up", "training", "evaluation", "checkpoint", "export"
WAYS = "one rank", "all", "torchrun restarts", "SIGTERM", "SIGUSR1"
RESULTS = ROOT / "results/08_faults.md"
COLUMNS = ["script", *PHASES, *WAYS, "ended the same", "did not", "slowest, s"]

class Reference:
    """An undisturbed run: its outcome, and when it did what."""
    def __init__(self, folder, script):
        self.times, began = [], time.monotonic()
        with launched(folder, script) as run:
            while run.process.poll() is None:
                if len(self.times) < len(run.metrics):
                    self.times.append(time.monotonic() - began)
                time.sleep(0.005)
            self.end = time.monotonic() - began
            assert run.returncode == 0, run.stderr[-3000:]
        self.outcome = outcome(folder)
        self.last = self.outcome[0][-1]["step"]
        self.evaluated = [record["step"] for record in self.outcome[0] if record["step"] and
                          any(key.startswith("val_") for key in record)]

def until(run, reached, seconds=60):
    end = time.monotonic() + seconds
    while run.process.poll() is None and time.monotonic() < end and not reached():
        time.sleep(0.0005)

def wait_for(phase, run, script, rng, reference):
    """Wait for a random moment of this phase, or the end of the run."""
    step = lambda: run.metrics[-1]["step"] if run.metrics else -1
    if phase == "start-up":
        return time.sleep(rng.uniform(0.1, reference.times[0]))
    if phase == "checkpoint":
        first, output = rng.randrange(reference.last), run.folder / "out"
        until(run, lambda: step() >= first)
        return until(run, lambda: any(output.glob("checkpoint*unfinished")))
    wanted = {"training": rng.randrange(reference.last),
              "evaluation": rng.choice(reference.evaluated) - 1, "export": reference.last}[phase]
    until(run, lambda: step() >= wanted)
    time.sleep(rng.uniform(0, reference.end - reference.times[-1] if phase == "export" else 0.03))

def phase_of(run, reference):
    """What the run was doing, by what it has written."""
    step = max((record["step"] for record in run.metrics), default=-1)
    if any(run.folder.glob("out/checkpoint*unfinished")):
        return "checkpoint"
    if step in (-1, reference.last):
        return "start-up" if step < 0 else "export"
    return "evaluation" if step + 1 in reference.evaluated else "training"

def strike(way, run, script, rng):
    """Do it, and wait until all is over; for torchrun's restart, until it goes on."""
    victims = workers(run, script) or [run.process]
    if way == "all":
        kill_all(run.mark)
    elif way == "SIGTERM":
        run.process.terminate()  # torchrun hands it on
    elif way == "SIGUSR1":
        rng.choice(victims).send_signal(signal.SIGUSR1)
    else:
        rng.choice(victims).kill()

def disturb(script, folder, phase, way, rng, reference):
    """Returns (phase, seconds until it went on); AssertionError for what was lost."""
    restarts = way == "torchrun restarts"
    with launched(folder, script, PET_MAX_RESTARTS="3" if restarts else "0") as run:
        wait_for(phase, run, script, rng, reference)
        if restarts:
            until(run, lambda: len(workers(run, script)) == 2)
        phase = phase_of(run, reference)
        if run.process.poll() is not None:
            return None, 0
        with suppress(psutil.NoSuchProcess):
            strike(way, run, script, rng)
        began = time.monotonic()
        phase = phase_of(run, reference) if way == "all" else phase
        if restarts:
            until(run, lambda: "resumed from step" in run.stdout)
            recovery = time.monotonic() - began
        run.process.wait(120)
        assert none_left(run), "processes are left"
        assert SCRIPTS[script].split()[0] + '", line' not in run.stderr, run.stderr[-6000:]
        if way.startswith("SIG") and phase in ("training", "evaluation", "checkpoint"):
            assert re.search("stopped by a signal after step|^done", run.stdout, re.M), run.stdout
        assert not restarts or run.returncode == 0, run.stderr[-6000:]
    if not restarts:
        began = time.monotonic()
        with launched(folder, script, "--resume") as run:
            until(run, lambda: "resumed from step" in run.stdout)
            recovery = time.monotonic() - began
            run.process.wait(120)
            assert none_left(run), "processes are left"
            assert run.returncode == 0, run.stderr[-6000:]
    for own, expected in zip(*(x[0] for x in (outcome(folder), reference.outcome)), strict=True):
        assert own == expected
    assert outcome(folder) == reference.outcome, "other weights"
    return phase, recovery

def count_up(script, counts, slowest):
    """Add to the script's row of the table in results/."""
    text = RESULTS.read_text()
    row = re.search(rf"^\| {script} \|.*$", text, re.M)
    old = dict(zip(COLUMNS, map(str.strip, row[0].strip("|").split("|")), strict=True))
    new = [str(int(old[column]) + counts.get(column, 0)) for column in COLUMNS[1:-1]]
    new = [script, *new, f"{max(float(old[COLUMNS[-1]]), slowest):.1f}"]
    RESULTS.write_text(text.replace(row[0], f"| {' | '.join(new)} |"))

def trials(script, folder, moments, seed):
    """Returns ({what: how often}, slowest recovery in seconds)."""
    rng, counts, slowest, done = random.Random(f"{script} {seed}"), {}, 0, 0
    make_material(folder / "material")
    reference = Reference(shutil.copytree(folder / "material", folder / "reference"), script)
    while done < moments:
        wanted, way = PHASES[done % len(PHASES)], rng.choice(WAYS)
        own = shutil.copytree(folder / "material", folder / f"{done}")
        try:
            phase, seconds = disturb(script, own, wanted, way, rng, reference)
            result = "ended the same"
        except (AssertionError, psutil.TimeoutExpired, OSError, ValueError) as problem:
            phase, seconds, result = wanted, 0, "did not"
            print(f"{script} {own}: {problem!r}", flush=True)
        if phase:
            print(f"{script} {phase}, {way}: {result}, {seconds:.1f} s", flush=True)
            for key in (phase, way, result):
                counts[key] = counts.get(key, 0) + 1
            slowest, done = max(slowest, seconds), done + 1
        if result == "ended the same":
            shutil.rmtree(own)
    return counts, slowest

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--moments", type=int, default=10, help="of each script")
    parser.add_argument("--script", choices=SCRIPTS, help="only this one")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--no_count", action="store_true", help="leave results/ as it is")
    args = parser.parse_args()
    print(f"--seed {args.seed}")
    for script in [args.script] if args.script else SCRIPTS:
        folder = Path(tempfile.mkdtemp(prefix=f"faults_{script}_"))
        counts, slowest = trials(script, folder, args.moments, args.seed)
        if not args.no_count:
            count_up(script, counts, slowest)
        print(script, counts, f"slowest {slowest:.1f} s")
        if "did not" not in counts:
            shutil.rmtree(folder)

if __name__ == "__main__":
    main()
