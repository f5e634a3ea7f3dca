"""python tests/checkpoints/kill_conversions.py MODEL OUT DIRECTION KILLS SEED      (DIRECTION: to-megatron | to-hf)

Kill a conversion at random moments, start it again each time, and check after each kill that whatever is
accepted as complete is complete. Each attempt is a process of its own, forked after the slow imports.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_sgopd.checkpoint.inspection import diff
from megatron_sgopd.cli import main
from megatron_sgopd.errors import ConfigError

model, out, direction = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
kills, seed = int(sys.argv[4]), int(sys.argv[5])
partial = out.with_name(f"{out.name}.partial")


def convert(source: Path, target: Path, way: str) -> int:
    size = ["--part-size" if way == "to-megatron" else "--max-shard-size", "500KB"]
    like = [] if way == "to-megatron" else ["--like", str(model), "--allow-no-tokenizer"]
    return main(["convert", way, str(source), str(target), "--verify", "off", *size, *like])


def attempt(source: Path, seconds: float | None) -> int | None:
    """Exit code of one attempt, None where it was killed after `seconds`."""
    pid = os.fork()
    if pid == 0:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        os._exit(convert(source, out, direction))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def complete(folder: Path) -> bool:
    """Whether our own readers accept the folder; then it must be the model, whole."""
    try:
        report = diff(model, folder, like=model)
    except ConfigError:
        return False
    assert not report["different"] and not report["only_in_a"] and not report["only_in_b"], report
    return True


torch.set_num_threads(1)
draw = random.Random(seed)
source = model
if direction == "to-hf":
    source = out.with_name("source")
    assert convert(model, source, "to-megatron") == 0
for name in ("first", "second"):  # imports all there is to import; then says how long it takes
    started = time.monotonic()
    assert convert(source, out.with_name(name), direction) == 0
    duration = time.monotonic() - started
done = finished = resumed = 0
while done < kills:
    resumed += partial.exists()
    code = attempt(source, draw.uniform(0, duration))
    if code is None:
        done += 1
        if out.exists():  # killed between the last rename and its end
            assert complete(out)
            shutil.rmtree(out)
        elif partial.exists():
            complete(partial)
            complete(partial / "release")
    else:
        assert code == 0 and complete(out)
        finished += 1
        shutil.rmtree(out)
if not out.exists():
    assert attempt(source, None) == 0
assert complete(out) and not partial.exists()
print(f"{direction}: {done} kills within {duration:.2f} s, {resumed} attempts went on, {finished + 1} finished")
