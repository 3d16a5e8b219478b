"""Starts a vLLM sidecar on this machine, waits until it truly generates, watches it, and takes it down. No torch."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import httpx

import megatron_rlsc
from megatron_rlsc.rollout import keeper
from megatron_rlsc.rollout.admission import RefusedError, UnreachableError, generate_a_token
from megatron_rlsc.rollout.sidecar_log import last_words
from megatron_rlsc.rollout.wire import KEY_VARIABLE, PUSH_DIR_VARIABLE, bearer, memory_backed_root

DYING_SECONDS = 10.0
"""What a sidecar that has failed a request is given to end, so that the end of its log can be shown."""
_POLL_SECONDS = 0.2


class SidecarError(RuntimeError):
    """The sidecar cannot start, did not come up, or died; with the last lines of its log where there is one."""


class Sidecar:
    """One vLLM server, its key, and its files. `start()` returns at once, so that the trainer builds its model while
    vLLM starts; `wait_until_ready()` comes before the first push. A context manager: leaving it stops the sidecar.

    The process tree: this process -> keeper -> `serve` -> vLLM's engine and workers. The keeper kills the rest when
    this process dies in any way, SIGKILL included.
    """

    def __init__(
        self,
        python: Path,
        model_dir: Path,
        *,
        dtype: Literal["float32", "bfloat16"],
        max_model_len: int,
        seed: int,
        log_path: Path,
        port: int = 0,
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 64,
        gpu_memory_utilization: float = 0.85,
        kv_cache_gib: int = 1,
        devices: Sequence[int] = (),
        cores: str = "",
        more_flags: Sequence[str] = (),
        timeout: float = 600.0,
    ) -> None:
        """
        Args:
            python: of the environment that has vLLM.
            model_dir: HF folder with config.json; weights and tokenizer in it are not read.
            dtype: of vLLM's weights; a push must have the same.
            max_model_len: tokens of the longest prompt and response together.
            seed: vLLM's own; each request brings its own as well.
            log_path: vLLM's output is appended here.
            port: on 127.0.0.1; 0 takes a free one.
            tensor_parallel_size: vLLM's workers.
            max_num_seqs: responses decoded at one time, and the most samples a prompt.
            gpu_memory_utilization: share of a GPU's memory.
            kv_cache_gib: GiB of KV cache on a CPU.
            devices: the GPUs that it sees, by their index on this machine; empty leaves the environment's.
            cores: vLLM's VLLM_CPU_OMP_THREADS_BIND, the CPUs of each worker; empty leaves the choice to vLLM.
            more_flags: of vLLM's own.
            timeout: seconds from `wait_until_ready()` to the first token.
        """
        self.key = secrets.token_urlsafe(32)
        self.url = ""
        """http://127.0.0.1:port, once started."""
        self.run_dir: Path | None = None
        """Private folder of its sockets and of the weights on their way, while it runs."""
        self.log_path = log_path
        self._python = python
        self._port = port
        self._held_port: socket.socket | None = None
        self._timeout = timeout
        self._keeper: subprocess.Popen[bytes] | None = None
        self._terminated: float | None = None
        self._log_start = 0
        self._kv_cache_gib, self._devices, self._cores = kv_cache_gib, tuple(devices), cores
        self._flags = [
            *("--model", str(model_dir), "--dtype", dtype, "--seed", str(seed)),
            *("--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
            *("--tensor-parallel-size", str(tensor_parallel_size)),
            *("--gpu-memory-utilization", str(gpu_memory_utilization)),
            *more_flags,
        ]

    def __enter__(self) -> Sidecar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises SidecarError for a Python without vLLM and for a port in use, before anything has been started."""
        require_vllm(self._python)
        _hold_port(self._port).close()

    def start(self) -> None:
        """Starts the process tree, again where one has ended, and returns. Call it on the main thread: the kernel ties
        the keeper's life to the thread that started it. Raises SidecarError for a Python without vLLM and for a port in
        use."""
        assert self.has_ended(), "started twice"
        self.stop()
        assert threading.current_thread() is threading.main_thread(), "a sidecar dies with the thread that started it"
        require_vllm(self._python)
        self._held_port = _hold_port(self._port)
        port = self._held_port.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Private (0700), with room for a copy of the weights, and a short name: vLLM's sockets lie in it, at most 107
        # bytes long.
        self.run_dir = Path(tempfile.mkdtemp(prefix="rlsc-", dir=memory_backed_root()))
        environment = self._environment(self.run_dir)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        server = [str(self._python), "-m", "megatron_rlsc.rollout.serve", "--port", str(port), *self._flags]
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, str(os.getpid()), str(self.run_dir), *server],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the trainer, which then stops us in its own order
            )

    def wait_until_ready(self) -> None:
        """Returns when one token has been generated: /health alone also answers for an engine that has crashed.

        Raises SidecarError at once when the process dies, and after `timeout` seconds.
        """
        deadline = time.monotonic() + self._timeout
        with httpx.Client(base_url=self.url, headers=bearer(self.key), trust_env=False) as http:
            while time.monotonic() < deadline:
                self.check_alive()
                try:
                    return generate_a_token(http)
                except UnreachableError:
                    time.sleep(_POLL_SECONDS)  # it does not listen yet
                except RefusedError as error:
                    self.check_alive(wait=DYING_SECONDS)
                    raise self._failure(f"failed its first request ({error})") from error
        raise self._failure(f"generated nothing within {self._timeout:g} s (--sidecar-timeout)")

    def has_ended(self) -> bool:
        """Whether nothing of it runs: it was never started, or has ended, by itself or by `terminate`. Kills what
        should have ended."""
        if self._keeper is None:
            return True
        status = self._keeper.poll()
        if status is not None:
            return status >= 0 or self.run_dir is None or not keeper.kill_orphans(self.run_dir)
        if self._terminated is not None and time.monotonic() - self._terminated > keeper.GRACE_SECONDS + 5:
            self._keeper.kill()  # the server follows it by its own parent-death signal
        return False

    def check_alive(self, *, wait: float = 0.0) -> None:
        """Raises SidecarError if the sidecar has ended, or does so within `wait` seconds: call it wherever its death
        would explain an error. A server whose engine has died answers 500 for a moment before it ends."""
        if self._keeper is None:
            raise SidecarError("the sidecar was not started")
        try:
            status = self._keeper.wait(wait) if wait else self._keeper.poll()
        except subprocess.TimeoutExpired:
            status = None
        if status is not None:
            raise self._failure(f"ended with status {status}")

    def last_words(self) -> str:
        """The end of its log since its last start."""
        return last_words(self.log_path, self._log_start)

    def terminate(self) -> None:
        """Has the keeper end the process tree, and returns: what hangs is killed after `keeper.GRACE_SECONDS`."""
        if self._keeper is not None and self._terminated is None:
            self._keeper.terminate()
            self._terminated = time.monotonic()

    def stop(self) -> None:
        """Ends the process tree and removes its files; does nothing where there is none."""
        self.terminate()
        while not self.has_ended():
            time.sleep(0.02)
        self._keeper = self._terminated = None
        if self._held_port is not None:
            self._held_port.close()
            self._held_port = None
        if self.run_dir is not None:
            shutil.rmtree(self.run_dir, ignore_errors=True)  # the keeper has done it, if it got that far
            self.run_dir = None

    def _environment(self, run_dir: Path) -> dict[str, str]:
        """The sidecar's environment, and the folders that it names."""
        for name in ("push", "tmp", "lib"):
            (run_dir / name).mkdir(mode=0o700)
        # This package alone, not the trainer's site-packages around it.
        (run_dir / "lib" / "megatron_rlsc").symlink_to(Path(megatron_rlsc.__file__).parent)
        environment = dict(os.environ)
        # torchrun's variables would make vLLM join the trainer's process group.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        if not os.access(Path("~").expanduser(), os.W_OK | os.X_OK):  # where vLLM, Triton and HF keep their caches
            (run_dir / "home").mkdir(mode=0o700)
            environment["HOME"] = str(run_dir / "home")
        local = "127.0.0.1,localhost"
        environment.update(
            {
                KEY_VARIABLE: self.key,
                PUSH_DIR_VARIABLE: str(run_dir / "push"),
                "PYTHONPATH": str(run_dir / "lib"),
                "TMPDIR": str(run_dir / "tmp"),
                "HF_HUB_OFFLINE": "1",
                "NO_PROXY": local,
                "no_proxy": local,
                "VLLM_CPU_KVCACHE_SPACE": str(self._kv_cache_gib),
            }
        )
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._devices))
        if self._cores:
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", self._cores)
        return environment

    def _failure(self, what: str) -> SidecarError:
        return SidecarError(f"the vLLM sidecar {what}. The end of {self.log_path}:\n{self.last_words()}")


