""".venv/bin/python tools/convert_checkpoint.py to-megatron FOLDER OUT      (or: to-hf CHECKPOINT OUT)

The same as `megatron-sgopd convert`, for batch scripts that name a file.
"""

import sys

from megatron_sgopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
