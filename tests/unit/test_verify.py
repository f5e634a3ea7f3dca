"""Verifiers judge like a careful reader, and the pool keeps its limits."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.verify.base import VerifyRequest, exact, extract_answer, resolve_verifier
from megatron_sgopd.verify.pool import VerifierPool

MATH = resolve_verifier("math")


def request(response: str, answer: str = "", task: str = "", **metadata: object) -> VerifyRequest:
    return VerifyRequest("", response, answer, task, dict(metadata))


RIGHT = [
    ("42", "so it is 42"),
    ("42", "<answer>42</answer>"),
    ("42", "first <answer>41</answer> no, <answer>42</answer>"),
    ("42", "\\boxed{41} or rather \\boxed{42}"),
    ("42", "thus\n#### 42"),
    ("42", "\\boxed{42.0}"),
    ("-7", "= -7"),
    ("1000", "\\boxed{1,000}"),
    ("0.5", "\\boxed{\\frac{1}{2}}"),
    ("1/2", "\\boxed{0.5}"),
    ("1/2", "\\boxed{\\dfrac12}"),
    ("\\frac{3}{4}", "\\boxed{3/4}"),
    ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}"),
    ("\\sqrt{2}/2", "\\boxed{\\frac{1}{\\sqrt{2}}}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("\\{1,2,3\\}", "\\boxed{\\{3,2,1\\}}"),
    ("(0,1]", "\\boxed{(0,1]}"),
    ("[0,\\infty)", "\\boxed{[0, \\infty)}"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("\\pi", "\\boxed{\\pi}"),
    ("Paris", "\\boxed{\\text{paris}}"),
    ("\\text{even}", "\\boxed{even}"),
    ("3", "Therefore $x = 1$ and the sum is $3$."),
    ("\\boxed{3}", "\\boxed{3}"),
    ("$3$", "\\boxed{3}"),
    ("-\\frac{1}{3}", "\\boxed{\\frac{-1}{3}}"),
    ("2^{10}", "\\boxed{1024}"),
    ("yes", "<answer>Yes.</answer>"),
]
WRONG = [
    ("42", "so it is 43"),
    ("42", "<answer>42"),
    ("42", "\\boxed{42"),
    ("42", ""),
    ("42", "\\boxed{}"),
    ("-7", "= 7"),
    ("1/2", "\\boxed{\\frac{1}{3}}"),
    ("x^2+2x+1", "\\boxed{(x-1)^2}"),
    ("\\{1,2,3\\}", "\\boxed{\\{1,2\\}}"),
    ("(0,1]", "\\boxed{(0,1)}"),
    ("Paris", "\\boxed{London}"),
    ("42", "\\boxed{" + "4" * 5000 + "}"),
    ("1", "1/0"),
    ("12", "<answer>1 2 3</answer>"),
]


@pytest.mark.parametrize(("answer", "response"), RIGHT)
def test_mathematics_that_is_right(answer: str, response: str):
    assert MATH(request(response, answer)).outcome == 1


@pytest.mark.parametrize(("answer", "response"), WRONG)
def test_mathematics_that_is_wrong(answer: str, response: str):
    assert MATH(request(response, answer)).outcome == 0


def test_extraction_prefers_the_last_box_then_the_last_tag_then_the_hashes():
    assert extract_answer("#### 1 <answer>2</answer> \\boxed{3{4}}") == "3{4}"
    assert extract_answer("#### 1 <answer> 2 </answer>") == "2"
    assert extract_answer("#### 1\nrest") == "1"
    assert extract_answer("nothing") is None


def test_exact_compares_letters():
    assert exact(request("<answer> ab </answer>", "ab ")).outcome == 1
    assert exact(request("ab", "Ab")).outcome == 0


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "spell_backward"])
def test_reasoning_gym_scores_its_own_answers(task: str):
    import reasoning_gym

    verifier = resolve_verifier("task")
    for entry in reasoning_gym.create_dataset(task, size=5, seed=1):
        good = request(f"<answer>{entry['answer']}</answer>", entry["answer"], task, **entry["metadata"])
        assert verifier(good).outcome == 1
        assert verifier(request("<answer>none</answer>", entry["answer"], task, **entry["metadata"])).outcome == 0
        assert verifier(request(entry["answer"], entry["answer"], task, **entry["metadata"])).reason == "no answer"


@pytest.mark.parametrize("task", ["spiral_matrix", "countdown", "polynomial_multiplication", "n_queens"])
def test_scorers_that_evaluate_the_answer_are_refused(task: str):
    from megatron_sgopd.verify.tasks import scorer

    with pytest.raises(ConfigError, match="evaluates the answer as Python code"):
        scorer(task)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'"),
        ("nowhere.module:check", "cannot be imported"),
        ("os.path:nothing", "cannot be imported"),
        ("sys:path", "is a list, not a function"),
    ],
)
def test_unknown_verifiers_are_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve_verifier(name)


# ---- The pool; this module is also the verifier that misbehaves ------------------------------------------


def misbehave(r: VerifyRequest):
    """A verifier that does what the response says."""
    from megatron_sgopd.verify.base import judged

    if r.response == "sleep":
        time.sleep(60)
    if r.response == "exit":
        os._exit(3)
    if r.response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if r.response == "memory":
        bytearray(2**32)
    if r.response == "raise":
        raise RuntimeError("no")
    if r.response == "write":
        Path(r.answer).write_text("x" * 100)
    if r.response == "print":
        print('{"outcome": 1}\n[1, null, "right"]', flush=True)
        sys.stdin.read()
    return judged(r.response == "good", r.response)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_faults_cost_one_answer_each_and_order_is_kept():
    script = ["good", "sleep", "good", "exit", "memory", "kill", "good", "raise", "print", "good"] * 2
    with VerifierPool("test_verify:misbehave", workers=2, time_limit=1.0, memory_limit=2**28) as pool:
        results = pool.submit([request(word) for word in script]).result()
        counters = pool.counters
    reasons = {"good": "right", "sleep": "timeout", "exit": "crashed", "memory": "memory", "kill": "crashed"}
    reasons |= {"raise": "unreadable (RuntimeError)", "print": "wrong"}
    assert [r.reason for r in results] == [reasons[word] for word in script]
    assert [r.outcome for r in results] == [int(word == "good") for word in script]
    assert counters == {"timeout": 2, "memory": 2, "crashed": 4, "unreadable": 2}


def test_a_verifier_cannot_leave_files_with_contents(tmp_path: Path):
    target = tmp_path / "made"
    with VerifierPool("test_verify:misbehave", time_limit=5.0) as pool:
        (result,) = pool.submit([request("write", str(target))]).result()
    assert result.outcome == 0
    assert not target.exists() or target.read_bytes() == b""


def test_submitting_returns_at_once_and_batches_do_not_mix():
    with VerifierPool("test_verify:misbehave", time_limit=5.0) as pool:
        start = time.monotonic()
        first = pool.submit([request("good")] * 300)
        second = pool.submit([request("bad")] * 300)
        assert time.monotonic() - start < 0.5
        assert {r.outcome for r in first.result()} == {1}
        assert {r.outcome for r in second.result()} == {0}
        assert pool.submit([]).result() == []


def test_workers_import_neither_torch_nor_megatron():
    with VerifierPool("test_verify:modules", time_limit=20.0) as pool:
        (result,) = pool.submit([request("")]).result()
    assert result.extracted == ""


def modules(r: VerifyRequest):
    """Which heavy modules the worker holds."""
    from megatron_sgopd.verify.base import judged

    return judged(True, " ".join(name for name in ("torch", "megatron.core", "vllm") if name in sys.modules))
