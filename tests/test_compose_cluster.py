"""docker-compose.yml without containers: its commands and environment, a network namespace for each service."""

import sys

import pytest

from tests import namespaces

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


pytestmark = pytest.mark.skipif(not namespaces.permitted(), reason=namespaces.REASON)


@pytest.fixture
def hosts(tmp_path):
    with namespaces.made(tmp_path) as made:
        yield made


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
