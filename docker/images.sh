#!/usr/bin/env bash
# Builds the image and runs it, without a Docker engine: Debian's mmdebstrap, buildah, podman, runc.
# What pip is configured with here, its local folders included, holds in the build, read-only.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${VARIANT:-cpu}
image=localhost/polyhead:$variant
base=localhost/polyhead-base:bookworm
store=(--storage-driver vfs)
work=$(mktemp -d)
container=
cleanup() {
  [ -z "$container" ] || podman "${store[@]}" rm -f "$container" >/dev/null
  rm -rf "$work"
}
trap cleanup EXIT

if ! podman "${store[@]}" image exists "$base"; then
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$work/base.tar"
  podman "${store[@]}" import "$work/base.tar" "$base"
fi

# `global.cert='FILE'` and `:env:.find-links='FOLDER'` become lines of one file.
{
  echo '[global]'
  .venv/bin/python -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" | sort -u -t= -k1,1
} >"$work/pip.conf"
mounts=()
for path in $(grep -oE '(file://)?/[^ ]+' "$work/pip.conf" | sed -E 's#^file://##; s#/simple$##' | sort -u); do
  [ ! -e "$path" ] || mounts+=(--volume "$path:$path:ro")
done

buildah "${store[@]}" bud --isolation chroot --build-arg "BASE=$base" --build-arg "VARIANT=$variant" \
  --secret "id=pip,src=$work/pip.conf" "${mounts[@]}" --format docker \
  --file docker/Dockerfile --tag "$image" .
podman "${store[@]}" image inspect "$image" --format '{{.Size}}' |
  awk '{printf "the image has %.0f MB\n", $1 / 1e6}'

# Without root's rights, on a read-only root, it serves and ends in good order.
port=${PORT:-18900}
mkdir -m 777 "$work/data"
container=$(podman "${store[@]}" --runtime runc --cgroup-manager cgroupfs run --detach --network host \
  --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --read-only --tmpfs /tmp \
  --volume "$PWD/data/SmolLM2-135M-Instruct:/models/backbone:ro" \
  --volume "$PWD/data/inventory:/models/inventory:ro" --volume "$work/data:/data" \
  --env POLYHEAD_BACKBONE=/models/backbone --env POLYHEAD_INVENTORY=/models/inventory \
  --env POLYHEAD_HOST=127.0.0.1 --env "POLYHEAD_PORT=$port" "$image")
for _ in $(seq 120); do
  ! curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health/ready" || break
  sleep 1
done
curl --silent --fail "http://127.0.0.1:$port/generate" --header 'content-type: application/json' \
  --data '{"task": "past_tense", "input": "walk"}'
echo
podman "${store[@]}" stop --time 40 "$container" >/dev/null
status=$(podman "${store[@]}" inspect "$container" --format '{{.State.ExitCode}}')
echo "SIGTERM ended it with $status"
[ "$status" = 0 ]
