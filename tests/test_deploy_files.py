"""The files that start a cluster fit each other, demand their secrets and pass the validators that need no cluster."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
NODES = ("head", "worker")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SECRETS = ("GSA_RAY_TOKEN", "GSA_REDIS_PASSWORD")
REQUIRED = re.compile(r"\$\{(\w+):\?[^}]+\}")  # Compose stops with the message when the variable is unset or empty


def cluster():
    return yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())


def environment(service):
    return SERVICES[service]["environment"]


def flag(command, name):
    """The value of --name=value in a command."""
    found = re.search(rf"--{name}=(\S+)", command)
    assert found, f"no --{name} in: {command}"
    return found.group(1)


# docker-compose.yml


def test_compose_keys_are_those_of_the_specification():
    """A typo in a key is otherwise found by the engine only."""
    known = {
        "image", "init", "restart", "shm_size", "stop_grace_period", "security_opt", "cap_drop", "environment",
        "volumes", "build", "command", "depends_on", "healthcheck", "user",
    }  # fmt: skip
    assert set(COMPOSE) <= {"name", "services", "volumes", "networks", "secrets", "x-node"}
    for name, service in SERVICES.items():
        assert set(service) <= known, name
        assert set(service.get("healthcheck", {})) <= {"test", "interval", "timeout", "retries", "start_period"}
        for dependency, condition in service.get("depends_on", {}).items():
            assert dependency in SERVICES
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[dependency]


def test_every_address_in_compose_is_a_service_that_listens_there():
    head, worker = SERVICES["head"]["command"], SERVICES["worker"]["command"]
    port = flag(head, "port")
    assert flag(worker, "address") == f"head:{port}"
    assert f"/dev/tcp/head/{port}" in SERVICES["head"]["healthcheck"]["test"][-1]
    for service in NODES:
        url = re.fullmatch(r"redis://:(\$\{.+\})@(\w+):6379/0", environment(service)["GSA_REDIS_URL"])
        assert url.group(2) in SERVICES
        assert SERVICES[url.group(2)]["image"].startswith("redis:")


def test_no_secret_has_a_default_and_every_node_has_the_token():
    text = (ROOT / "docker-compose.yml").read_text()
    for secret in SECRETS:
        uses = re.findall(rf"\$\{{{secret}([^}}]*)\}}", text)
        assert uses
        assert all(use.startswith(":?") for use in uses)
        assert f"{secret}=\n" in (ROOT / ".env.example").read_text()  # named there, and empty
    for service in NODES:
        assert environment(service)["RAY_AUTH_MODE"] == "token"
        assert REQUIRED.fullmatch(environment(service)["RAY_AUTH_TOKEN"]).group(1) == "GSA_RAY_TOKEN"
    assert REQUIRED.fullmatch(environment("redis")["REDISCLI_AUTH"]).group(1) == "GSA_REDIS_PASSWORD"


def test_redis_takes_the_password_from_its_environment_and_not_from_its_command_line(tmp_path):
    shell, option, script = SERVICES["redis"]["command"]
    assert (shell, option) == ("sh", "-c")
    config = tmp_path / "redis.conf"
    script = script.replace("$$", "$").replace("/tmp/redis.conf", str(config))
    script = script.replace("exec redis-server", "exec echo redis-server")
    run = subprocess.run([shell, option, script], env={"REDISCLI_AUTH": "5ecret"}, capture_output=True, text=True)
    assert run.stdout == f"redis-server {config}\n"
    assert config.read_text().splitlines() == ["requirepass 5ecret", 'save ""', "appendonly no"]
    assert config.stat().st_mode & 0o077 == 0


def test_nothing_is_published_and_nothing_runs_with_more_rights_than_it_needs():
    for service in SERVICES.values():
        assert not {"ports", "expose", "privileged", "network_mode", "cap_add"} & set(service)
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_workers_can_be_scaled():
    """A fixed name, host name or port allows a service only once."""
    assert not {"container_name", "hostname", "ports", "networks"} & set(SERVICES["worker"])


def test_nodes_are_one_image_with_shared_memory_that_come_back():
    assert SERVICES["head"]["image"] == SERVICES["worker"]["image"]
    assert SERVICES["head"]["build"] == SERVICES["worker"]["build"]
    assert (ROOT / SERVICES["head"]["build"]["dockerfile"]).exists()
    for service in NODES:
        assert "shm_size" in SERVICES[service]
        assert SERVICES[service]["command"].rstrip().endswith("--block")  # so that its end is the container's
    assert {service["restart"] for service in SERVICES.values()} == {"unless-stopped"}


def test_volumes_are_declared_or_given_by_the_user():
    for service in NODES:
        for mount in SERVICES[service]["volumes"]:
            source, target = re.fullmatch(r"\$\{\w+:-(\w+)\}:(/\S+)", mount).groups()
            assert source in COMPOSE["volumes"]
            assert target in ("/data", "/home/gsa/runs")


def test_every_variable_of_compose_is_explained_in_the_example():
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text)) - {"GSA_VERSION"}
    assert used == set(re.findall(r"^#? ?(GSA_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


# deploy/Dockerfile


def test_the_image_runs_as_a_user_and_can_render():
    instructions = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE, re.MULTILINE)
    users = [value for name, value in instructions if name == "USER"]
    assert users == ["gsa"]
    assert "MUJOCO_GL=egl" in DOCKERFILE
    graphics = re.search(r"^GRAPHICS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert f"--no-install-recommends {graphics} " in DOCKERFILE  # one list, kept in two places


def test_the_image_has_what_pyproject_says():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.search(r"/src\[([\w,]+)\]", DOCKERFILE).group(1).split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    assert f"gsa-rl:${{GSA_VERSION:-{project['project']['version']}}}" == SERVICES["head"]["image"]
    needs = next(d for d in project["project"]["dependencies"] if d.startswith("torch>="))
    assert re.search(r'"torch==([\d.]+)\.\*"', DOCKERFILE).group(1) == needs.removeprefix("torch>=")


def test_secrets_and_runs_do_not_enter_the_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".env", ".venv", "runs", "data"} <= set(ignored)
    git = (ROOT / ".gitignore").read_text().split()
    assert ".env" in git


# deploy/cluster.yaml


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster()))


@pytest.mark.parametrize("damage", [{"head_nod": {}}, {"provider": {"type": "local", "worker_ips": []}}])
def test_ray_would_refuse_a_wrong_one(damage):
    """The test above can fail."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match=r"."):
        validate_config(prepare_config({**cluster(), **damage}))


def test_every_machine_of_the_cluster_demands_the_token_that_is_copied_to_it():
    config = cluster()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[commands][-1]
        assert "RAY_AUTH_MODE=token ~/gsa/.venv/bin/ray start " in start
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert flag(worker, "address") == f"$RAY_HEAD_IP:{flag(head, 'port')}"
    assert flag(head, "autoscaling-config") == "~/ray_bootstrap_config.yaml"


def test_the_cluster_file_holds_documentation_addresses_only():
    provider = cluster()["provider"]
    assert all(ip.startswith("192.0.2.") for ip in [provider["head_ip"], *provider["worker_ips"]])


# Makefile and .ci/run


@pytest.mark.parametrize("target", ["setup", "demo", "test", "check", "bench", "clean"])
def test_make_knows_its_targets(target):
    run = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("script", [".ci/run"])
def test_scripts_are_executable_and_parse(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", path]).returncode == 0
