"""Two hundred hostile answers: no hang, no code run, no memory growth, an outcome for each within the limit."""

import random
import time
from pathlib import Path

import psutil
import pytest

from megatron_sgopd.verify.base import VerifyRequest
from megatron_sgopd.verify.pool import VerifierPool

LIMIT = 1.0


def hostile(marker: Path) -> list[str]:
    code = f"__import__('pathlib').Path('{marker}').touch()"
    seeds = [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "9" * 100_000,
        "10^{10^{10}} + 1",
        "99999!",
        "((((9!)!)!)!)",
        "{" * 100_000,
        "}" * 100_000,
        "{" * 50_000 + "}" * 50_000,
        "\\frac{1}{" * 3000 + "2" + "}" * 3000,
        "\\frac{1}{" * 100 + "2" + "}" * 100,
        "\\sqrt{" * 400 + "2" + "}" * 400,
        "\\sqrt[" * 100_000,
        "\\left(" * 300,
        "x^{" * 200 + "2" + "}" * 200,
        "\\sum_{n=1}^{10^{12}} \\frac{1}{n^n}",
        "\\int_0^{\\infty} e^{x^{x^{x}}} dx",
        "\\prod_{k=1}^{100000} k^k",
        "\\lim_{x \\to 0} \\frac{\\sin(x^{100})}{x^{99}}",
        "\\binom{10^9}{5 \\cdot 10^8}",
        "(x+y+z+w)^{400}",
        "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(200)),
        "\x00" * 1000,
        "1\x002",
        "4\ud8002",
        "\\text{4\udfff}",
        "\\sum_{n=1}^{\\infty} \\frac{1}{n!(n+f(1))}",
        f"\\sum_{{n=1}}^{{\\infty}} \\frac{{1}}{{n!(n+\\text{{{code}}}(1))}}",
        f"\\text{{a\n{code}\n}}",
        "x^5 - x + f(1) = 0",
        "\\gcd(8!, \\text{__import__})",
        "\u202e42\u202c",
        "𝟜𝟚",
        "a" * 1_000_000,
        ("1," * 500_000),
        "<answer>" * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed{" + "\\text{" * 50_000,
        code,
        f"\\text{{{code}}}",
        f"{{{{{code}}}}}",
        f"'; {code}; '",
        f"$({code})$",
        f"`{code}`",
        f"; touch {marker}",
        f"$(touch {marker})",
        f"lambda: {code}",
        f"[{code} for _ in range(9)]",
        f'open("{marker}", "w")',
        "import os; os.system('true')",
        "exec(input())",
        "nan",
        "-inf",
        "1e99999999",
        "0x" + "f" * 1000,
        "0.(9)",
        "1/0",
        "0^0",
        "0/0",
        ",".join("123" for _ in range(10_000)),
        "$" * 10_000,
        "\\" * 10_000,
        "#" * 100_000,
        "1" + " " * 100_000 + "2",
        "\n" * 100_000,
        "&" * 5000 + "\\\\" * 5000,
        "\\begin{matrix}" * 500,
        "\\begin{pmatrix}" + "1 & " * 900 + "1\\end{pmatrix}",
        "\\infty - \\infty",
        "(-1)^{1/2^{1/2^{1/2}}}",
        "\\log_{1}{0}",
        "\\sin(\\cos(\\tan(" * 100,
        "|" * 1999,
        "=" * 1999,
        "x=" * 900 + "1",
        "\\{" + ",".join(str(i) for i in range(400)) + "\\}",
        "(" * 900 + "1" + ")" * 900,
        "-" * 1900 + "1",
        "!" * 1900,
        "1" + "+1" * 900,
        "2^" * 900 + "2",
        "\\cdot" * 400,
        "%" * 1999,
    ]
    random.seed(0)
    shapes = ["\\boxed{%s}", "<answer>%s</answer>", "#### %s", "%s", "so $%s$"]
    answers = [random.choice(shapes).replace("%s", seed) for seed in seeds]
    while len(answers) < 200:
        a, b = random.choice(seeds)[:1500], random.choice(seeds)[:1500]
        answers.append(random.choice(shapes).replace("%s", a + random.choice(["", "+", "^", " = ", "\\\\"]) + b))
    return answers


@pytest.mark.parametrize("verifier", ["math", "task"])
def test_hostile_answers(verifier: str, tmp_path: Path):
    marker = tmp_path / "code_ran"
    task = "chain_sum" if verifier == "task" else ""
    requests = [VerifyRequest("", text, "42", task, {}) for text in hostile(marker)]
    assert len(requests) == 200
    with VerifierPool(verifier, workers=2, time_limit=LIMIT, memory_limit=2**29) as pool:
        pool.submit([VerifyRequest("", "<answer>42</answer>", "42", task, {})] * 2).result()
        before, start = psutil.Process().memory_info().rss, time.monotonic()
        results = pool.submit(requests).result()
        seconds = time.monotonic() - start
        grown = psutil.Process().memory_info().rss - before
        timeouts = pool.counters["timeout"]
        (last,) = pool.submit([VerifyRequest("", "<answer>42</answer>", "42", task, {})]).result()
    assert len(results) == 200 and all(r.outcome in (0, 1) for r in results)
    assert not marker.exists()
    assert last.outcome == 1
    assert grown < 100 * 2**20
    # Each timeout costs its limit and a new worker's start; everything else is quick.
    assert seconds < timeouts * (LIMIT + 15) / 2 + 60
    assert timeouts < 60
