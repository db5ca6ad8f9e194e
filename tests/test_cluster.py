"""The cluster files: what Ray says to them, and what their users do with them, on machines inside this one."""

import os
import re
import select
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_bits import result

from fedsim.checkpoint import NAME

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).parents[1]
FILES = "cluster.yaml", "cluster.local.yaml"
ADDRESS = {"laptop": "10.77.0.1", "head": "10.77.0.2", "w1": "10.77.0.3"}  # as in hosts.sh
HOME = "home/researcher"
WAIT_S = 600  # for a command: they take seconds, and a busy machine takes more
JOIN_S = 120  # for a machine to join, once its raylet has been started; Ray itself gives up after 30
SSH = "ssh", "-q", "-i", "/run/user-key", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"
RUN = "--dataset features --data-dir ~/fedsim/features --held-out ink --clients 6"
WAIT = f"""
import sys, time, ray
ray.init("auto", logging_level="ERROR")
wanted, end = set(sys.argv[1:]), time.monotonic() + {JOIN_S}
while absent := wanted - {{node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}}:
    if time.monotonic() > end:
        sys.exit(f"absent: {{absent}}")
    time.sleep(0.2)
print("all are here:", *sorted(wanted))
"""
RESERVE = """
import ray
ray.init("auto", logging_level="ERROR")
(head,) = (node["Resources"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
bundle = {"CPU": head["CPU"], "node:__internal_head__": 0.001}
ray.get(ray.util.placement_group([bundle], lifetime="detached", name="reserved").ready())
print("the head has no free CPU")
"""
SCRIPTS = {"wait.py": WAIT, "reserve.py": RESERVE}


def plain(file):
    return yaml.safe_load((PROJECT / file).read_text())


def checked(config):
    """As `ray up` does it first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@pytest.mark.parametrize("file", FILES)
def test_ray_takes_a_cluster_file(file):
    checked(plain(file))


MISTAKES = {
    "a field that Ray does not know": lambda config: config.update(workers=3),
    "a number as a word": lambda config: config.update(idle_timeout_minutes="ten"),
    "a command that is no text": lambda config: config["setup_commands"].append({"uv": "sync"}),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_ray_refuses_a_cluster_file_with_a_mistake(file, mistake):
    import jsonschema

    config = plain(file)
    MISTAKES[mistake](config)
    with pytest.raises(jsonschema.ValidationError):
        checked(config)


def test_both_files_send_and_install_the_same():
    aws, local = map(plain, FILES)
    for field in ("file_mounts", "rsync_exclude", "setup_commands", "worker_start_ray_commands"):
        assert aws[field] == local[field], field
    # The one word that must differ: see the comment there.
    local_start = local["head_start_ray_commands"][-1].replace("RAY_enable_autoscaler_v2=0 ", "")
    assert local_start == aws["head_start_ray_commands"][-1]


@pytest.mark.parametrize("file", FILES)
def test_a_cluster_asks_for_its_token_and_listens_to_no_stranger(file):
    config = plain(file)
    starts = [config[f"{side}_start_ray_commands"][-1] for side in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token ray start " in line for line in starts)
    assert any("RAY_AUTH_MODE=token" in line and ".bashrc" in line for line in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in starts[0] and "0.0.0.0" not in (PROJECT / file).read_text()


@pytest.mark.parametrize("file", FILES)
def test_all_that_an_installation_needs_is_sent(file):
    packages = {folder.parent.name for folder in PROJECT.glob("*/__init__.py")}
    needed = packages | {"pyproject.toml", "uv.lock", "README.md", "benchmarks"}
    mounts = plain(file)["file_mounts"]
    assert {f"~/fedsim/{name}": name for name in needed}.items() <= mounts.items()


@pytest.mark.parametrize("file", FILES)
def test_every_group_that_is_installed_is_one_of_the_project(file):
    groups = re.findall(r"--group (\w+)", (PROJECT / file).read_text())
    declared = (PROJECT / "pyproject.toml").read_text().partition("[dependency-groups]")[2].partition("\n[")[0]
    assert all(re.search(rf"^{group} = ", declared, flags=re.MULTILINE) for group in groups)


class Room:
    """The machines of hosts.sh.

    Attributes:
        inside: in front of a command line: seen from the room.
        together: both machines of the cluster have been seen in it, and none has been killed since.
    """

    together = False

    def __init__(self, seen, cache):
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        words = [PROJECT / "tests" / "hosts.sh", *seen]
        self.shell = subprocess.Popen(words, env=os.environ | {"UV_CACHE_DIR": cache}, **streams)
        self.inside = ["nsenter", f"--target={self.shell.pid}", "--mount", "--net"]

    def say(self, words):
        """`boot NAME` or `kill NAME`; returns when that is done."""
        self.together = self.together and not words.startswith("kill ")
        print(words, file=self.shell.stdin, flush=True)
        assert select.select([self.shell.stdout], [], [], 30)[0], f"{words}: no answer in 30 s"
        answer = self.shell.stdout.readline()
        assert answer.endswith((" is up\n", " is down\n")), f"{words}: {answer or 'the room is gone'}"

    def start(self, name, command):
        """A command in a login shell on a machine, by ssh; its process here, with all that it prints as output."""
        words = [*self.inside, *SSH, f"root@{ADDRESS[name]}", "--", f"bash --login -c {shlex.quote(command)}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, **pipes)

    def run(self, name, command):
        """What such a command prints; it has to succeed."""
        process = self.start(name, command)
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, f"{name}: {command}\n{output}"
        return output

    def home(self, name):
        """The home folder of a machine, as this process sees it; for reading alone."""
        return Path("/proc", str(self.shell.pid), "root", "run", name, "new", HOME)

    def close(self):
        self.shell.stdin.close()
        self.shell.wait(timeout=60)


def uv_here():
    """The uv that is a program; pyenv's of that name is not."""
    bundled = Path(sys.base_prefix) / "bin" / "uv"
    return os.environ.get("UV") or (str(bundled) if bundled.exists() else shutil.which("uv"))


