"""docker-compose.yml without containers: its commands and environment, a network namespace for each service."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deploy.redis_server import find_binary

ROOT = Path(__file__).parent.parent
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
HOSTS = {"redis": ("redis", 11), "head": ("head", 12), "worker-1": ("worker", 13), "worker-2": ("worker", 14)}
SECRETS = {"GSA_RAY_TOKEN": secrets.token_hex(32), "GSA_REDIS_PASSWORD": secrets.token_hex(16)}
DEADLINE_S = 60
PING = "import os, redis; redis.Redis(password=os.environ['REDISCLI_AUTH']).ping() and print('PONG')"
DRIVER = """
import os, time, ray, redis
assert redis.Redis.from_url(os.environ["GSA_REDIS_URL"]).ping()
ray.init(address=os.environ["GSA_RAY_ADDRESS"], log_to_driver=False)
while len([n for n in ray.nodes() if n["Alive"]]) < 3:
    time.sleep(0.2)
ask = ray.remote(lambda: ray.util.get_node_ip_address()).options(scheduling_strategy="SPREAD")
found = set()
while len(found) < 3:
    found |= set(ray.get([ask.remote() for _ in range(6)]))
print("nodes", sorted(found))
"""


def may_make_namespaces():
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter", "getent"))):
        return False
    if any(Path(folder).resolve().is_relative_to("/tmp") for folder in (sys.prefix, __file__)):
        return False  # every host gets a /tmp of its own, and would lose sight of them
    name = f"gsa-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "del", name]).returncode == 0


pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="needs root, iproute2 and a checkout outside /tmp")


def substituted(text):
    """`text` as Compose hands it over: variables filled in, $$ made $."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: SECRETS[m.group(1)], text)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


class Host:
    """One machine: a network namespace with an address, and in it one service with processes and /tmp of its own."""

    def __init__(self, network, name, folder):
        self.service = HOSTS[name][0]
        self.namespace, self.address = f"{network.prefix}{name}", f"10.77.9.{HOSTS[name][1]}"
        self.folder = folder / name
        self.tmp = self.folder / "tmp"  # what the service sees as /tmp
        (self.tmp / "bin").mkdir(parents=True)
        (self.tmp / "bin" / "redis-server").symlink_to(find_binary())
        (self.tmp / "bin" / "redis-cli").write_text(f"#!{sys.executable}\n{PING}")
        (self.tmp / "bin" / "redis-cli").chmod(0o755)
        self.process = None
        port = f"p{HOSTS[name][1]}"
        ip("netns", "add", self.namespace)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            self.namespace,
            "type",
            "veth",
            "peer",
            "name",
            port,
            "netns",
            network.switch,
        )
        ip("-n", network.switch, "link", "set", port, "master", "br0", "up")
        for command in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            ip("-n", self.namespace, *command.split())
        ip("-n", self.namespace, "route", "add", "default", "via", "10.77.9.1")  # as containers have one
        hosts = Path("/etc/netns") / self.namespace / "hosts"  # `ip netns exec` shows it as /etc/hosts
        hosts.parent.mkdir(parents=True)
        names = [f"10.77.9.{n} {service}" for service, n in HOSTS.values() if service != "worker"]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def environment(self, **more):
        path = f"/tmp/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {k: substituted(v) for k, v in SERVICES[self.service]["environment"].items()}
        return {"PATH": path, "HOME": "/tmp", **given, **more}

    def start(self):
        """The service's command. It and all its children end with the process that is kept."""
        command = SERVICES[self.service]["command"]
        command = substituted(command).split() if isinstance(command, str) else [substituted(c) for c in command]
        own_tmp = f'mount --bind {self.tmp} /tmp && exec "$@"'
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *apart, "sh", "-c", own_tmp, "sh", *command],
            env=self.environment(), stdout=(self.folder / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def execute(self, *command, **more):
        """As `docker compose exec` does: within what start() made."""
        inner = ""
        while not inner and self.process.poll() is None:
            inner = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip()
        enter = ["nsenter", "--target", inner, "--mount", "--pid", "--net"]
        return subprocess.run(
            [*enter, *command], env=self.environment(**more), capture_output=True, text=True, timeout=DEADLINE_S
        )

    def await_health(self):
        test = [substituted(part) for part in SERVICES[self.service]["healthcheck"]["test"]]
        command = ["sh", "-c", test[1]] if test[0] == "CMD-SHELL" else test[1:]
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if self.execute(*command).returncode == 0:
                return
        pytest.fail(f"{self.service} is not healthy:\n{(self.folder / 'log').read_text()}")

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        subprocess.run(["ip", "netns", "del", self.namespace])
        shutil.rmtree(Path("/etc/netns") / self.namespace, ignore_errors=True)


class Network:
    """A switch without a way out."""

    def __init__(self):
        self.prefix = f"g{os.getpid()}-"
        self.switch = f"{self.prefix}switch"
        ip("netns", "add", self.switch)
        for command in ("link add br0 type bridge", "link set br0 up"):
            ip("-n", self.switch, *command.split())

    def close(self):
        subprocess.run(["ip", "netns", "del", self.switch])


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    network = Network()
    made = {}
    try:
        for name in HOSTS:
            made[name] = Host(network, name, folder)
        yield made
    finally:
        for host in made.values():
            host.close()
        network.close()


def test_the_services_find_each_other_and_let_nobody_in_without_the_secrets(hosts):
    for name in ("redis", "head"):
        hosts[name].start()
        hosts[name].await_health()
    for name in ("worker-1", "worker-2"):
        hosts[name].start()
    head = hosts["head"]
    joined = head.execute(sys.executable, "-c", DRIVER)
    assert joined.stdout.strip() == "nodes ['10.77.9.12', '10.77.9.13', '10.77.9.14']", joined.stderr

    knock = ("ray", "health-check", "--address", "head:6379")
    assert head.execute(*knock).returncode == 0
    assert "token is missing or incorrect" in head.execute(*knock, RAY_AUTH_TOKEN="0" * 64).stderr
    guest = "import redis; redis.Redis(host='redis').ping()"
    assert "AuthenticationError" in head.execute(sys.executable, "-c", guest).stderr