def require_vllm(python: Path) -> None:
    """Raises SidecarError unless `python` runs and has vLLM."""
    remedy = "`bash tools/setup_env.sh` makes .venv-sidecar; name its Python with --sidecar-python"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([str(python), "-c", probe], stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise SidecarError(f"no Python at {python} ({error.strerror}): {remedy}") from error
    if found.returncode != 0:
        raise SidecarError(f"{python} has no vLLM: {remedy}")


def core_shares(replicas: int, tensor_parallel_size: int) -> list[str]:
    """What each of so many replicas on CPUs is given for `cores`, so that they do not wait for each other's threads.
    Empty where there is one replica, and where there are fewer CPUs than workers."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // (replicas * tensor_parallel_size)
    if replicas == 1 or each == 0:
        return [""] * replicas
    workers = [",".join(map(str, cores[i * each : (i + 1) * each])) for i in range(replicas * tensor_parallel_size)]
    return ["|".join(workers[i * tensor_parallel_size : (i + 1) * tensor_parallel_size]) for i in range(replicas)]


def _hold_port(port: int) -> socket.socket:
    """A socket that is bound to the port, or to a free one for 0, and does not listen: until vLLM does, many seconds
    later, the kernel gives the port to nobody who asks for any, neither to listen nor to connect from. vLLM, which asks
    for it by its number, gets it, since both set SO_REUSEADDR. Raises SidecarError if it is taken."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(("127.0.0.1", port))
    except OSError as error:
        held.close()
        raise SidecarError(f"port {port} of 127.0.0.1: {error.strerror}. Take another --sidecar-port") from error
    return held