def missing():
    """Why there can be no machines inside this one; None where there can."""
    if sys.platform != "linux" or os.geteuid():
        return "machines inside this one need Linux and root"
    tools = "unshare", "nsenter", "ip", "pgrep", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd"
    if lacking := [tool for tool in tools if not shutil.which(tool)]:
        return f"machines inside this one need {', '.join(lacking)}"
    if not uv_here() or not (PROJECT / "uv.lock").exists():
        return "machines inside this one need uv and its lock file: run the tests by `uv run pytest`"
    overlay = "cd /run && mkdir a b c && mount -t overlay -o lowerdir=/,upperdir=a,workdir=b x c"
    trial = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", f"mount -t tmpfs x /run && {overlay}"]
    tried = subprocess.run(trial, capture_output=True, text=True)
    return f"no machines inside this one: {tried.stderr.strip()}" if tried.returncode else None


@pytest.fixture(scope="module")
def room():
    if reason := missing():
        pytest.skip(reason)
    uv = uv_here()
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    made = Room([sys.base_prefix, uv], cache)
    try:
        for name in ADDRESS:
            made.say(f"boot {name}")
        # Seconds, of 30 and 5: the head looks sooner for a machine that is lost, and more often.
        sooner = "AUTOSCALER_HEARTBEAT_TIMEOUT_S=10 AUTOSCALER_UPDATE_INTERVAL_S=1"
        made.run("head", f"echo export {sooner} > /etc/profile.d/sooner.sh")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def laptop(room, features_dir):
    """Runs a command in ~/fedsim of the laptop, a clone whose file for machines of one's own has been filled in."""
    copy = [*room.inside, "rsync", "-a", "--rsh", shlex.join(SSH)]
    clone = f"root@{ADDRESS['laptop']}:fedsim/"
    as_git = "--exclude=.git", "--include=/uv.lock", "--filter=:- .gitignore"
    subprocess.run([*copy, *as_git, f"{PROJECT}/", clone], check=True)
    subprocess.run([*copy, f"{features_dir}/", f"{clone}features"], check=True)
    config = plain("cluster.local.yaml")
    config["provider"] |= {"head_ip": ADDRESS["head"], "worker_ips": [ADDRESS["w1"]]}
    config["auth"]["ssh_user"] = "root"
    config["file_mounts"]["~/fedsim/features"] = "features"
    for name, text in {"cluster.local.yaml": yaml.safe_dump(config, sort_keys=False), **SCRIPTS}.items():
        room.run("laptop", f"echo {shlex.quote(text)} > fedsim/{name}")
    return lambda command, how=room.run: how("laptop", f"cd fedsim; {command}")


@pytest.fixture(scope="module")
def up(room, laptop):
    """The room with the cluster up. `uv run` installs the project on the laptop, and `ray up` on the others."""
    laptop("uv run ray get-auth-token --generate > /dev/null && uv run ray up -y cluster.local.yaml")
    return room


