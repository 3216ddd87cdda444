#!/usr/bin/env bash
# Debian's packages: .ci/debian.sh NAME... installs those that are missing, where this is Debian and root runs it.
set -euo pipefail
dpkg -s "$@" > /dev/null 2>&1 && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" > /dev/null
else
    echo "not installed, and this is not root on Debian: $*" >&2
fi
