#!/usr/bin/env bash
# Install Debian's Slurm if it is missing, for `make test-slurm`.
set -euo pipefail
packages="slurm-wlm munge iproute2 util-linux"
missing=
for program in slurmctld slurmd sbatch munged ip unshare nsenter setpriv; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make test-slurm needs$missing: install $packages, or run it as root on a system with apt-get" >&2
    exit 1
fi
# Keep services from starting: the tests start what they need.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
