""".venv/bin/python tools/gguf_to_hf.py FILE.gguf OUT

Turn a GGUF file into a Hugging Face folder: its weights, dequantized by transformers, as safetensors, with
config.json and tokenizer. What was quantized stays as coarse as it was.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(float32)")
    arguments = parser.parse_args()
    if not arguments.file.is_file():
        parser.error(f"{arguments.file} is no file")
    partial = arguments.out.with_name(f"{arguments.out.name}.partial")
    if partial.exists():
        parser.error(f"{partial} exists: remove it, or choose another folder")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: remove it, or choose another folder")
    partial.mkdir(mode=0o700)  # nobody else gets in before it is done
    return convert(arguments.file, partial, arguments.out, arguments.dtype)


def convert(file: Path, partial: Path, out: Path, dtype: str) -> int:
    """Write `out`, which appears only when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    print(f"reading {file}", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.chmod(0o755)
    partial.rename(out)
    print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} weights, {dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
