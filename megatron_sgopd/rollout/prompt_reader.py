"""python -m megatron_sgopd.rollout.prompt_reader MODEL MEMORY_LIMIT    (started by prompt_cache.py)

Reads sources of prompts and tokenizes them: a JSON line in, [settings, path of the result], and lines out, of progress
and of the end. What it reads is hostile, so that it has a limit of memory, and no network.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sgopd.checkpoint.files import new_file
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import NamedRows, read_prompts, write_prompts
from megatron_sgopd.rollout.tokenizer import load_tokenizer


def main() -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def reply(**said: Any) -> None:
        print(json.dumps(said), file=replies, flush=True)

    model, memory_limit = sys.argv[1], int(sys.argv[2])
    sys.addaudithook(refuse_network)
    try:
        tokenizer = load_tokenizer(model) if model else None
    except ConfigError as error:
        reply(error=str(error))
        return
    _limit_memory(memory_limit)
    reply(ready=True)
    for line in sys.stdin:
        values, out = json.loads(line)
        try:
            settings, left_out = PromptSettings(**values), NamedRows()
            with new_file(Path(out)) as file:
                prompts = read_prompts(settings, tokenizer, left_out, _each_second(reply))
                write_prompts(prompts, file, left_out)
                os.fsync(file.fileno())
        except ConfigError as error:
            reply(error=str(error))
        except MemoryError:
            reply(
                error=f"{values['source']}: a prompt, a file that unpacks to far more than it is, or the chat template "
                f"of {model} takes more than {memory_limit >> 30} GiB of memory: leave it out"
            )
        except OSError as error:
            reply(error=f"{out} cannot be written ({error.strerror}): free some space, or set SGOPD_CACHE")
        except Exception as error:  # whatever a library does on hostile bytes, it is a fault of the source
            reply(error=f"{values['source']} cannot be read ({' '.join(repr(error).split())}): leave out what is wrong")
        else:
            reply(whole=True)


def _each_second(reply: Callable[..., None]) -> Callable[[int], None]:
    said = time.monotonic()

    def progress(read: int) -> None:
        nonlocal said
        if time.monotonic() - said > 1:
            said = time.monotonic()
            reply(read=read)

    return progress


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what is read is on this machine, whatever a data set says.

    Raises:
        PermissionError: in place of a connection, or of a look-up of a name.
    """
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise PermissionError(f"a data set must not reach for the network ({arguments[-1]!r})")


def _limit_memory(limit: int) -> None:
    """Of what is allocated, beyond the libraries; files that are mapped to be read do not count."""
    [held] = [
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    ]
    total = int(held) * 1024 + limit
    resource.setrlimit(resource.RLIMIT_DATA, (total, total))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
