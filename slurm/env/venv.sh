# shellcheck shell=bash
# A virtual environment on a file system that all nodes see.
use_venv
