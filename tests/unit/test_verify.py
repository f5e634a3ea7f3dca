"""Verifiers judge like a careful reader, and the pool keeps its limits."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from answer_cases import PAIRS
from answer_cases import WRONG as WRONG_ANSWERS

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.verify.base import VerifierResult, VerifyRequest, exact, judged, resolve_verifier
from megatron_sgopd.verify.equality import vote
from megatron_sgopd.verify.pool import VerifierPool
from megatron_sgopd.verify.reading import final_answer

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
    ("no solution", "\\boxed{\\text{no solution}}"),
    ("A", "\\boxed{\\textbf{(A)}}"),
    ("\\$5.00", "\\boxed{5}"),
    ("5", "\\boxed{5 \\text{ cm}}"),
    ("90^\\circ", "\\boxed{90}"),
    ("1.5", "\\boxed{1\\frac{1}{2}}"),
    ("-7", "\\boxed{−7}"),
    ("3+4i", "\\boxed{4i+3}"),
    ("x>2", "\\boxed{2<x}"),
    ("x=5", "\\boxed{5}"),
    ("5", "\\boxed{x=5}"),
    ("5,7", "\\boxed{7, 5}"),
    ("(-\\infty,1)\\cup(2,\\infty)", "\\boxed{(2,\\infty)\\cup(-\\infty,1)}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{bmatrix}1\\\\2\\end{bmatrix}}"),
    ("\\frac{1}{3}", "\\boxed{0.333333}"),
    ("\\sin^2 x+\\cos^2 x", "\\boxed{1}"),
    ("7", "$$7$$"),
    ("7", "so\n\\[\nx = 7\n\\]"),
    ("7", "we get \\(x=7\\)."),
    ("7", "first $3$,\nso the answer is 7."),
    ("7", "**7**"),
    ("x^2+1", "x^2+1"),
    ("[0,1)", "[0,1)"),
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
    ("evil", "\\boxed{live}"),
    ("Paris", "\\boxed{\\text{sirap}}"),
    ("(5,7)", "\\boxed{(7,5)}"),
    ("x=5", "\\boxed{y=5}"),
    ("12", "\\boxed{12, 13}"),
    ("12", "\\boxed{12 \\text{ or } 13}"),
    ("-\\infty", "\\boxed{\\infty}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\3\\end{pmatrix}}"),
    ("\\pi", "\\boxed{3.14}"),
    ("7", "7 apples out of 9"),
]


@pytest.mark.parametrize(("answer", "response"), RIGHT)
def test_mathematics_that_is_right(answer: str, response: str):
    assert MATH(request(response, answer)).outcome == 1


@pytest.mark.parametrize(("answer", "response"), WRONG)
def test_mathematics_that_is_wrong(answer: str, response: str):
    assert MATH(request(response, answer)).outcome == 0


@pytest.mark.parametrize(("kind", "answer", "right", "wrong"), PAIRS)
def test_a_right_answer_is_accepted_and_one_that_is_nearly_like_it_is_not(
    kind: str, answer: str, right: str, wrong: str
) -> None:
    assert MATH(request(right, answer)).outcome == 1, kind
    assert MATH(request(wrong, answer)).outcome == 0, kind


@pytest.mark.parametrize(("kind", "answer", "response"), WRONG_ANSWERS)
def test_a_false_answer_is_not_accepted(kind: str, answer: str, response: str) -> None:
    assert MATH(request(response, answer)).outcome == 0, kind


def test_the_last_box_goes_before_a_tag_before_hashes_before_words() -> None:
    assert final_answer("#### 1 <answer>2</answer> \\boxed{3{4}}") == "3{4}"
    assert final_answer("#### 1\n<answer> 2 </answer>") == "2"
    assert final_answer("The answer is 5.\n#### 1\nrest") == "1"
    assert final_answer("The answer is 5. It is more than 4.") == "5"
    assert final_answer("It is more than 4.") == "4"
    assert final_answer("nothing") == "nothing"


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("0.5", "\\frac12", "0.51"),
        ("1,000", "1000", "1,00"),
        ("x=5", "5", "6"),
        ("\\text{Yes}", "yes", "no"),
        ("1, 2", "2 and 1", "2, 2"),
        ("(A) 12", "A", "B"),
        ("(1,2)", "( 1 , 2 )", "(2,1)"),
        ("5 cm", "5", "5\\%"),
    ],
)
def test_votes_are_counted_by_answers_and_not_by_spellings(one: str, same: str, other: str) -> None:
    assert vote(one) == vote(same) != vote(other)


def test_exact_compares_letters():
    assert exact(request("<answer> ab </answer>", "ab ")).outcome == 1
    assert exact(request("let me see\nab", "ab")).outcome == 1
    assert exact(request("ab", "Ab")).outcome == 0
    assert exact(request("<answer>ab", "ab")).reason == "no answer"
    assert exact(request(" \n", "")).reason == "no answer"


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "spell_backward", "rearc"])
def test_reasoning_gym_scores_its_own_answers(task: str):
    import reasoning_gym

    verifier = resolve_verifier("task")
    for entry in reasoning_gym.create_dataset(task, size=5, seed=1):
        # As JSON, which prompts travel in: rearc's own scorer then no longer knows its own answer.
        reference, metadata = entry["answer"], json.loads(json.dumps(entry["metadata"]))
        assert verifier(request(f"<answer>{reference}</answer>", reference, task, **metadata)).outcome == 1
        assert verifier(request(f"I think\n{reference}", reference, task, **metadata)).outcome == 1
        assert verifier(request("<answer>none</answer>", reference, task, **metadata)).outcome == 0
        assert verifier(request(f"<answer>{reference}", reference, task, **metadata)).reason == "no answer"


def test_a_task_may_accept_other_answers_than_the_reference():
    import reasoning_gym

    entry = reasoning_gym.create_dataset("word_ladder", size=1, seed=1)[0]
    spaced = entry["answer"].replace(",", ", ")
    results = [
        resolve_verifier("task")(
            request(f"<answer>{text}</answer>", entry["answer"], "word_ladder", **entry["metadata"])
        )
        for text in (spaced.lower(), spaced + ",XX")
    ]
    assert [r.outcome for r in results] == [1, 0]


def test_reasoning_gyms_own_answers_are_right_by_task_and_by_mathematics() -> None:
    """Of every task that has one: 100 of its 106."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    judge, accepted = resolve_verifier("task"), 0
    for task in sorted(DATASETS.keys() - {"composite"}):
        entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
        if entry["answer"] is None:
            continue
        reference, metadata = str(entry["answer"]), json.loads(json.dumps(entry["metadata"], default=str))
        said = VerifyRequest("", f"Let me see.\n<answer>{reference}</answer>", reference, task, metadata)
        assert judge(said).outcome == 1, task
        assert MATH(request(f"\\boxed{{{reference}}}", reference)).outcome == 1, (task, reference)
        accepted += 1
    assert accepted >= 100


