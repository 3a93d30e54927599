"""How torch's threads should wait for each other: the time of a mix under several policies, alone and beside others.

    python -m lab.bench.busy [--repeats 5]

The policies are environment variables that the OpenMP runtime reads when torch is imported; torch's wheels for Linux
bring GNU's (libgomp). Each run is a process of its own: the embedded checkpoint mixes a picture with a prompt in
Python, on as many threads as there are cores. In each situation the policies take turns:

    alone             nothing else is started
    beside a loop     another process keeps one core busy
    two at once       two mixes at the same time, under the same policy; the later end counts

Reported are the median seconds from the first step's start to the decoded picture, and the ratio to the runtime's own
default, in pairs: median, smallest and largest. Every run must give the same picture, byte for byte. On a machine that
does other work, "alone" is not what it says.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
POLICIES = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_WAIT_POLICY=ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "KMP_BLOCKTIME=0": {"KMP_BLOCKTIME": "0"},  # Intel's and LLVM's runtimes read it
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
SITUATIONS = {"alone": (1, 0), "beside a loop": (1, 1), "two at once": (2, 0)}  # mixes, loops

# Nothing of lab/ or the command here: they set a policy.
MIX = """
import hashlib, time
import weights
from command.pictures import fit, open_layout
from magicmix import decode, magicmix
models = weights.load()
layout = fit(open_layout("docs/layouts/trophy.png").picture, models.size)
began = time.perf_counter()
*_, last = magicmix(models, "a tiger", layout)
picture = decode(models, last.x)[0]
print(time.perf_counter() - began, hashlib.sha256(picture.tobytes()).hexdigest())
"""


def start(code: str, policy: dict[str, str]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | policy
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def run(policy: dict[str, str], mixes: int, loops: int) -> tuple[float, set[str]]:
    """(seconds of the slowest mix, the pictures' sha256)"""
    others = [start("while True: pass", {}) for _ in range(loops)]
    try:
        outputs = [process.communicate()[0].split() for process in [start(MIX, policy) for _ in range(mixes)]]
    finally:
        for other in others:
            other.kill()
            other.wait()
    return max(float(seconds) for seconds, _ in outputs), {digest for _, digest in outputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pictures = {}  # policy -> the sha256 of all its pictures
    for situation, (mixes, loops) in SITUATIONS.items():
        rounds = []  # of {policy: seconds}
        for _ in range(args.repeats):
            rounds.append({})
            for name, policy in POLICIES.items():
                rounds[-1][name], digests = run(policy, mixes, loops)
                pictures.setdefault(name, set()).update(digests)
        print(f"{situation:26}{'seconds':>9}{'ratio':>8}   smallest .. largest")
        for name in POLICIES:
            ratios = sorted(r[name] / r["default"] for r in rounds)
            spread = f"{statistics.median(ratios):8.2f}   {ratios[0]:.2f} .. {ratios[-1]:.2f}"
            print(f"  {name:24}{statistics.median(r[name] for r in rounds):9.2f}{spread}", flush=True)
    one_thread = pictures.pop("OMP_NUM_THREADS=1")  # rounds otherwise
    same = len(one_thread) == len(set().union(*pictures.values())) == 1
    print(f"the pictures of all policies, but for one thread, are {'identical' if same else 'NOT identical'}")


if __name__ == "__main__":
    main()
