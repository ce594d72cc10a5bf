"""The services of docker-compose.yml without containers: a network namespace for each, with their commands and
environment as they stand there. A host can die, be cut off from all others or lose one of them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from deploy.redis_server import find_binary
from tests.processes import children

ROOT = Path(__file__).parent.parent
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
NUMBERS = {"redis": 11, "head": 12, "worker-1": 13, "worker-2": 14}  # each host's in the network
SECRETS = {"GSA_RAY_TOKEN": secrets.token_hex(32), "GSA_REDIS_PASSWORD": secrets.token_hex(16)}
DEADLINE_S = 180
ROUTE = "route replace default via 10.77.9.1"  # as containers have one
NOWHERE = "02:00:00:00:00:01"  # nobody's hardware address
PING = "import os, redis; redis.Redis(password=os.environ['REDISCLI_AUTH']).ping() and print('PONG')"
REASON = "network namespaces need Linux, root and iproute2"


def permitted() -> bool:
    """Whether network namespaces may be made here."""
    if sys.platform != "linux" or os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter", "getent"))):
        return False
    name = f"gsa-probe-{os.getpid()}"
    inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--fork", "true"]
    tries = (["ip", "netns", "add", name], inside)
    may = all(subprocess.run(command, capture_output=True).returncode == 0 for command in tries)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return may


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def substituted(text: str) -> str:
    """`text` as Compose hands it over: variables filled in, $$ made $."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: SECRETS[m.group(1)], text)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")


class Host:
    """One machine: a network namespace with an address, and in it one service with processes and a /tmp of its own.

    `folder` is what all hosts share, as volumes are.
    """

    def __init__(self, network: Network, name: str, folder: Path) -> None:
        self.name, self.service = name, name.split("-")[0]
        self.namespace, self.address = f"{network.prefix}{name}", f"10.77.9.{NUMBERS[name]}"
        self.folder, self._shared = folder / name, folder
        self.tmp = self.folder / "tmp"  # what the service sees as /tmp
        (self.tmp / "bin").mkdir(parents=True)
        (self.tmp / "bin" / "redis-server").symlink_to(find_binary())
        (self.tmp / "bin" / "redis-cli").write_text(f"#!{sys.executable}\n{PING}")
        (self.tmp / "bin" / "redis-cli").chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None

    def join(self, network: Network) -> None:
        """Makes the namespace and plugs it into the switch. It stays when the service ends, as a cable does."""
        ip("netns", "add", self.namespace)
        port = f"p{NUMBERS[self.name]}"
        cable = f"link add eth0 netns {self.namespace} type veth peer name {port} netns {network.switch}"
        ip(*cable.split())
        ip("-n", network.switch, "link", "set", port, "master", "br0", "up")
        for command in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up", ROUTE):
            ip("-n", self.namespace, *command.split())
        hosts = Path("/etc/netns") / self.namespace / "hosts"  # `ip netns exec` shows it as /etc/hosts
        hosts.parent.mkdir(parents=True)
        names = [f"10.77.9.{n} {name}" for name, n in NUMBERS.items() if "-" not in name]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def environment(self, **more: str) -> dict[str, str]:
        path = f"/tmp/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {k: substituted(v) for k, v in SERVICES[self.service]["environment"].items()}
        return {"PATH": path, "HOME": "/tmp", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **given, **more}

    def start(self) -> None:
        """The service's command, again and again where the file says so. It ends with the process that is kept."""
        command = SERVICES[self.service]["command"]
        command = substituted(command).split() if isinstance(command, str) else [substituted(c) for c in command]
        again = SERVICES[self.service].get("restart") == "unless-stopped"
        serve = 'while :; do "$@"; sleep 1; done' if again else 'exec "$@"'
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        shell = ["sh", "-c", f"{self._own_tmp()} && {serve}", "sh"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart, *shell, *command],
                env=self.environment(), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def entered(self, *command: str) -> list[str]:
        """`command` to be run as `docker compose exec` does: within what start() made."""
        inner = ""
        while not inner and self.process.poll() is None:
            inner = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip()
        return ["nsenter", "--target", inner, "--mount", "--pid", "--net", *command]

    def execute(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.entered(*command), env=self.environment(**more), capture_output=True, text=True, timeout=DEADLINE_S
        )

    def await_health(self) -> None:
        test = [substituted(part) for part in SERVICES[self.service]["healthcheck"]["test"]]
        command = ["sh", "-c", test[1]] if test[0] == "CMD-SHELL" else test[1:]
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if self.execute(*command).returncode == 0:
                return
        raise TimeoutError(f"{self.service} is not healthy:\n{(self.folder / 'log').read_text()}")

    def running(self, title: str) -> list[int]:
        """The processes of this host whose title has `title`."""
        return [] if self.process is None else children(self.process.pid, title)

    def die(self) -> None:
        """SIGKILL to all its processes at once: the kernel ends a PID namespace with its first process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def cut_off(self) -> None:
        """From now on nothing goes out and nothing comes in; nobody is told."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def connect(self) -> None:
        for command in ("link set eth0 up", ROUTE):
            ip("-n", self.namespace, *command.split())

    def lose(self, other: Host) -> None:
        """What it sends to the other goes nowhere from now on."""
        ip(*f"-n {self.namespace} neigh replace {other.address} lladdr {NOWHERE} dev eth0 nud permanent".split())

    def find(self, other: Host) -> None:
        ip("-n", self.namespace, "neigh", "del", other.address, "dev", "eth0")

    def close(self) -> None:
        self.die()
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / self.namespace, ignore_errors=True)

    def _own_tmp(self) -> str:
        """Shell: the host's own folder in place of /tmp, with what the tests need of the real one."""
        needed = {Path(each).resolve() for each in (sys.prefix, sys.base_prefix, ROOT, self._shared)}
        pairs = [(each, self.tmp / each.relative_to("/tmp")) for each in needed if each.is_relative_to("/tmp")]
        shown = [f"mkdir -p {inside} && mount --bind {each} {inside}" for each, inside in pairs]
        return " && ".join([*shown, f"mount --rbind {self.tmp} /tmp"])


class Network:
    """A switch without a way out, in a namespace of its own."""

    def __init__(self) -> None:
        self.prefix = f"g{secrets.token_hex(3)}-"
        self.switch = f"{self.prefix}switch"
        ip("netns", "add", self.switch)
        for command in ("link add br0 type bridge", "link set br0 up"):
            ip("-n", self.switch, *command.split())

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)


@contextmanager
def made(folder: Path) -> Iterator[dict[str, Host]]:
    """All hosts, none of them started. In the end nothing is left of them."""
    with ExitStack() as stack:
        network = Network()
        stack.callback(network.close)
        hosts = {}
        for name in NUMBERS:
            hosts[name] = Host(network, name, folder)
            stack.callback(hosts[name].close)
            hosts[name].join(network)
        yield hosts
