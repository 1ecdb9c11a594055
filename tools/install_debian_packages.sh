#!/usr/bin/env bash
# Installs what the tests need beside Python: a browser and fonts for the pages, Fashion-MNIST for the picture recipe,
# PostgreSQL for the ledger, a clock that can be moved (faketime) for rollouts, an SSH server and git-lfs for the data
# versions. Nothing of it is needed to use the workbench.
set -euo pipefail
packages=(chromium fonts-dejavu-core dataset-fashion-mnist postgresql faketime openssh-server git-lfs)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then echo "Debian packages: all there"; exit 0; fi
echo "Debian packages to install: ${missing[*]}"
run=()
[ "$(id -u)" -eq 0 ] || run=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${run[@]}" apt-get update -qq
"${run[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "Debian packages: installed"
