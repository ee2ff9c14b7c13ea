# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
# What scripts/quickstart and scripts/test share; sourced by them.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

build_packages=(build-essential cmake ninja-build pkg-config ocl-icd-opencl-dev opencl-headers pocl-opencl-icd
    libclblast-dev libcriterion-dev libjansson-dev libxxhash-dev)

say() {
    printf '\n==> %s\n' "$*"
}

# Installs those of the given Debian packages that are missing.
install_packages() {
    local package missing=() as_root=()
    for package in "$@"; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]; then
            missing+=("$package")
        fi
    done
    if [ ${#missing[@]} -eq 0 ]; then
        return
    fi
    say "Installing ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        as_root=(sudo)
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# Configures and builds a preset of CMakePresets.json.
build_preset() {
    say "Building build/$1"
    cmake --preset "$1" --log-level=WARNING
    cmake --build --preset "$1" -j "$(nproc)"
}