def together(up, laptop):
    """Waits until both machines are in the cluster, by a custom script.

    The cluster is started once more if Ray has given up on a machine, as in tests/ray_start.py.
    """
    printed = ""
    for start in ("true", "uv run ray up -y cluster.local.yaml"):
        if up.together:
            return
        laptop(start)
        # Ray takes a while to miss a machine, and would count it. First, it is installed there.
        up.run("w1", f"timeout {WAIT_S // 2} bash -c 'until pgrep raylet; do sleep 0.2; done' || true")
        printed = laptop("uv run ray submit cluster.local.yaml wait.py head w1 || true")
        up.together = "all are here: head w1" in printed
    assert up.together, printed


@pytest.mark.hosts
def test_a_machine_that_loses_power_in_a_run_changes_no_bit(up, laptop):
    alone = laptop(f"uv run fedsim run {RUN} --rounds 150 --actors 0 --out ~/alone", up.start)
    together(up, laptop)
    output, _ = alone.communicate(timeout=WAIT_S)
    assert alone.returncode == 0, output
    run = f"fedsim run {RUN} --rounds 150 --address auto --actors 2 --out ~/runs/across"
    across = laptop(f"uv run ray exec cluster.local.yaml {shlex.quote(run)}", up.start)
    try:
        while not (up.home("head") / "runs" / "across" / NAME).exists() and across.poll() is None:
            time.sleep(0.05)
        up.say("kill w1")
        assert across.poll() is None, "the run was over before the machine was lost"
        output, _ = across.communicate(timeout=WAIT_S)
    finally:
        up.say("boot w1")
    assert across.returncode == 0, output
    assert "2 actors of 1 CPU on 2 nodes" in output
    laptop("uv run ray rsync-down cluster.local.yaml '~/runs' .")
    assert result(up.home("laptop") / "fedsim" / "runs" / "across") == result(up.home("laptop") / "alone")


@pytest.mark.hosts
def test_a_cluster_refuses_a_guessed_token(up):
    ask = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=guessed fedsim/.venv/bin/ray status --address 10.77.0.2:6379"
    stranger = up.start("w1", ask)
    output, _ = stranger.communicate(timeout=WAIT_S)
    assert stranger.returncode and "InvalidAuthToken" in output


@pytest.mark.hosts
def test_the_dashboard_is_closed_to_other_machines(up):
    stranger = up.start("w1", ": < /dev/tcp/10.77.0.2/8265")
    assert "Connection refused" in stranger.communicate(timeout=WAIT_S)[0]


@pytest.mark.hosts
def test_clients_with_private_state_need_a_disk_that_all_machines_share(up, laptop):
    together(up, laptop)
    run = f"fedsim run {RUN} --server local_only --rounds 2 --address auto --actors 2 --out ~/runs/kept"
    process = laptop(f"uv run ray exec cluster.local.yaml {shlex.quote(run)}", up.start)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode
    assert f"fedsim: /{HOME}/runs/kept is not seen by w1; clients have private state here" in output


@pytest.mark.hosts
def test_a_job_of_the_head_sweeps_on_another_machine_that_has_come_back_though_they_share_no_disk(up, laptop, tmp_path):
    together(up, laptop)
    # Ray fills the head first, so that short trials would never run elsewhere.
    assert "the head has no free CPU" in laptop("uv run ray submit cluster.local.yaml reserve.py")
    forwarded = "until (: < /dev/tcp/localhost/8265) 2> /dev/null; do sleep 0.2; done"
    search = "--search method.lr --trials 6 --pruner none --report-seeds"
    job = f"cd && fedsim sweep {RUN} --rounds 10 {search} --address auto --out runs/sweep"
    printed = laptop(
        f"uv run ray dashboard cluster.local.yaml > ~/forward 2>&1 & {forwarded}; "
        "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://localhost:8265; "
        f"uv run ray job submit -- bash -c {shlex.quote(job)}"
    )
    assert "6 trials: 6 complete" in printed, printed
    shutil.copy(up.home("head") / "runs" / "sweep" / "study.db", tmp_path)
    query = "SELECT value_json FROM trial_user_attributes WHERE key = 'node'"
    nodes = sqlite3.connect(tmp_path / "study.db").execute(query).fetchall()
    assert nodes == [('"w1"',)] * 6


@pytest.mark.hosts
def test_down_ends_the_head(up, laptop):
    up.together = False
    laptop("uv run ray down -y cluster.local.yaml")
    assert up.run("head", "pgrep -c raylet || true").strip() == "0"
