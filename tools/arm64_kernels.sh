#!/usr/bin/env bash
# Builds src/kernels and its tests for 64-bit ARM with Debian's cross compiler and runs them under qemu-user: once as a
# CPU with half arithmetic (all tests), once as one without (which table is chosen). Needs Debian 12 on another CPU;
# what it checks is numbers, not speed. JOBS=N: processes at a time (all cores).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/cache_dir.sh"
jobs=${JOBS:-$(nproc)}

"$root/tools/install_packages.sh" packages_arm64.txt
command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null ||
  die "aarch64-linux-gnu-g++ or qemu-aarch64 is missing; install what tools/packages_arm64.txt lists."

# Libraries for ARM, unpacked instead of installed: apt is asked as if this were an ARM machine, with lists of its own, so
# that nothing of this system changes (no `dpkg --add-architecture`). apt checks their signatures as always.
packages=$narrows_cache/arm64-packages
if [[ ! -e $packages/usr/include/hwy ]]; then
  mkdir -p "$narrows_cache"
  work=$(mktemp -d "$narrows_cache/arm64.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work"/{apt/lists/partial,archives/partial,debs,tree}
  : >"$work/apt/status"
  apt_options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Acquire::Languages=none
    -o Acquire::Retries=3 -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work"
    -o APT::Sandbox::User=) # apt's own user may not write into the cache folder
  echo "arm64_kernels: fetching Debian's libhwy-dev, libhwy1 and libgtest-dev for arm64" >&2
  apt-get "${apt_options[@]}" update >&2 &&
    (cd "$work/debs" && apt-get "${apt_options[@]}" download libhwy-dev libhwy1 libgtest-dev >&2) ||
    die "Debian's packages for arm64 did not arrive (apt-get says above why); nothing was kept."
  for deb in "$work"/debs/*.deb; do dpkg-deb --extract "$deb" "$work/tree"; done
  # Another run may have finished first; its tree is the same.
  mv --no-target-directory "$work/tree" "$packages" 2>/dev/null || [[ -e $packages/usr/include/hwy ]] ||
    die "could not move the packages to $packages; remove that folder and try again."
fi

build=$root/build/arm64
cmake -G Ninja -S "$root" -B "$build" --toolchain "$root/cmake/aarch64.cmake" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CXX_FLAGS_RELEASE="-O3 -DNDEBUG" -DNARROWS_KERNELS_ONLY=ON -DNARROWS_ARM64_PACKAGES="$packages"
cmake --build "$build" -j "$jobs"

# The first is every extension that qemu knows; a Cortex-A72 (2016, Raspberry Pi 4) has no half arithmetic.
QEMU_CPU=max ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error
QEMU_CPU=cortex-a72 ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error -R 'Dispatch|forced_'