@pytest.mark.parametrize(
    ("task", "answer", "metadata", "right", "wrong"),
    [
        ("countdown", "2*5 + 3", {"numbers": [2, 3, 5], "target": 13}, "(5*2)+3", "2+5*3"),
        ("countdown", "2*5 + 3", {"numbers": [2, 3, 5], "target": 13}, "3+2*5", "13"),
        ("puzzle24", "(1+3)*(2+4)", {"numbers": [1, 2, 3, 4]}, "(3+1)*(4+2)", "24"),
        ("puzzle24", "8/(3-8/3)", {"numbers": [3, 3, 8, 8]}, "8/(3-(8/3))", "8*3+8-8/1"),
        ("number_sorting", "['1.0', '2.5']", {}, '["1", "2.50"]', '["2.5", "1"]'),
        ("polynomial_multiplication", "x**2 - 1", {}, "-1 + x**2", "x**2 + 1"),
        ("simple_integration", "x**3 + C", {}, "x**3 + C", "3*x**2 + C"),
        ("n_queens", "Q", {"valid_answers": ["Q", "_"]}, "_", "X"),
        ("spiral_matrix", "1 2 3", {}, "1 2 3", "[1, 2, 3]"),
    ],
)
def test_where_reasoning_gym_evaluates_answers_we_do_not(
    task: str, answer: str, metadata: dict[str, object], right: str, wrong: str
) -> None:
    judge = resolve_verifier("task")
    assert judge(request(f"<answer>{right}</answer>", answer, task, **metadata)).outcome == 1
    assert judge(request(f"<answer>{wrong}</answer>", answer, task, **metadata)).outcome == 0


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "1/0", "9**9**9", "1//1", "(" * 300 + "1", "1 2", "", "1e9", "lambda: 1", "-" * 400 + "1"],
)
def test_what_is_no_arithmetic_has_no_value(text: str) -> None:
    from megatron_sgopd.verify.own_scores import arithmetic

    assert arithmetic(text) is None or text.startswith("-")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'"),
        ("", "Known: math, task, exact, or import.path:function"),
        ("module:", "Known: math, task, exact, or import.path:function"),
        ("nowhere.module:check", "cannot be imported"),
        ("os.path:nothing", "cannot be imported"),
        ("broken_module:check", "cannot be imported .ZeroDivisionError"),
        ("sys:path", "is a list, not a function"),
    ],
)
def test_unknown_verifiers_are_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_verifier(name)


