"""A SLURM of one node on this machine, to test with; everything of it in one folder.

    python tests/cluster/slurm.py up FOLDER
    python tests/cluster/slurm.py down FOLDER

Two CPUs (more than there may be), 8 GB, a GPU that is /dev/null, and no accounting, as
the smallest clusters have it. Outside there is a link, /etc/slurm/slurm.conf: steps of
a job find the configuration nowhere else. Needs root, and of Debian: slurm-wlm, munge.
Standard library only.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LINK = Path("/etc/slurm/slurm.conf")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun")
CONF = """ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
KillWait=5
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 CoresPerSocket=2 RealMemory=8000 Gres=gpu:1
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def find_trouble():
    """Why there can be no SLURM here, or None."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (apt install slurm-wlm munge)"
    if LINK.exists():
        return f"this machine has a SLURM of its own ({LINK})"
    return None if os.geteuid() == 0 else "a SLURM to test with is started by root"


def start(folder):
    """Daemons with all their files in `folder`."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, ports=find_ports(2)))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")
    LINK.unlink(missing_ok=True)  # of a killed test
    LINK.parent.mkdir(exist_ok=True)
    LINK.symlink_to(conf)
    pids = []
    for command in (
        ["munged", "-F", "-f", "-S", folder / "munge.socket",
         "--key-file", folder / "munge.key", "--pid-file", folder / "munged.pid",
         "--log-file", folder / "munged.log", "--seed-file", folder / "munge.seed"],
        ["slurmctld", "-D", "-f", conf],
        ["slurmd", "-D", "-f", conf, "-N", host],
    ):  # fmt: skip
        with (folder / f"{command[0]}.out").open("wb") as out:
            started = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=out, start_new_session=True
            )
        pids.append(started.pid)
        (folder / "pids").write_text(json.dumps(pids))
        if command[0] == "munged":
            wait_for(lambda: (folder / "munge.socket").exists(), folder)
    wait_for(lambda: "idle" in ask("sinfo", "--noheader", "--format=%t"), folder)


def find_ports(count):
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def wait_for(true, folder, seconds=60):
    for _ in range(seconds * 5):
        if true():
            return
        time.sleep(0.2)
    for log in sorted([*folder.glob("*.log"), *folder.glob("*.out")]):
        print(log.name, *log.read_text().splitlines()[-5:], sep="\n  ", file=sys.stderr)
    stop(folder)
    raise RuntimeError(f"SLURM does not start, see above and in {folder}")


def stop(folder):
    """End jobs and daemons; the folder stays."""
    try:
        ask("scancel", "--user", "root")
    except (OSError, subprocess.TimeoutExpired):
        pass
    pids = json.loads((folder / "pids").read_text())
    for pid in reversed(pids):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not is_ours(pid, folder):
                break
            os.kill(pid, number)
            for _ in range(50):
                if not is_ours(pid, folder):
                    break
                time.sleep(0.1)
    if LINK.is_symlink() and LINK.resolve() == (folder / "slurm.conf").resolve():
        LINK.unlink()


def is_ours(pid, folder):
    """Whether the process is still the daemon that was started."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return False
    return str(folder) in command


if __name__ == "__main__":
    if sys.argv[1:2] not in (["up"], ["down"]) or len(sys.argv) != 3:
        sys.exit(__doc__)
    place = Path(sys.argv[2]).resolve()
    if sys.argv[1] == "up":
        if trouble := find_trouble():
            sys.exit(f"slurm: {trouble}")
        start(place)
    else:
        stop(place)
        shutil.rmtree(place)
