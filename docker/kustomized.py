"""What `kubectl apply -k docker/kubernetes` would send, checked without a cluster.

    python docker/kustomized.py [FOLDER]

Builds as much of Kustomize as the folder uses, and refuses the rest by name. Each object is
validated against Kubernetes' schema, and what objects say of each other against each other.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "secretGenerator"}
Object = dict[str, Any]


def built(folder: Path) -> list[Object]:
    """Every object, as it would be sent. Raises `ValueError` for what is not built here."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - KNOWN
    if unknown:
        raise ValueError(f"kustomization.yaml: {', '.join(sorted(unknown))}: not built here")
    listed = set(kustomization["resources"])
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    if listed != there:
        raise ValueError(f"kustomization.yaml: resources: only one of list and folder has "
                         f"{', '.join(sorted(listed ^ there))}")  # fmt: skip
    found = [o for name in kustomization["resources"] for o in _objects(folder / name)]
    found += [_secret(secret) for secret in kustomization.get("secretGenerator", [])]
    for one in found:
        if one["kind"] != "Namespace":
            one["metadata"]["namespace"] = kustomization["namespace"]
        for label in kustomization.get("labels", []):
            one["metadata"].setdefault("labels", {}).update(label["pairs"])
    return found


def _objects(path: Path) -> list[Object]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def _secret(generator: Object) -> Object:
    """With empty values: the files with the true ones are nobody's here."""
    values = {name.partition("=")[0]: "" for name in generator.get("files", [])}
    metadata = {"name": generator["name"]}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": values}


def wrong(objects: list[Object]) -> Iterator[str]:
    """What the schema or another object contradicts."""
    for one in objects:
        try:
            kubernetes_validate.validate(one, "1.37", strict=True)
        except kubernetes_validate.ValidationError as exc:
            yield f"{_title(one)}: {'.'.join(map(str, exc.path))}: {exc.message}"
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    pods = {}
    for one in objects:
        if one["kind"] == "Deployment":
            pods[one["metadata"]["name"]] = one["spec"]["template"]["metadata"]["labels"]
            yield from _contradictions(one)
        for wanted in _references(one):
            if wanted not in names:
                yield f"{_title(one)}: names {wanted[0]} {wanted[1]}, which nothing makes"
    for one in objects:
        selector = _selector(one)
        if selector and not any(selector.items() <= labels.items() for labels in pods.values()):
            yield f"{_title(one)}: selects {selector}, which no pod has"


def _title(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"


def _selector(one: Object) -> dict[str, str] | None:
    found: dict[str, str] | None = one.get("spec", {}).get("selector")
    return (found or {}).get("matchLabels", found) if one["kind"] != "Deployment" else None  # type: ignore[return-value]


def _contradictions(deployment: Object) -> Iterator[str]:
    """Within one deployment: the selector, mounts, ports of probes, and time to drain."""
    spec, template = deployment["spec"], deployment["spec"]["template"]
    if not spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items():
        yield f"{_title(deployment)}: its selector does not match its own pods"
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
    for container in template["spec"]["containers"]:
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        for name in sorted(mounted - volumes):
            yield f"{_title(deployment)}: mounts {name}, which is no volume"
        ports = {port["name"] for port in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if container[kind]["httpGet"]["port"] not in ports:
                yield f"{_title(deployment)}: {kind} asks a port that is not there"
        told = {variable["name"]: variable["value"] for variable in container["env"]}
        ends = sum(float(told.get(f"POLYHEAD_DRAIN_{n}", 0)) for n in ("DELAY_SECONDS", "SECONDS"))
        if ends >= template["spec"]["terminationGracePeriodSeconds"]:
            yield f"{_title(deployment)}: it may drain for {ends:g} s and is killed before"


def _references(one: Object) -> Iterator[tuple[str, str]]:
    """Kind and name of every object that this one names."""
    spec = one.get("spec", {})
    if target := spec.get("scaleTargetRef"):
        yield target["kind"], target["name"]
    pod = spec.get("template", {}).get("spec", {})
    for container in pod.get("containers", []):
        for source in container.get("envFrom", []):
            yield "Secret", source["secretRef"]["name"]
    for volume in pod.get("volumes", []):
        if claim := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", claim["claimName"]
        if secret := volume.get("secret"):
            yield "Secret", secret["secretName"]


def main() -> int:
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "kubernetes"
    try:
        found = list(wrong(built(folder)))
    except ValueError as exc:
        found = [str(exc)]
    for line in found:
        print(f"{folder}: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
