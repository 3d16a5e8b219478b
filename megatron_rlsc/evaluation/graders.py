"""Grading in processes of its own: an answer can make sympy compute for ever, or ask for all memory there is.

Each verdict has so many seconds of CPU time, which the kernel counts, and ends the process after, also where it is deep
in C: a busy machine makes no verdict another. Memory is bounded likewise. What ends a process is `timed out`, and a new
one goes on.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from megatron_rlsc.evaluation.problems import Problem
from megatron_rlsc.evaluation.verdict import Grade

CPU_SECONDS = 10.0
"""Of one verdict; the ordinary one takes 5 ms."""
MEMORY_BYTES = 4 << 30
"""Of a process."""
ATTEMPTS = 3
"""At a verdict."""
PATIENCE = 30.0
"""Times `CPU_SECONDS`, after which a process is ended that neither answers nor computes."""


T = TypeVar("T")


class Graders:
    """So many processes. A context manager; leaving it ends them."""

    def __init__(self, processes: int | None = None, *, cpu_seconds: float = CPU_SECONDS) -> None:
        """`processes`: by default one for each CPU that this process may use, and at most 16."""
        self._cpu_seconds = cpu_seconds
        self._processes = processes or min(16, len(os.sched_getaffinity(0)))
        self._pool = self._start()

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def grade(self, responses: Sequence[tuple[str, Problem, bool]], *, last_line: bool) -> list[Grade]:
        """The verdict on each (response, problem, whether it is whole), in order; see `grading.grade`."""
        return self._map(_grade, [(*response, last_line) for response in responses], Grade(verdict="timed out"))

    def gradable(self, problems: Iterable[Problem]) -> list[bool]:
        """Whether each problem's own answer can be compared."""
        return self._map(_is_gradable, [(problem,) for problem in problems], False)

    def answers(self, responses: Sequence[tuple[str, bool]]) -> list[str | None]:
        """What each (response, whether it is whole) gives as its answer, in order; None where it gives none."""
        return self._map(_answer_of, list(responses), None)

    def votes(self, answers: Sequence[str], problem: Problem) -> list[int]:
        """Answers as classes of those that are one: the place of the first that each is the same as."""
        classes: list[int] = []
        for i, answer in enumerate(answers):
            firsts = [j for j in range(i) if classes[j] == j]
            equal = self._map(_same, [(answers[j], answer, problem) for j in firsts], False)
            classes.append(next((j for j, is_same in zip(firsts, equal) if is_same), i))
        return classes

    def _map(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]], otherwise: T) -> list[T]:
        """What each call returns; `otherwise` where the limits end it. One that is ended by something else, as by a
        kernel without memory, has another try; so have all where the pool itself is broken by that."""
        results: dict[int, T] = {}
        for _ in range(ATTEMPTS):
            try:
                tasks = {i: self._schedule(function, call) for i, call in enumerate(calls) if i not in results}
                for i, task in tasks.items():
                    with suppress(_Killed):
                        results[i] = _result(task, otherwise)
            except RuntimeError:  # pebble: a process died with the lock that all share
                self._stop()
                self._pool = self._start()
            if len(results) == len(calls):
                break
        return [results.get(i, otherwise) for i in range(len(calls))]

    def _schedule(self, function: Callable[..., T], call: tuple[Any, ...]) -> Future[T]:
        limit = self._cpu_seconds * PATIENCE
        task: Future[T] = self._pool.schedule(function, args=(self._cpu_seconds, *call), timeout=limit)
        return task

    def _start(self) -> ProcessPool:
        # A fork would have the locks of this process's threads.
        return ProcessPool(max_workers=self._processes, initializer=_prepare, context=get_context("spawn"))

    def _stop(self) -> None:
        self._pool.stop()
        self._pool.join()


class _Killed(Exception):
    """By neither limit."""


def _result(task: Future[T], otherwise: T) -> T:
    try:
        return task.result()
    except ProcessExpired as error:
        if error.exitcode != -signal.SIGPROF:
            raise _Killed from error
        return otherwise
    except CancelledError as error:
        raise _Killed from error
    except (TimeoutError, MemoryError, RecursionError):
        return otherwise


# In the processes.


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # which warns that its own time-outs are off
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _limited(cpu_seconds: float) -> Iterator[None]:
    """SIGPROF, which nobody catches, ends a process that has computed for so long."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _grade(cpu_seconds: float, response: str, problem: Problem, whole: bool, last_line: bool) -> Any:
    from megatron_rlsc.evaluation.grading import grade  # sympy is loaded outside the limit

    with _limited(cpu_seconds):
        return grade(response, problem, whole=whole, last_line=last_line)


def _answer_of(cpu_seconds: float, response: str, whole: bool) -> str | None:
    from megatron_rlsc.evaluation.grading import answer_of

    with _limited(cpu_seconds):
        return answer_of(response, whole=whole)


def _is_gradable(cpu_seconds: float, problem: Problem) -> bool:
    from megatron_rlsc.evaluation.grading import is_gradable

    with _limited(cpu_seconds):
        return is_gradable(problem)


def _same(cpu_seconds: float, first: str, second: str, problem: Problem) -> bool:
    from megatron_rlsc.evaluation.grading import same

    with _limited(cpu_seconds):
        return same(first, second, problem)