def test_naming_a_built_in_verifier_imports_no_libraries():
    code = "import sys; from megatron_sgopd.verify.base import resolve_verifier as r; r('math'), r('task'); "
    code += "sys.exit(any(m in sys.modules for m in ('sympy', 'math_verify', 'reasoning_gym')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_worker_lets_sympy_compile_no_answer():
    import sympy

    called = sympy.Function("print")(7)
    assert sympy.lambdify([], called)() is None, "sympy runs the names in an expression: what is to be prevented"
    code = (
        "import sys; sys.argv = ['worker', 'exact', str(2**30)]; from megatron_sgopd.verify import worker; "
        "worker.main(); import sympy; sympy.lambdify([], sympy.Function('print')(7))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "PermissionError: an answer must not be compiled" in done.stderr


# ---- The pool; this module is also the verifier that misbehaves ------------------------------------------


def misbehave(r: VerifyRequest):
    """A verifier that does what the response says."""
    if r.response == "sleep":
        time.sleep(60)
    if r.response == "child":
        subprocess.run(["sleep", r.answer])
    if r.response == "exit":
        os._exit(3)
    if r.response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if r.response == "signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    if r.response == "memory":
        bytearray(2**32)
    if r.response == "raise":
        raise RuntimeError("no")
    if r.response == "write":
        Path(r.answer).write_text("x" * 100)
    if r.response == "print":
        print('[1, null, "right"]', flush=True)
        sys.stdin.read()
    if r.response == "bool":
        return True
    if r.response == "who":
        return judged(True, str(os.getpid()))
    return judged(r.response[-4:] == "good", r.response)


def test_faults_cost_one_answer_each_and_order_is_kept():
    script = ["good", "sleep", "good", "exit", "memory", "kill", "good", "raise", "print", "signals", "good"] * 2
    with VerifierPool("test_verify:misbehave", workers=2, time_limit=1.0, memory_limit=2**28) as pool:
        results = pool.submit([request(word) for word in script]).result()
        counters = pool.counters
    reasons = {"good": "right", "sleep": "timeout", "exit": "crashed", "memory": "memory", "kill": "crashed"}
    reasons |= {"raise": "unreadable (RuntimeError)", "print": "wrong", "signals": "wrong"}
    assert [r.reason for r in results] == [reasons[word] for word in script]
    assert [r.outcome for r in results] == [int(word == "good") for word in script]
    assert counters == {"timeout": 2, "memory": 2, "crashed": 4, "unreadable": 2}


def test_a_worker_is_replaced_after_a_fault_and_only_then():
    script = ["who", "raise", "who", "memory", "who", "kill", "who"]
    with VerifierPool("test_verify:misbehave", time_limit=5.0, memory_limit=2**28) as pool:
        results = pool.submit([request(word) for word in script]).result()
    first, second, third, fourth = (r.extracted for r in results[::2])
    assert first == second
    assert len({second, third, fourth}) == 3


def test_a_verifier_cannot_leave_files_with_contents(tmp_path: Path):
    target = tmp_path / "made"
    with VerifierPool("test_verify:misbehave", time_limit=5.0) as pool:
        (result,) = pool.submit([request("write", str(target))]).result()
    assert result.outcome == 0
    assert not target.exists() or target.read_bytes() == b""


def test_what_a_verifier_started_ends_with_it():
    seconds = f"9{os.getpid()}.25"
    with VerifierPool("test_verify:misbehave", time_limit=1.0) as pool:
        (result,) = pool.submit([request("child", seconds)]).result()
        pool.submit([request("good")]).result()
    assert result.reason == "timeout"
    assert not any(seconds in p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"])


def test_submitting_returns_at_once_and_batches_do_not_mix():
    with VerifierPool("test_verify:misbehave", workers=3, time_limit=5.0) as pool:
        start = time.monotonic()
        batches = [pool.submit([request("good" if i % 3 else "bad")] * (i % 7)) for i in range(300)]
        assert time.monotonic() - start < 0.5
        for i, batch in enumerate(batches):
            assert [r.outcome for r in batch.result()] == [int(i % 3 > 0)] * (i % 7)


def test_a_hang_is_noticed_behind_a_full_pipe():
    long = "x" * 1_000_000 + "good"
    with VerifierPool("test_verify:misbehave", time_limit=1.0) as pool:
        results = pool.submit([request("sleep"), *[request(long)] * 10]).result()
    assert [r.reason for r in results] == ["timeout"] + ["right"] * 10


def test_more_open_files_than_select_can_watch():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 4096), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with VerifierPool("test_verify:misbehave") as pool:
            assert pool.submit([request("good")]).result() == [judged(True, "good")]
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_verifier_that_breaks_its_contract_stops_the_run():
    with VerifierPool("test_verify:misbehave") as pool:
        pending = pool.submit([request("bool"), request("good")])
        with pytest.raises(RuntimeError, match="'test_verify:misbehave' returned True, not a VerifierResult"):
            pending.result()
        with pytest.raises(RuntimeError, match="not a VerifierResult"):
            pool.submit([request("good")])


def test_a_verifier_that_does_not_start_stops_the_run():
    with VerifierPool("nowhere.module:check", workers=2) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.submit([request("good")] * 3).result()


def test_closing_does_not_wait_for_answers():
    start = time.monotonic()
    with VerifierPool("test_verify:misbehave", time_limit=60.0) as pool:
        pool.submit([request("good")]).result()
        pending = pool.submit([request("sleep")] * 3)
        time.sleep(0.2)
        closing = time.monotonic()
    assert time.monotonic() - closing < 5 < 60 > closing - start
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import os, signal, sys, time; from megatron_sgopd.verify.pool import VerifierPool as P; "
        "from megatron_sgopd.verify.base import VerifyRequest as R; p = P('test_verify:misbehave', time_limit=60); "
        "print(p.submit([R('', 'who', '', '', {})]).result()[0].extracted, flush=True); "
        "p.submit([R('', 'sleep', '', '', {})]); time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    worker = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_import_neither_torch_nor_megatron():
    with VerifierPool("test_verify:modules", time_limit=20.0) as pool:
        (result,) = pool.submit([request("")]).result()
    assert result.extracted == ""


def modules(r: VerifyRequest) -> VerifierResult:
    """Which heavy modules the worker holds."""
    return judged(True, " ".join(name for name in ("torch", "megatron.core", "vllm") if name in sys.modules))


def test_a_verifier_may_lie_beside_the_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_verifier.py").write_text(
        "from megatron_sgopd.verify.base import judged\ndef check(r): return judged(True, 'mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with VerifierPool("my_verifier:check") as pool:
        assert pool.submit([request("")]).result() == [judged(True, "mine")]
