"""Manifests, compose file and Dockerfile: valid, locked down, and of this code (its commands, extras, version, exit codes)."""

import copy
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version as installed
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml

from jobs.__main__ import app
from pipeline import __version__
from pipeline.config import Config
from pipeline.config_file import load_config
from tests.kuberay import KINDS, violations

HOME = Path(__file__).parent.parent
MANIFESTS = HOME / "jobs" / "kubernetes"
BIN = Path(sys.executable).parent
DOCKERFILE = (HOME / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((HOME / "docker" / "compose.yaml").read_text(encoding="utf-8"))
COMMANDS = typer.main.get_command(app).commands
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WRITABLE = {"/tmp", "/var/cache/vecmill"}
OVERLAYS = ("cpu", "gpu")


def build(overlay):
    command = [BIN / "kubectl", "kustomize", MANIFESTS / "overlays" / overlay]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def built():
    return {overlay: build(overlay) for overlay in OVERLAYS}


def found(value, name):
    """Every value of a key, anywhere in a document."""
    if isinstance(value, list):
        return [hit for item in value for hit in found(item, name)]
    if not isinstance(value, dict):
        return []
    return [item for key, item in value.items() if key == name] + [hit for item in value.values() for hit in found(item, name)]


def pods(documents):
    """Specs of all pods that documents make."""
    return [spec for spec in found(documents, "spec") if "containers" in spec]


def only(documents, kind):
    (document,) = [document for document in documents if document["kind"] == kind]
    return document


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kinds_of_kubernetes_are_valid(built, overlay):
    secrets = list(yaml.safe_load_all((MANIFESTS / "base" / "secrets.yaml").read_text()))
    documents = [document for document in built[overlay] if not document["apiVersion"].startswith("ray.io/")] + secrets
    assert {document["kind"] for document in documents} == {
        "Namespace", "ServiceAccount", "ConfigMap", "NetworkPolicy", "CronJob", "PodDisruptionBudget", "Secret",
    }  # fmt: skip
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kinds_of_ray_have_known_fields(built, overlay):
    documents = [document for document in built[overlay] if document["apiVersion"].startswith("ray.io/")]
    assert {document["kind"] for document in documents} == KINDS.keys()
    for document in documents:
        assert document["apiVersion"] == "ray.io/v1"
        assert violations(document["spec"], KINDS[document["kind"]], document["kind"]) == []


def test_wrong_fields_are_found(built):
    cron = copy.deepcopy(only(built["cpu"], "CronJob"))
    cron["spec"]["concurrency"] = cron["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(cron, kubernetes_validate.latest_version(), strict=True)
    spec = copy.deepcopy(only(built["cpu"], "RayService")["spec"])
    spec["rayClusterSpec"] = spec.pop("rayClusterConfig")
    assert violations(spec, KINDS["RayService"], "s") == ["s.rayClusterSpec: no such field"]
    spec = copy.deepcopy(only(built["cpu"], "RayCronJob")["spec"])
    spec["concurrencyPolicy"] = "Forbid"
    spec["jobTemplate"]["runtimeEnvYAML"] = {}
    spec["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert len(violations(spec, KINDS["RayCronJob"], "s")) == 3


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rules_of_kuberay_are_kept(built, overlay):
    cluster = only(built[overlay], "RayCluster")["spec"]
    assert cluster["rayVersion"] == installed("ray")
    assert cluster["authOptions"]["mode"] == "token"
    assert only(built[overlay], "RayService")["spec"]["rayClusterConfig"] == cluster
    job = only(built[overlay], "RayJob")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert not job.keys() & {"clusterSelector", "deletionStrategy"}, "excluded by rayClusterSpec and by the ttl"
    assert job["shutdownAfterJobFinishes"] is True, "a ttl needs it"
    cron = only(built[overlay], "RayCronJob")["spec"]
    assert cron["jobTemplate"] == job
    assert cron["suspend"] is True, "or two nightly runs of one apply"
    assert "TZ=" not in cron["schedule"]
    assert only(built[overlay], "CronJob")["spec"]["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_valid_and_locked_down(built, overlay):
    specs = pods(built[overlay])
    assert len(specs) == 11, "heads, workers, submitters"
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert spec["serviceAccountName"] == "vecmill"
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert f"USER {spec['securityContext']['runAsUser']}:" in DOCKERFILE
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["image"] == f"registry.example.com/vecmill:{__version__}-{overlay}"
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts.keys() >= WRITABLE
        assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policy_selects_every_pod(built, overlay):
    selected = only(built[overlay], "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    templates = found(built[overlay], "template") + found(built[overlay], "submitterPodTemplate")
    assert len(templates) == len(pods(built[overlay]))
    assert all(template["metadata"]["labels"].items() >= selected.items() for template in templates)
    assert only(built[overlay], "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() >= selected.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_belongs_to_a_part(built, overlay):
    parts = {document["metadata"]["labels"]["vecmill/part"] for document in built[overlay]}
    assert parts == {"common", "once", "nightly", "nightly-ray", "service"}


def test_only_workers_of_the_gpu_overlay_ask_for_gpus(built):
    assert found(built["cpu"], "nvidia.com/gpu") == []
    workers = [group for groups in found(built["gpu"], "workerGroupSpecs") for group in groups]
    assert len(workers) == 4
    assert len(found(built["gpu"], "nvidia.com/gpu")) == 2 * len(workers), "request and limit"
    assert all(found(group, "tolerations") for group in workers)


def test_secrets_are_names_only_and_never_applied(built):
    secrets = list(yaml.safe_load_all((MANIFESTS / "base" / "secrets.yaml").read_text()))
    names = {secret["metadata"]["name"]: secret["stringData"] for secret in secrets}
    assert {value for values in names.values() for value in values.values()} == {""}
    for documents in built.values():
        assert "Secret" not in {document["kind"] for document in documents}
        used = {reference["name"] for reference in found(documents, "secretRef")}
        used |= set(found(documents, "secretName"))
        for reference in found(documents, "secretKeyRef"):
            assert reference["key"] in names[reference["name"]]
        assert used == names.keys()


def test_config_of_the_manifests_is_valid(built):
    file = MANIFESTS / "base" / "vecmill.yaml"
    load_config(file)
    for documents in built.values():
        assert only(documents, "ConfigMap")["data"] == {file.name: file.read_text()}
        assert set(found(documents, "configMap")[0].values()) == {only(documents, "ConfigMap")["metadata"]["name"]}


def named_commands(built):
    """Command lines of vecmill in manifests and compose file, as argument lists without the program's name."""
    for documents in built.values():
        yield from (shlex.split(line)[1:] for line in found(documents, "entrypoint"))
        yield from (container["args"] for spec in pods(documents) for container in spec["containers"] if "args" in container)
    for service in COMPOSE["services"].values():
        words = shlex.split(service["command"])
        if words[0] == "vecmill" or (service["image"].startswith("vecmill:") and "entrypoint" not in service):
            yield words[words[0] == "vecmill" :]


def test_commands_of_manifests_exist(built):
    lines = list(named_commands(built))
    assert {line[0] for line in lines} == {"reindex", "submit", "demo", "serve"}
    for name, *words in lines:
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, name


def test_import_path_of_the_service_exists(built):
    (application,) = yaml.safe_load(only(built["cpu"], "RayService")["spec"]["serveConfigV2"])["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert application["args"]["config"] == "/etc/vecmill/vecmill.yaml"
    assert f"def {attribute}(" in Path(importlib.util.find_spec(module).origin).read_text()


def test_the_cache_of_artifacts_fits_its_volume(built):
    config = yaml.safe_load((HOME / "jobs" / "kubernetes" / "base" / "vecmill.yaml").read_text())
    cluster = (HOME / "jobs" / "kubernetes" / "base" / "ray-cluster.yaml").read_text()
    volumes = [int(size) << 30 for size in re.findall(r"sizeLimit: (\d+)Gi", cluster)]
    assert Config.model_validate(config).search.cache_size < min(volumes)


def test_exit_codes_are_those_of_the_readme(built):
    sentence = re.search(r"Exit codes: (.*?)\.\n", (HOME / "README.md").read_text(), re.S).group(1)
    codes = {int(code): words for code, words in re.findall(r"(\d) ([^,]+)", sentence)}
    assert codes[1] == "failure", "the one that a second attempt may make good"
    rules = only(built["cpu"], "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == sorted(codes.keys() - {0, 1})


def test_compose_pins_images_and_publishes_to_this_machine_only():
    services = COMPOSE["services"]
    assert services.keys() == {"seaweedfs", "head", "worker", "reindex", "service"}
    for name, service in services.items():
        assert re.fullmatch(rf"vecmill:{re.escape(__version__)}-cpu|.+:[\d.]+@sha256:[0-9a-f]{{64}}", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service.keys() & {"network_mode", "privileged", "cap_add", "env_file"}
        for variable, value in service["environment"].items():
            if re.search("TOKEN$|KEY", variable):
                assert value == f"${{{variable}:?run make docker/.env}}", "no secret and no default"
    assert services["worker"]["deploy"]["replicas"] == 2


def test_compose_runs_ray_with_tokens_on_a_read_only_root():
    for name in ("head", "worker", "reindex", "service"):
        service = COMPOSE["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert {mount.partition(":")[0] for mount in service["tmpfs"]} == WRITABLE


def test_dockerfile_passes_the_linter():
    done = subprocess.run([BIN / "hadolint", HOME / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile_is_of_this_project():
    assert re.search(r"^ARG BASE=\S+:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.M)
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE
    extras = re.search(r'"\$VARIANT" ([a-z0-9 ]+) > requirements', DOCKERFILE).group(1).split()
    assert {"cpu", "gpu", *extras} <= PROJECT["optional-dependencies"].keys()
    assert 'ENTRYPOINT ["vecmill"]' in DOCKERFILE
    assert "vecmill" in PROJECT["scripts"]
    environment = dict(re.findall(r"(\w+)=(\S+)", DOCKERFILE[DOCKERFILE.index("ENV PATH=") :]))
    assert {environment["HOME"], environment["XDG_CACHE_HOME"], environment["RAY_TMPDIR"]} == WRITABLE


def test_secrets_of_compose_stay_out_of_git_and_of_the_image():
    assert "docker/.env" in (HOME / ".gitignore").read_text().splitlines()
    allowed = (HOME / ".dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert not any(line.startswith("!docker") and line != "!docker/constraints*.txt" for line in allowed)
