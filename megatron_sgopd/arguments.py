"""Command line arguments that several commands have."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, as `load_recipe` takes its overrides."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting of the recipe; may be given several times",
    )


def prompt_text(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_prompt_text` was given, by the names of the settings."""
    return {
        "chat_template": not arguments.no_chat_template,
        "chat_template_arguments": arguments.chat_template_arguments,
        "system_prompt": arguments.system_prompt,
        "prompt_suffix": arguments.prompt_suffix,
    }


def add_prompt_text(parser: argparse.ArgumentParser, of: str) -> None:
    """Add what says how prompts become text, where no recipe does.

    Args:
        of: the prompts that are meant, for the help.
    """
    parser.add_argument("--no-chat-template", action="store_true", help=f"give the prompts of {of} as they are")
    parser.add_argument("--system-prompt", metavar="TEXT", help=f"system message before the prompts of {of} (none)")
    parser.add_argument(
        "--prompt-suffix",
        default="",
        metavar="TEXT",
        help=f"added to each prompt of {of}: how to answer, and in which form (nothing)",
    )
    parser.add_argument(
        "--chat-template-arguments",
        type=_json_object,
        default={},
        metavar="JSON",
        help=f"what the chat template reads besides the messages of {of}: '{{\"enable_thinking\": false}}' for Qwen3",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"enable_thinking": false}}')
    return value
