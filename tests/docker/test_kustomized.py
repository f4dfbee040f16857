"""The Kubernetes manifests agree with their schema and with each other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCKER / "kustomized.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_manifests_are_right() -> None:
    done = checked(DOCKER / "kubernetes")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("deployment.yaml", "periodSeconds: 2", "periodSecond: 2", "periodSecond"),
        ("deployment.yaml", "claimName: polyhead-models", "claimName: else", "names Persistent"),
        ("deployment.yaml", "secretName: polyhead-keys", "secretName: else", "names Secret else"),
        ("deployment.yaml", "{name: state, mountPath", "{name: gone, mountPath", "mounts gone"),
        ("deployment.yaml", "{path: /health/ready, port: http}", "{path: /, port: web}", "a port"),
        ("deployment.yaml", 'SECONDS, value: "30"', 'SECONDS, value: "60"', "is killed before"),
        ("service.yaml", "app: polyhead", "app: other", "which no pod has"),
        ("autoscaler.yaml", "kind: Deployment, name: polyhead", "kind: Deployment, name: p", "p,"),
        ("kustomization.yaml", "  - service.yaml\n", "", "service.yaml"),
        ("kustomization.yaml", "namespace: polyhead", "namePrefix: x\nnamespace: y", "namePrefix"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(DOCKER / "kubernetes", folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    done = checked(folder)
    assert done.returncode == 1
    assert said in done.stderr, done.stderr
