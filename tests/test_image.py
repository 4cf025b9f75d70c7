"""The CPU image, built and run for real: `make image-test`, as root; minutes, ten gigabytes of disk. Not in `make test`.

No registry and no Docker are needed: buildah builds in chroot isolation, on a Debian that mmdebstrap made in place of the
base image. pip inside the build is configured as pip is here, by a build secret. Then `vecmill demo` runs inside the image as
its own user, with the environment the image states, on a root file system mounted read-only.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

HOME = Path(__file__).parent.parent
TOOLS = ("buildah", "mmdebstrap", "unshare")
SIZE_LIMIT = 3 << 30
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif("VECMILL_IMAGE_TEST" not in os.environ, reason="takes minutes: make image-test"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="buildah's chroot isolation and mounts need root here"),
    pytest.mark.timeout(3600),
]
IN_A_READ_ONLY_ROOT = """
set -eu
root=$1; shift
touch "$root/etc/hosts" "$root/etc/resolv.conf"
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind /etc/hosts "$root/etc/hosts"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o uid=10001,gid=10001,mode=0700 tmpfs "$root/var/cache/vecmill"
exec chroot --userspec=10001:10001 "$root" env -i "$@"
"""


def sh(*command, **options):
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def pip_configuration(folder):
    """pip's settings of this machine as one file, and the local files and folders that they name."""
    lines = sh(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    settings = {name.rpartition(".")[2]: ast.literal_eval(value) for name, value in settings.items()}
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()), encoding="utf-8")
    words = [word for value in settings.values() for word in value.split()]
    # the pages of an index name files beside it
    paths = [Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word) for word in words]
    return file, sorted({path for path in paths if path.is_absolute() and path.exists() and path != Path("/")})


@pytest.fixture(scope="module")
def image():
    folder = Path(tempfile.mkdtemp(prefix="vecmill-image", dir="/var/tmp"))
    buildah = ("buildah", "--storage-driver", "vfs", "--root", folder / "store", "--runroot", folder / "run")
    try:
        sh("mmdebstrap", "--variant=minbase", "--include=python3-venv,python3-pip,python-is-python3,ca-certificates",
           "bookworm", folder / "base.tar")  # fmt: skip
        empty = sh(*buildah, "from", "scratch")
        sh(*buildah, "add", empty, folder / "base.tar", "/")
        sh(*buildah, "commit", "--rm", empty, "localhost/base:bookworm")
        (folder / "base.tar").unlink()
        pip, paths = pip_configuration(folder)
        mounts = [word for path in paths for word in ("--volume", f"{path}:{path}:ro")]
        sh(*buildah, "bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--secret", f"id=pip,src={pip}",
           *mounts, "--build-arg", "BASE=localhost/base:bookworm", "--build-arg", "TORCH_INDEX=",
           "--file", HOME / "docker" / "Dockerfile", "--tag", "localhost/vecmill:cpu", HOME)  # fmt: skip
        config = json.loads(sh(*buildah, "inspect", "--type", "image", "localhost/vecmill:cpu"))["Docker"]["config"]
        container = sh(*buildah, "from", "--pull-never", "localhost/vecmill:cpu")
        yield SimpleNamespace(config=config, root=Path(sh(*buildah, "mount", container)))
    finally:
        subprocess.run([*buildah, "umount", "--all"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def inside(image, *command):
    """What a command of the image prints, run as its user on its read-only root."""
    return sh("unshare", "--mount", "--pid", "--fork", "sh", "-c", IN_A_READ_ONLY_ROOT, "sh",
              image.root, *image.config["Env"], *command)  # fmt: skip


def test_image_states_user_entrypoint_and_health(image):
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["vecmill"]
    assert "/healthz" in image.config["Healthcheck"]["Test"][-1]
    assert image.config["Labels"]["org.opencontainers.image.title"] == "vecmill"


def test_image_is_small_and_holds_no_trace_of_the_build(image):
    size = sum(path.lstat().st_size for path in image.root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"image: {size / 1e9:.2f} GB")
    assert size < SIZE_LIMIT
    assert not (image.root / "etc" / "pip.conf").exists()
    assert not (image.root / "build").exists()
    assert not list((image.root / "opt" / "venv").glob("lib/python3*/site-packages/nvidia*"))


def test_root_is_read_only_and_user_is_not_root(image):
    assert inside(image, "id", "-u") == "10001"
    assert inside(image, "sh", "-c", "touch /x /opt/venv/x /data/x 2>/dev/null || echo refused") == "refused"


def test_torch_is_the_pinned_cpu_build(image):
    code = "import torch; print(torch.__version__.partition('+')[0], torch.version.cuda)"
    version, cuda = inside(image, "/opt/venv/bin/python", "-c", code).split()
    assert f"torch=={version}" in (HOME / "docker" / "constraints.txt").read_text().splitlines()
    assert cuda == "None"


def test_demo_runs_in_the_image(image):
    answer = inside(image, *image.config["Entrypoint"], "demo", "--folder", "/tmp/demo")
    assert "datetime.datetime.strptime" in answer
    assert answer.count("rank") == 5
